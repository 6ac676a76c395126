"""The backbone against transformers and timm, and against itself: packing, masks, stochastic depth, initialisation."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models import eva
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from pretrain.models.architectures import ARCHITECTURES, architecture, build
from pretrain.models.layers.attention import BACKENDS
from pretrain.models.layers.block import draw_kept, num_kept
from pretrain.models.vision_transformer import Features, VisionTransformer
from tests.pretrain.randomised import randomise

SIZES_14 = [(112, 112), (70, 126), (42, 42)]  # 112 is the size of the position table here
SIZES_16 = [(112, 112), (64, 128), (32, 48)]
TOLERANCE = 1e-5  # float32, a few blocks, activations of order one


def pixels(size: tuple[int, int], images: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(seed))


def joined(features: Features) -> Tensor:
    """All tokens [B, 1 + R + N, D], as other libraries return them."""
    return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)


def small(name: str, **changes: Any) -> VisionTransformer:
    """A published architecture, three blocks deep, every parameter random."""
    changes = {"depth": 3, **changes}
    if ARCHITECTURES[name]["position"] == "learned":
        changes = {"position_grid": 8, **changes}
    model = build(name, **changes)
    randomise(model)
    return model.eval()


def to_transformers(model: VisionTransformer, reference: nn.Module) -> nn.Module:
    """Fill a transformers model from ours, by name; every one of its parameters must be found."""
    ours = dict(model.named_parameters())
    for i, block in enumerate(model.blocks):
        if hasattr(block.mlp, "w12"):
            for part in ("weight", "bias"):
                gate, value = getattr(block.mlp.w12, part).chunk(2)
                ours |= {f"blocks.{i}.mlp.w1.{part}": gate, f"blocks.{i}.mlp.w2.{part}": value}
    width = model.embed_dim
    plain = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.patch_embeddings": "patch_embed.proj",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.register_tokens": model.registers_name,
        "embeddings.": "",
        "layernorm": "norm",
    }
    inside = {
        "attention.output.dense": "attn.proj",
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "mlp.gate_proj": "mlp.w1",
        "mlp.up_proj": "mlp.w2" if "blocks.0.mlp.w2.weight" in ours else "mlp.fc1",
        "mlp.down_proj": "mlp.w3" if "blocks.0.mlp.w3.weight" in ours else "mlp.fc2",
    }
    for name, parameter in reference.named_parameters():
        block = re.match(r"(?:model\.|encoder\.)?layers?\.(\d+)\.(.*)", name)
        if block is None:
            own = name
            for theirs, here in plain.items():
                own = own.replace(theirs, here, 1) if own.startswith(theirs) else own
            value = ours[own]
        else:
            tail = block[2]
            third = re.search(r"(query|key|value|[qkv]_proj)\.(weight|bias)$", tail)
            if third:
                at = "qkv".index({"query": "q", "key": "k", "value": "v"}.get(third[1], third[1][0]))
                value = ours[f"blocks.{block[1]}.attn.qkv.{third[2]}"][at * width : (at + 1) * width]
            else:
                for theirs, here in inside.items():
                    tail = tail.replace(theirs, here, 1)
                value = ours[f"blocks.{block[1]}.{tail}"]
        with torch.no_grad():
            parameter.copy_(value.view_as(parameter))
    return reference.eval()


def hf_dinov2(model: VisionTransformer, swiglu: bool) -> nn.Module:
    kind, config = (
        (Dinov2WithRegistersModel, Dinov2WithRegistersConfig) if model.num_registers else (Dinov2Model, Dinov2Config)
    )
    extra = {"num_register_tokens": model.num_registers} if model.num_registers else {}
    return to_transformers(
        model,
        kind(
            config(
                hidden_size=model.embed_dim,
                num_hidden_layers=len(model.blocks),
                num_attention_heads=model.blocks[0].attn.num_heads,
                image_size=112,
                patch_size=14,
                use_swiglu_ffn=swiglu,
                **extra,
            )
        ),
    )


def hf_dinov3(model: VisionTransformer) -> nn.Module:
    gated = hasattr(model.blocks[0].mlp, "w1")
    linear = model.blocks[0].mlp.w1 if gated else model.blocks[0].mlp.fc1
    config = DINOv3ViTConfig(
        hidden_size=model.embed_dim,
        intermediate_size=linear.out_features,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.blocks[0].attn.num_heads,
        num_register_tokens=4,
        patch_size=16,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        query_bias=model.blocks[0].attn.qkv.bias is not None,
        value_bias=model.blocks[0].attn.qkv.bias is not None,
    )
    return to_transformers(model, DINOv3ViTModel(config))


V7B = {"embed_dim": 256, "num_heads": 2}  # the options of the 7B model at a width that a test can afford
CASES: list[tuple[str, dict[str, Any], Callable[[VisionTransformer], nn.Module]]] = [
    ("dinov2_vits14", {}, lambda m: hf_dinov2(m, False)),
    ("dinov2_vitg14", {"embed_dim": 192, "num_heads": 3}, lambda m: hf_dinov2(m, True)),
    ("dinov2_vits14_reg", {}, lambda m: hf_dinov2(m, False)),
    ("dinov3_vits16", {}, hf_dinov3),
    ("dinov3_vits16plus", {}, hf_dinov3),
    ("dinov3_vit7b16", V7B, hf_dinov3),
]


@pytest.mark.parametrize(("name", "changes", "reference"), CASES, ids=[case[0] for case in CASES])
def test_features_equal_transformers(name: str, changes: dict[str, Any], reference: Any) -> None:
    model = small(name, **changes)
    theirs = reference(model)
    for size in SIZES_14 if "14" in name else SIZES_16:
        image = pixels(size)
        with torch.no_grad():
            ours, expected = joined(model([image])[0]), theirs(pixel_values=image).last_hidden_state
        assert 0.5 < expected.std() < 2
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("at", [0, 2, 3])
def test_masked_features_equal_transformers(at: int) -> None:
    name, changes, reference = CASES[at]
    model = small(name, **changes)
    image = pixels((112, 112))
    grid = 112 // model.patch_size
    mask = torch.rand(2, grid * grid, generator=torch.Generator().manual_seed(3)) < 0.4
    with torch.no_grad():
        expected = reference(model)(pixel_values=image, bool_masked_pos=mask).last_hidden_state
        ours, without = joined(model([image], [mask])[0]), joined(model([image])[0])
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert (ours - without).abs().max() > 0.1


def test_gradients_equal_transformers() -> None:
    """In float64, so that what differs is the function, not its rounding."""
    for at in (0, 3):
        name, changes, reference = CASES[at]
        model = small(name, **changes).double()
        theirs = reference(model).double()
        ours_in, their_in = (pixels((64 if "16" in name else 70, 112)).double().requires_grad_() for _ in range(2))
        joined(model([ours_in])[0]).square().mean().backward()
        theirs(pixel_values=their_in).last_hidden_state.square().mean().backward()
        # transformers makes its RoPE tables in float32 as we do, its position resize in float32 too.
        torch.testing.assert_close(ours_in.grad, their_in.grad, atol=1e-8, rtol=1e-4)


TIMM = [
    ("dinov2_vits14", "vit_small_patch14_dinov2", {"img_size": 112}, timm_vit, {"position_antialias": True}),
    ("dinov2_vits14_reg", "vit_small_patch14_reg4_dinov2", {"img_size": 112}, timm_vit, {}),
    ("dinov3_vits16", "vit_small_patch16_dinov3_qkvb", {}, eva, {}),
    ("dinov3_vits16plus", "vit_small_plus_patch16_dinov3_qkvb", {}, eva, {}),
]


@pytest.mark.parametrize(("name", "theirs", "options", "module", "changes"), TIMM, ids=[case[0] for case in TIMM])
def test_features_equal_timm(name: str, theirs: str, options: dict[str, Any], module: Any, changes: Any) -> None:
    """Through timm's own conversion of released checkpoints, so this checks the parameter names too."""
    model = small(name, **changes)
    other = timm.create_model(theirs, depth=3, dynamic_img_size=True, num_classes=0, **options).eval()
    other.load_state_dict(module.checkpoint_filter_fn(model.state_dict(), other))
    for size in SIZES_14 if "14" in name else SIZES_16:
        image = pixels(size)
        with torch.no_grad():
            ours, expected = joined(model([image])[0]), other.forward_features(image)
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["dinov2_tiny", "dinov3_tiny"])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "xformers"])
def test_mixed_groups_equal_separate_forwards_and_backends_agree(name: str, backend: str) -> None:
    """Features and gradients of one packed pass, against a pass for each group with the default backend."""
    model, alone = small(name, attention=backend), small(name)
    model.load_state_dict(alone.state_dict())
    crops = [pixels((64, 64), 4), pixels((24, 40), 6), pixels((32, 32), 1)]
    masks = [torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) < 0.3, None, None]
    together = [joined(f) for f in model(crops, masks)]
    separate = [joined(alone([crop], [mask])[0]) for crop, mask in zip(crops, masks, strict=True)]
    for ours, expected in zip(together, separate, strict=True):
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)
    sum(tokens.pow(3).mean() for tokens in together).backward()
    sum(tokens.pow(3).mean() for tokens in separate).backward()
    for (parameter_name, ours), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None, parameter_name
        torch.testing.assert_close(ours.grad, expected.grad, atol=TOLERANCE, rtol=1e-4, msg=parameter_name)


