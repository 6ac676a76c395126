"""`load_backbone` from timm and from the Hugging Face hub's cache, layers, sizes; nothing comes from the network."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.downstream.backbone import chosen_layers, fitted, load_backbone
from tests.pretrain.randomised import randomise

TIMM = "vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache as its client leaves it, with a model of timm and one of transformers."""
    import timm
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    root = tmp_path_factory.mktemp("hub")
    model = timm.create_model(TIMM)
    randomise(model)
    folder = _snapshot(root, f"timm/{TIMM}")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    config = Dinov2Config(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14)
    theirs = Dinov2Model(config)
    randomise(theirs)
    theirs.save_pretrained(_snapshot(root, "someone/small"))
    return root


def _snapshot(root: Path, name: str) -> Path:
    repository = root / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    return repository / "snapshots" / commit


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height))


def test_a_model_of_timm_gives_its_own_tokens(offline: None) -> None:
    import timm

    backbone = load_backbone(f"timm:{TIMM}")
    theirs = timm.create_model(TIMM, pretrained=True, num_classes=0, dynamic_img_size=True).eval()
    assert (backbone.architecture, backbone.depth, backbone.model.patch_size) == (TIMM, 12, 16)
    assert backbone.image.mean == (0.5, 0.5, 0.5)
    for size in ((224, 224), (96, 160)):
        ours = backbone.features(images(*size))
        with torch.inference_mode():
            tokens = theirs.forward_features(images(*size))
        assert torch.equal(ours.cls, tokens[:, 0])
        assert torch.equal(ours.patches, tokens[:, 1:])
        assert (ours.registers.shape[1], ours.grid) == (0, (size[0] // 16, size[1] // 16))
    last, third = backbone.layers(images(96, 160), [-1, 3])
    assert torch.allclose(last.patches, ours.patches, atol=1e-5)
    assert not torch.allclose(third.patches, ours.patches, atol=1e-2)


def test_a_model_of_the_hub_is_that_of_transformers(offline: None, cache: Path) -> None:
    from transformers import Dinov2Model

    backbone = load_backbone("hf:someone/small", position_offset=0)
    theirs = Dinov2Model.from_pretrained("someone/small").eval()
    for size in ((56, 56), (70, 112)):
        ours = backbone.features(images(*size))
        with torch.inference_mode():
            tokens = theirs(images(*size)).last_hidden_state
        assert torch.allclose(torch.cat([ours.cls[:, None], ours.patches], 1), tokens, atol=1e-5)
    folder = next((cache / "models--someone--small" / "snapshots").iterdir())
    again = load_backbone(f"hf:{folder}", position_offset=0).features(images(56, 56))
    assert torch.equal(again.cls, backbone.features(images(56, 56)).cls)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("timm:vit_tiny_patch16_225", "timm has no model"),
        ("timm:resnet18", "cannot load the weights"),
        ("hf:nobody/nothing", "neither a folder nor can it be had from the hub"),
        (f"timm:{TIMM}+", "Invalid pretrained tag"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(offline: None, path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        load_backbone(path)
    assert "\n" not in str(raised.value)


def test_settings_of_ours_do_not_apply_to_timm(offline: None) -> None:
    with pytest.raises(ValueError, match="as it is"):
        load_backbone(f"timm:{TIMM}", attention="sdpa")


@pytest.mark.parametrize(
    ("which", "depth", "expected"),
    [
        (4, 12, [8, 9, 10, 11]),
        ("four", 12, [2, 5, 8, 11]),
        ("four", 24, [4, 11, 17, 23]),
        ("four", 40, [9, 19, 29, 39]),
        ([0, -1], 6, [0, 5]),
    ],
)
def test_blocks_are_chosen_as_published(which, depth, expected) -> None:
    assert chosen_layers(which, depth) == expected


@pytest.mark.parametrize(("which", "depth"), [("four", 3), ("five", 12), (13, 12), (0, 12), ([12], 12), ([], 12)])
def test_blocks_that_are_not_there_are_refused(which, depth) -> None:
    with pytest.raises(ValueError, match="layers="):
        chosen_layers(which, depth)


def test_sides_that_the_patch_does_not_divide(offline: None) -> None:
    with pytest.raises(ValueError, match="50 x 70 px do not split into patches of 14 px"):
        fitted(images(50, 70), 14, "exact")
    padded = fitted(images(50, 70), 14, "pad")
    assert padded.shape[-2:] == (56, 70)
    assert torch.equal(padded[..., :50, :], images(50, 70))
    assert not padded[..., 50:, :].any()
    assert fitted(images(50, 70), 14, "resize").shape[-2:] == (56, 70)
    assert fitted(images(3, 3), 14, "resize").shape[-2:] == (14, 14)
    with pytest.raises(ValueError, match="fit="):
        fitted(images(50, 70), 14, "crop")


def test_images_of_different_sizes_are_those_of_each_alone(offline: None) -> None:
    backbone = load_backbone("hf:someone/small", position_offset=0)
    several = [images(h, w, 1)[0] for h, w in ((56, 56), (42, 84), (56, 56), (50, 60))]
    together = backbone.features_of_each(several, fit="pad")
    for image, features in zip(several, together, strict=True):
        alone = backbone.features(image[None], fit="pad")
        assert features.grid == alone.grid
        assert torch.allclose(features.cls, alone.cls, atol=1e-5)
        assert torch.allclose(features.patches, alone.patches, atol=1e-5)
