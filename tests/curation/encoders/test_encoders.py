"""Encoders: parity with the model called directly, views, names that do not load. Models are tiny and random."""

import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.encoders import load
from curation.encoders.encoder import View
from curation.encoders.load import encoder_view, load_encoder, parse_spec
from curation.ops.randomness import hash_uint64

pytest.importorskip("torch")
import torch

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def _image(seed: int = 0, size: tuple[int, int] = (90, 60)) -> Image.Image:
    small = hash_uint64(seed, np.arange(8 * 12 * 3)).astype(np.uint8).reshape(8, 12, 3)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def _views(view: View, count: int = 3) -> np.ndarray:
    return np.stack([view(_image(seed)) for seed in range(count)])


def _pixels(views: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def _unit(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features, dim=-1).numpy()


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import safetensors.torch
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit.r160_in1k", pretrained=False)
    path = tmp_path_factory.mktemp("timm") / "tiny.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hf")
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    preprocessor = {
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 56, "width": 56},
        "do_center_crop": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def test_timm_file_gives_what_the_model_gives(timm_file: Path):
    import safetensors.torch
    import timm

    encoder = load_encoder(f"timm:test_vit.r160_in1k@{timm_file}", device="cpu", precision="float32")
    views = _views(encoder.view)
    model = timm.create_model("test_vit.r160_in1k", pretrained=False).eval()
    model.load_state_dict(safetensors.torch.load_file(timm_file))
    config = timm.data.resolve_data_config(model=model)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        pixels = (torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255 - mean) / std
        expected = _unit(model.forward_head(model.forward_features(pixels), pre_logits=True))
    rows = encoder.embed(views)
    assert rows.dtype == np.float32
    assert encoder.dim == rows.shape[1]
    np.testing.assert_allclose(rows, expected, atol=1e-6)  # float32, same kernels


def test_threads_that_begin_together_share_one_model(timm_file: Path, monkeypatch: pytest.MonkeyPatch):
    """An actor embeds several parts at once; a dozen models would not fit its GPU."""
    spec = f"timm:test_vit.r160_in1k@{timm_file}"
    encoder = pickle.loads(pickle.dumps(load_encoder(spec, device="cpu", precision="float32")))
    views = _views(encoder.view)
    build, built, together = load._build, [], threading.Barrier(8)

    def counted(*arguments):
        built.append(arguments)
        return build(*arguments)

    def embed(_: int) -> np.ndarray:
        together.wait()
        return encoder.embed(views)

    monkeypatch.setattr(load, "_build", counted)
    with ThreadPoolExecutor(8) as threads:
        rows = list(threads.map(embed, range(8)))
    assert len(built) == 1
    for other in rows:
        np.testing.assert_array_equal(other, rows[0])
    again = pickle.loads(pickle.dumps(encoder))  # with its model loaded: that stays behind
    assert again._loaded is None
    np.testing.assert_array_equal(again.embed(views), rows[0])


def test_timm_pth_file_gives_the_same_and_another_size_resizes_positions(timm_file: Path, tmp_path: Path):
    import safetensors.torch

    path = tmp_path / "tiny.pth"
    torch.save(safetensors.torch.load_file(timm_file), path)
    spec = "timm:test_vit.r160_in1k@"
    first, second = (load_encoder(f"{spec}{file}", device="cpu", precision="float32") for file in (timm_file, path))
    views = _views(first.view)
    np.testing.assert_array_equal(first.embed(views), second.embed(views))
    assert first.fingerprint() != second.fingerprint()  # other bytes, though equal tensors
    larger = load_encoder(f"{spec}{timm_file}", device="cpu", image_px=192)
    assert larger.view.height == 192
    assert larger.embed(_views(larger.view)).shape == (3, first.dim)
    assert larger.fingerprint() != first.fingerprint()


def test_a_pickle_that_is_not_tensors_is_not_loaded(tmp_path: Path):
    path = tmp_path / "evil.pth"
    torch.save({"weight": print}, path)
    encoder = load_encoder(f"timm:test_vit.r160_in1k@{path}", device="cpu")
    with pytest.raises(ValueError, match="does not load"):
        encoder.embed(_views(encoder.view))


def test_weights_with_a_missing_tensor_do_not_load(timm_file: Path, hf_folder: Path, tmp_path: Path):
    import safetensors.torch

    for file in (timm_file, hf_folder / "model.safetensors"):
        tensors = safetensors.torch.load_file(file)
        tensors.pop(sorted(name for name in tensors if "mlp.fc1.weight" in name)[0])
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        for name in ("config.json", "preprocessor_config.json"):
            (tmp_path / name).write_text((hf_folder / name).read_text())
        spec = f"timm:test_vit.r160_in1k@{tmp_path / 'model.safetensors'}" if file == timm_file else f"hf:{tmp_path}"
        encoder = load_encoder(spec, device="cpu")
        with pytest.raises(ValueError, match="does not load"):
            encoder.embed(_views(encoder.view))


