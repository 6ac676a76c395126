"""Sinkhorn-Knopp against the plain formulation and lightly's; the softmax centre against lightly's."""

import math

import pytest
import torch
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from lightly.models.modules.center import Center
from torch import Tensor

from pretrain.losses import prototypes as module
from pretrain.losses.centering import SoftmaxCentering, sinkhorn_knopp


def logits_of(num_rows: int, num_prototypes: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num_rows, num_prototypes, generator=generator, dtype=torch.float64)


def plain_sinkhorn(logits: Tensor, temperature: float, num_iterations: int = 3) -> Tensor:
    """As in SwAV and DINOv2: the whole matrix of exponentials, normalised by its total, rows and columns in turn."""
    q = torch.exp(logits / temperature).T
    num_prototypes, num_samples = q.shape
    q = q / q.sum()
    for _ in range(num_iterations):
        q = q / q.sum(dim=1, keepdim=True) / num_prototypes
        q = q / q.sum(dim=0, keepdim=True) / num_samples
    return (q * num_samples).T


def log_domain_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    """The same in logarithms and float64, the whole matrix at once."""
    log_q = logits.double() / temperature
    for _ in range(3):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


@pytest.fixture(params=[1 << 20, 500])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows in one block; a row or two in a block."""
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", request.param)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("num_iterations", [1, 2, 3, 5])
def test_equals_the_plain_form(num_iterations: int) -> None:
    logits = logits_of(37, 50)
    expected = plain_sinkhorn(logits, 0.05, num_iterations)
    for dtype, tolerance in [(torch.float64, 1e-12), (torch.float32, 1e-6)]:
        [targets] = sinkhorn_knopp([logits.to(dtype)], 0.05, num_iterations)
        q = targets.rows(0, 37)
        assert q.dtype == dtype
        torch.testing.assert_close(q.double(), expected, rtol=20 * tolerance, atol=tolerance)
        torch.testing.assert_close(targets.rows(5, 9), q[5:9])


@pytest.mark.parametrize("size", [(3, 4), (40, 7), (16, 300)])
def test_equals_lightly(size: tuple[int, int]) -> None:
    logits = logits_of(*size).float()
    [targets] = sinkhorn_knopp([logits], 0.05)
    torch.testing.assert_close(targets.rows(0, size[0]), lightly_sinkhorn(logits, epsilon=0.05), rtol=1e-5, atol=1e-6)


def test_rows_sum_to_one_and_prototypes_share_equally() -> None:
    q = sinkhorn_knopp([logits_of(400, 20, scale=0.1).float()], 0.07)[0].rows(0, 400)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(400))
    torch.testing.assert_close(q.sum(dim=0), torch.full((20,), 20.0), rtol=1e-2, atol=0)


@pytest.mark.usefixtures("block_bytes")
@pytest.mark.parametrize("largest", [175.0, 500.0])
def test_large_logits_are_finite_and_exact(largest: float) -> None:
    """Some samples and prototypes are far below the others: float32 exponentials of them vanish."""
    logits = logits_of(12, 30)
    logits[3] += largest * 0.07
    logits[:, 5] -= largest * 0.07 / 2
    logits[7, 9] = -largest * 0.07 / 2
    [targets] = sinkhorn_knopp([logits.float()], 0.07)
    q = targets.rows(0, 12)
    assert torch.isfinite(q).all()
    # float32 holds exponents of `largest` to 24 bits.
    torch.testing.assert_close(q.double(), log_domain_sinkhorn(logits.float(), 0.07), rtol=1e-3, atol=1e-5)


def test_beyond_what_float64_can_exponentiate_is_still_finite() -> None:
    q = sinkhorn_knopp([logits_of(12, 30, scale=100).float()], 0.04)[0].rows(0, 12)
    # float32 holds exponents of 7,500 to 5e-4.
    torch.testing.assert_close(q.sum(dim=1), torch.ones(12), rtol=2e-3, atol=0)


def test_heads_of_unlike_sizes_share_one_reduction_an_iteration_and_a_head_may_be_empty() -> None:
    calls = []

    def count(buffer: Tensor) -> Tensor:
        calls.append(buffer.shape)
        return buffer

    dino, ibot = logits_of(6, 9), logits_of(0, 5)
    targets = sinkhorn_knopp([dino, ibot], 0.05, sum_over_ranks=count)
    assert calls == [(14,)] * 3
    torch.testing.assert_close(targets[0].rows(0, 6), plain_sinkhorn(dino, 0.05))
    assert targets[1].rows(0, 0).shape == (0, 5)
    assert torch.isfinite(targets[1].log_prototype).all()


def test_bfloat16_logits_stay_as_they_are() -> None:
    logits = logits_of(30, 40).bfloat16()
    [targets] = sinkhorn_knopp([logits], 0.05)
    assert targets.logits is logits
    torch.testing.assert_close(targets.rows(0, 30), plain_sinkhorn(logits.float(), 0.05), rtol=2e-5, atol=1e-6)


def test_autocast_changes_nothing() -> None:
    logits = logits_of(30, 40).float()
    [expected] = sinkhorn_knopp([logits], 0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [targets] = sinkhorn_knopp([logits], 0.05)
        torch.testing.assert_close(targets.rows(0, 30), expected.rows(0, 30), rtol=0, atol=0)


def test_no_iterations_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sinkhorn_knopp([torch.zeros(2, 2)], 0.05, num_iterations=0)


def test_softmax_centring_is_lightlys() -> None:
    ours, theirs = SoftmaxCentering(20), Center(size=(1, 20), mode="mean", momentum=0.9)
    for step in range(4):
        logits = logits_of(8, 20, seed=step).float()
        expected = torch.softmax((logits - theirs.value) / 0.04, dim=-1)
        targets = ours(logits, 0.04)
        ours.update(logits)
        theirs.update(logits)
        # Formed after the update: targets keep the centre that they were made with.
        torch.testing.assert_close(targets.rows(0, 8), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.center[None], theirs.value)


def test_no_samples_leave_the_centre_alone() -> None:
    centering = SoftmaxCentering(4)
    centering.center += 2
    centering.update(torch.zeros(0, 4))
    torch.testing.assert_close(centering.center, torch.full((4,), 2.0))
    assert len(centering(torch.zeros(0, 4), 0.04)) == 0


def test_equal_logits_give_uniform_assignments() -> None:
    for targets in (sinkhorn_knopp([torch.ones(3, 8)], 0.05)[0], SoftmaxCentering(8)(torch.ones(3, 8), 0.05)):
        torch.testing.assert_close(targets.rows(0, 3), torch.full((3, 8), 1 / 8))
        torch.testing.assert_close(targets.entropy(), torch.full((3,), math.log(8)))
