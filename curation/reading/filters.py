"""Which decodable images are not worth having: a list of rules in the config, applied to the index or to pixels.

A pixel filter, `{kind: pixels, path: package.module:name, options: {...}}`, is one of

- a function `f(images, rows) -> reasons`, `options` as further keywords;
- a class, built once a process as `C(device=..., **options)` and then called as such a function: it may hold a model;
- a class that also has a class method `view(**options)`, which gives the `View` (curation/encoders/load.py) that its
  model wants. It is built once an actor, beside the encoders and on their device, "cuda" or "cpu".

`images` are whole upright RGB pictures, a list of uint8 [H, W, 3], shown in the decode tasks on a processor; or, with
`view`, one array uint8 [B, h, w, 3], made in the decode tasks as those of encoders are, so that whole pictures need not
travel. `rows` are the images' rows of the index, as mappings. `reasons` holds for each image a word why it is rejected,
or None. How many images come at a time, up to `embed.batch_size`, must not change the answer. Filters of whole pictures
are asked before those of views, and each is asked only about what those before it let pass.

A class may have a class method `fingerprint(**options)`, a text that changes when its weights do: path, options and
that decide whether embedded parts are kept.
"""

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.ranges import check_ranges

PixelFilter = Callable[[Any, Sequence[dict[str, Any]]], Sequence[str | None]]
BytesEdit = Callable[[bytes, dict[str, Any]], bytes]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Reject images whose short side is below `min_side_px` or long side above `max_side_px`."""

    kind: ClassVar[str] = "size"
    min_side_px: int = 16
    max_side_px: int = 65_500

    def __post_init__(self) -> None:
        check_ranges("filters: size", self, min_side_px="[0, inf)", max_side_px="[1, inf)")
        if self.min_side_px > self.max_side_px:
            raise ValueError(
                f"filters: size.min_side_px={self.min_side_px} is above max_side_px={self.max_side_px}: nothing passes."
            )

    def reasons(self, index: pa.Table) -> list[tuple[str, np.ndarray]]:
        short = np.minimum(_numbers(index, "width"), _numbers(index, "height"))
        long = np.maximum(_numbers(index, "width"), _numbers(index, "height"))
        return [("too_small", short < self.min_side_px), ("too_long", long > self.max_side_px)]


@dataclass(frozen=True, kw_only=True)
class Aspect:
    """Reject images whose long side is more than `max_ratio` times the short one."""

    kind: ClassVar[str] = "aspect"
    max_ratio: float = 8.0

    def __post_init__(self) -> None:
        check_ranges("filters: aspect", self, max_ratio="[1, inf)")

    def reasons(self, index: pa.Table) -> list[tuple[str, np.ndarray]]:
        width, height = _numbers(index, "width"), _numbers(index, "height")
        ratio = np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)
        return [("extreme_aspect", ratio > self.max_ratio)]


@dataclass(frozen=True, kw_only=True)
class Blank:
    """Reject images with nothing to see: brightness deviates by less than this (0..127.5) over the picture."""

    kind: ClassVar[str] = "blank"
    min_luma_deviation: float = 2.0

    def __post_init__(self) -> None:
        check_ranges("filters: blank", self, min_luma_deviation="[0, 127.5]")

    def reasons(self, index: pa.Table) -> list[tuple[str, np.ndarray]]:
        return [("blank", _numbers(index, "luma_deviation") < self.min_luma_deviation)]


@dataclass(frozen=True, kw_only=True)
class Blocklist:
    """Reject what a text file lists, one a line: keys, sha256 digests (hex), or domains of the metadata's url."""

    kind: ClassVar[str] = "blocklist"
    of: str
    """key, sha256 or domain"""
    path: str
    """a text file at any fsspec URL"""
    url_column: str = "url"

    def __post_init__(self) -> None:
        if self.of not in ("key", "sha256", "domain"):
            raise ValueError(f"filters: a blocklist is of key, sha256 or domain, not of {self.of!r}.")

    def reasons(self, index: pa.Table) -> list[tuple[str, np.ndarray]]:
        listed = self._listed()
        if self.of == "domain":
            hits = [_in_domains(_metadata(text).get(self.url_column), listed) for text in index["metadata"].to_pylist()]
            return [("blocked_domain", np.array(hits, bool))]
        values = (
            index["key"].to_pylist() if self.of == "key" else [v.hex() if v else "" for v in _list(index, "sha256")]
        )
        return [(f"blocked_{self.of}", np.array([value in listed for value in values], bool))]

    def digest(self) -> str:
        """Hex digest of what the file lists: another list is another result."""
        return hashlib.sha256("\n".join(sorted(self._listed())).encode()).hexdigest()

    def _listed(self) -> frozenset[str]:
        try:
            with fsspec.open(self.path, "rt", encoding="utf-8") as file:
                return frozenset(line.strip() for line in file if line.strip() and not line.startswith("#"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"filters: the blocklist {self.path!r} cannot be read: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class Score:
    """Keep images whose metadata field `column` lies in [min, max]; without the field, as `missing` says."""

    kind: ClassVar[str] = "score"
    column: str
    min: float = -float("inf")
    max: float = float("inf")
    missing: str = "keep"
    """keep or reject"""

    def __post_init__(self) -> None:
        if self.missing not in ("keep", "reject"):
            raise ValueError(f"filters: score.missing is keep or reject, not {self.missing!r}.")
        if not self.min <= self.max:  # NaN too
            raise ValueError(f"filters: score.min={self.min} and score.max={self.max} leave nothing between them.")

    def reasons(self, index: pa.Table) -> list[tuple[str, np.ndarray]]:
        values = [_metadata(text).get(self.column) for text in index["metadata"].to_pylist()]
        numeric = [isinstance(v, int | float) and not isinstance(v, bool) for v in values]
        score = np.array([float(v) if ok else np.nan for v, ok in zip(values, numeric, strict=True)], float)
        outside = (score < self.min) | (score > self.max)
        return [
            (f"score_{self.column}", outside),
            (f"no_score_{self.column}", np.isnan(score) & (self.missing == "reject")),
        ]


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Ask a function or a model about pixels during the one decode: NSFW, quality and the like (module docstring)."""

    kind: ClassVar[str] = "pixels"
    path: str
    """package.module:name"""
    options: dict = field(default_factory=dict)
    """keywords for it"""

    def function(self) -> Any:
        """What `path` names."""
        return import_callable(self.path)

    def build(self, device: str) -> PixelFilter:
        """What to call with pictures and rows; a class is built once in this process."""
        return _built(self.path, json.dumps(self.options, sort_keys=True), device)

    def view(self) -> Any:
        """The `View` that it wants; None: it sees whole pictures."""
        return self._asked("view")

    def settings(self) -> Any:
        """What its answers depend on, for a stage's key."""
        fingerprint = self._asked("fingerprint")
        if not self.options and fingerprint is None:
            return self.path
        return {"path": self.path, "options": self.options, "fingerprint": fingerprint}

    def _asked(self, name: str) -> Any:
        """What a class method of that name says; None where there is none."""
        method = getattr(self.function(), name, None)
        try:
            return method(**self.options) if method is not None else None
        except TypeError as error:
            raise ValueError(f"filters: {self.path} does not take options {self.options}: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Change an image's bytes as it is written to a shard (blurring faces): the one exception to original bytes.

    `path` names `f(content: bytes, row: dict) -> bytes`; the sample's .json then says so, with both digests.
    """

    kind: ClassVar[str] = "edit"
    path: str
    """package.module:function"""

    def function(self) -> BytesEdit:
        return import_callable(self.path)


Filter = Size | Aspect | Blank | Blocklist | Score | Pixels | Edit
_KINDS: dict[str, type] = {f.kind: f for f in (Size, Aspect, Blank, Blocklist, Score, Pixels, Edit)}


def build_filters(entries: Sequence[dict[str, Any]]) -> list[Filter]:
    """The config's list of mappings (`kind:` and that kind's fields) -> filters.

    Raises:
        ValueError: an unknown kind or field, a missing field, or a value that a filter refuses.
    """
    filters = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or entry.get("kind") not in _KINDS:
            raise ValueError(f"filters: {entry!r} needs a `kind`, one of {', '.join(_KINDS)}.")
        schema = _KINDS[entry["kind"]]
        known = {f.name: f for f in fields(schema)}
        given = {name: value for name, value in entry.items() if name != "kind"}
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"filters: {entry['kind']} knows {', '.join(known)}, not {', '.join(unknown)}.")
        missing = [n for n, f in known.items() if f.default is f.default_factory is MISSING and n not in given]
        if missing:
            raise ValueError(f"filters: {entry['kind']} needs {', '.join(missing)}.")
        filters.append(schema(**{name: _typed(f"filters.{number}.{name}", given[name], known[name]) for name in given}))
    return filters


def _typed(label: str, value: Any, parameter: Field) -> Any:
    """A parameter's value, if it is of the kind that its default or annotation says."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if parameter.type is int and not (is_number and float(value).is_integer()):
        raise ValueError(f"{label}={value!r} must be a whole number.")
    if parameter.type is float and not is_number:
        raise ValueError(f"{label}={value!r} must be a number.")
    if parameter.type is str and not (isinstance(value, str) and value):
        raise ValueError(f"{label}={value!r} must be text.")
    if parameter.type is dict and not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
        raise ValueError(f"{label}={value!r} must be a mapping of names to values.")
    return parameter.type(value)  # type: ignore[operator]  # annotations are types in this module


def first_reasons(index: pa.Table, filters: Sequence[Filter]) -> np.ndarray:
    """The first reason, in the list's order, why each row of the index is rejected; None where it is not.

    Rows that the index rejected already keep their reason. Returns objects [N].
    """
    reasons = np.array(index["reason"].to_pylist(), dtype=object)
    decoded = np.asarray(pc.equal(index["status"], "ok").to_numpy(zero_copy_only=False), bool)
    for rule in filters:
        if isinstance(rule, Pixels | Edit):
            continue  # asked while decoding, applied while writing
        for reason, hit in rule.reasons(index):
            reasons[decoded & hit & (reasons == None)] = reason  # noqa: E711  elementwise on objects
    return reasons


def first_refusals(
    filters: Sequence[tuple[Pixels, PixelFilter]],
    rows: Sequence[dict[str, Any]],
    pictures: Callable[[int, list[int]], Any],
) -> list[str | None]:
    """The first reason why a pixel filter rejects each image, None where none does.

    Args:
        pictures: (number of the filter, which rows) -> what that filter sees of them.

    Raises:
        ValueError: a filter failed, or gave something else than a reason for each; names it and the images.
    """
    reasons: list[str | None] = [None] * len(rows)
    for number, (rule, function) in enumerate(filters):
        left = [i for i, reason in enumerate(reasons) if reason is None]
        if not left:
            break
        asked = [rows[i] for i in left]
        among = f"among {asked[0]['key']!r} to {asked[-1]['key']!r} of {asked[0]['source']}"
        try:
            answer = list(function(pictures(number, left), asked))
        except Exception as error:
            raise ValueError(f"filters: {rule.path} failed {among}: {type(error).__name__}: {error}") from None
        if len(answer) != len(left):
            raise ValueError(f"filters: {rule.path} gave {len(answer)} answers for {len(left)} images, {among}.")
        for i, reason in zip(left, answer, strict=True):
            reasons[i] = str(reason) if reason is not None else None
    return reasons


@functools.cache
def _built(path: str, options: str, device: str) -> PixelFilter:
    named, keywords = import_callable(path), json.loads(options)
    if not isinstance(named, type):
        return functools.partial(named, **keywords)
    try:
        return named(device=device, **keywords)
    except TypeError as error:
        raise ValueError(f"filters: {path} is not built with device and {keywords}: {error}.") from None


def import_callable(path: str) -> Any:
    """package.module:function -> the function.

    Raises:
        ValueError: not of that form, or not to be imported.
    """
    module, colon, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"filters: cannot import {path!r}: {error}.") from None
    if not callable(function):
        raise ValueError(f"filters: {path!r} must name a function as package.module:function.")
    return function


def _numbers(index: pa.Table, column: str) -> np.ndarray:
    return index[column].to_numpy(zero_copy_only=False).astype(np.float64)


def _list(index: pa.Table, column: str) -> list[Any]:
    return index[column].to_pylist()


def _metadata(text: str | None) -> dict[str, Any]:
    return json.loads(text) if text else {}


def _in_domains(url: Any, domains: frozenset[str]) -> bool:
    if not isinstance(url, str):
        return False
    try:
        host = (urlsplit(url).hostname or "").lower()
    except ValueError:  # the pool's urls are hostile too
        return False
    labels = host.split(".")
    return any(".".join(labels[i:]) in domains for i in range(len(labels)))
