"""Attention and its backends against a loop in float64, and gradients of the hand-written parts."""

import pytest
import torch
from torch import Tensor

from pretrain.models.layers.attention import (
    Attention,
    attend,
    make_layout,
    split_heads,
    views_of_heads,
)
from pretrain.models.layers.norm import LayerScale
from pretrain.models.layers.rope import Rope, tables
from tests.pretrain.randomised import randomise

CPU = torch.device("cpu")
GROUPS = [(2, 7), (3, 4)]  # (images, tokens): 26 rows


def rope_tables() -> list[Tensor | None]:
    return [tables(Rope(8), (2, 3), 1, CPU), tables(Rope(8), (1, 3), 1, CPU)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_image(attention: Attention, x: Tensor) -> Tensor:
    """Attention by its definition, in float64, for the rows [N, D] of one image."""
    weight, bias = attention.qkv.weight.double(), attention.qkv.bias.double()
    width = x.shape[1]
    q, k, v = ((x.double() @ weight.T + bias)[:, i * width : (i + 1) * width] for i in range(3))
    if attention.mask_key_bias:
        k = k - bias[width : 2 * width]
    d = width // attention.num_heads
    heads = []
    for h in range(attention.num_heads):
        at = slice(h * d, (h + 1) * d)
        heads.append(torch.softmax(q[:, at] @ k[:, at].T / d**0.5, dim=1) @ v[:, at])
    return torch.cat(heads, 1) @ attention.proj.weight.double().T + attention.proj.bias.double()


@pytest.mark.parametrize("backend", ["sdpa", "varlen"])
@pytest.mark.parametrize("mask_key_bias", [False, True])
def test_attention_equals_its_definition_image_by_image(backend: str, mask_key_bias: bool) -> None:
    attention = Attention(16, 2, qkv_bias=True, mask_key_bias=mask_key_bias, backend=backend)
    randomise(attention)
    x = random(26, 16)
    ours = attention(x, make_layout(GROUPS, backend, CPU), [None, None])
    images = [x[:7], x[7:14], x[14:18], x[18:22], x[22:]]
    expected = torch.cat([one_image(attention, rows) for rows in images])
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)


def test_key_bias_does_nothing_and_gets_no_gradient_when_masked() -> None:
    layout = make_layout(GROUPS, "sdpa", CPU)
    x = random(26, 16)
    outputs = []
    for masked in (False, True):
        attention = Attention(16, 2, qkv_bias=True, mask_key_bias=masked, backend="sdpa")
        randomise(attention)
        outputs.append(attention(x, layout, [None, None]))
        outputs[-1].pow(3).sum().backward()
        if masked:
            assert attention.qkv.bias.grad is not None
            assert attention.qkv.bias.grad[16:32].abs().max() == 0
            assert attention.qkv.bias.grad[:16].abs().max() > 1e-3
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rotated", [False, True])
def test_split_heads_and_its_gradient_equal_the_plain_form(rotated: bool) -> None:
    layout = make_layout(GROUPS, "sdpa", CPU)
    table = rope_tables() if rotated else [None, None]
    results = []
    for split in (split_heads, views_of_heads):
        qkv = random(26, 48).double().requires_grad_()
        heads = split(qkv, layout, 2, table)
        sum((x.pow(2) * (i + 1)).sum() for i, group in enumerate(heads) for x in group).backward()
        results.append((heads, qkv.grad))
    (ours, grad), (plain, expected) = results
    for a, b in zip(ours, plain, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.is_contiguous()
            torch.testing.assert_close(x, y)
    torch.testing.assert_close(grad, expected)


def test_bfloat16_on_a_processor_is_as_exact_as_the_fused_kernel() -> None:
    q, k, v = (random(2, 3, 50, 16, seed=seed) for seed in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    low = [x.bfloat16() for x in (q, k, v)]
    plain, fused = attend(*low).float(), torch.nn.functional.scaled_dot_product_attention(*low).float()
    assert (plain - expected).abs().mean() < 1.5 * (fused - expected).abs().mean()


@pytest.mark.parametrize("tokens", [5, 300, 1100])
def test_bfloat16_in_use_takes_some_queries_at_a_time(tokens: int) -> None:
    q, k, v = (random(1, 2, tokens, 16, seed=seed) for seed in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    low = [x.bfloat16() for x in (q, k, v)]
    with torch.inference_mode():
        found = attend(*low).float()
    fused = torch.nn.functional.scaled_dot_product_attention(*low).float()
    assert found.shape == exact.shape
    assert (found - exact).abs().mean() < 1.5 * (fused - exact).abs().mean()


def test_folded_layer_scale_equals_the_product() -> None:
    """Values and gradients, also of the factor itself; a replaced linear layer keeps its own forward."""
    linear, scale = torch.nn.Linear(6, 4).double(), LayerScale(4, 1.0).double()
    randomise(linear)
    randomise(scale, seed=1)
    results = []
    for apply in (lambda x: scale.after(linear, x), lambda x: scale(linear(x))):
        x = random(5, 6).double().requires_grad_()
        output = apply(x)
        grads = torch.autograd.grad(output.pow(2).sum(), [x, scale.gamma, *linear.parameters()])
        results.append([output, *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)

    class Adapted(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    adapted = Adapted(6, 4).double()
    torch.testing.assert_close(scale.after(adapted, x), scale(adapted(x)))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="sdpa, auto, varlen, xformers"):
        Attention(16, 2, qkv_bias=True, mask_key_bias=False, backend="flash")
    with pytest.raises(ValueError, match="no kernels for 'cpu'"):
        make_layout(GROUPS, "xformers", CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["varlen", "xformers"])
def test_packed_kernels_on_a_gpu(backend: str) -> None:
    device = torch.device("cuda")
    reference = Attention(64, 1, qkv_bias=True, mask_key_bias=False, backend="sdpa").to(device)
    randomise(reference)
    packed = Attention(64, 1, qkv_bias=True, mask_key_bias=False, backend=backend).to(device)
    packed.load_state_dict(reference.state_dict())
    x = random(26, 64).to(device)
    with torch.autocast("cuda", torch.bfloat16):
        ours = packed(x, make_layout(GROUPS, backend, device), [None, None])
    expected = reference(x, make_layout(GROUPS, "sdpa", device), [None, None])
    torch.testing.assert_close(ours.float(), expected, atol=0.03, rtol=0.03)
