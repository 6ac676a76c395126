"""KoLeo: closed forms, a loop in float64, lightly's KoLeoLoss, groups, and what must stay finite."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import KoLeoLoss
from torch import Tensor

from pretrain.losses.koleo import koleo_loss


def rows(num_rows: int, width: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loop(x: Tensor) -> Tensor:
    x = F.normalize(x.double(), dim=-1)
    terms = []
    for i in range(len(x)):
        distances = [(x[i] - x[j]).norm() for j in range(len(x)) if j != i]
        terms.append(-torch.log(min(distances) + 1e-8))
    return torch.stack(terms).mean()


def test_opposite_rows() -> None:
    torch.testing.assert_close(koleo_loss(torch.tensor([[3.0, 0], [-0.1, 0]])), torch.tensor(-math.log(2)))


def test_equals_the_loop_with_gradients() -> None:
    x = rows(12, dtype=torch.float64).requires_grad_()
    loss, expected = koleo_loss(x), loop(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))
    torch.testing.assert_close(koleo_loss(x.detach().float()).double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_equals_lightly() -> None:
    x = rows(32).requires_grad_()
    ours, theirs = koleo_loss(x), KoLeoLoss()(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x), rtol=1e-5, atol=1e-6)


def test_order_and_scale_of_rows_do_not_matter() -> None:
    x = rows(20)
    torch.testing.assert_close(koleo_loss(x[torch.randperm(20)] * torch.rand(20, 1).add(0.1)), koleo_loss(x))


def test_float32_inside_autocast_and_for_bfloat16() -> None:
    x = rows(10).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(x)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, koleo_loss(x.float()), rtol=0, atol=0)


def test_identical_and_zero_rows_are_finite() -> None:
    for x in (torch.ones(4, 8), torch.zeros(4, 8), torch.cat([torch.ones(2, 8), rows(3, 8)])):
        x.requires_grad_()
        loss = koleo_loss(x)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(x.grad).all()


def test_groups_within_a_batch() -> None:
    x = rows(12)
    expected = torch.stack([koleo_loss(part) for part in x.split(4)]).mean()
    torch.testing.assert_close(koleo_loss(x, group_size=4), expected)
    torch.testing.assert_close(koleo_loss(x, group_size=12), koleo_loss(x))


@pytest.mark.parametrize("group_size", [24, 12, 6, 3])
def test_groups_over_ranks_average_to_the_groups_of_all_rows(group_size: int) -> None:
    """The ranks one after the other; their gathering stands in for communication."""
    x = rows(24).requires_grad_()
    ranks_of_group = max(group_size // 6, 1)

    def on_rank(rank: int) -> Tensor:
        first = rank // ranks_of_group * group_size
        gather = lambda _: F.normalize(x[first : first + group_size], dim=-1)  # noqa: E731
        shared = gather if ranks_of_group > 1 else None
        return koleo_loss(x[6 * rank : 6 * rank + 6], group_size, shared, rank % ranks_of_group)

    loss, expected = torch.stack([on_rank(rank) for rank in range(4)]).mean(), koleo_loss(x, group_size)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize(
    ("num_rows", "group_size", "message"),
    [
        (1, None, "at least 2 rows"),
        (4, 1, "at least 2 rows"),
        (6, 4, "4 rows do not divide the 6"),
        (6, 9, "9 rows, and 12"),
    ],
)
def test_groups_that_cannot_be(num_rows: int, group_size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        koleo_loss(rows(num_rows), group_size, gather=lambda x: torch.cat([x, x]) if group_size else x)


def test_a_group_larger_than_all_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="12 rows, and 6 are there"):
        koleo_loss(rows(6), group_size=12)
