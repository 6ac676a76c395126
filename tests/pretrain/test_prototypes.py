"""The fused cross-entropy: against the formula in float64, its gradients, chunks, dtypes, pairings, and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses import prototypes as module
from pretrain.losses.centering import SoftmaxCentering, sinkhorn_knopp
from pretrain.losses.prototypes import Targets, blocks, prototype_cross_entropy

WIDTH, TEMPERATURE = 6, 0.1


def rows(number: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(number, width, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def targets_of(logits: Tensor, temperature: float = 0.05) -> Targets:
    return sinkhorn_knopp([logits], temperature)[0]


def reference(features: Tensor, prototypes: Tensor, assignments: Tensor, weights: Tensor) -> Tensor:
    """As the formula says, everything whole."""
    log_probabilities = F.log_softmax(features @ prototypes.T / TEMPERATURE, dim=-1)
    return -(weights[:, None] * assignments * log_probabilities).sum()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several bands, and several blocks in a band, at the sizes of these tests."""
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", 3 * 64 * 8)
    monkeypatch.setitem(module.BAND_BYTES, "cpu", 3 * 200 * 8)


def test_uniform_everything_costs_log_k() -> None:
    targets = SoftmaxCentering(7)(torch.zeros(4, 7), 0.04)
    loss, each = prototype_cross_entropy(torch.zeros(4, 3), torch.ones(7, 3), targets, torch.full((4,), 0.25), 0.1)
    log_k = torch.tensor(7.0).log()
    torch.testing.assert_close(loss, log_k)
    torch.testing.assert_close(each, log_k.expand(4))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_formula_with_gradients_over_bands_and_blocks(dtype: torch.dtype, tolerance: float) -> None:
    exact = rows(11, WIDTH, 0).requires_grad_(), (3 * rows(200, WIDTH, 1)).requires_grad_()
    teacher, weights = rows(11, WIDTH, 2) @ rows(200, WIDTH, 3).T, torch.rand(11, dtype=torch.float64)
    weights[4] = 0
    (5 * reference(*exact, targets_of(teacher).rows(0, 11), weights)).backward()
    fused = [x.detach().to(dtype).requires_grad_() for x in exact]
    loss, each = prototype_cross_entropy(*fused, targets_of(teacher.to(dtype)), weights.to(dtype), TEMPERATURE)
    (5 * loss).backward()  # an outer scale: accumulation, a loss weight
    torch.testing.assert_close(each.double() @ weights, loss.double(), rtol=tolerance, atol=tolerance)
    for got, expected in zip(fused, exact, strict=True):
        largest = expected.grad.abs().max().item()
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=0, atol=tolerance * largest)
    assert (fused[0].grad[4] == 0).all()


@pytest.mark.usefixtures("small_chunks")
def test_gradcheck() -> None:
    targets, weights = targets_of(rows(5, WIDTH, 2) @ rows(70, WIDTH, 3).T), torch.rand(5, dtype=torch.float64)
    inputs = rows(5, WIDTH, 0).requires_grad_(), rows(70, WIDTH, 1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, p: 3 * prototype_cross_entropy(x, p, targets, weights, TEMPERATURE)[0].square(), inputs
    )


@pytest.mark.usefixtures("small_chunks")
def test_pairing_is_the_mean_over_pairs_of_cross_entropies() -> None:
    num_images, num_teacher, num_student = 3, 2, 4
    student, prototypes = rows(12, WIDTH, 0).requires_grad_(), rows(130, WIDTH, 1).requires_grad_()
    targets = targets_of(rows(6, WIDTH, 2) @ rows(130, WIDTH, 3).T)
    pairing = torch.tensor([[0, 1], [1, 0], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    weights = torch.rand(12, dtype=torch.float64)
    loss, _ = prototype_cross_entropy(student, prototypes, targets, weights, TEMPERATURE, pairing)
    expected = torch.zeros((), dtype=torch.float64)
    for g in range(num_student):
        for v in range(num_teacher):
            mine = slice(g * num_images, (g + 1) * num_images)
            assignments = targets.rows(v * num_images, (v + 1) * num_images)
            expected = expected + pairing[g, v] * reference(student[mine], prototypes, assignments, weights[mine])
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, [student, prototypes], retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [student, prototypes]))
    torch.testing.assert_close(torch.autograd.grad(loss, [student, prototypes]), gradients)  # a second time, the same


