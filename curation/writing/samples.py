"""What one sample of a shard holds: the same members, of the same types, whatever the pool's samples came with.

Readers infer a schema from the first samples and decode members by their suffix, so every sample of a run has an image
`jpeg`, a `json` with the fields of ABOUT and a `txt`; a `cls` where any kept sample had one; and an `others.tar` where
any had members of other kinds. What a reader would stumble over never stands under a name that it decodes.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.writing.tars import ShardBuilder, safe_suffix

# Every format goes by this one name: readers recognise images by content. `jpg` would be read too, but Ray then
# decodes by itself and refuses a file that holds both grey and coloured images.
IMAGE_SUFFIX = "jpeg"
OTHERS_SUFFIX = "others.tar"
MAX_TEXT_BYTES = 1 << 20
"""a longer .txt is no caption, and is carried with the other members"""
MAX_LABEL_BYTES = 64

ABOUT: dict[str, Any] = {
    "gid": -1,  # row number of the image in its set
    "set": "",  # "pool", or "seed:NAME" for a seed set that is included as it is
    "key": "",  # as the pool had it
    "format": "",  # of the bytes, whatever the suffix says: JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF ...
    "width": 0,  # pixels, upright
    "height": 0,
    "sha256": "",  # of the image's bytes in this shard
    "sha256_original": "",  # of the source's; another one only where an edit changed the bytes
    "edited_by": "",  # the edits that did, joined by ", "
    "source": "",  # tar, Parquet file or folder that the image came from
    "offset": -1,  # byte there; in Parquet the row
    "size": -1,  # bytes there
    "reason": "",  # why it was kept, as in decisions.parquet, as are the next six
    "seed": "",
    "seed_match": "",
    "similarity": -2.0,  # a cosine; -2 where there is none
    "cluster": -1,
    "component": -1,
    "component_size": 1,
    "draws": {},  # how many draws of each seed set, and of balance, it answers
    "original": "",  # the source's own metadata, as the text of a JSON object
    "text_encoding": "",  # of the source's .txt: utf-8, else latin-1, which takes any bytes; empty where it had none
    "label_text": "",  # the source's .cls as it was, where the member `cls` has -1 for what is no integer
    "left_out": "",  # members larger than a whole shard, left where they were: a JSON list of names
}
"""Fields of the .json, with what stands there where an image has nothing to say: one type each, and never null."""


@dataclass(frozen=True)
class Layout:
    """What the samples of one run have beside image, .json and .txt; the same for all shards of the run."""

    has_label: bool
    has_others: bool
    draw_names: tuple[str, ...]
    """seed sets and "balance": the fields of `draws`"""
    max_member_bytes: int
    """a larger member beside the image is left out, and named in `left_out`"""


@dataclass(frozen=True)
class ShardSample:
    """One sample, whatever the file format."""

    key: str
    """safe as a file name, unique in the run"""
    image: bytes
    about: dict[str, Any]
    """every field of ABOUT"""
    text: str = ""
    label: int | None = None
    others: Sequence[tuple[str, bytes]] = ()
    """(suffix, content) of members that have no place of their own"""


@dataclass
class Roles:
    """What becomes of the members beside an image; values are positions in the list of members."""

    text: int | None = None
    label: int | None = None
    carried: list[int] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)


def assign_roles(suffixes: Sequence[str], sizes: Sequence[int], has_metadata: bool, max_member_bytes: int) -> Roles:
    """The first .txt is the caption, the first .cls the label; the last .json stands in the new one where it was an
    object (has_metadata). The rest is carried as it is, or left out where it is larger than max_member_bytes."""
    roles = Roles()
    kinds = [_kind(suffix, size) for suffix, size in zip(suffixes, sizes, strict=True)]
    metadata = len(kinds) - 1 - kinds[::-1].index("json") if has_metadata and "json" in kinds else None
    for position, kind in enumerate(kinds):
        if position == metadata:
            continue
        if kind == "txt" and roles.text is None:
            roles.text = position
        elif kind == "cls" and roles.label is None:
            roles.label = position
        elif sizes[position] > max_member_bytes:
            roles.left_out.append(position)
        else:
            roles.carried.append(position)
    return roles


def find_layout(tables: Iterable[pa.Table], draw_names: Sequence[str], max_member_bytes: int) -> Layout:
    """The layout that index rows (columns `others` and `metadata`) of all kept images ask for; no object an image."""
    has_label = has_others = False
    for table in tables:
        if has_label and has_others:
            break
        flat, parents = flatten_members(table)
        suffixes, sizes = pc.ascii_lower(flat.field("suffix")), flat.field("size").to_numpy()  # type: ignore[attr-defined]  # no stubs
        is_json = _equals(suffixes, "json")
        is_text = _equals(suffixes, "txt") & (sizes <= MAX_TEXT_BYTES)
        is_label = _equals(suffixes, "cls") & (sizes <= MAX_LABEL_BYTES)
        has_label |= bool(is_label.any())

        def per_sample(which: np.ndarray, parents: np.ndarray = parents, rows: int = table.num_rows) -> np.ndarray:
            return np.bincount(parents[which], minlength=rows)

        has_metadata = table["metadata"].is_valid().to_numpy(zero_copy_only=False)
        has_others |= bool(
            (~(is_json | is_text | is_label) & (sizes <= max_member_bytes)).any()
            or (per_sample(is_text) > 1).any()
            or (per_sample(is_label) > 1).any()
            or (per_sample(is_json) > has_metadata).any()
        )
    return Layout(has_label, has_others, tuple(draw_names), max_member_bytes)


def sample_bytes(table: pa.Table, max_member_bytes: int) -> np.ndarray:
    """int64 [rows]: about how many bytes each sample takes in a tar, headers and padding included."""
    flat, parents = flatten_members(table)
    sizes = flat.field("size").to_numpy()
    beside = np.bincount(parents, np.where(sizes <= max_member_bytes, 1024 + sizes, 0), table.num_rows)
    image = pc.struct_field(table["image"].combine_chunks(), "size").to_numpy()
    return 3072 + image + beside.astype(np.int64)


def flatten_members(table: pa.Table) -> tuple[pa.StructArray, np.ndarray]:
    """The `others` of all rows one after another, and the row of each."""
    lists = table["others"].combine_chunks()
    return pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()


def read_text(content: bytes) -> tuple[str, str]:
    """Text and its encoding. Every byte can be had back: text.encode(encoding) == content."""
    try:
        return content.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return content.decode("latin-1"), "latin-1"


def read_label(text: str) -> int:
    """The integer that a .cls holds; -1 for what is none, or none of 64 bits."""
    digits = text.strip()
    return int(digits) if digits.removeprefix("-").isdecimal() and digits.isascii() and len(digits) <= 18 else -1


def complete(about: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Every field of ABOUT, with its default where nothing was said."""
    assert about.keys() <= ABOUT.keys(), about.keys() - ABOUT.keys()
    said = {name: value for name, value in about.items() if value is not None}
    draws = said.get("draws", {})
    said["draws"] = {name: draws.get(name) or 0 for name in layout.draw_names}
    return {**ABOUT, **said}


