"""Cross-entropy and centring over whole logits: against the streamed form and float64, plain and compiled."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from pretrain.losses import centering
from pretrain.losses.centering import SoftmaxCentering, sinkhorn_knopp, whole_passes
from pretrain.losses.prototypes import (
    STREAMED_PROTOTYPES,
    Targets,
    is_streamed,
    prototype_cross_entropy,
    whole_cross_entropy,
)

TEMPERATURE = 0.1
PAIRING = torch.tensor([[0, 1], [1, 0], [0.5, 0.5]], dtype=torch.float64)


def rows(number: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(number, width, generator=generator, dtype=torch.float64), dim=-1)


def case(dtype: torch.dtype, images: int = 5) -> tuple[Tensor, Tensor, Targets, Tensor]:
    """Features of three views and prototypes, targets of two views, weights; one row has none."""
    features, prototypes = rows(3 * images, 8, 0).to(dtype), rows(70, 8, 1).to(dtype)
    [targets] = sinkhorn_knopp([(rows(2 * images, 8, 2) @ rows(70, 8, 3).T).to(dtype)], 0.05)
    weights = torch.rand(3 * images, generator=torch.Generator().manual_seed(4)).to(targets.log_sample.dtype)
    weights[1] = 0
    return features.requires_grad_(), prototypes.requires_grad_(), targets, weights


def whole(
    features: Tensor, prototypes: Tensor, targets: Targets, weights: Tensor, pairing: Tensor | None, compiled: bool
):
    return whole_cross_entropy(features @ prototypes.T, targets, weights, TEMPERATURE, pairing, compiled=compiled)


def reference(features: Tensor, prototypes: Tensor, targets: Targets, weights: Tensor) -> Tensor:
    """As the formula says, in float64: a row's target is the mean over its pairs."""
    q = torch.einsum("gv,vrk->grk", PAIRING, targets.rows(0, len(targets)).double().unflatten(0, (2, -1))).flatten(0, 1)
    log_probabilities = F.log_softmax(features.double() @ prototypes.double().T / TEMPERATURE, dim=-1)
    return -(weights.double()[:, None] * q * log_probabilities).sum()


EVERY_DTYPE = (torch.float64, torch.float32, torch.bfloat16)


def check_whole(compiled: bool, images: int = 5, dtypes: Sequence[torch.dtype] = EVERY_DTYPE) -> None:
    for dtype in dtypes:
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
        features, prototypes, targets, weights = case(dtype, images)
        loss, each = whole(features, prototypes, targets, weights, PAIRING, compiled)
        (3 * loss).backward()
        streamed = [x.detach().clone().requires_grad_() for x in (features, prototypes)]
        other, every = prototype_cross_entropy(*streamed, targets, weights, TEMPERATURE, PAIRING)
        (3 * other).backward()
        exact = [x.detach().double().requires_grad_() for x in (features, prototypes)]
        expected = reference(*exact, targets, weights)
        (3 * expected).backward()
        assert loss.dtype == every.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(each, every, rtol=tolerance, atol=0)
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
        for ours, theirs, right in zip((features, prototypes), streamed, exact, strict=True):
            assert ours.grad.dtype == dtype
            for grad in (ours.grad, theirs.grad):
                assert (grad.double() - right.grad).norm() <= tolerance * right.grad.norm()
        assert (features.grad[1] == 0).all()
        assert not each.requires_grad


def check_passes(compiled: bool, monkeypatch: pytest.MonkeyPatch, dtypes: Sequence[torch.dtype] = EVERY_DTYPE) -> None:
    """All three passes in place of the streamed ones; a head without rows has nothing to hold."""

    def chosen(logits: Tensor, _: bool) -> centering._Passes:
        return whole_passes(compiled) if len(logits) else centering._STREAMED

    for num_rows in (37, 12):
        logits = 0.3 * torch.randn(num_rows, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        empty = torch.zeros(0, 9)
        for dtype in dtypes:
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            heads = [logits.to(dtype), empty]
            expected = [*sinkhorn_knopp(heads, 0.05), SoftmaxCentering(50)(heads[0], 0.05)]
            with monkeypatch.context() as patch:
                patch.setattr(
                    centering, "_passes", lambda x, _: whole_passes(compiled) if len(x) else centering._STREAMED
                )
                found = [*sinkhorn_knopp(heads, 0.05), SoftmaxCentering(50)(heads[0], 0.05)]
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.log_prototype.dtype == theirs.log_prototype.dtype
                q, right = ours.rows(0, len(ours)), theirs.rows(0, len(theirs))
                torch.testing.assert_close(q, right, rtol=20 * tolerance, atol=tolerance)


def test_the_whole_cross_entropy_is_the_streamed_one_and_the_formula() -> None:
    check_whole(compiled=False)


def test_centring_over_whole_logits_is_the_streamed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    check_passes(compiled=False, monkeypatch=monkeypatch)


@pytest.mark.slow
def test_both_compiled_for_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, as on a GPU: each kernel takes a compiler for C++ seconds."""
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    check_whole(True, 5, [torch.bfloat16])
    check_whole(True, 4, [torch.bfloat16])
    check_passes(True, monkeypatch, [torch.bfloat16])
    assert counters["stats"]["unique_graphs"] - before == 5  # loss, gradient, three passes of centring


def test_a_row_for_each_target_and_gradients_by_gradcheck() -> None:
    features, prototypes, targets, weights = case(torch.float64)
    features = features[:10].detach().requires_grad_()
    loss, _ = whole(features, prototypes, targets, weights[:10], None, compiled=False)
    other, _ = prototype_cross_entropy(features, prototypes, targets, weights[:10], TEMPERATURE)
    torch.testing.assert_close(loss, other)
    assert torch.autograd.gradcheck(
        lambda x, p: whole(x, p, targets, weights[:10], None, compiled=False)[0].square(),
        (features, prototypes),
        fast_mode=True,
    )


def test_large_logits_are_finite_and_what_is_not_a_number_shows() -> None:
    features, prototypes, targets, weights = case(torch.float32)
    loss, _ = whole(400 * features, prototypes, targets, weights, PAIRING, compiled=False)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, features)[0].isfinite().all()
    assert whole(torch.nan * features, prototypes, targets, weights, PAIRING, compiled=False)[0].isnan()


def test_who_streams() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not is_streamed(cuda, 65_536, compiled=True)
    assert is_streamed(cuda, STREAMED_PROTOTYPES, compiled=True)
    assert is_streamed(cuda, 65_536, compiled=False)
    assert is_streamed(cpu, 4096, compiled=True)
