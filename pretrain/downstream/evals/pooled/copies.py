"""Copy detection: which queries are edited copies of which reference; micro average precision.

Protocol of the Image Similarity Challenge (arXiv:2106.09672): all pairs of a query and a reference, of all queries
together, ranked by one score; precision is averaged over the true pairs, so that a threshold has to mean the same for
every query. The score is the cosine of unit-norm CLS tokens; the second figure is normalised as SSCD does
(arXiv:2202.10261, section 5): from it the query's own mean cosine to the nearest images of a background set, which hold
no copies, is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.ranges import check_ranges
from pretrain.downstream.evals.errors import bootstrap
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.labelled import read_table
from pretrain.downstream.evals.result import Result, counted
from pretrain.downstream.evals.sets import CopySet

_ROWS = 512  # queries compared at once: bounds the matrix of similarities


@dataclass(frozen=True, kw_only=True)
class CopiesConfig:
    """How scores are normalised, and how many pairs are ranked."""

    candidates: int = 10
    """references of each query that enter the ranking, the nearest ones"""
    background_neighbours: int = 3
    """nearest background images whose mean cosine is taken from a query's scores; 3 in SSCD's released code"""

    def __post_init__(self) -> None:
        check_ranges("copies", self, candidates="[1, inf)", background_neighbours="[1, inf)")


def micro_average_precision(scores: np.ndarray, is_true: np.ndarray, num_true: int) -> float:
    """Mean over the true pairs of the precision where each stands; those that are not ranked count 0.

    Args:
        scores: [P] of the ranked pairs. is_true: bool [P]. num_true: true pairs in all.
    """
    hits = is_true[_worst_first(scores, is_true)]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].sum() / num_true)


def _worst_first(scores: np.ndarray, is_true: np.ndarray) -> np.ndarray:
    """Falling scores; of equal ones the wrong pairs first, as the challenge has it: a tie is no merit."""
    return np.lexsort((is_true, -scores))


def recall_at_precision(scores: np.ndarray, is_true: np.ndarray, num_true: int, precision: float = 0.9) -> float:
    """The largest recall at a threshold whose precision is at least this."""
    hits = is_true[_worst_first(scores, is_true)]
    found = np.cumsum(hits)
    good = found[found / np.arange(1, len(hits) + 1) >= precision]
    return float(good.max() / num_true) if len(good) else 0.0


def run(frozen: Frozen, data: CopySet, config: CopiesConfig) -> Result:
    """Micro average precision without and, with a background, with normalised scores; the headline is without."""
    px = data.px or frozen.image.px
    parts = {"queries": data.queries, "references": data.references}
    parts |= {"background": data.background} if data.background else {}
    pooled = {name: frozen.all_of(pattern, "", px, px, needs_label=False) for name, pattern in parts.items()}
    unit = {name: F.normalize(found.last, dim=1) for name, found in pooled.items()}
    truth = _truth(data, pooled["queries"].keys, pooled["references"].keys)
    count = min(config.candidates, len(unit["references"]))
    nearest = [(rows @ unit["references"].T).topk(count, dim=1) for rows in unit["queries"].split(_ROWS)]
    similarity, candidates = (torch.cat(found) for found in zip(*nearest, strict=True))
    asked = zip(truth, candidates.cpu().numpy(), strict=True)
    is_true = np.stack([np.isin(found, list(wanted)) for wanted, found in asked])
    num_true = np.array([len(wanted) for wanted in truth])
    total = int(num_true.sum())
    scores = {"": similarity.cpu().numpy()}
    if data.background:
        shift = _background(unit["queries"], unit["background"], config)
        scores[", normalised"] = (similarity - shift[:, None]).cpu().numpy()
    figures, errors = {}, {}
    for name, found in scores.items():
        figures[f"micro-AP{name}"] = micro_average_precision(found.ravel(), is_true.ravel(), total)
        figures[f"recall at precision 0.9{name}"] = recall_at_precision(found.ravel(), is_true.ravel(), total)
        errors[name] = _error(found, is_true, num_true)
        figures[f"micro-AP{name}, error"] = errors[name]
    return Result(figures["micro-AP"], errors[""], figures, **counted(pooled))


def _error(scores: np.ndarray, is_true: np.ndarray, num_true: np.ndarray) -> float:
    def figure(drawn: np.ndarray) -> float:
        total = int(num_true[drawn].sum())
        return micro_average_precision(scores[drawn].ravel(), is_true[drawn].ravel(), total) if total else 0.0

    return bootstrap(len(scores), figure)


def _background(queries: Tensor, background: Tensor, config: CopiesConfig) -> Tensor:
    """What is taken from the scores of each query, [Q]."""
    count = min(config.background_neighbours, len(background))
    nearest = torch.cat([(rows @ background.T).topk(count, dim=1).values for rows in queries.split(_ROWS)])
    return nearest.mean(dim=1)


def _truth(data: CopySet, queries: Sequence[str], references: Sequence[str]) -> list[set[int]]:
    """For each query the numbers of its references."""
    places = {key: n for n, key in enumerate(queries)}, {key: n for n, key in enumerate(references)}
    truth: list[set[int]] = [set() for _ in queries]
    for row in read_table(data.truth, ("query", "reference")):
        if not row["reference"]:
            continue
        for key, known, name in ((row["query"], places[0], "queries"), (row["reference"], places[1], "references")):
            if key not in known:
                raise ValueError(f"{data.truth}: {key} is in no part of {name}.")
        truth[places[0][row["query"]]].add(places[1][row["reference"]])
    if not any(truth):
        raise ValueError(f"{data.truth} names no copy: there is nothing to find.")
    return truth
