"""Multi-crop: the one line of the docstring, boxes as torchvision draws them, statistics as the reference path's."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import pretrain.data.crops as crops_module
from pretrain.data.crops import Crops, CropsConfig, CropSizes, draw_boxes, draw_photometric, multi_crop, step_sizes
from pretrain.data.decode import open_image
from pretrain.data.photometric import normalize, photometric
from pretrain.data.reference import ReferenceCrops
from tests.conftest import encoded, picture

SMALL = CropsConfig(global_px=32, local_px=16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def crop(content: bytes, config: CropsConfig, seed: int = 0, **others) -> Crops:
    return multi_crop(open_image(content), config, np.random.default_rng(seed), **others)


def test_the_line_of_the_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = re.search(r"^    (crops = .*)$", crops_module.__doc__ or "", re.MULTILINE)
    assert line is not None
    picture(0, (320, 240)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {"multi_crop": multi_crop, "open_image": open_image, "Path": Path, "CropsConfig": CropsConfig, "np": np}
    exec(line[1], names)
    crops = names["crops"]
    assert isinstance(crops, Crops)
    assert crops.global_crops.shape == (2, 3, 224, 224)
    assert crops.local_crops.shape == (8, 3, 96, 96)
    assert len(crops.gram_crops) == 0
    assert crops.global_crops.dtype == crops.local_crops.dtype == torch.uint8
    assert crops.global_photometric.factors.shape == (2, 4)
    assert crops.local_photometric.gray.shape == (8,)


def test_the_generator_alone_decides() -> None:
    content = encoded(picture(1, (200, 150)))
    first, again, other = crop(content, SMALL), crop(content, SMALL), crop(content, SMALL, seed=1)
    assert torch.equal(first.global_crops, again.global_crops)
    assert torch.equal(first.local_photometric.sigma, again.local_photometric.sigma)
    assert not torch.equal(first.global_crops, other.global_crops)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2600, 5), (5, 2600), (32, 32), (25, 31), (1200, 900)])
def test_any_image_size_gives_crops(size: tuple[int, int]) -> None:
    for config in (SMALL, CropsConfig(global_px=48, local_px=32, gram_px=64)):
        for seed in range(4):
            crops = crop(encoded(picture(2, size), "PNG"), config, seed)
            assert crops.global_crops.shape[-1] == config.global_px
            assert crops.local_crops.shape == (8, 3, config.local_px, config.local_px)


def test_the_whole_image_at_its_own_size_is_itself() -> None:
    """Scale 1, aspect 1, no mirror: the resize is the identity."""
    image = picture(3, (32, 32))
    config = CropsConfig(
        global_px=32, local_px=16, global_scale=[1.0, 1.0], aspect=[1.0, 1.0], flip_probability=0.0, num_local_crops=0
    )
    crops = crop(encoded(image, "PNG"), config)
    for view in crops.global_crops:
        np.testing.assert_array_equal(view.permute(1, 2, 0).numpy(), np.asarray(image))
    assert len(crops.local_crops) == 0
    mirrored = crop(encoded(image, "PNG"), CropsConfig(**{**vars(config), "flip_probability": 1.0}))
    assert torch.equal(mirrored.global_crops, crops.global_crops.flip(-1))


def test_a_crop_equals_pillows_antialiased_resize() -> None:
    """The same box cut and resized by Pillow: both round to 8 bits, torch with weights of 16 bits."""
    image = picture(4, (160, 120))
    config = CropsConfig(global_px=48, local_px=24, flip_probability=0.0)
    crops = crop(encoded(image, "PNG"), config, seed=3)
    scales = np.array([config.global_scale] * 2 + [config.local_scale] * 8)
    boxes = draw_boxes(120, 160, scales, config.aspect, np.random.default_rng(3))
    for view, (top, left, height, width) in zip([*crops.global_crops, *crops.local_crops], boxes.tolist(), strict=True):
        side = view.shape[-1]
        expected = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
        assert np.abs(view.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1


def test_a_large_jpeg_decoded_small_gives_nearly_the_same_crops() -> None:
    """2000 x 1500 to crops of 48 px: decoded at 1/8 or 1/4, within the difference of the two low-pass filters."""
    image = picture(5, (2000, 1500))
    config = CropsConfig(global_px=48, local_px=24)
    small, full = crop(encoded(image, quality=97), config), crop(encoded(image, "PNG"), config)
    for name in ("global_crops", "local_crops"):
        difference = (getattr(small, name).float() - getattr(full, name).float()).abs()
        assert difference.mean() < 1.5


def test_gram_crops_are_the_global_boxes_undistorted() -> None:
    image = picture(6, (300, 300))
    crops = crop(encoded(image, "PNG"), CropsConfig(global_px=32, local_px=16, gram_px=64))
    assert crops.gram_crops.shape == (2, 3, 64, 64)
    reduced = torch.nn.functional.interpolate(crops.gram_crops.float(), (32, 32), mode="area")
    assert (reduced - crops.global_crops).abs().mean() < 2


def test_sizes_are_drawn_by_step_with_their_probabilities() -> None:
    sizes = [
        CropSizes(global_px=512, local_px=112, gram_px=768, probability=0.3),
        CropSizes(global_px=768, local_px=112, gram_px=1152, probability=0.6),
        CropSizes(global_px=768, local_px=336, gram_px=1152, probability=0.1),
    ]
    config = CropsConfig(sizes=sizes)
    drawn = [step_sizes(config, seed=0, phase=1, step=step) for step in range(2000)]
    assert drawn[:50] == [step_sizes(config, seed=0, phase=1, step=step) for step in range(50)]
    assert drawn != [step_sizes(config, seed=1, phase=1, step=step) for step in range(2000)]
    for s in sizes:
        assert abs(drawn.count(s) / 2000 - s.probability) < 4 * np.sqrt(0.25 / 2000)
    crops = crop(encoded(picture(0)), SMALL, sizes=CropSizes(global_px=48, local_px=8))
    assert (crops.global_crops.shape[-1], crops.local_crops.shape[-1]) == (48, 8)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (32, 32), (60, 20)])
@pytest.mark.parametrize("scale", [[0.32, 1.0], [0.05, 0.32]])
def test_boxes_have_torchvisions_distribution(height: int, width: int, scale: list[float]) -> None:
    """Area, aspect and place of 4000 boxes each: quantiles within five standard errors of a two-sample test."""
    count = 4000
    ours = draw_boxes(height, width, np.array([scale] * count), [3 / 4, 4 / 3], np.random.default_rng(0))
    image = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        get = v2.RandomResizedCrop(8, (scale[0], scale[1])).make_params
        theirs = np.array([[(p := get([image]))["top"], p["left"], p["height"], p["width"]] for _ in range(count)])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for figure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        a, b = np.sort(figure(ours)), np.sort(figure(theirs))
        grid = np.unique(np.concatenate([a, b]))
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / count
        assert distance < 2.0 * np.sqrt(2 / count)  # Kolmogorov-Smirnov, p about 0.0007


@pytest.mark.parametrize("blur", ["as_released", "as_intended"])
def test_operations_come_as_often_as_stated(blur: str) -> None:
    """Over 3000 images; as released, a stated blur of 1.0 never blurs, of 0.1 blurs 90 %."""
    config = CropsConfig(blur=blur)
    drawn = [draw_photometric(config, np.random.default_rng(seed)) for seed in range(3000)]
    bound = 4 * np.sqrt(0.25 / 3000)

    def frequency(of) -> np.ndarray:
        return torch.stack([of(parameters) for parameters in drawn]).double().mean(dim=0).numpy()

    blurred = frequency(lambda p: p.sigma > 0)
    released = np.array([0.0, 0.9, *[0.5] * 8])
    expected = released if blur == "as_released" else np.array([1.0, 0.1, *[0.5] * 8])
    assert np.abs(blurred - expected).max() < bound
    assert np.abs(frequency(lambda p: p.solarize) - np.array([0, 0.2] + [0] * 8)).max() < bound
    assert np.abs(frequency(lambda p: p.gray) - 0.2).max() < bound
    assert np.abs(frequency(lambda p: (p.factors != torch.tensor([1.0, 1, 1, 0])).any(dim=1)) - 0.8).max() < bound
    factors = torch.stack([p.factors for p in drawn])
    for place, (neutral, spread) in enumerate([(1, 0.4), (1, 0.4), (1, 0.2), (0, 0.1)]):
        values = factors[..., place]
        assert values.min() >= neutral - spread - 1e-6
        assert values.max() <= neutral + spread + 1e-6
        jittered = values[values != neutral].double()
        assert abs(jittered.mean() - neutral) < 4 * spread / np.sqrt(3 * len(jittered))
        assert abs(jittered.std() - spread / np.sqrt(3)) < 0.02 * spread
    sigma = torch.stack([p.sigma for p in drawn])
    sigma = sigma[sigma > 0]
    assert sigma.min() >= 0.1
    assert sigma.max() <= 2.0
    orders = torch.stack([p.order for p in drawn]).view(-1, 4)
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert counts.max() / counts.min() < 1.3


def fast_path(content: bytes, config: CropsConfig, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    crops = crop(content, config, seed)
    return (
        normalize(photometric(crops.global_crops, crops.global_photometric)),
        normalize(photometric(crops.local_crops, crops.local_photometric)),
    )


def crop_figures(crops: torch.Tensor) -> torch.Tensor:
    """[n, 8]: for each crop the mean of each channel, contrast, colourfulness, sharpness, its square, is gray."""
    gray = crops.mean(dim=1)
    colour = crops.std(dim=1).mean(dim=(1, 2))
    sharpness = (gray[:, :, 1:] - gray[:, :, :-1]).abs().mean(dim=(1, 2))
    return torch.stack(
        [*crops.mean(dim=(2, 3)).T, gray.std(dim=(1, 2)), colour, sharpness, sharpness**2, (colour < 0.2).float()],
        dim=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("blur", ["as_released", "as_intended"])
def test_the_fast_path_has_the_statistics_of_the_reference(blur: str) -> None:
    """Mean and variance over 250 draws of an image, of each figure of each of the crops, within sampling error."""
    config = CropsConfig(global_px=64, local_px=32, num_local_crops=2, blur=blur)
    noise = np.random.default_rng(0).normal(0, 12, (150, 200, 3))
    pixels = np.clip(np.asarray(picture(7, (200, 150))) + noise, 0, 255).astype(np.uint8)
    content = encoded(Image.fromarray(pixels), quality=95)
    reference = ReferenceCrops(config)
    count = 250
    for place in range(2):  # global, local
        ours = torch.stack([crop_figures(fast_path(content, config, seed)[place]) for seed in range(count)]).double()
        theirs = torch.stack([crop_figures(reference(content, seed)[place]) for seed in range(count)]).double()
        spread = ((ours.var(dim=0) + theirs.var(dim=0)) / count).sqrt()
        assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() < 4.5 * spread + 0.01).all()
        ratio = (ours.std(dim=0) + 0.02) / (theirs.std(dim=0) + 0.02)
        assert (ratio - 1).abs().max() < 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blur": "inverted"}, "one of as_released, as_intended"),
        ({"interpolation": "area"}, "one of bicubic, bilinear"),
        ({"flip_probability": 1.5}, r"crops.flip_probability=1.5 must be in \[0, 1\]"),
        ({"global_blur_probability": [1.0]}, "one value for each of the two"),
        ({"local_scale": [0.5, 0.1]}, "crops.local_scale"),
        ({"global_scale": [0.5, 1.1]}, "crops.global_scale"),
        ({"aspect": [0.0, 1.0]}, "crops.aspect"),
        ({"hue": 0.7}, "crops.hue"),
        ({"brightness": -0.1}, "crops.brightness"),
        ({"num_local_crops": -1}, "num_local_crops"),
        ({"local_px": 0}, "crops.local_px=0 must be 1 or more"),
        ({"sizes": [CropSizes(probability=0.0)]}, "all 0"),
        ({"sizes": [CropSizes(gram_px=512), CropSizes()]}, "gram_px"),
    ],
)
def test_wrong_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropsConfig(**changes)
