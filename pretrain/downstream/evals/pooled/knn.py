"""k-nearest-neighbour accuracy of frozen features: python -m pretrain.downstream.evals knn BACKBONE --data ...

Protocol of DINO (arXiv:2104.14294) and DINOv2 (arXiv:2304.07193): CLS token after the final norm, unit length; the k
training images with the highest cosine vote for their class with weight exp(cosine / 0.07); the class with the most
votes is the answer. One resize and centre crop, no augmentation, nothing learned.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from configs.ranges import check_ranges
from pretrain.distributed import collectives
from pretrain.downstream.evals.errors import of_share
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.result import Result, both_halves, counted
from pretrain.downstream.evals.sets import LabelledSet

_ROWS = 512  # validation rows compared at once: bounds the similarity matrix
_LARGE = 50_000  # rows of a bank from which on Faiss, where it is installed, compares on a processor


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """How neighbours vote."""

    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    """numbers of neighbours; each gives a figure, and the first is the headline, so that nothing is chosen by looking
    at the answers. Of a smaller training set the first must fit, and others that do not have no figure"""
    temperature: float = 0.07
    """of the votes; above 0"""

    def __post_init__(self) -> None:
        check_ranges("knn", self, k="[1, inf)", temperature="(0, inf)")
        if not self.k:
            raise ValueError("knn.k=[] must be one or more numbers of neighbours.")


def run(frozen: Frozen, data: LabelledSet, config: KnnConfig) -> Result:
    """Accuracy at the first of config.k, and at each. Several ranks share the images, and all get the result."""
    halves = both_halves(frozen, data, share=True)
    train, val = halves["train"], halves["val"]
    images = train.left_out.images - len(train.left_out)
    fitting = [config.k[0], *(k for k in config.k[1:] if k <= images)]
    by_k = knn_accuracy(train.last, train.labels, val.last, val.labels, fitting, config.temperature)
    found, accuracy = counted(halves, share=True), by_k[config.k[0]]
    return Result(
        value=accuracy,
        standard_error=of_share(accuracy, found["images"]["val"]),
        figures={f"k={n}": value for n, value in by_k.items()} | {"chance": 1 / len(_union(train.labels))},
        **found,
    )


def nearest(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and labels [N, k] of the nearest bank rows, nearest first; -inf where the bank has fewer rows."""
    if queries.device.type == "cpu" and len(bank) >= _LARGE and find_spec("faiss"):
        similarity, neighbours = _nearest_by_faiss(queries, bank, k)
    else:
        similarity, neighbours = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    missing = (0, k - similarity.shape[1])
    return F.pad(similarity, missing, value=-torch.inf), F.pad(labels[neighbours], missing)


def _nearest_by_faiss(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact as well, in two thirds of the time on a processor, and without the matrix of all cosines."""
    import faiss

    found = faiss.knn(queries.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def votes(
    similarity: Tensor, labels: Tensor, num_classes: int, k: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """Votes per class of each query's k nearest bank rows.

    Args:
        similarity, labels: of the nearest rows, [N, K], nearest first.
        k: numbers of neighbours, each at most K.

    Returns:
        k -> [N, num_classes]: sums of exp((cosine - largest cosine) / temperature) over the neighbours of that class.
    """
    # exp(s/T) overflows in no case here (|s| <= 1, T >= 0.012 in float32); the shift makes that true for every T.
    weights = torch.exp((similarity - similarity[:, :1]) / temperature)
    empty = weights.new_zeros(len(weights), num_classes)
    return {n: empty.scatter_add(1, labels[:, :n], weights[:, :n]) for n in k}


def _nearest_of_all_ranks(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`nearest` for the queries [N, D] of this rank, over the banks of all; N is the same on every rank.

    Every rank looks through its own bank for everyone's queries, so that no bank travels.
    """
    ranks = collectives.world_size()
    if ranks == 1:
        return nearest(queries, bank, labels, k)
    found = nearest(collectives.gather_with_grad(queries), bank, labels, k)
    answers = [torch.empty_like(part) for part in found]
    for answer, part in zip(answers, found, strict=True):
        dist.all_to_all_single(answer, part)
    # [ranks * N, k], one bank after another -> [N, ranks * k]
    similarity, names = (answer.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1) for answer in answers)
    similarity, places = similarity.topk(k, dim=1)
    return similarity, names.gather(1, places)


def knn_accuracy(
    train: Tensor,
    train_labels: Sequence[str],
    val: Tensor,
    val_labels: Sequence[str],
    k: Sequence[int],
    temperature: float,
) -> dict[int, float]:
    """k -> share of validation rows whose class gets the most votes.

    Of several ranks each gives its own rows, and all get the result over the rows of all.

    Args:
        train: [M, D], val: [N, D]; any length, normalised here in float32.

    Raises:
        ValueError: a set of fewer than two images or classes, a k beyond the number of training images, or labels that
            the sets do not share.
    """
    num_train, num_val = (sum(collectives.from_every_rank(len(rows))) for rows in (train, val))
    names, names_of_val = ([*_union(labels)] for labels in (train_labels, val_labels))
    if num_train < 2 or num_val < 2:
        raise ValueError(
            f"k-NN needs two images or more on both sides, found {num_train} that vote and {num_val} to classify."
        )
    if max(k) > num_train:
        raise ValueError(f"k={max(k)} neighbours asked for, but the training set has {num_train} images; lower knn.k.")
    for side, labels_there in (("training", names), ("validation", names_of_val)):
        if len(labels_there) < 2:
            raise ValueError(f"all images of the {side} set have the label {labels_there[0]!r}: any features would do.")
    number = {name: n for n, name in enumerate(names)}
    if not number.keys() & set(names_of_val):
        raise ValueError(f"no class of the validation set is in the training set, which has {', '.join(names[:5])} ...")
    dim = collectives.max_over_ranks(train.shape[1])
    device = train.device
    labels = torch.tensor([number[name] for name in train_labels], dtype=torch.int64, device=device)
    truth = torch.tensor([number.get(name, -1) for name in val_labels], dtype=torch.int64, device=device)
    bank = collectives.together(lambda: F.normalize(train.float(), dim=1) if len(train) else train.new_zeros(0, dim))
    correct = torch.zeros(len(k), dtype=torch.int64, device=device)
    size = -(-_ROWS // collectives.world_size())

    def classify(rows: slice | None) -> None:
        queries, true = (val[rows], truth[rows]) if rows is not None else (val[:0], truth[:0])
        padded = val.new_zeros(size, dim, dtype=torch.float32)
        if len(queries):
            padded[: len(queries)] = F.normalize(queries.float(), dim=1)
        similarity, names_found = _nearest_of_all_ranks(padded, bank, labels, max(k))
        voted = votes(similarity[: len(queries)], names_found[: len(queries)], len(names), k, temperature)
        correct.add_(torch.stack([(vote.argmax(dim=1) == true).sum() for vote in voted.values()]))

    collectives.in_step((slice(start, start + size) for start in range(0, len(val), size)), classify)
    collectives.sum_over_ranks(correct)
    return {n: count / num_val for n, count in zip(k, correct.tolist(), strict=True)}


def _union(names: Iterable[str]) -> list[str]:
    """All ranks' names, each once, in order."""
    return sorted(set[str]().union(*collectives.from_every_rank(set(names))))
