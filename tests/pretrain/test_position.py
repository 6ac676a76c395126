"""Resized position tables and grids: PyTorch's interpolation as products, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses.gram import resize_grid
from pretrain.losses.koleo import koleo_loss
from pretrain.models.layers.position import patch_positions

SIDE, DIM = 7, 12


def interpolated(patches: Tensor, grid: tuple[int, int], antialias: bool, offset: float) -> Tensor:
    images = patches.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
    size = {"scale_factor": [(n + offset) / SIDE for n in grid]} if offset else {"size": grid}
    return F.interpolate(images, mode="bicubic", antialias=antialias, **size).flatten(2).mT


def nodes(x: Tensor) -> set[str]:
    """Names of the operations whose backward a gradient of x runs."""
    assert x.grad_fn is not None
    found, left = set(), [x.grad_fn]
    while left:
        node = left.pop()
        found.add(node.name())
        left += [following for following, _ in node.next_functions if following is not None]
    return found


@pytest.mark.parametrize("grid", [(3, 3), (4, 9), (11, 7), (7, 5)])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_products_are_the_interpolation(grid: tuple[int, int], antialias: bool, offset: float) -> None:
    table = torch.randn(1, 1 + SIDE**2, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # positions stay float32
        _, ours = patch_positions(table, grid, antialias=antialias, offset=offset)
    theirs = interpolated(table[:, 1:], grid, antialias, offset)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    # Resizing is linear, so the gradient of any sum says what another table gives. PyTorch's own gradient does not,
    # where it antialiases by a scale factor.
    weights, other = torch.randn_like(ours), torch.randn_like(table)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), table)
    expected = (interpolated(other[:, 1:], grid, antialias, offset) * weights).sum()
    torch.testing.assert_close((gradient * other).sum(), expected, rtol=1e-4, atol=1e-4)


def test_no_gradient_is_added_up_in_any_order() -> None:
    """On a GPU the backward of interpolating and of gathering adds atomically."""
    table = torch.randn(1, 1 + SIDE**2, DIM).requires_grad_()
    _, resized = patch_positions(table, (3, 3), antialias=True)
    grid = resize_grid(table[:, 1:], (SIDE, SIDE), (3, 3))
    names = nodes(resized) | nodes(grid) | nodes(koleo_loss(table[0]))
    assert not [name for name in names if any(word in name for word in ("Upsample", "Gather", "Index"))]
