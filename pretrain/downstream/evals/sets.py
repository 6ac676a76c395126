"""The sets that evaluations take: a file of them, or one in words.

A file, `--data sets.yaml`, names sets; its paths are relative to itself:

    birds:    {kind: labelled, train: birds/train, val: birds/val}
    streets:  {kind: segmentation, train: streets/train-*.tar, val: streets/val-*.tar, classes: 11, ignore: [11]}
    oxford:   {kind: retrieval, queries: oxford/queries, database: oxford/images, truth: oxford.csv}

In words, of the kind that the evaluation takes: `--data train=birds/train val=birds/val`. Images lie in folders, tars,
Parquet files (also `hf://datasets/OWNER/NAME/...parquet` of the Hugging Face hub); see `labelled.LABELS` for labels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from configs.loader import read_yaml
from configs.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Images with a label each: some to learn from, others to classify."""

    train: str
    """images that teach or vote: path, glob or folder, several joined by commas"""
    val: str
    """images that are classified"""
    train_labels: str = ""
    """csv with columns key and label; empty: see labelled.LABELS"""
    val_labels: str = ""
    px: int = 0
    """side of the centre crop, in pixels; 0: that of the backbone"""
    resize_px: int = 0
    """shorter side before the crop, in pixels; 0: px x 256 / 224"""
    max_train_images: int = 0
    """first images only, of a folder of classes the first classes; 0: all"""
    max_val_images: int = 0

    def __post_init__(self) -> None:
        sizes = ("px", "resize_px", "max_train_images", "max_val_images")
        check_ranges("", self, **dict.fromkeys(sizes, "[0, inf)"))
        if 0 < self.resize_px < self.px:
            raise ValueError(f"resize_px={self.resize_px} is smaller than the crop px={self.px}.")


@dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """Query images, and a database in which each has pictures of the same thing."""

    queries: str
    """cropped to the thing that is looked for, as the revisited protocol has it"""
    database: str
    truth: str
    """csv with columns query, image (keys) and relation: easy, hard or junk; others of the database are negative"""
    px: int = 0


@dataclass(frozen=True, kw_only=True)
class CopySet:
    """Query images of which some are edited copies of a reference, and references."""

    queries: str
    references: str
    truth: str
    """csv with columns query and reference: keys, an empty reference where there is none"""
    background: str = ""
    """images that are no copies of anything, to normalise scores by; empty: no normalised figure"""
    px: int = 0


@dataclass(frozen=True, kw_only=True)
class SegmentationSet:
    """Images with a class for each pixel."""

    train: str
    """each image with its classes beside it: KEY.jpg and KEY.seg.png, 8 bits"""
    val: str
    classes: int
    """classes are numbered 0 to classes - 1"""
    ignore: list[int] = field(default_factory=lambda: [255])
    """other numbers in the maps, which are neither learned nor judged"""
    first: int = 0
    """the number of the first class in the maps: 1 where 0 means nothing, as in ADE20K, which then needs ignore=[0]"""
    train_maps: str = ""
    """a second folder, tar or Parquet column (FILE.parquet:COLUMN) that holds the maps under the same keys"""
    val_maps: str = ""
    px: int = 0
    """shorter side of the whole picture, in pixels; 0: twice the crop of the backbone"""

    def __post_init__(self) -> None:
        check_ranges("", self, classes="[2, 65535]", px="[0, inf)", first="[0, 1]", ignore="[0, 65535]")
        clash = [n for n in self.ignore if self.first <= n < self.first + self.classes]
        if clash:
            raise ValueError(
                f"ignore={self.ignore} has {clash[0]}, which is one of the classes {self.first} to "
                f"{self.first + self.classes - 1}."
            )


