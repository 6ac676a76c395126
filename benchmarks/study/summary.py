"""Records -> what tables and sentences say: means over seeds, differences, and whether they are shown."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtr

from benchmarks.study.description import WITHOUT_SEED, Claim, Experiment
from benchmarks.study.record import Record

LEAST_SEEDS = 3
SIGNIFICANT = 0.05
_NOT_SHARES = ("RMSE, m",)
_LESS_IS_BETTER = ("RMSE, m",)


@dataclass(frozen=True)
class Difference:
    """Of two variants in one evaluation, over the seeds that both have."""

    mean: float
    num_seeds: int
    p: float | None
    """two-sided, of a t-test paired by seed; None below LEAST_SEEDS"""

    @property
    def is_shown(self) -> bool:
        return self.p is not None and self.p < SIGNIFICANT

    def evidence(self) -> str:
        """For example `p = 0.012` or `2 seeds, three are needed`."""
        if self.p is None:
            return f"{self.num_seeds} seed{'s' * (self.num_seeds != 1)}, three are needed"
        return "p < 0.001" if self.p < 0.001 else f"p = {self.p:.2g}"


@dataclass(frozen=True)
class Summary:
    """All records of an experiment."""

    experiment: Experiment
    records: Sequence[Record]

    def of(self, variant: str) -> list[Record]:
        return [record for record in self.records if record.variant == variant]

    def metric(self, evaluation: str) -> str:
        """The headline figure of an evaluation, by the records that have it; empty where none has."""
        return next((r.results[evaluation]["metric"] for r in self.records if evaluation in r.results), "")

    def values(self, variant: str, evaluation: str) -> dict[int, float]:
        """Seed -> figure."""
        return {r.seed: r.results[evaluation]["value"] for r in self.of(variant) if evaluation in r.results}

    def difference(self, one: str, other: str, evaluation: str) -> Difference | None:
        """`one` minus `other`; None where they have no seed in common. What has no seed stands for every one."""
        ours, theirs = (self.values(name, evaluation) for name in (one, other))
        if self._has_no_seed(other):
            theirs = dict.fromkeys(ours, *theirs.values()) if theirs else {}
        if self._has_no_seed(one):
            ours = dict.fromkeys(theirs, *ours.values()) if ours else {}
        pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        return Difference(statistics.fmean(pairs), len(pairs), paired_p(pairs)) if pairs else None

    def _has_no_seed(self, variant: str) -> bool:
        return self.experiment.variants[variant].kind in WITHOUT_SEED

    def sentence(self, claim: Claim) -> str:
        """The claim with its figures; what is not shown, or is otherwise, says so first."""
        metric = self.metric(claim.evaluation)
        found = self.difference(claim.better, claim.worse, claim.evaluation)
        claimed = f"{claim.better} is better than {claim.worse} in {claim.evaluation}"
        if found is None:
            return f"Not shown: {claimed} (no seed that both were run with)."
        sign = -1 if metric in _LESS_IS_BETTER else 1
        shown = [self.spread(name, claim.evaluation) for name in (claim.better, claim.worse)]
        seeds = f"{found.num_seeds} seeds, " if found.p is not None else ""
        figures = f"{shown[0]} against {shown[1]}, {signed(found.mean, metric)} ({seeds}{found.evidence()})"
        if not found.is_shown:
            return f"Not shown: {claimed}: {figures}."
        if sign * found.mean > 0:
            return f"{claimed[0].upper()}{claimed[1:]}: {figures}."
        return f"Refuted, for it is worse: {claimed}: {figures}."

    def spread(self, variant: str, evaluation: str) -> str:
        """Mean ± sample standard deviation over seeds, with its unit."""
        metric = self.metric(evaluation)
        return spread(list(self.values(variant, evaluation).values()), metric) + unit(metric)


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of a mean difference of 0, by Student's t; None below LEAST_SEEDS pairs."""
    if len(differences) < LEAST_SEEDS:
        return None
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    if deviation == 0:
        return 0.0 if mean else 1.0
    t = mean / (deviation / math.sqrt(len(differences)))
    return float(2 * stdtr(len(differences) - 1, -abs(t)))


def unit(metric: str) -> str:
    return "" if metric in _NOT_SHARES else "%"


def number(value: float, metric: str) -> str:
    """Shares in %, to one place; other figures as they are, to three."""
    return f"{value:.3f}" if metric in _NOT_SHARES else f"{100 * value:.1f}"


def signed(value: float, metric: str) -> str:
    return ("+" if value >= 0 else "-") + number(abs(value), metric)


def spread(values: Sequence[float], metric: str) -> str:
    """Mean ± sample standard deviation; the value alone where there is one."""
    if not values:
        return ""
    mean = number(statistics.fmean(values), metric)
    return f"{mean} ± {number(statistics.stdev(values), metric)}" if len(values) > 1 else mean


def curve(records: Sequence[Record]) -> Mapping[int, list[float]]:
    """Images seen -> figures, one a record."""
    found: dict[int, list[float]] = {}
    for record in records:
        for point in record.points:
            found.setdefault(point["images"], []).append(point["value"])
    return found
