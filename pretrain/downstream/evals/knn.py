"""k-nearest-neighbour accuracy of frozen features: python -m pretrain.downstream.evals.knn EXPORT_OR_CHECKPOINT ...

Protocol of DINO (arXiv:2104.14294) and DINOv2 (arXiv:2304.07193): CLS token after the final norm, unit length; the k
training images with the highest cosine vote for their class with weight exp(cosine / 0.07); the class with the most
votes is the answer. One resize and centre crop, no augmentation, nothing learned.

    python -m pretrain.downstream.evals.knn RUN/teacher --train 'eval/train-*.tar' --val 'eval/val-*.tar' --px 224
    python -m pretrain.downstream.evals.knn --baseline pixels --train ... --val ...
    python -m pretrain.downstream.evals.knn RUN/teacher --baseline random --train ... --val ...
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from configs.messages import named_folder, sentence
from configs.ranges import check_ranges
from pretrain.distributed import collectives
from pretrain.distributed.collectives import choose_device
from pretrain.downstream.evals.labelled import LeftOut, batches
from pretrain.models.vision_transformer import Features as TokenFeatures
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.stopping import Stopped

BASELINES = ("pixels", "random")
_PIXELS = 16  # side of the thumbnail of the pixel baseline
_ROWS = 512  # validation rows compared at once: bounds the similarity matrix

Tokens = Callable[[Sequence[Tensor]], Sequence[TokenFeatures]]
"""normalised images, one group [B, 3, H, W] -> their tokens: a backbone, or the call of a wrapped one"""
Features = Callable[[Tensor], Tensor]
"""uint8 [B, 3, H, W] -> float [B, D]"""


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """A labelled training and validation set, and how they are compared."""

    train: str = ""
    """tars of the images that vote: path, glob or folder, several joined by commas"""
    val: str = ""
    """tars of the images that are classified"""
    train_labels: str = ""
    """csv with columns key and label; empty: the label of each sample's json"""
    val_labels: str = ""
    px: int = 224
    """side of the centre crop, in pixels"""
    resize_px: int = 0
    """shorter side before the crop, in pixels; 0: px x 256 / 224"""
    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    """numbers of neighbours; each gives a figure, and the first is the headline"""
    temperature: float = 0.07
    """of the votes; above 0"""
    max_train_images: int = 0
    """first images only; 0: all"""
    max_val_images: int = 0
    batch_size: int = 128
    """images through the backbone at once"""
    bfloat16: bool = False
    """run the backbone under bfloat16 autocast; moves the figure by noise"""

    def __post_init__(self) -> None:
        if not self.train or not self.val:
            raise ValueError("k-NN needs two labelled sets: give train and val.")
        ranges = dict.fromkeys(("px", "k", "batch_size"), "[1, inf)")
        ranges |= dict.fromkeys(("resize_px", "max_train_images", "max_val_images"), "[0, inf)")
        check_ranges("", self, **ranges | {"temperature": "(0, inf)"})
        if not self.k:
            raise ValueError("k=[] must be one or more numbers of neighbours.")
        if 0 < self.resize_px < self.px:
            raise ValueError(f"resize_px={self.resize_px} is smaller than the crop px={self.px}.")

    @property
    def short_side_px(self) -> int:
        return self.resize_px or round(self.px * 256 / 224)


