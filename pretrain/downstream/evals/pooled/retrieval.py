"""Instance retrieval: a database ranked by cosine to each query; mean average precision.

The revisited protocol (arXiv:1803.11285): pictures of what a query shows are easy, hard or junk; `easy` looks for the
easy ones, `hard` for the hard ones, `medium`, the headline, for both, and whatever a setting does not look for is taken
out of the ranking before it is judged. Average precision by the trapezoidal rule of the Oxford code. One global
descriptor, the unit-norm CLS token, of the centre crop at one scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.ranges import check_ranges
from pretrain.downstream.evals.errors import of_mean
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.labelled import read_table
from pretrain.downstream.evals.result import Result, counted
from pretrain.downstream.evals.sets import RetrievalSet

RELATIONS = ("easy", "hard", "junk")
# setting -> (looked for, taken out)
SETTINGS = {
    "easy": (("easy",), ("hard", "junk")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
}
_QUERIES = 64  # ranked at once: bounds the matrix of similarities


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What is reported beside mean average precision."""

    ranks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """mean precision among the first so many"""

    def __post_init__(self) -> None:
        check_ranges("retrieval", self, ranks="[1, inf)")


def average_precision(places: np.ndarray) -> float:
    """Area under precision over recall, by trapezoids.

    Args:
        places: int64 [P], ascending: how many pictures, wanted or not, stand before each wanted one.
    """
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    after = (found + 1) / (places + 1)
    return float(np.mean((before + after) / 2))


def places_of(order: np.ndarray, wanted: np.ndarray, taken_out: np.ndarray) -> np.ndarray:
    """Places of the wanted pictures in a ranking without those that are taken out.

    Args:
        order: int64 [N]: the database by falling similarity. wanted, taken_out: bool [N] of the database.
    """
    kept = order[~taken_out[order]]
    return np.flatnonzero(wanted[kept])


def rankings(queries: Tensor, database: Tensor) -> Sequence[np.ndarray]:
    """For each query [Q, D] the database [N, D], both unit-norm, by falling cosine; equal ones in their order."""
    found: list[np.ndarray] = []
    for rows in queries.split(_QUERIES):
        found += list((rows @ database.T).argsort(dim=1, descending=True, stable=True).cpu().numpy())
    return found


def judge(
    orders: Sequence[np.ndarray], relations: Sequence[Mapping[str, np.ndarray]], ranks: Sequence[int]
) -> dict[str, tuple[np.ndarray, dict[int, float]]]:
    """setting -> average precision of each query that has something to find there, and mean precision by rank.

    Args:
        relations: for each query, relation -> bool [N] of the database.
    """
    found = {}
    for setting, (looked_for, taken_out) in SETTINGS.items():
        precisions, at = [], {rank: [] for rank in ranks}
        for order, related in zip(orders, relations, strict=True):
            wanted = np.logical_or.reduce([related[name] for name in looked_for])
            if not wanted.any():
                continue
            places = places_of(order, wanted, np.logical_or.reduce([related[name] for name in taken_out]))
            precisions.append(average_precision(places))
            for rank, values in at.items():
                # As the published code: no further than where the last wanted one stands.
                reach = min(rank, places[-1] + 1)
                values.append(np.sum(places < reach) / reach)
        if precisions:
            found[setting] = np.array(precisions), {rank: float(np.mean(values)) for rank, values in at.items()}
    return found


def run(frozen: Frozen, data: RetrievalSet, config: RetrievalConfig) -> Result:
    """Mean average precision of the medium setting.

    Raises:
        ValueError: a truth of unknown keys or relations, or none that has anything to find.
    """
    px = data.px or frozen.image.px
    queries, database = (
        frozen.all_of(pattern, "", px, px, needs_label=False) for pattern in (data.queries, data.database)
    )
    relations = _relations(data, queries.keys, database.keys)
    unit = [F.normalize(pooled.last, dim=1) for pooled in (queries, database)]
    asked = [n for n, key in enumerate(queries.keys) if key in relations]
    orders = rankings(unit[0][torch.tensor(asked, device=frozen.device)], unit[1])
    found = judge(orders, [relations[queries.keys[n]] for n in asked], config.ranks)
    headline = found["medium"][0]
    figures: dict[str, float] = {}
    for setting, (precisions, at) in found.items():
        figures |= {f"mAP {setting}": float(precisions.mean()), f"mAP {setting}, error": of_mean(precisions)}
        figures |= {f"mP@{rank} {setting}": value for rank, value in at.items()}
    return Result(
        float(headline.mean()), of_mean(headline), figures, **counted({"queries": queries, "database": database})
    )


def _relations(data: RetrievalSet, queries: Sequence[str], database: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    numbers, known = {key: n for n, key in enumerate(database)}, set(queries)
    found: dict[str, dict[str, np.ndarray]] = {}
    for row in read_table(data.truth, ("query", "image", "relation")):
        query, image, relation = row["query"], row["image"], row["relation"]
        if query not in known or image not in numbers or relation not in RELATIONS:
            where = f"its relation {relation!r} is none of {', '.join(RELATIONS)}"
            where = where if image in numbers else f"{image} is in no part of the database"
            where = where if query in known else f"{query} is in no part of the queries"
            raise ValueError(f"{data.truth}: query {query}, image {image}: {where}.")
        of_query = found.setdefault(query, {name: np.zeros(len(database), bool) for name in RELATIONS})
        of_query[relation][numbers[image]] = True
    if not any(related["easy"].any() or related["hard"].any() for related in found.values()):
        raise ValueError(f"{data.truth} names no easy or hard image: there is nothing to find.")
    return found