@dataclass(frozen=True, kw_only=True)
class DepthSet:
    """Images with a distance for each pixel."""

    train: str
    """each image with KEY.depth.png beside it: 16 bits, 0 where nothing was measured"""
    val: str
    unit_m: float = 0.001
    """metres of one step of the maps"""
    min_m: float = 0.001
    """the published range of NYU; what lies outside is neither learned nor judged"""
    max_m: float = 10.0
    train_maps: str = ""
    val_maps: str = ""
    px: int = 0
    """shorter side of the whole picture, in pixels; 0: twice the crop of the backbone"""

    def __post_init__(self) -> None:
        check_ranges("", self, unit_m="(0, inf)", min_m="(0, inf)", max_m="(0, inf)", px="[0, inf)")
        if self.min_m >= self.max_m:
            raise ValueError(f"min_m={self.min_m} must be below max_m={self.max_m}.")


@dataclass(frozen=True, kw_only=True)
class ObjectSet:
    """Images with the boxes of their objects."""

    val: str
    """each image with `boxes` in its json, [[left, top, right, bottom], ...] in pixels; or with KEY.seg.png beside it,
    whose segments are the objects: those that cover `least_share` of the picture and touch at most one of its sides"""
    least_share: float = 0.02
    px: int = 0
    """shorter side of the whole picture, in pixels; 0: twice the crop of the backbone"""

    def __post_init__(self) -> None:
        check_ranges("", self, least_share="(0, 1)", px="[0, inf)")


ImageSets = LabelledSet | RetrievalSet | CopySet | SegmentationSet | DepthSet | ObjectSet
KINDS: dict[str, type[Any]] = {
    "labelled": LabelledSet,
    "retrieval": RetrievalSet,
    "copies": CopySet,
    "segmentation": SegmentationSet,
    "depth": DepthSet,
    "objects": ObjectSet,
}
_PATHS = ("train", "val", "train_labels", "val_labels", "train_maps", "val_maps", "queries", "database", "references")
_PATHS += ("truth", "background")


def read_sets(path: Path) -> dict[str, ImageSets]:
    """name -> set, of a YAML file (see the top of this file).

    Raises:
        ValueError: an unreadable file, an unknown kind or key, a value out of range, or no set.
    """
    found = {}
    for name, entry in read_yaml(path).items():
        if not isinstance(entry, dict) or entry.get("kind") not in KINDS:
            raise ValueError(f"{path}: {name} needs a kind, one of {', '.join(KINDS)}.")
        words = {key: value for key, value in entry.items() if key != "kind"}
        try:
            made = _made(KINDS[entry["kind"]], words)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
        found[str(name)] = _relative_to(made, path.parent)
    if not found:
        raise ValueError(f"{path} names no set.")
    return found


def set_of_words(kind: str, words: Sequence[str]) -> ImageSets:
    """A set from `key=value` words.

    Raises:
        ValueError: an unknown or missing key, or a value that is none.
    """
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--data {word}: give a file that ends in .yaml, or key=value words.")
        values[key] = value if key in _PATHS else yaml.safe_load(value)
    return _made(KINDS[kind], values)


def _made(kind: type[Any], words: Mapping[str, Any]) -> Any:
    own = {f.name: f for f in fields(kind)}
    needed = [name for name, f in own.items() if f.default is MISSING and f.default_factory is MISSING]
    if unknown := sorted(set(words) - set(own)):
        raise ValueError(f"{unknown[0]} is unknown; this kind of set has {', '.join(own)}.")
    if missing := [name for name in needed if name not in words]:
        raise ValueError(f"give {' and '.join(missing)}; this kind of set has {', '.join(own)}.")
    for name, value in words.items():
        kind_of_value = own[name].type
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = {str: isinstance(value, str), int: is_number and float(value).is_integer(), float: is_number}
        if not fits.get(kind_of_value, isinstance(value, list)):
            raise ValueError(f"{name}={value!r} must be {_type_name(own[name].type)}.")
    return kind(**words)


def _type_name(kind: Any) -> str:
    return {str: "text", int: "a whole number", float: "a number"}.get(kind, "a list of numbers, as [255]")


def _relative_to(made: Any, folder: Path) -> Any:
    def placed(pattern: str) -> str:
        parts = [part.strip() for part in pattern.split(",")]
        return ",".join(part if "://" in part or not part else str(folder / part) for part in parts)

    return replace(made, **{name: placed(getattr(made, name)) for name in _PATHS if hasattr(made, name)})
