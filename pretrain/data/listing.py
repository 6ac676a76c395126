"""What one source holds: for every usable image of it where it lies, as arrays; and how many are refused, and why."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.reading.parquet import ParquetTable
from curation.reading.places import open_file
from pretrain.data.decode import IMAGE_SUFFIXES, ImageLimits
from pretrain.data.sources import Shard, Source
from pretrain.data.tars import BLOCK, scan

_MOST = (1 << 32) - 1
_LARGE_GROUP_BYTES = 32 << 20
_READ_AHEAD = 8 << 20
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listing:
    """The images of one source, in its order. N images."""

    shard: Shard
    blocks: np.ndarray
    """uint32 [N]: where an image begins, in blocks of its shard (`block_bytes`); of rows the row; of files the place of
    its name in `names`"""
    sizes: np.ndarray
    """uint32 [N], bytes; of rows those of the images of its row group, which have to be read for it"""
    refused: Counter[str]
    names: bytes = b""
    """of files: each one's name and a zero byte"""


def list_images(source: Source, limits: ImageLimits) -> Listing:
    """Tars without an index are scanned, header by header: for a remote tar that reads all of it once.

    Raises:
        ValueError: an index of curation that is none.
        OSError: a tar or an index that cannot be read.
    """
    if source.shard.kind == "files":
        return _files(source, limits)
    if source.shard.kind == "rows":
        return _rows(source)
    return _ranges(source, limits)


def block_bytes(shard: Shard) -> int:
    """Bytes of the blocks that offsets are counted in."""
    return BLOCK if shard.kind == "tar" else 1


def _ranges(source: Source, limits: ImageLimits) -> Listing:
    refused: Counter[str] = Counter()
    url = source.shard.url
    if source.index is not None:
        offsets, sizes = _read_index(source.index)
    else:
        with open_file(url, block_size=_READ_AHEAD) as file:
            offsets, sizes, damage = scan(file, source.size, IMAGE_SUFFIXES)
        if damage:
            refused["damaged_shard"] += 1
            _logger.warning("%s is damaged, and %d of its images are used: %s.", url, len(sizes), damage)
    block = block_bytes(source.shard)
    good = _kept(
        {
            "misplaced": (offsets % block != 0) | (offsets < block) | (offsets // block > _MOST),
            **_by_size(sizes, limits),
            "truncated": offsets + sizes > source.size,
        },
        refused,
    )
    return Listing(source.shard, (offsets[good] // block).astype(np.uint32), sizes[good].astype(np.uint32), refused)


def _files(source: Source, limits: ImageLimits) -> Listing:
    refused = Counter({"unsupported_format": source.unsupported} if source.unsupported else {})
    sizes = np.array(source.sizes, np.int64)
    good = _kept({"unreadable": sizes < 0, **_by_size(sizes, limits)}, refused)
    names = [source.names[i].encode() + b"\0" for i in np.flatnonzero(good).tolist()]
    places = np.concatenate([[0], np.cumsum([len(name) for name in names])])
    if places[-1] > _MOST:
        raise ValueError(f"{source.shard.url} has more than 4 GB of file names: pack its images into tars.")
    return Listing(source.shard, places[:-1].astype(np.uint32), sizes[good].astype(np.uint32), refused, b"".join(names))


def _rows(source: Source) -> Listing:
    url, none = source.shard.url, np.zeros(0, np.uint32)
    try:
        with open_file(url) as file:
            table = ParquetTable(file)
            starts, column = table.group_starts, table.image_column()
            groups = [] if column is None else [table.column_bytes(group, column) for group in range(table.num_groups)]
    except Exception as error:  # a damaged file can raise anything out of the reader
        _logger.warning("%s is damaged, and none of its images are used: %s.", url, " ".join(str(error).split()))
        return Listing(source.shard, none, none, Counter(damaged_shard=1))
    counts = np.diff(starts)
    if starts[-1] > min(source.size, _MOST) or (counts < 0).any():  # a footer may claim anything
        _logger.warning("%s is damaged: %d bytes claim to be %d rows.", url, source.size, starts[-1])
        return Listing(source.shard, none, none, Counter(damaged_shard=1))
    if column is None:
        return Listing(source.shard, none, none, Counter(no_image_column=starts[-1]))
    is_empty = np.array([size is None for size in groups], bool)
    sizes = np.array([min(max(size or 0, 1), _MOST) for size in groups], np.uint32)
    if len(sizes) and sizes.max() > _LARGE_GROUP_BYTES:
        _logger.warning(
            "%s has %d MB of images in a row group, all of which is read for each: write it with row groups of about "
            "100 images, or pack it into tars",
            url,
            sizes.max() >> 20,
        )
    good = np.repeat(~is_empty, counts)
    refused: Counter[str] = Counter()
    if not good.all():
        refused["no_image"] = int((~good).sum())
    rows = np.arange(starts[-1], dtype=np.uint32)
    return Listing(replace(source.shard, column=column), rows[good], np.repeat(sizes, counts)[good], refused)


def _by_size(sizes: np.ndarray, limits: ImageLimits) -> dict[str, np.ndarray]:
    return {"empty": sizes < 1, "file_too_large": sizes > min(limits.max_file_bytes, _MOST)}


def _kept(reasons: dict[str, np.ndarray], refused: Counter[str]) -> np.ndarray:
    """bool [N]: no reason against it; the others are counted by their first."""
    good = np.ones(len(next(iter(reasons.values()))), bool)
    for reason, refuse in reasons.items():
        if count := int((good & refuse).sum()):
            refused[reason] += count
        good &= ~refuse
    return good


def indexed_name(index: str, offset: int) -> str:
    """key.suffix of the image at this byte of a shard, empty where the index has none there."""
    table = _table(index, ["key", "suffix", "offset"])
    rows = table.filter(pc.equal(table["offset"], offset)).to_pylist()
    return f"{rows[0]['key']}.{rows[0]['suffix']}" if rows else ""


def _read_index(url: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes, int64 bytes, of the image members that an index of curation lists.

    Raises:
        ValueError: it is no such index.
    """
    try:
        table = _table(url, ["suffix", "offset", "size"])
    except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError) as error:
        raise ValueError(f"{url} is not a shard index of curation: {str(error).splitlines()[0]}") from None
    is_image = pc.is_in(pc.utf8_lower(table["suffix"]), value_set=pa.array(sorted(IMAGE_SUFFIXES)))
    table = table.filter(is_image)
    return table["offset"].to_numpy().astype(np.int64), table["size"].to_numpy().astype(np.int64)


def _table(url: str, columns: Sequence[str]) -> pa.Table:
    with open_file(url) as file:
        return pq.read_table(pa.BufferReader(file.read()), columns=list(columns))
