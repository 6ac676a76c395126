"""Batched colours against torchvision, operation by operation, with the same image and the same parameters."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from pretrain.data.photometric import Photometric, blend, blur, luma, normalize, on_device, photometric, shift_hue
from tests.conftest import picture

FACTORS = [0.6, 0.83, 1.0, 1.17, 1.4]
HUES = [-0.1, -0.037, 0.0, 0.05, 0.1]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(count: int, size: tuple[int, int] = (48, 40)) -> Tensor:
    """uint8 [count, 3, H, W]: smooth pictures with a gray and a black patch, where hue and saturation have ties."""
    pixels = np.stack([np.asarray(picture(seed, size)) for seed in range(count)]).copy()
    pixels[:, :5, :5] = 90
    pixels[:, 5:9, :5] = 0
    pixels[:, :5, 5:9] = 255
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def parameters(count: int, **changes: Tensor) -> Photometric:
    neutral = {
        "factors": torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(count, 1),
        "order": torch.arange(4, dtype=torch.uint8).repeat(count, 1),
        "gray": torch.zeros(count, dtype=torch.bool),
        "sigma": torch.zeros(count),
        "solarize": torch.zeros(count, dtype=torch.bool),
    }
    return Photometric(**neutral | changes)


def with_factor(place: int, values: list[float]) -> Photometric:
    factors = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(len(values), 1)
    factors[:, place] = torch.tensor(values)
    return parameters(len(values), factors=factors)


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def levels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_neutral_parameters_change_nothing() -> None:
    x = images(3)
    torch.testing.assert_close(photometric(x, parameters(3)), x.float() / 255, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("place", "values", "function", "most", "mean"),
    [
        (0, FACTORS, tv.adjust_brightness, 1.01, 0.6),  # Pillow cuts off instead of rounding
        (1, FACTORS, tv.adjust_contrast, 1.5, 0.7),  # and rounds the mean
        (2, FACTORS, tv.adjust_saturation, 1.5, 0.6),
        (3, HUES, tv.adjust_hue, 13.0, 1.5),  # and has 256 hues: a step is up to six levels, cut off there and back
    ],
)
def test_each_jitter_equals_torchvision(place: int, values: list[float], function, most: float, mean: float) -> None:
    """Its float images to 2e-4 of 1 (its luma has weights of four digits); Pillow's 8-bit ones within some levels."""
    x = images(len(values))
    ours = photometric(x, with_factor(place, values))
    theirs = torch.stack([function(image.float() / 255, value) for image, value in zip(x, values, strict=True)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    on_pillow = torch.stack([levels(function(pil(image), value)) for image, value in zip(x, values, strict=True)])
    difference = (255 * ours - on_pillow).abs()
    assert difference.max() <= most
    assert difference.mean(dim=(1, 2, 3)).max() <= mean


def test_blends_in_closed_form() -> None:
    x = torch.tensor([0.2, 0.4, 0.9])[None, :, None, None].expand(1, 3, 2, 2).clone()
    x[:, :, 1] = 0.5
    gray = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.9
    one, zero = torch.ones(1), torch.zeros(1)
    brighter = blend(x, torch.tensor([1.4]), zero, zero)
    torch.testing.assert_close(brighter[0, :, 0, 0], torch.tensor([0.28, 0.56, 1.0]))
    less_colour = blend(x, torch.tensor([0.5]), zero, one)
    torch.testing.assert_close(less_colour[0, :, 0, 0], 0.5 * torch.tensor([0.2, 0.4, 0.9]) + 0.5 * gray)
    less_contrast = blend(x, torch.tensor([0.5]), one, zero)
    torch.testing.assert_close(less_contrast[0, :, 0, 0], 0.5 * torch.tensor([0.2, 0.4, 0.9]) + 0.5 * (gray + 0.5) / 2)


def test_hue_in_closed_form() -> None:
    """A third of the circle turns red to green to blue; gray stays; a whole turn changes nothing."""
    red = torch.tensor([0.8, 0.1, 0.1])[None, :, None, None]
    torch.testing.assert_close(shift_hue(red, torch.tensor([1 / 3]))[0, :, 0, 0], torch.tensor([0.1, 0.8, 0.1]))
    torch.testing.assert_close(shift_hue(red, torch.tensor([-1 / 3]))[0, :, 0, 0], torch.tensor([0.1, 0.1, 0.8]))
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shift_hue(x, torch.ones(4)), x, rtol=0, atol=1e-5)
    gray = luma(x).expand_as(x)
    torch.testing.assert_close(shift_hue(gray, torch.full((4,), 0.07)), gray, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_all_orders_of_the_four(order: tuple[int, ...]) -> None:
    """As ColorJitter applies them: one after the other, on floats."""
    x = images(3)
    factors = torch.tensor([[1.3, 0.7, 1.2, 0.08], [0.7, 1.35, 0.8, -0.09], [1.0, 1.2, 1.0, 0.0]])
    ours = photometric(x, parameters(3, factors=factors, order=torch.tensor([order] * 3, dtype=torch.uint8)))
    functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    for image, row, values in zip(x, ours, factors.tolist(), strict=True):
        theirs = image.float() / 255
        for operation in order:
            theirs = functions[operation](theirs, values[operation])
        torch.testing.assert_close(row, theirs, rtol=0, atol=1e-3)


def test_gray_and_solarize_equal_torchvision() -> None:
    x = images(4)
    ours = photometric(x, parameters(4, gray=torch.tensor([True, False, True, False])))
    for i, image in enumerate(x):
        expected = levels(tv.rgb_to_grayscale(pil(image), 3)) if i % 2 == 0 else image.float()
        assert (255 * ours[i] - expected).abs().max() <= 1
    ours = photometric(x, parameters(4, solarize=torch.tensor([True, True, False, False])))
    for i, image in enumerate(x):
        expected = levels(tv.solarize(pil(image), 128)) if i < 2 else image.float()
        assert (255 * ours[i] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("size", [(48, 40), (16, 16), (224, 224)])
def test_blur_equals_torchvision(size: tuple[int, int]) -> None:
    sigma = [0.1, 0.3, 0.8, 1.4, 2.0]
    x = images(5, size)
    ours = photometric(x, parameters(5, sigma=torch.tensor(sigma)))
    for image, row, value in zip(x, ours, sigma, strict=True):
        theirs = tv.gaussian_blur(image.float() / 255, [9, 9], [value, value])
        torch.testing.assert_close(row, theirs, rtol=0, atol=1e-5)
        on_pillow = levels(tv.gaussian_blur(pil(image), [9, 9], [value, value]))
        assert (255 * row - on_pillow).abs().max() <= 0.51


def test_blur_is_near_pillows() -> None:
    """Pillow's is three box blurs and never cut off at nine taps: the same picture within a few levels."""
    from PIL import ImageFilter

    x = images(3, (96, 96))
    for sigma in (0.5, 1.0, 2.0):
        ours = blur(x.float() / 255, torch.full((3,), sigma))
        for image, row in zip(x, ours, strict=True):
            theirs = levels(pil(image).filter(ImageFilter.GaussianBlur(sigma)))
            assert (255 * row - theirs).abs().mean() < 1.5


def test_everything_together_equals_torchvision_on_pillow_images() -> None:
    """64 random sets of parameters; rounding to 8 bits after each of up to seven operations is what remains."""
    count = 64
    rng = np.random.default_rng(0)
    x = images(count)
    factors = torch.from_numpy(
        np.stack([rng.uniform(0.6, 1.4, count), rng.uniform(0.6, 1.4, count), rng.uniform(0.8, 1.2, count),
                  rng.uniform(-0.1, 0.1, count)], axis=1).astype(np.float32)
    )  # fmt: skip
    chosen = parameters(
        count,
        factors=factors,
        order=torch.from_numpy(np.argsort(rng.random((count, 4)), axis=1).astype(np.uint8)),
        gray=torch.from_numpy(rng.random(count) < 0.2),
        sigma=torch.from_numpy((rng.uniform(0.1, 2, count) * (rng.random(count) < 0.5)).astype(np.float32)),
    )
    ours = 255 * photometric(x, chosen)
    functions = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    differences = []
    for i in range(count):
        image = pil(x[i])
        for operation in chosen.order[i].tolist():
            image = functions[operation](image, chosen.factors[i, operation].item())
        if chosen.gray[i]:
            image = tv.rgb_to_grayscale(image, 3)
        if chosen.sigma[i] > 0:
            image = tv.gaussian_blur(image, [9, 9], [chosen.sigma[i].item()] * 2)
        differences.append((ours[i] - levels(image)).abs())
    assert torch.stack(differences).mean() < 2.0
    assert torch.stack(differences).flatten().quantile(0.99) < 10.0


def test_a_crop_does_not_depend_on_its_batch() -> None:
    """Rows in another order or by themselves: the same values, to the last bit or rounding of vector kernels."""
    rng = np.random.default_rng(1)
    x = images(8)
    chosen = parameters(
        8,
        factors=torch.from_numpy(rng.uniform(0.7, 1.3, (8, 4)).astype(np.float32)) - torch.tensor([0, 0, 0, 1.0]),
        order=torch.from_numpy(np.argsort(rng.random((8, 4)), axis=1).astype(np.uint8)),
        gray=torch.arange(8) % 3 == 0,
        sigma=torch.arange(8) / 4,
        solarize=torch.arange(8) % 2 == 0,
    )
    whole = photometric(x, chosen)
    for i in range(8):
        torch.testing.assert_close(photometric(x[i : i + 1], chosen[i : i + 1])[0], whole[i], rtol=0, atol=1e-6)
    back = torch.arange(7, -1, -1)
    torch.testing.assert_close(photometric(x[back], chosen[back])[back], whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(224, 224), (48, 40), (7, 5), (9, 17)])
def test_the_processors_kernel_equals_the_devices_operations(size: tuple[int, int]) -> None:
    """All orders, all operations on and off, either memory layout; to rounding, but where that crosses solarisation.

    Both compute in float32, so a value within some 1e-6 of the threshold may be inverted in one of them only.
    """
    rng = np.random.default_rng(3)
    count = 48
    factors = rng.uniform(0.6, 1.4, (count, 4)).astype(np.float32) - np.array([0, 0, 0, 1], np.float32)
    factors[rng.random((count, 4)) < 0.2] = 0
    factors[:, :3][factors[:, :3] == 0] = 1
    chosen = parameters(
        count,
        factors=torch.from_numpy(factors),
        order=torch.tensor(list(itertools.permutations(range(4))) * 2, dtype=torch.uint8),
        gray=torch.from_numpy(rng.random(count) < 0.2),
        sigma=torch.from_numpy((rng.uniform(0.1, 2, count) * (rng.random(count) < 0.5)).astype(np.float32)),
        solarize=torch.from_numpy(rng.random(count) < 0.3),
    )
    x = images(count, size)
    x[:, 1:] ^= torch.from_numpy(rng.integers(0, 32, x[:, 1:].shape, dtype=np.uint8))
    ours, theirs = photometric(x, chosen), on_device(x, chosen)
    assert torch.equal(ours, photometric(x.contiguous(memory_format=torch.channels_last), chosen))
    # An inverted value is mirrored at 1/2, so that is undone before the two are compared.
    folded = [torch.where(chosen.solarize[:, None, None, None], (y - 0.5).abs(), y) for y in (ours, theirs)]
    torch.testing.assert_close(folded[0], folded[1], rtol=0, atol=2e-5)
    assert ((ours - theirs).abs() > 2e-5).float().mean() < 1e-4


def test_normalize_in_closed_form() -> None:
    x = torch.full((2, 3, 4, 4), 0.5)
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(normalize(x)[1, :, 2, 3], expected)


@pytest.mark.gpu
def test_the_device_gives_the_same_and_nothing_waits_for_it() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = images(8)
    rng = np.random.default_rng(2)
    chosen = parameters(
        8,
        factors=torch.from_numpy(rng.uniform(0.7, 1.3, (8, 4)).astype(np.float32)) - torch.tensor([0, 0, 0, 1.0]),
        sigma=torch.arange(8) / 4,
    )
    there = x.cuda()
    photometric(there, chosen)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = photometric(there, chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(ours.cpu(), photometric(x, chosen), rtol=0, atol=1e-4)