@pytest.mark.parametrize("name", ["dinov2_tiny", "dinov3_tiny"])
def test_layers_end_in_the_forward_and_are_quiet_in_training(name: str) -> None:
    model = small(name, drop_path=0.5, rope_rescale=2.0)
    image = pixels((32, 48))
    expected = model([image])[0]
    model.train()
    middle, last = model.layers(image, [1, -1])
    torch.testing.assert_close(joined(last), joined(expected), atol=0, rtol=0)
    assert last.grid == (4, 6)
    raw = model.layers(image, [1], norm=False)[0]
    torch.testing.assert_close(joined(middle), model.norm(joined(raw)))
    with pytest.raises(ValueError, match=r"\[7\].*3 blocks"):
        model.layers(image, [0, 7])


def test_training_is_a_function_of_the_generator() -> None:
    model = small("dinov3_tiny", drop_path=0.4, rope_rescale=2.0, rope_jitter=1.2, rope_shift=0.1).train()
    crops = [pixels((64, 64), 5), pixels((32, 32), 7)]
    first, again, other = (
        [joined(f) for f in model(crops, generator=torch.Generator().manual_seed(seed))] for seed in (0, 0, 1)
    )
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.allclose(a, c, atol=1e-2)
    with pytest.raises(ValueError, match="generator"):
        model(crops)
    model.eval()
    assert torch.equal(model(crops)[0].cls, model(crops)[0].cls)