def tar_members(sample: ShardSample, layout: Layout) -> list[tuple[str, bytes]]:
    """(suffix, content) of a sample's members in a tar, the image first."""
    members = [
        (IMAGE_SUFFIX, sample.image),
        ("json", json.dumps(sample.about, ensure_ascii=False, sort_keys=True).encode()),
        ("txt", sample.text.encode()),
    ]
    if layout.has_label:
        members.append(("cls", str(-1 if sample.label is None else sample.label).encode()))
    if layout.has_others:
        members.append((OTHERS_SUFFIX, pack_others(sample)))
    return members


def pack_others(sample: ShardSample) -> bytes:
    """The members that have no place of their own as a tar of KEY.SUFFIX; no bytes at all where there are none."""
    if not sample.others:
        return b""
    taken: set[str] = set()
    members = []
    for suffix, content in sample.others:
        name = safe_suffix(suffix)
        while name in taken:
            name = f"other.{name}"
        taken.add(name)
        members.append((name, content))
    builder = ShardBuilder()
    builder.add(sample.key, members)
    return bytes(builder.finish())


def unpack_others(packed: bytes) -> dict[str, bytes]:
    """suffix -> content of what `pack_others` made."""
    if not packed:
        return {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        return {m.name.rpartition("/")[2].partition(".")[2]: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]  # pack_others writes files alone


def _kind(suffix: str, size: int) -> str:
    kind = suffix.lower()
    if (kind == "txt" and size > MAX_TEXT_BYTES) or (kind == "cls" and size > MAX_LABEL_BYTES):
        return ""
    return kind if kind in ("json", "txt", "cls") else ""


def _equals(values: pa.Array, word: str) -> np.ndarray:
    return pc.equal(values, word).to_numpy(zero_copy_only=False)
