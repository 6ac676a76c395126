"""Diagnostics against closed forms, and alarms on the signs they are for and on no others."""

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.watch.alarms import AlarmWatch, find_alarms
from pretrain.watch.diagnostics import feature_std, mean_entropy, prototype_use, target_diagnostics

K = 64
HEALTHY = {
    "feature_std": 0.6,
    "teacher_entropy/dino": 1.5,
    "prototype_use/dino": 0.8,
    "data_wait": 0.01,
}


def lines(**changes: float) -> list[dict[str, float]]:
    named = {name.replace("__", "/"): value for name, value in changes.items()}
    return [{"step": step, **HEALTHY, **named} for step in (10, 20, 30)]


def test_entropy_of_known_rows() -> None:
    uniform, certain = torch.full((3, K), 1 / K), F.one_hot(torch.arange(3), K).float()
    assert mean_entropy(uniform).item() == pytest.approx(math.log(K), rel=1e-6)
    assert mean_entropy(certain).item() == 0
    assert mean_entropy(torch.cat([uniform, certain])).item() == pytest.approx(math.log(K) / 2, rel=1e-6)


@pytest.mark.parametrize(("numbers", "share", "perplexity"), [([0, 1, 2, 3], 1, 4), ([5, 5, 5, 5], 0.25, 1)])
def test_prototype_use_of_known_rows(numbers: list[int], share: float, perplexity: float) -> None:
    use, effective = prototype_use(F.one_hot(torch.tensor(numbers), K).float())
    assert use.item() == share
    assert effective.item() == pytest.approx(perplexity, rel=1e-5)


def test_more_rows_than_prototypes() -> None:
    use, _ = prototype_use(F.one_hot(torch.arange(12) % 3, 4).float())
    assert use.item() == 0.75


def test_divergence_is_cross_entropy_less_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(20, K, generator=generator).softmax(dim=1)
    log_p = torch.randn(20, K, generator=generator).log_softmax(dim=1)
    cross_entropy = -(q * log_p).sum(dim=1).mean()
    figures = target_diagnostics("dino", lambda a, b: q[a:b], 20, cross_entropy)
    expected = F.kl_div(log_p.double(), q.double(), reduction="batchmean")
    assert figures["kl/dino"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_rows_give_zeros() -> None:
    figures = target_diagnostics("ibot", lambda a, b: torch.zeros(b - a, K), 0)
    assert {value.item() for value in figures.values()} == {0.0}


def test_feature_std_of_spread_and_collapsed_features() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4000, 128, generator=generator) * 7
    assert feature_std(spread).item() == pytest.approx(1, abs=0.02)  # sampling error of 4,000 rows
    assert feature_std(spread[:1].expand(50, -1)).item() == pytest.approx(0, abs=1e-4)
    assert feature_std(spread[:1]).item() == 0
    assert feature_std(spread + 1000).item() < 0.02


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"feature_std": 0.01}, "collapsed_features", "almost the same feature"),
        ({"teacher_entropy__dino": 0.999 * math.log(K)}, "uniform_targets_dino", "almost uniform"),
        ({"teacher_entropy__dino": 0.001, "prototype_use__dino": 0.1}, "certain_targets_dino", "collapse is near"),
        ({"prototype_use__dino": 0.01}, "dead_prototypes_dino", "most have died"),
        ({"data_wait": 0.6}, "waiting_for_data", "60% of the time"),
    ],
)
def test_each_sign_raises_its_alarm(changes: dict[str, float], name: str, words: str) -> None:
    (alarm,) = find_alarms(lines(**changes), {"dino": K})
    assert alarm.name == name
    assert words in alarm.message


def test_no_alarm_for_a_healthy_run_a_single_odd_line_or_a_missing_figure() -> None:
    assert find_alarms(lines(), {"dino": K, "ibot": K}) == []
    assert find_alarms([*lines()[:2], *lines(feature_std=0.0)[2:]], {"dino": K}) == []
    assert find_alarms(lines(feature_std=0.0)[:2], {"dino": K}) == []
    assert find_alarms([{"step": n} for n in range(3)], {"dino": K}) == []


def test_certain_targets_on_different_prototypes_are_no_collapse() -> None:
    assert find_alarms(lines(teacher_entropy__dino=0.001, prototype_use__dino=0.95), {"dino": K}) == []


def test_watch_says_it_once_and_again_after_it_was_over() -> None:
    watch = AlarmWatch({"dino": K}, warmup_steps=5, num_steps=20)
    sick = {**HEALTHY, "feature_std": 0.0}
    said = [
        [alarm.name for alarm in watch.look({**(HEALTHY if 10 <= step < 13 else sick), "step": step})]
        for step in range(20)
    ]
    assert [step for step, names in enumerate(said) if names] == [8, 15]  # third line after the grace, after recovery
