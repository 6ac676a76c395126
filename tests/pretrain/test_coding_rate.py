"""The objective without prototypes: against its formulas in float64, over two ranks, and where a run may name it."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.loader import merge_config
from pretrain.checks import check_run
from pretrain.config import TrainConfig, load_train_config
from pretrain.distributed import collectives
from pretrain.losses.coding_rate import alignment_loss, coding_rate_loss, patch_alignment_loss
from pretrain.network_weights import check_distillation, load_teacher
from pretrain.phase import fresh_network
from pretrain.student_teacher import predicted_patches
from tests.pretrain.ranks import run_ranks
from tests.pretrain.tiny_train import TINY, run

VIEWS, IMAGES, WIDTH = 2, 6, 5


def unit_rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def rate_of(rows: Tensor, eps: float) -> float:
    """SimDINO's coding rate of rows [m, d], by the eigenvalues of their covariance."""
    m, d = rows.shape
    return 0.5 * torch.log1p(torch.linalg.eigvalsh(rows.T @ rows / m) * d / eps).sum().item()


@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_the_rate_is_that_of_the_eigenvalues(eps: float) -> None:
    rows = unit_rows(VIEWS, IMAGES, WIDTH)
    expected = -sum(rate_of(view, eps) for view in rows) / VIEWS * (WIDTH + IMAGES) / (WIDTH * IMAGES)
    assert coding_rate_loss(rows, eps).item() == pytest.approx(expected, rel=1e-12)
    assert coding_rate_loss(rows.float(), eps).item() == pytest.approx(expected, rel=1e-5)
    assert coding_rate_loss(rows.bfloat16(), eps).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda x: coding_rate_loss(x, eps), rows.requires_grad_())


def test_rows_that_agree_span_nothing() -> None:
    """The rate falls as images answer alike, and its gradient parts two that are close."""
    apart, alike = unit_rows(1, IMAGES, WIDTH), unit_rows(1, 1, WIDTH).expand(1, IMAGES, WIDTH)
    assert coding_rate_loss(apart, 0.05) < coding_rate_loss(alike, 0.05) - 0.5
    close = F.normalize(alike + 0.01 * unit_rows(1, IMAGES, WIDTH, seed=1), dim=-1).requires_grad_()
    coding_rate_loss(close, 0.05).backward()
    assert close.grad is not None
    moved = F.normalize(close.detach() - close.grad, dim=-1)
    assert (moved[0] @ moved[0].T).mean() < (close[0] @ close[0].T).mean()


@pytest.mark.parametrize("same_crop", [False, True])
def test_alignment_is_the_mean_over_pairs(same_crop: bool) -> None:
    student, teacher = unit_rows(VIEWS + 3, IMAGES, WIDTH), unit_rows(VIEWS, IMAGES, WIDTH, seed=1)
    pairs = [(s, t) for s in range(VIEWS + 3) for t in range(VIEWS) if same_crop or s != t]
    distances = [
        (0.7 if s >= VIEWS else 1.0) * 0.5 * (student[s] - teacher[t]).square().sum(-1).mean() for s, t in pairs
    ]
    found = alignment_loss(student[:VIEWS], student[VIEWS:], teacher, same_crop, local_weight=0.7)
    # Weights of pairs are float32.
    torch.testing.assert_close(found.total, torch.stack(distances).mean(), rtol=1e-6, atol=0)
    student.requires_grad_()
    teacher.requires_grad_()
    alignment_loss(student[:VIEWS], student[VIEWS:], teacher).total.backward()
    assert teacher.grad is None
    alone = alignment_loss(student[:VIEWS], None, teacher)
    assert alone.local_term == 0
    with pytest.raises(ValueError, match="needs two global crops"):
        alignment_loss(student[:1], None, teacher[:1])


def test_patches_are_averaged_within_an_image() -> None:
    student, teacher = unit_rows(5, WIDTH), unit_rows(5, WIDTH, seed=1)
    weights = torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)
    distance = 0.5 * (student - teacher).square().sum(-1)
    expected = (distance[:2].mean() + distance[2:].mean()) / 4
    torch.testing.assert_close(patch_alignment_loss(student, teacher, weights, 4), expected)
    assert patch_alignment_loss(student[:0], teacher[:0], weights[:0], 4) == 0


def of_a_map(images: range) -> dict[str, Tensor]:
    """The rate of a shared linear map of these images' rows; its gradient is what ranks average."""
    weight = torch.eye(WIDTH, dtype=torch.float64).requires_grad_()
    rows = F.normalize(unit_rows(VIEWS, IMAGES, WIDTH)[:, list(images)] @ weight, dim=-1)
    loss = coding_rate_loss(rows, 0.05, collectives.world_size(), collectives.sum_with_grad)
    loss.backward()
    assert weight.grad is not None
    return {"loss": loss.detach(), "gradient": collectives.mean_over_ranks(weight.grad)}


def half_of_the_images() -> dict[str, Tensor]:
    first = collectives.rank() * IMAGES // 2
    return of_a_map(range(first, first + IMAGES // 2))


def test_two_ranks_have_the_rate_and_gradient_of_one(tmp_path: Path) -> None:
    expected = of_a_map(range(IMAGES))
    for found in run_ranks(half_of_the_images, tmp_path):
        torch.testing.assert_close(found, expected)


def test_all_patches_are_those_of_crops_with_a_mask() -> None:
    masks = torch.tensor([[True, False, True, False], [False] * 4, [False, False, False, True]])
    predicted, weights = predicted_patches(masks, "masked")
    assert predicted.tolist() == [0, 2, 11]
    assert weights.tolist() == [0.5, 0.5, 1.0]
    predicted, weights = predicted_patches(masks, "all")
    assert predicted.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert weights.tolist() == [0.25] * 8


def settings(folder: Path, **changes: object) -> Path:
    (folder / "tiny.yaml").write_text(json.dumps(TINY | changes))
    return folder / "tiny.yaml"


OBJECTIVE = ("loss.objective=coding_rate", "loss.koleo_weight=0")


def test_a_run_learns_without_prototypes(tmp_path: Path, shards: Path) -> None:
    config = settings(tmp_path)
    assert run(config, shards, tmp_path / "out", *OBJECTIVE, "steps=8") == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/coding_rate", "loss/dino", "loss/ibot"} <= lines[-1].keys()
    assert not any(name.startswith(("teacher_entropy", "prototype")) for name in lines[-1])
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert load_teacher(tmp_path / "out" / "teacher").dino_head.last_layer is None


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss\.dino_weight=0 lets all images have one answer"):
        load_train_config(str(settings(tmp_path)), ["loss.objective=coding_rate", "loss.dino_weight=0"], [])
    phases = {"first": {}, "second": {"steps": 2, "loss": {"objective": "coding_rate"}}}
    two = load_train_config(str(settings(tmp_path, phases=phases)), [], [])
    with pytest.raises(ValueError, match=r"loss\.objective=coding_rate differs from prototypes of the phase before"):
        check_run(two, 1)
    tiny = merge_config(TrainConfig(), TINY, "the tests' settings")
    without = merge_config(tiny, {"loss": {"objective": "coding_rate"}}, "changes")
    with pytest.raises(ValueError, match="were trained with coding_rate: set it to coding_rate"):
        check_distillation(fresh_network(without), tiny)
    wider = merge_config(without, {"heads": {"dino": {"bottleneck_dim": 24}}}, "changes")
    with pytest.raises(ValueError, match=r"heads\.dino\.bottleneck_dim=24.*has 16: set it to 16"):
        check_distillation(fresh_network(without), wider)
