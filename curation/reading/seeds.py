"""Seed sets: the files of configs/seeds/ with the published modes and counts, or any path."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.loader import config_names, load_config
from configs.ranges import check_ranges

SEED_ROOT_VARIABLE = "SEEDBED_SEED_ROOT"
MODES = ("sample", "cluster", "none")
COLLISIONS = ("keep", "drop", "next_neighbor")


@dataclass(frozen=True, kw_only=True)
class RetrievalRule:
    """How a seed set draws images from the pool. Source: DINOv2, arXiv:2304.07193, sec. 3 and Table 15."""

    mode: str = "sample"
    """sample: the k nearest pool images of each seed image; cluster: images of the clusters that the seed set hits;
    none: nothing is drawn (a set that is only included as it is)"""
    k: int = 4
    """sample: pool images per seed image"""
    collisions: str = "keep"
    """sample: when two seed images want one pool image: keep (each counts it, so fewer distinct images), drop (the
    nearer seed image has it), next_neighbor (the other goes deeper in its list until it has k)"""
    target_recall: float = 0.99
    """sample: of the nearest pool images, against brute force, to be certified with 95% confidence; sets of up to 1,024
    images are compared with the whole pool anyway"""
    min_similarity: float = -1.0
    """sample: least cosine between a seed image and what it draws"""
    min_hits: int = 4
    """cluster: seed images that a cluster needs; published: more than 3"""
    images_per_cluster: int = 10_000
    """cluster: images drawn from each such cluster, at most"""
    max_images: int = 1_000_000
    """cluster: images drawn for the whole set, at most"""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"retrieve mode {self.mode!r} is unknown; choose {', '.join(MODES)}.")
        if self.collisions not in COLLISIONS:
            raise ValueError(f"retrieve collisions {self.collisions!r} is unknown; choose {', '.join(COLLISIONS)}.")
        counts = dict.fromkeys(("k", "min_hits", "images_per_cluster", "max_images"), "[1, inf)")
        check_ranges("retrieve", self, **counts, target_recall="(0, 1)", min_similarity="[-1, 1]")


@dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """One file of configs/seeds/."""

    description: str = ""
    urls: list[str] = field(default_factory=list)
    """where the images lie; `{root}` is --seed-root or $SEEDBED_SEED_ROOT; empty: {root}/<name>"""
    include_as_is: bool = False
    """write the seed images themselves to the shards too"""
    retrieve: RetrievalRule = field(default_factory=RetrievalRule)
    published: dict[str, Any] = field(default_factory=dict)
    """counts of the LVD-142M table, for comparison only"""


@dataclass(frozen=True, kw_only=True)
class SeedSet:
    """A seed set located: its name, its URLs, how it draws."""

    name: str
    urls: tuple[str, ...]
    rule: RetrievalRule
    include_as_is: bool = False


def locate_seed(name_or_path: str, seed_root: str | None, rule: RetrievalRule) -> SeedSet:
    """A name in configs/seeds/, a seed YAML file, or any path or URL of images (which then draws by `rule`).

    Raises:
        ValueError: an unknown name, or a known one whose images cannot be located.
    """
    known = config_names("seeds")
    is_file = name_or_path.endswith((".yaml", ".yml"))
    if name_or_path in known or is_file:
        config = load_config(SeedConfig, "seeds", name_or_path)
        name = Path(name_or_path).stem if is_file else name_or_path
        root = seed_root or os.environ.get(SEED_ROOT_VARIABLE)
        urls = config.urls or ["{root}/" + name]
        if any("{root}" in url for url in urls) and not root:
            raise ValueError(
                f"seed {name!r} is known, but not where its images are: pass --seed-root PATH (they are expected in "
                f"PATH/{name}), or set {SEED_ROOT_VARIABLE}."
            )
        return SeedSet(
            name=name,
            urls=tuple(url.replace("{root}", str(root)) for url in urls),
            rule=config.retrieve,
            include_as_is=config.include_as_is,
        )
    if _looks_like_path(name_or_path):
        return SeedSet(name=set_name(name_or_path), urls=(name_or_path,), rule=rule)
    raise ValueError(
        f"unknown seed {name_or_path!r}: give demo, one of {', '.join(known)}, or a path or URL of tars, Parquet files "
        "or a folder of images."
    )


def set_name(url: str, taken: Sequence[str] = ()) -> str:
    """A short name for a set given by URL: its last path component without suffix, numbered when taken."""
    parts = [part for part in url.replace("\\", "/").split("/") if part and not any(c in part for c in "*{?[")]
    stem = (parts[-1] if parts else "images").split(".")[0] or "images"
    name = "".join(c if c.isalnum() or c in "_-" else "-" for c in stem)
    number = 2
    while name in taken:
        name = f"{name.rsplit('~', 1)[0]}~{number}"
        number += 1
    return name


def _looks_like_path(text: str) -> bool:
    return "/" in text or "://" in text or os.path.exists(text) or any(c in text for c in "*?[{")