def test_stochastic_depth_keeps_the_expectation() -> None:
    """Over all single-image choices of one block, the mean output is that of the whole block."""
    model = small("dinov2_tiny", depth=1, drop_path=0.5).double()
    block = model.blocks[0]
    tokens, grids = model.embed([pixels((16, 16), 4).double()], None)
    layout = _layout(model, tokens, 4)
    full = block.attention_branch(tokens, layout, [None])
    model.train()
    total, hits = torch.zeros_like(tokens), torch.zeros(4)
    for seed in range(400):
        ((kept, _),) = model.draw_depth(layout, tokens.device, torch.Generator().manual_seed(seed))
        branch = block.attention_branch(tokens[kept.rows], kept.layout, [None])
        total = total.index_add(0, kept.rows, branch * kept.scale)
        hits[kept.rows[:: layout.groups[0][1]] // layout.groups[0][1]] += 1
    # Each image is kept in half of the draws and then counts double: its mean is full * hits / 200.
    expected = full.unflatten(0, (4, -1)) * (hits / 200)[:, None, None]
    torch.testing.assert_close(total.unflatten(0, (4, -1)) / 400, expected)
    assert (hits - 200).abs().max() < 5 * 10  # five standard deviations of a binomial
    assert grids == [(2, 2)]


def _layout(model: VisionTransformer, tokens: Tensor, images: int) -> Any:
    from pretrain.models.layers.attention import make_layout

    return make_layout([(images, len(tokens) // images)], model.attention, tokens.device)


def test_stochastic_depth_equals_a_loop_over_images() -> None:
    """Two groups through one block: images not drawn pass by, the others get their branch times b / s."""
    model = small("dinov3_tiny", depth=1, drop_path=0.3, rope_rescale=None).train()
    crops = [pixels((32, 32), 4), pixels((16, 24), 7)]
    result = model(crops, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    block = model.blocks[0]
    for crop, features in zip(crops, result, strict=True):
        images = len(crop)
        first, second = draw_kept(images, 0.3, 2, generator)
        assert len(first) == num_kept(images, 0.3) == int(images * 0.7)
        for i in range(images):
            x, grids = model.embed([crop[i : i + 1]], None)
            layout = _layout(model, x, 1)
            tables = model.rope_tables(grids, x.device, None)[0]
            x = x + (i in first) * images / len(first) * block.attention_branch(x, layout, tables)
            x = x + (i in second) * images / len(second) * block.ffn_branch(x)
            torch.testing.assert_close(joined(features)[i], model.norm(x), atol=TOLERANCE, rtol=TOLERANCE)


def test_local_norm_acts_on_the_prefix_of_local_crops_in_training_only() -> None:
    model = small("dinov3_tiny", untied_local_norm=True)
    crops = [pixels((32, 32)), pixels((16, 16), 3)]
    quiet = model(crops, local=[False, True])
    model.train()
    loud = model(crops, local=[False, True])
    raw = model.layers(crops[1], [-1], norm=False)[0]
    assert torch.equal(joined(loud[0]), joined(quiet[0]))
    assert torch.equal(loud[1].patches, quiet[1].patches)
    torch.testing.assert_close(quiet[1].cls, model.norm(raw.cls), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(loud[1].cls, model.local_cls_norm(raw.cls), atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(loud[1].registers, model.local_cls_norm(raw.registers), atol=TOLERANCE, rtol=TOLERANCE)


def test_every_parameter_has_a_gradient_without_masks() -> None:
    """DDP waits for all of them, the mask token too."""
    model = small("dinov3_tiny", untied_local_norm=True).train()
    features = model([pixels((32, 32)), pixels((16, 16))], local=[False, True])
    sum(joined(f).pow(2).sum() for f in features).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own look at a block's input
@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
def test_blocks_compile_whole_and_checkpoint(backend: str) -> None:
    """With noise and stochastic depth: one graph without breaks, and recomputation, give the same gradients."""
    crops = [pixels((32, 32), 4), pixels((16, 16), 6)]
    gradients = []
    for way in ("eager", "compiled", "recomputed"):
        model = small("dinov3_tiny", depth=1, drop_path=0.3, rope_rescale=2.0, attention=backend).train()
        block = model.blocks[0]
        if way == "compiled":
            block.compile(backend="aot_eager", fullgraph=True)
        if way == "recomputed":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        features = model(crops, generator=torch.Generator().manual_seed(0))
        sum(joined(f).pow(3).mean() for f in features).backward()
        gradients.append(block.attn.qkv.weight.grad)
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=TOLERANCE, rtol=1e-4)


MILLIONS = {
    "dinov2_vits14": 22.06,
    "dinov2_vitb14": 86.58,
    "dinov2_vitl14": 304.37,
    "dinov2_vitg14": 1136.48,
    "dinov3_vits16": 21.6,
    "dinov3_vits16plus": 28.7,
    "dinov3_vitb16": 85.7,
    "dinov3_vitl16": 303.2,
    "dinov3_vith16plus": 840.6,
    "dinov3_vit7b16": 6716.0,
}


@pytest.mark.parametrize("name", sorted(MILLIONS))
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    """DINOv3's table of models, arXiv:2508.10104; for DINOv2 the size of the released files."""
    count = sum(parameter.numel() for parameter in build(name, device="meta").parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[name], abs=0.1)


@pytest.mark.parametrize("stem", ["patches", "convolutions"])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_initialisation_leaves_no_gap(name: str, stem: str) -> None:
    """Two blocks of every architecture, built without storage and filled with NaN."""
    changes: dict[str, Any] = {"embed_dim": 256, "num_heads": 4} if "7b" in name else {}
    if stem == "convolutions":
        changes |= {"stem": stem, "patch_size": 8}
    with torch.device("meta"):
        model = VisionTransformer(**architecture(name, depth=2, **changes))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(torch.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter_name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), parameter_name
    size = 2 * model.patch_size
    assert all(f.patches.isfinite().all() for f in model.eval()([pixels((size, size))]))


def test_tokens_of_convolutions_are_of_their_image_and_place() -> None:
    """Row-major, no image's depends on another, a token sees 9 px around, and what is masked nobody."""
    model = build("dinov2_tiny", stem="convolutions", patch_size=4, generator=torch.Generator().manual_seed(0)).double()
    images = pixels((16, 40)).double()
    (tokens,) = model.patch_embed([images], [None])
    assert tokens.shape[1:] == (4 * 10, 192)
    changed = images.clone()
    changed[0, :, 4:8, 16:20] += 1  # the patch in row 1, column 4
    (found,) = model.patch_embed([changed], [None])
    moved = (found - tokens).abs().amax(dim=2) > 0
    assert not moved[1:].any()
    rows, columns = moved[0].view(4, 10).nonzero().unbind(1)
    assert set(rows.tolist()) == {0, 1, 2, 3}
    assert set(columns.tolist()) == {2, 3, 4, 5, 6, 7}
    mask = torch.zeros(len(images), 40, dtype=torch.bool)
    mask[0, 1 * 10 + 4] = True
    assert torch.equal(joined(model([changed], [mask])[0]), joined(model([images], [mask])[0]))
    assert not torch.equal(joined(model([changed])[0]), joined(model([images])[0]))


@torch.no_grad()
def test_initial_distributions() -> None:
    for name, token_std in (("dinov2_vits14_reg", 1e-6), ("dinov3_vits16", 0.02)):
        model = build(name, depth=1, generator=torch.Generator().manual_seed(0))
        block = model.blocks[0]
        assert block.attn.qkv.weight.std() == pytest.approx(0.02, rel=0.02)
        assert block.mlp.fc2.bias.abs().max() == 0
        assert (block.ls1.gamma == 1e-5).all()
        assert model.cls_token.std() == pytest.approx(token_std, rel=0.15)
        assert model.get_parameter(model.registers_name).std() == pytest.approx(token_std, rel=0.1)
        assert model.mask_token.abs().max() == 0
        fan_in = 3 * model.patch_size**2
        assert model.patch_embed.proj.weight.abs().max() <= fan_in**-0.5
        assert model.patch_embed.proj.weight.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)


def test_the_residual_stream_stays_float32_under_autocast() -> None:
    model = small("dinov3_tiny")
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    image = pixels((64, 64))
    expected = joined(model([image])[0])
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        ours = joined(model([image])[0])
    assert set(seen) == {(torch.float32, torch.float32)}
    assert (ours - expected).abs().mean() < 0.02  # 8 bits of mantissa
    in_bfloat16 = joined(model.bfloat16()([image.bfloat16()])[0])
    assert in_bfloat16.dtype == torch.bfloat16


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"dinov9.*known: dinov2_vits14"):
        build("dinov9")
    with pytest.raises(ValueError, match="learned, rope"):
        build("dinov2_tiny", position="sine")
    with pytest.raises(ValueError, match="mlp, swiglu"):
        build("dinov2_tiny", ffn="conv")
    with pytest.raises(ValueError, match="dinov2, dinov3"):
        build("dinov2_tiny", family="dino")
    with pytest.raises(ValueError, match="patches, convolutions"):
        build("dinov2_tiny", stem="conv")
    with pytest.raises(ValueError, match="patch_size=14 is no power of 2"):
        build("dinov2_vits14", stem="convolutions")
    with pytest.raises(ValueError, match="num_heads=5"):
        build("dinov2_tiny", num_heads=5)
    with pytest.raises(ValueError, match="drop_path=1"):
        build("dinov2_tiny", drop_path=1.0)
    model = build("dinov2_tiny")
    with pytest.raises(ValueError, match=r"100 x 96 px .* patches of 8 px; .* 96 x 96"):
        model([pixels((100, 96))])
    with pytest.raises(ValueError, match="B, 3, H, W"):
        model([torch.zeros(1, 1, 8, 8)])