def knn_votes(
    queries: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """Votes per class of each query's k nearest bank rows.

    Args:
        queries: [N, D] unit rows. bank: [M, D] unit rows. labels: int64 [M].
        k: numbers of neighbours, each at most M.

    Returns:
        k -> [N, num_classes]: sums of exp(cosine / temperature) over the neighbours of that class.
    """
    return _votes(*_nearest(queries, bank, labels, max(k)), num_classes, k, temperature)


def _nearest(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines and labels [N, k] of the nearest bank rows, nearest first; -inf where the bank has fewer rows."""
    similarity, neighbours = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    missing = (0, k - similarity.shape[1])
    return F.pad(similarity, missing, value=-torch.inf), F.pad(labels[neighbours], missing)


def _votes(
    similarity: Tensor, labels: Tensor, num_classes: int, k: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    # exp(s/T) overflows in no case here (|s| <= 1, T >= 0.012 in float32); the shift makes that true for every T.
    weights = torch.exp((similarity - similarity[:, :1]) / temperature)
    empty = weights.new_zeros(len(weights), num_classes)
    return {n: empty.scatter_add(1, labels[:, :n], weights[:, :n]) for n in k}


def _nearest_of_all_ranks(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`_nearest` for the queries [N, D] of this rank, over the banks of all; N is the same on every rank.

    Every rank looks through its own bank for everyone's queries, so that no bank travels.
    """
    ranks = collectives.world_size()
    if ranks == 1:
        return _nearest(queries, bank, labels, k)
    found = _nearest(collectives.gather_with_grad(queries), bank, labels, k)
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
        raise ValueError(f"k={max(k)} neighbours asked for, but the training set has {num_train} images.")
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
        voted = _votes(similarity[: len(queries)], names_found[: len(queries)], len(names), k, temperature)
        correct.add_(torch.stack([(vote.argmax(dim=1) == true).sum() for vote in voted.values()]))

    collectives.in_step((slice(start, start + size) for start in range(0, len(val), size)), classify)
    collectives.sum_over_ranks(correct)
    return {n: count / num_val for n, count in zip(k, correct.tolist(), strict=True)}


def _union(names: Iterable[str]) -> list[str]:
    """All ranks' names, each once, in order."""
    return sorted(set[str]().union(*collectives.from_every_rank(set(names))))


def extract(
    features: Features,
    config: KnnConfig,
    split: str,
    device: torch.device,
    left: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, list[str], LeftOut]:
    """Features [N, D] float32 of this rank's share of one split (`train` or `val`), its labels, and what of the whole
    set could not be used. The ranks go through their batches in step, so that features may come of a sharded network.

    Args:
        left: whether this rank is asked to stop.

    Raises:
        ValueError: no image, or more than MAX_LEFT_OUT of them damaged or without a label.
        Stopped: a rank was asked to stop.
    """
    rows, names, mine = [], [], LeftOut()
    pattern, labels_file = getattr(config, split), getattr(config, f"{split}_labels")
    reading = batches(
        pattern,
        config.px,
        config.short_side_px,
        config.batch_size,
        labels_file,
        getattr(config, f"max_{split}_images"),
        left_out=mine,
        rank=collectives.rank(),
        num_ranks=collectives.world_size(),
    )

    def embed(batch: tuple[Tensor, list[str]] | None) -> None:
        if batch is None:  # another rank needs this one's part of the network
            features(torch.zeros(1, 3, config.px, config.px, dtype=torch.uint8, device=device))
            return
        rows.append(features(batch[0].to(device, non_blocking=True)).float())
        names.extend(batch[1])

    if not collectives.in_step(reading, embed, left):
        raise Stopped
    left_out = LeftOut.of_all(collectives.from_every_rank(mine))
    left_out.check(pattern, labels_file)
    together = collectives.together(lambda: torch.cat(rows) if rows else torch.empty(0, 1, device=device))
    return together, names, left_out


def backbone_features(backbone: Tokens, mean: Sequence[float], std: Sequence[float], bfloat16: bool) -> Features:
    """The unit CLS token of a backbone in eval mode.

    Args:
        mean, std: per channel, of pixel values from 0 to 1.
    """

    # Not inference mode: what FSDP keeps from one forward to the next must serve training too.
    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        centre, scale = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
        with torch.autocast(images.device.type, torch.bfloat16) if bfloat16 else nullcontext():
            cls = backbone([(images.float() / 255 - centre) / scale])[0].cls
        return F.normalize(cls.float(), dim=-1)

    return features


def pixel_features(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> [B, 768]: 16 x 16 thumbnails, centred per image: cosine is then their correlation."""
    small = F.interpolate(images.float(), size=(_PIXELS, _PIXELS), mode="bilinear", antialias=True)
    flat = small.flatten(1)
    return flat - flat.mean(dim=1, keepdim=True)


def random_like(backbone: VisionTransformer, seed: int = 0) -> VisionTransformer:
    """A backbone of the same form with freshly drawn weights: what its features are worth without training.

    Layer scales are 1, not their first value of 1e-5, at which the CLS token is the same for every image and the
    figure is chance: 0.24 against 0.10 on CIFAR-10. The stronger floor is the honest one.
    """
    fresh = copy.deepcopy(backbone).cpu().float()
    fresh.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
    return fresh.to(next(backbone.parameters()).device).eval()


def evaluate(
    features: Features, config: KnnConfig, device: torch.device, left: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Accuracies of one kind of feature, as result.json has them: `accuracy` at the first of config.k, `by_k` at each.

    The first, and not the best, so that nothing is chosen by looking at the answers. `left_out` counts and names the
    images of each set that are damaged or have no label. Several ranks share the images, and all get the result.
    """
    train, train_labels, train_left_out = extract(features, config, "train", device, left)
    val, val_labels, val_left_out = extract(features, config, "val", device, left)
    left_out = {"train": train_left_out, "val": val_left_out}
    by_k = knn_accuracy(train, train_labels, val, val_labels, config.k, config.temperature)
    return {
        "accuracy": by_k[config.k[0]],
        "by_k": {str(n): value for n, value in by_k.items()},
        "num_train": left_out["train"].images - len(left_out["train"]),
        "num_val": left_out["val"].images - len(left_out["val"]),
        "num_classes": len(_union(train_labels)),
        "left_out": {split: {"images": len(those), "first": those.names} for split, those in left_out.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.downstream.evals.knn", description="k-nearest-neighbour accuracy of frozen features."
    )
    parser.add_argument("backbone", nargs="?", help="export, checkpoint or run folder; not needed for pixels")
    parser.add_argument("--architecture", default="", help="of a released file, which does not say")
    parser.add_argument("--train", required=True, help="labelled tars that vote: path, glob or folder")
    parser.add_argument("--val", required=True, help="labelled tars to classify")
    parser.add_argument("--train-labels", default="", help="csv with columns key,label; default: the json members")
    parser.add_argument("--val-labels", default="")
    parser.add_argument("--baseline", choices=BASELINES, help="raw pixels, or the same architecture untrained")
    parser.add_argument("--px", type=int, help="side of the crop (default: that of the backbone; 224 for pixels)")
    parser.add_argument("--resize-px", type=int, default=0, help="shorter side before it (default: px x 256 / 224)")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument("--temperature", type=float, default=0.07)
    parser.add_argument("--max-train-images", type=int, default=0)
    parser.add_argument("--max-val-images", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--out", type=named_folder, help="where to write result.json (default: only shown)")
    asked = vars(parser.parse_args(arguments))
    try:
        result = _run(**asked)
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    for split, those in result["left_out"].items():
        if those["images"]:
            print(f"{split}: {those['images']} images left out: {', '.join(those['first'])}", file=sys.stderr)
    print(json.dumps(result, indent=1))
    return 0


def _run(
    *,
    backbone: str | None,
    architecture: str,
    baseline: str | None,
    px: int | None,
    device: str,
    out: Path | None,
    **settings: Any,
) -> dict[str, Any]:
    where = choose_device(device, "--device")
    if baseline == "pixels":
        config = KnnConfig(px=224 if px is None else px, **settings)
        features: Features = pixel_features
    elif backbone is None:
        raise ValueError("name an export, checkpoint or run folder, or ask for --baseline pixels.")
    else:
        from pretrain.downstream.backbone import load_backbone

        loaded = load_backbone(backbone, architecture)
        model = loaded.model.to(where)
        model = random_like(model) if baseline == "random" else model
        config = KnnConfig(px=loaded.image.px if px is None else px, **settings)
        features = backbone_features(model, loaded.image.mean, loaded.image.std, config.bfloat16)
    kind = baseline or "backbone"
    result = {"eval": "knn", "features": kind, "backbone": backbone, **evaluate(features, config, where)}
    result["config"] = asdict(config)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    sys.exit(main())
