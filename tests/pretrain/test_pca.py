"""Pictures of what a backbone sees: their arrays against plain computations, and the command."""

import io
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.downstream.backbone import Backbone, ImageSettings, complete_settings, load_backbone
from pretrain.downstream.export.folder import write_checked
from pretrain.downstream.look import attention_maps, first_component, pca_colours, similarity
from pretrain.downstream.pca import heat, main, video_frames
from pretrain.models.vision_transformer import VisionTransformer
from tests.conftest import picture
from tests.pretrain.randomised import randomise


def made(architecture: str = "dinov3_vits16", **changes: object) -> Backbone:
    settings = complete_settings(architecture, {"embed_dim": 48, "depth": 3, "num_heads": 4, **changes})
    model = VisionTransformer(**settings).eval().requires_grad_(False)
    randomise(model)
    return Backbone(model, ImageSettings(px=64), architecture, settings, "made here", {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "export"
    write_checked(made(), {}, folder, "safetensors")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate([(120, 80), (80, 160)]):
        picture(number, size).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize(("architecture", "depth"), [("dinov3_vits16", 3), ("dinov2_vits14_reg", 1)])
def test_attention_is_that_of_the_last_block(architecture: str, depth: int) -> None:
    backbone = made(architecture, depth=depth, position_grid=4, layerscale=0.0)
    model, p = backbone.model, backbone.model.patch_size
    image = torch.randn(3, 3 * p, 5 * p, generator=torch.Generator().manual_seed(0))
    maps = attention_maps(backbone, image)
    assert maps.shape == (4, 3, 5)
    seen = {}
    block = model.blocks[-1]
    mix = block.attn.mix
    block.attn.mix = lambda x, layout, tables: _plain(block, x, model, (3, 5), seen, mix, layout, tables)
    backbone.features(image[None])
    assert np.allclose(maps, seen["weights"], atol=1e-5)


def _plain(block, x, model, grid, seen, mix, layout, tables):
    """What `mix` gives, held to a loop over heads, whose weights are kept."""
    heads = block.attn.num_heads
    mixed = mix(x, layout, tables)
    from pretrain.models.layers.rope import rotate

    q, k, v = block.attn.project(x).unflatten(1, (3, heads, -1)).unbind(1)
    weights = []
    for head in range(heads):
        qh, kh = q[:, head], k[:, head]
        if tables[0] is not None:
            qh, kh = rotate(qh, tables[0]), rotate(kh, tables[0])
        w = torch.softmax(qh @ kh.T / qh.shape[1] ** 0.5, dim=1)
        assert torch.allclose(w @ v[:, head], mixed.unflatten(1, (heads, -1))[:, head], atol=1e-5)
        weights.append(w[0, model.num_prefix_tokens :].reshape(grid))
    seen["weights"] = torch.stack(weights).numpy()
    return mixed


@pytest.mark.parametrize("architecture", ["dinov3_vits16", "dinov2_vits14_reg"])
def test_attention_of_a_model_of_timm_is_ours(architecture: str, tmp_path: Path) -> None:
    changes = {"position_antialias": True, "norm_eps": 1e-6, "position_grid": 4, "num_registers": 4}
    if architecture == "dinov3_vits16":
        changes |= {"norm_eps": 1e-5, "mask_key_bias": True}
    ours = made(architecture, **changes)
    write_checked(ours, {}, tmp_path / "export", "timm")
    theirs = load_backbone(f"timm:{tmp_path / 'export'}")
    p = ours.model.patch_size
    image = torch.randn(3, 3 * p, 5 * p, generator=torch.Generator().manual_seed(0))
    before = theirs.features(image[None])
    maps = attention_maps(theirs, image)
    assert maps.std() > 1e-4
    assert np.allclose(maps, attention_maps(ours, image), atol=1e-5)
    assert torch.equal(theirs.features(image[None]).cls, before.cls)  # left as it was


def test_colours_share_one_basis_and_follow_the_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 48, generator=generator)
    left, right = directions[0].expand(4, 3, 48), directions[1].expand(4, 3, 48)
    grids = [torch.cat([left, right], 1), torch.cat([right, left], 1)]
    grids = [grid + 0.01 * torch.randn(grid.shape, generator=generator) for grid in grids]
    first, second = pca_colours(grids)
    assert np.abs(first[:, :3, 0].astype(int) - second[:, 3:, 0]).max() < 20
    assert np.abs(first[:, :3, 0].astype(int) - first[:, 3:, 0]).min() > 60
    masked = pca_colours(grids, [np.arange(24).reshape(4, 6) % 2 == 0, np.ones((4, 6), bool)])
    assert not masked[0][0, 1].any()


def test_the_first_component_stands_for_what_is_in_the_middle() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = 0.05 * torch.randn(8, 8, 48, generator=generator)
    grid[2:6, 2:6] += torch.randn(48, generator=generator)
    (component,) = first_component([grid])
    expected = np.zeros((8, 8), bool)
    expected[2:6, 2:6] = True
    assert np.array_equal(component > 0.5, expected)


def test_similarity_is_the_cosine() -> None:
    grids = [torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
    found = similarity(grids, 0, 2, 1)
    expected = torch.cosine_similarity(grids[1], grids[0][2, 1], dim=2)
    assert np.allclose(found[1], expected, atol=1e-6)
    assert found[0][2, 1] == pytest.approx(1)
    with pytest.raises(ValueError, match="patch 3,0"):
        similarity(grids, 0, 3, 0)


def test_heat_grows_brighter() -> None:
    brightness = heat(np.linspace(-0.5, 1.5, 50)[None], 0, 1).astype(int).sum(axis=2)[0]
    assert (np.diff(brightness) >= 0).all()


def test_the_command_draws_each_image_at_its_own_aspect(exported: Path, photos: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "out.png"
    options = ["--attention", "--similar-to", "0.5,0.5", "--foreground", "--px", "64", "--device", "cpu"]
    assert main([str(exported), str(photos), "-o", str(out), *options]) == 0
    assert capsys.readouterr().out.startswith("2 images in")
    page = Image.open(out)
    assert page.size == (7 * (96 + 8) - 8, 64 + 8 + 128)  # 96 x 64 and 64 x 128 px, 3 + 4 pictures each


def test_pixels_stand_beside_a_backbone_of_smaller_images_than_their_patch(photos: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "export", tmp_path / "out.png"
    write_checked(replace(made("dinov2_vits14"), image=ImageSettings(px=14)), {}, folder, "safetensors")
    assert main([str(folder), str(photos / "0.png"), "-o", str(out), "--px", "84", "--beside", "pixels"]) == 0
    assert Image.open(out).width == 3 * (126 + 8) - 8


def test_others_stand_beside_it(exported: Path, photos: Path, tmp_path: Path, capsys) -> None:
    untrained, out = f"untrained:{exported}", tmp_path / "out.png"
    beside = ["--beside", untrained, "--beside", "pixels"]
    assert main([str(exported), str(photos / "0.png"), "-o", str(out), "--px", "64", *beside]) == 0
    assert f"image, patches as colours, {untrained}, pixels" in capsys.readouterr().out
    page = np.asarray(Image.open(out))
    tiles = [page[:, left : left + 96] for left in range(0, page.shape[1], 104)]
    assert [tile.shape[1] for tile in tiles] == [96] * 4
    assert not any(np.array_equal(one, other) for one, other in pairwise(tiles))


def test_images_at_their_own_size(exported: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert main([str(exported), str(photos), "-o", str(out), "--px", "own", "--device", "cpu"]) == 0
    assert Image.open(out).size == (2 * 128 + 8, 80 + 8 + 160)  # 128 x 80 of 120 x 80, and 80 x 160


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 frames of 96 x 64 px that grow brighter, 15 levels each."""
    import cv2

    path = tmp_path_factory.mktemp("video") / "film.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (96, 64))
    for number in range(16):
        writer.write(np.full((64, 96, 3), 15 * number, np.uint8))
    writer.release()
    return path


@pytest.mark.parametrize(("count", "expected"), [(2, [4, 12]), (1, [8]), (100, list(range(16)))])
def test_frames_of_a_video_are_evenly_spaced(video: Path, count: int, expected: list[int]) -> None:
    levels = [np.asarray(Image.open(io.BytesIO(content))).mean() for content in video_frames(video, count)]
    assert np.allclose(levels, [15 * number for number in expected], atol=7)  # the codec loses some


def test_the_command_draws_frames(exported: Path, photos: Path, video: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.png"
    asked = [str(exported), str(photos / "0.png"), str(video), "-o", str(out), "--px", "64", "--device", "cpu"]
    assert main([*asked, "--frames", "3"]) == 0
    assert capsys.readouterr().out.startswith("4 images in")
    assert Image.open(out).size == (2 * 96 + 8, 4 * (64 + 8) - 8)
    assert main([*asked, "--frames", "64"]) == 2
    assert "65 images are more than the 64" in capsys.readouterr().err
    (tmp_path / "broken.mp4").write_bytes(video.read_bytes()[:100])
    assert main([str(exported), str(tmp_path / "broken.mp4"), "-o", str(out)]) == 2
    assert "broken.mp4 cannot be read as a video" in capsys.readouterr().err


def test_a_video_without_opencv(exported: Path, video: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main([str(exported), str(video), "-o", str(tmp_path / "out.png")]) == 2
    assert "film.mp4 is a video, and those are read by opencv: pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (["nowhere.png"], [], "nowhere.png does not exist"),
        (["notes.txt"], [], "notes.txt cannot be read: not_an_image"),
        (["0.png"], ["--px", "8"], "--px 8 is less than a patch of 16 px"),
        (["0.png"], ["--px", "30000"], "--px 30000 has more than 40,000 patches of 16 px"),
        (["0.png"], ["--px", "big"], "--px big must be a number of pixels, or own"),
        (["0.png"], ["--frames", "0"], "--frames 0 must be 1 or more"),
        (["0.png"], ["--similar-to", "1,2"], "from 0 to 1"),
        (["0.png"], ["--similar-to", "here"], "must be two shares"),
    ],
)
def test_wrong_inputs(exported, photos, tmp_path, capsys, images, options, message) -> None:
    named = [str(photos / name) for name in images]
    assert main([str(exported), *named, "-o", str(tmp_path / "out.png"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_a_small_picture_and_a_model_of_timm(exported: Path, tmp_path: Path, capsys) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    assert main([str(exported), str(tmp_path / "one.png"), "-o", str(tmp_path / "out.png"), "--px", "64"]) == 0
    assert load_backbone(exported).depth == 3


def test_one_bad_picture_keeps_no_other_from_the_page(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture(1, (48, 48)).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"no picture")
    assert main([str(exported), str(folder), "-o", str(tmp_path / "out.png"), "--px", "48"]) == 0
    shown = capsys.readouterr()
    assert f"left out: {folder}/b.jpg cannot be read: not_an_image" in shown.err
    assert shown.out.startswith("1 images in")
    (folder / "a.png").write_bytes(b"")
    assert main([str(exported), str(folder), "-o", str(tmp_path / "out.png"), "--px", "48"]) == 2
    assert "a.png cannot be read: empty; nor can 1 others." in capsys.readouterr().err