def test_only_the_gradients_asked_for() -> None:
    features, prototypes = rows(5, WIDTH, 0), rows(9, WIDTH, 1).requires_grad_()
    targets, weights = targets_of(rows(5, WIDTH, 2) @ rows(9, WIDTH, 3).T), torch.ones(5, dtype=torch.float64)
    loss, each = prototype_cross_entropy(features, prototypes, targets, weights, TEMPERATURE)
    loss.backward()
    assert features.grad is None
    assert prototypes.grad is not None
    assert not each.requires_grad
    with torch.no_grad():
        without, _ = prototype_cross_entropy(features, prototypes, targets, weights, TEMPERATURE)
    assert not without.requires_grad
    torch.testing.assert_close(without, loss.detach())


def test_no_rows_is_a_zero_that_depends_on_its_inputs() -> None:
    features, prototypes = torch.zeros(0, WIDTH, requires_grad=True), torch.ones(9, WIDTH, requires_grad=True)
    loss, each = prototype_cross_entropy(
        features, prototypes, targets_of(torch.zeros(0, 9)), torch.zeros(0), TEMPERATURE
    )
    loss.backward()
    assert loss == 0
    assert each.shape == (0,)
    assert features.grad.shape == (0, WIDTH)
    assert (prototypes.grad == 0).all()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_near_and_returns_the_dtypes_of_its_inputs(autocast: bool) -> None:
    stored = torch.float32 if autocast else torch.bfloat16
    features, prototypes = rows(64, 32, 0, stored).requires_grad_(), rows(300, 32, 1, stored).requires_grad_()
    teacher, weights = rows(64, 32, 2) @ rows(300, 32, 3).T, torch.full((64,), 1 / 64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        targets = targets_of(teacher.bfloat16())
        loss, each = prototype_cross_entropy(features, prototypes, targets, weights, TEMPERATURE)
    loss.backward()
    assert each.dtype == loss.dtype == torch.float32
    assert features.grad.dtype == prototypes.grad.dtype == stored
    exact = [x.detach().double().requires_grad_() for x in (features, prototypes)]
    expected = reference(*exact, targets.rows(0, 64).double(), weights.double())
    expected.backward()
    # bfloat16 keeps 8 bits; logits of up to 1 are divided by 0.1.
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)
    for got, wanted in zip((features, prototypes), exact, strict=True):
        assert (got.grad.double() - wanted.grad).norm() < 0.02 * wanted.grad.norm()


def test_extreme_logits_are_finite() -> None:
    features, prototypes = (40 * rows(5, WIDTH, 0, torch.float32)).requires_grad_(), rows(9, WIDTH, 1, torch.float32)
    loss, _ = prototype_cross_entropy(
        features, prototypes, targets_of(40 * rows(5, 9, 2, torch.float32)), torch.ones(5), 0.1
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_not_a_number_is_not_hidden() -> None:
    features = torch.full((2, WIDTH), torch.nan, requires_grad=True)
    loss, _ = prototype_cross_entropy(features, torch.ones(9, WIDTH), targets_of(torch.zeros(2, 9)), torch.ones(2), 0.1)
    assert loss.isnan()


def test_entropy() -> None:
    targets = targets_of(rows(30, 200, 0))
    q = targets.rows(0, 30)
    torch.testing.assert_close(targets.entropy(), -(q * q.log()).sum(dim=1))


def test_blocks_cover_everything_once() -> None:
    assert [list(range(10))[part] for part in blocks(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(blocks(0, 4)) == []
    assert len(list(blocks(3, 0))) == 3