def test_hf_folder_gives_the_class_token_of_the_model(hf_folder: Path):
    from transformers import Dinov2Model

    encoder = load_encoder(f"hf:{hf_folder}", device="cpu", precision="float32")
    assert encoder.view == View(height=56, width=56, resize_short_px=64, resample=3)
    views = _views(encoder.view)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    with torch.no_grad():
        pixels = (torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255 - mean) / std
        expected = _unit(Dinov2Model.from_pretrained(hf_folder).eval()(pixel_values=pixels).last_hidden_state[:, 0])
    np.testing.assert_allclose(encoder.embed(views), expected, atol=1e-6)


def test_torchscript_gives_what_the_module_gives(tmp_path: Path):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 16, 8, 8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    module = torch.nn.Sequential(*layers).eval()
    path = tmp_path / "copy.torchscript.pt"
    torch.jit.trace(module, torch.zeros(1, 3, 320, 320)).save(str(path))
    encoder = load_encoder(f"sscd:{path}", device="cpu", precision="float32")
    views = _views(encoder.view)
    assert views.shape == (3, 320, 320, 3)
    with torch.no_grad():
        expected = _unit(module(_pixels(views)))
    np.testing.assert_allclose(encoder.embed(views), expected, atol=1e-6)
    assert encoder.dim == 16


def test_rows_hold_for_any_batch_size_and_survive_pickling(hf_folder: Path):
    encoder = load_encoder(f"hf:{hf_folder}", device="cpu", precision="float32")
    views = _views(encoder.view, 5)
    together = encoder.embed(views)
    alone = np.concatenate([encoder.embed(view[None]) for view in views])
    np.testing.assert_allclose(together, alone, atol=2e-6)  # float32 sums in another order
    copy = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(copy.embed(views), together)
    assert len(pickle.dumps(encoder)) < 2000  # the weights stay behind
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


def test_bfloat16_stays_near_float32(hf_folder: Path):
    exact, rough = (load_encoder(f"hf:{hf_folder}", device="cpu", precision=p) for p in ("float32", "bfloat16"))
    views = _views(exact.view)
    cosine = (exact.embed(views) * rough.embed(views)).sum(axis=1)
    assert (cosine > 0.999).all()  # eight bits of mantissa


def test_offline_encoders_mirror_exactly_and_share_a_view():
    encoder, likeness = load_encoder("descriptors"), load_encoder("descriptors-likeness")
    assert encoder.view == likeness.view == encoder_view("descriptors")
    views = _views(encoder.view)
    assert encoder.mirror is not None
    mirrored = encoder.embed(np.ascontiguousarray(views[:, :, ::-1]))
    np.testing.assert_allclose(mirrored, encoder.embed(views) * encoder.mirror, atol=1e-5)
    assert likeness.mirror is None
    assert (encoder.dim, likeness.dim) == (256, 512)
    assert encoder.fingerprint() != likeness.fingerprint()


def test_views_squash_or_crop():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    cropped = View(height=50, width=50, resize_short_px=50)(image)
    assert (cropped[:, 5:-5] == (0, 0, 255)).all()  # the bicubic window reaches over the edges
    squashed = View(height=60, width=60)(image)
    assert (squashed[:, 5] == (255, 0, 0)).all()
    assert (squashed[:, 30] == (0, 0, 255)).all()
    assert View(height=32, width=32, resize_short_px=36)(Image.new("RGB", (3, 1000))).shape == (32, 32, 3)


def test_a_view_refuses_what_is_not_rgb():
    with pytest.raises(ValueError, match="RGB"):
        View(height=8, width=8)(Image.new("L", (9, 9)))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2.lvd142m", "timm:vit_small_patch14_dinov2.lvd142m"])
def test_the_default_for_real_runs_takes_224_px(name: str):
    assert encoder_view(name) == View(height=224, width=224, resize_short_px=224, resample=3)
    assert len(pickle.dumps(encoder_view(name))) < 200


def test_views_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"\[B, 128, 128, 3\]"):
        load_encoder("descriptors").embed(np.zeros((2, 64, 64, 3), np.uint8))


def test_without_network_or_cache_the_error_names_the_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"vit_small_patch14_dinov2") as error:
        load_encoder("vit_small_patch14_dinov2.lvd142m")
    for part in (str(tmp_path), "descriptors", "hf:/folder", "timm:NAME@"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vit_smal_patch14_dinov2", "nearest: vit_small_patch14_dinov2"),
        ("vit_small_patch14_dinov2.no_such_tag", "nearest"),
        ("clip:ViT-L", "not a known kind"),
        ("hf:/no/such/folder", "config.json"),
        ("sscd:/no/such/file.pt", "does not exist"),
        ("timm:test_vit.r160_in1k@/no/such.safetensors", "does not exist"),
    ],
)
def test_what_cannot_load_says_why(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_encoder(spec)


def test_unsafe_kinds_are_refused(tmp_path: Path):
    (tmp_path / "weights.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match="no safe kind"):
        load_encoder(f"timm:test_vit.r160_in1k@{tmp_path / 'weights.pkl'}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "custom", "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(ValueError, match="model_type 'custom'"):
        load_encoder(f"hf:{tmp_path}")


def test_spec_strings():
    assert parse_spec("descriptors") == ("descriptors", "descriptors", "")
    assert parse_spec("timm:a.b@/x.safetensors") == ("timm", "a.b", "/x.safetensors")
    assert parse_spec("a.b") == ("timm", "a.b", "")
    assert parse_spec("hf:/x") == ("hf", "", "/x")
