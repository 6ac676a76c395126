"""RoPE against complex rotation in float64, and its training noise against its definition."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pretrain.models.layers.rope import (
    Rope,
    RopeNoise,
    coordinates,
    noisy_tables,
    periods,
    rotate,
    rotate_,
    tables,
)

CPU = torch.device("cpu")


def test_periods_are_the_published_ones() -> None:
    expected = [100 ** (2 * i / 32) for i in range(16)]  # base ** (2 i / (D / 2)), D = 64
    np.testing.assert_allclose(periods(Rope(64)), expected, rtol=1e-6)
    spaced = periods(Rope(64, min_period=0.5, max_period=90.0))
    np.testing.assert_allclose(spaced, np.geomspace(0.5, 90.0, 16), rtol=1e-5)


def test_coordinates_are_patch_centres() -> None:
    expected = [(r, c) for r in (-0.5, 0.5) for c in (-2 / 3, 0.0, 2 / 3)]
    np.testing.assert_allclose(coordinates(2, 3, "separate", CPU), expected, atol=1e-6)
    by_longest = coordinates(2, 3, "max", CPU)
    np.testing.assert_allclose(by_longest[-1], [1.5 / 3 * 2 - 1, 2.5 / 3 * 2 - 1], atol=1e-6)
    by_shortest = coordinates(2, 3, "min", CPU)
    np.testing.assert_allclose(by_shortest[-1], [1.5 / 2 * 2 - 1, 2.5 / 2 * 2 - 1], atol=1e-6)


def test_rotation_is_a_complex_product_and_leaves_the_prefix() -> None:
    rope, grid, prefix = Rope(8), (3, 2), 2
    x = torch.randn(2, 4, prefix + 6, 8, generator=torch.Generator().manual_seed(0))
    ours = rotate(x, tables(rope, grid, prefix, CPU))
    assert torch.equal(ours[:, :, :prefix], x[:, :, :prefix])
    for n in range(6):
        row, column = (n // 2 + 0.5) / 3 * 2 - 1, (n % 2 + 0.5) / 2 * 2 - 1
        angles = [2 * math.pi * at / 100 ** (i / 2) for at in (row, column) for i in range(2)]
        pairs = x[:, :, prefix + n].double().numpy()
        turned = (pairs[..., :4] + 1j * pairs[..., 4:]) * np.exp(1j * np.array(angles))
        np.testing.assert_allclose(ours[:, :, prefix + n], np.concatenate([turned.real, turned.imag], -1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_rotation_is_the_same_and_its_inverse_undoes_it(dtype: torch.dtype) -> None:
    table = tables(Rope(16), (3, 5), 1, CPU)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    turned = x.clone()
    rotate_(turned, table)
    bound = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(turned, rotate(x, table), atol=bound, rtol=bound)
    rotate_(turned, table, inverse=True)
    torch.testing.assert_close(turned, x, atol=2 * bound, rtol=2 * bound)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(2))
    table = tables(Rope(32), (6, 6), 0, CPU)
    turned_q, turned_k = (rotate(x.expand(1, 1, 36, 32), table)[0, 0] for x in (q, k))
    scores = (turned_q @ turned_k.T).view(6, 6, 6, 6)
    torch.testing.assert_close(scores[1, 1, 3, 2], scores[2, 3, 4, 4], atol=1e-4, rtol=1e-4)


def test_tables_are_kept_and_serve_training_after_inference() -> None:
    with torch.inference_mode():
        first = tables(Rope(12), (7, 3), 1, CPU)
    assert tables(Rope(12), (7, 3), 1, CPU) is first
    x = torch.randn(1, 1, 22, 12, requires_grad=True)
    rotate(x, first).sum().backward()
    assert x.grad is not None


def test_fake_tensors_are_not_kept() -> None:
    with FakeTensorMode():
        assert type(tables(Rope(20), (3, 3), 0, CPU)) is not torch.Tensor
    assert type(tables(Rope(20), (3, 3), 0, CPU)) is torch.Tensor


def test_noise_is_within_bounds_log_uniform_and_in_the_published_order() -> None:
    noise = RopeNoise(shift=0.25, jitter=1.5, rescale=2.0)
    factor, offset = noise.draw(4000, torch.Generator().manual_seed(0))
    shift = offset / factor
    assert shift.abs().max() <= 0.25 + 1e-6
    assert shift.std().item() == pytest.approx(0.5 / math.sqrt(12), rel=0.05)
    common = factor.log().mean(-1).flatten()
    apart = (factor.log()[..., 0] - factor.log()[..., 1]).flatten()
    jitter, rescale = (2 * math.log(bound) / math.sqrt(12) for bound in (1.5, 2.0))  # standard deviations
    assert apart.std().item() == pytest.approx(jitter * math.sqrt(2), rel=0.05)
    assert common.std().item() == pytest.approx(math.sqrt(rescale**2 + jitter**2 / 2), rel=0.05)
    assert factor.log().abs().max() <= math.log(3.0) + 1e-6
    only_rescale, still = RopeNoise(rescale=2.0).draw(10, torch.Generator().manual_seed(0))
    assert torch.equal(only_rescale[..., 0], only_rescale[..., 1])
    assert still.abs().max() == 0


def test_noisy_tables_are_the_tables_of_noisy_coordinates() -> None:
    rope, noise = Rope(8), RopeNoise(shift=0.1, rescale=2.0)
    drawn = noisy_tables(rope, (2, 3), 1, CPU, noise, 4, torch.Generator().manual_seed(3))
    factor, offset = noise.draw(4, torch.Generator().manual_seed(3))
    coords = coordinates(2, 3, "separate", CPU) * factor + offset
    angle = 2 * math.pi * coords[2, 5, 1] / periods(rope)[1]
    assert drawn.shape == (4, 2, 7, 4)
    torch.testing.assert_close(drawn[2, :, 6, 3], torch.stack([angle.cos(), angle.sin()]))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="divisible by 4, got 6"):
        Rope(6)
    with pytest.raises(ValueError, match="separate, min, max"):
        Rope(8, normalise="area")
    with pytest.raises(ValueError, match="both or neither"):
        Rope(8, min_period=1.0)
    with pytest.raises(ValueError, match=r"rope_rescale=0\.5"):
        RopeNoise(rescale=0.5)
    with pytest.raises(ValueError, match="rope_shift=0"):
        RopeNoise(shift=0)
