"""All images of a dataset as arrays, eight bytes an image, and a reader that fetches any one of them by range.

A dataset is what one of these names: a tar, a glob or {000..999} braces of tars, a folder of tars, or a folder that
`curation` wrote (its manifest and index are used, so no tar is scanned); local, or any fsspec URL. Parquet shards of
`curation` are read as its tars are: their index says where each image's bytes lie in the file.
"""

import hashlib
import json
import logging
import os
import posixpath
import time
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from braceexpand import braceexpand
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from curation.engine.manifest import MANIFEST_NAME, Manifest
from pretrain.data.decode import IMAGE_SUFFIXES, Damaged, ImageLimits
from pretrain.data.tars import BLOCK, member_name, scan

PARQUET = ".parquet"
_MAX_OPEN_FILES = 64
_READ_ATTEMPTS = 3
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTable:
    """Where every image of a dataset lies. Rows are in the order of the shards, sorted by name, then of the tar.

    S shards, N images. What could not be used is counted in `refused`, by reason.
    """

    shards: tuple[str, ...]
    """S URLs or paths"""
    starts: np.ndarray
    """int64 [S + 1]: shard s holds rows starts[s] to starts[s + 1]"""
    blocks: np.ndarray
    """uint32 [N]: offset in the shard, in its blocks: 512 bytes of a tar, single bytes of a Parquet file"""
    sizes: np.ndarray
    """uint32 [N]: bytes"""
    refused: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sizes)

    def locate(self, row: int) -> tuple[int, int, int]:
        """(shard number, offset in bytes, size in bytes) of a row."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, int(self.blocks[row]) * _block_bytes(self.shards[shard]), int(self.sizes[row])

    def fingerprint(self) -> str:
        """32 hex digits over what decides the order: names of shards (not their folder), offsets and sizes."""
        digest = hashlib.sha256(json.dumps([posixpath.basename(shard) for shard in self.shards]).encode())
        for array in (self.starts, self.blocks, self.sizes):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:32]


def read_table(shards: str, limits: ImageLimits) -> ImageTable:
    """List the images that `shards` names.

    Tars without an index are scanned, header by header: for a remote tar that reads all of it once.

    Raises:
        ValueError: nothing there, or no image in it.
    """
    found = find_shards(shards)
    with ThreadPoolExecutor(8) as pool:  # for remote shards, where the time goes into waiting
        parts = list(pool.map(lambda shard: _read_shard(shard, limits), found))
    counts = [len(part.offsets) for part in parts]
    refused = sum((part.refused for part in parts), Counter())
    if not sum(counts):
        why = f" Refused: {dict(refused)}." if refused else ""
        raise ValueError(
            f"{shards!r} names {len(found)} shard(s) without a usable image; members must end in one of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}.{why}"
        )
    if refused:
        _logger.warning("%s: refused before reading: %s", shards, dict(refused))
    return ImageTable(
        shards=tuple(shard.url for shard in found),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        blocks=np.concatenate(
            [part.offsets // _block_bytes(s.url) for s, part in zip(found, parts, strict=True)]
        ).astype(np.uint32),
        sizes=np.concatenate([part.sizes for part in parts]).astype(np.uint32),
        refused=dict(sorted(refused.items())),
    )


class ShardReader:
    """Reads images of one table. Files stay open, a bounded number of them; cheap to pickle and to fork."""

    def __init__(self, table: ImageTable) -> None:
        self.table = table
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, ImageTable]:
        return {"table": self.table}

    def __setstate__(self, state: dict[str, ImageTable]) -> None:
        self.__init__(state["table"])

    def read(self, row: int) -> bytes:
        """The bytes of one image.

        Raises:
            Damaged: truncated (the shard got shorter), unreadable (gone, or refused after several attempts).
        """
        shard, offset, size = self.table.locate(row)
        content = self._read_range(shard, offset, size)
        if len(content) != size:
            raise Damaged("truncated")
        return content

    def name(self, row: int) -> str:
        """shard:member, for a report. Read from the tar's header or the index, so the table holds no names."""
        shard, offset, _ = self.table.locate(row)
        url = self.table.shards[shard]
        try:
            if url.endswith(PARQUET):
                member = _indexed_name(_index_beside(url), offset)
            else:
                member = member_name(self._read_range(shard, offset - BLOCK, BLOCK))
        except (Damaged, OSError):
            member = ""
        return f"{posixpath.basename(url)}:{member or offset}"

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_range(self, shard: int, offset: int, size: int) -> bytes:
        for attempt in range(_READ_ATTEMPTS):
            if attempt:
                time.sleep(0.5 * 4 ** (attempt - 1))
            try:
                if local := _local_path(self.table.shards[shard]):
                    return os.pread(self._open(shard, local), size, offset)
                # Looked up anew: a file system object of another process must not be used after a fork.
                fs, path = _file_system(self.table.shards[shard])
                return fs.cat_file(path, start=offset, end=offset + size)  # type: ignore[return-value]  # fsspec says text or bytes
            except FileNotFoundError:
                break
            except OSError:
                continue
        raise Damaged("unreadable")

    def _open(self, shard: int, path: str) -> int:
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(path, os.O_RDONLY)
        self._files.move_to_end(shard)
        return self._files[shard]


@dataclass(frozen=True)
class Shard:
    """One tar or Parquet file: where it is, its bytes, and its index where there is one."""

    url: str
    size: int
    index: str | None


def find_shards(shards: str) -> list[Shard]:
    """The shards that a dataset's `shards` names, sorted by name.

    Raises:
        ValueError: nothing there, or a folder of curation that was not finished.
    """
    found: dict[str, Shard] = {}
    indexes: dict[str, set[str]] = {}
    foreign: list[str] = []
    for pattern in braceexpand(shards):
        fs, path = _file_system(pattern)
        fs.invalidate_cache()
        for name, size in _files(fs, path).items():
            folder = posixpath.dirname(name)
            if folder not in indexes:
                below = posixpath.join(folder, "index")
                indexes[folder] = set(fs.find(below)) if fs.isdir(below) else set()
            index = _index_beside(name)
            url = fs.unstrip_protocol(index) if index in indexes[folder] else None
            if url is None and name.endswith(PARQUET):
                foreign.append(name)  # metadata beside tars, or images that only a Parquet library finds
                continue
            found[name] = Shard(fs.unstrip_protocol(name), size, url)
    if not found:
        of_curation = f" ({foreign[0]} has no index: curation did not write it; curate it first.)" if foreign else ""
        raise ValueError(
            f"{shards!r} names no .tar: give a tar, a glob or {{0000..0009}} braces of tars, a folder with tars, "
            f"or a run folder of curation.{of_curation}"
        )
    return [found[name] for name in sorted(found)]


def _files(fs: AbstractFileSystem, path: str) -> dict[str, int]:
    """Paths and bytes of the tars and Parquet files that one path means."""
    if fs.isdir(path):
        below = posixpath.join(path, "shards")
        folder = below if fs.isdir(below) else path.rstrip("/")
        found = fs.find(folder, maxdepth=1, detail=True)
        manifest = posixpath.join(folder, MANIFEST_NAME)
        if manifest in found:
            written = Manifest.from_json(fs.cat_file(manifest).decode()).files
            wanted = {posixpath.join(folder, file.path) for file in written}
            if missing := sorted(wanted - found.keys()):
                raise ValueError(f"{manifest} lists {len(missing)} shard(s) that are not there, such as {missing[0]}.")
            found = {name: info for name, info in found.items() if name in wanted}
        elif fs.isdir(posixpath.join(folder, "index")):
            raise ValueError(
                f"{folder} has an index and no {MANIFEST_NAME}: curation did not finish there; run it again."
            )
    elif any(character in path for character in "*?["):
        found = fs.glob(path, detail=True)
    else:
        found = {path: fs.info(path)} if fs.exists(path) else {}
    return {
        str(name): int(info.get("size") or 0)
        for name, info in found.items()
        if info["type"] == "file" and name.endswith((".tar", PARQUET))
    }


@dataclass(frozen=True)
class _Listing:
    """The images of one shard, in its order."""

    offsets: np.ndarray
    """int64 bytes"""
    sizes: np.ndarray
    """int64 bytes"""
    refused: Counter[str]


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    fs, path = url_to_fs(url)
    return fs, str(path)


@lru_cache(maxsize=8192)
def _local_path(url: str) -> str:
    """The plain path, empty for a remote URL."""
    fs, path = _file_system(url)
    return path if isinstance(fs, LocalFileSystem) else ""


def _read_shard(shard: Shard, limits: ImageLimits) -> _Listing:
    refused: Counter[str] = Counter()
    fs, path = _file_system(shard.url)
    if shard.index is not None:
        offsets, sizes = _read_index(shard.index)
    else:
        with fs.open(path, "rb", **({} if isinstance(fs, LocalFileSystem) else {"block_size": 8 << 20})) as file:
            offsets, sizes, damage = scan(file, shard.size, IMAGE_SUFFIXES)
        if damage:
            refused["damaged_shard"] += 1
            _logger.warning("%s is damaged, and %d of its images are used: %s.", shard.url, len(sizes), damage)
    block = _block_bytes(shard.url)
    reasons = {
        "misplaced": (offsets % block != 0) | (offsets < block) | (offsets // block >= 1 << 32),
        "empty": sizes < 1,
        "file_too_large": sizes > min(limits.max_file_bytes, (1 << 32) - 1),
        "truncated": offsets + sizes > shard.size,
    }
    good = np.ones(len(sizes), bool)
    for reason, refuse in reasons.items():
        if count := int((good & refuse).sum()):
            refused[reason] += count
        good &= ~refuse
    return _Listing(offsets[good], sizes[good], refused)


def _block_bytes(shard: str) -> int:
    return 1 if shard.endswith(PARQUET) else BLOCK


def _index_beside(shard: str) -> str:
    folder, base = posixpath.split(shard)
    return posixpath.join(folder, "index", posixpath.splitext(base)[0] + PARQUET)


def _indexed_name(index: str, offset: int) -> str:
    """key.suffix of the image at this byte of a shard, empty where the index has none there."""
    fs, path = _file_system(index)
    table = pq.read_table(pa.BufferReader(fs.cat_file(path)), columns=["key", "suffix", "offset"])
    rows = table.filter(pc.equal(table["offset"], offset)).to_pylist()
    return f"{rows[0]['key']}.{rows[0]['suffix']}" if rows else ""


def _read_index(url: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes, int64 bytes, of the image members that an index of curation lists.

    Raises:
        ValueError: it is no such index.
    """
    fs, path = _file_system(url)
    try:
        table = pq.read_table(pa.BufferReader(fs.cat_file(path)), columns=["suffix", "offset", "size"])
    except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError) as error:
        raise ValueError(f"{url} is not a shard index of curation: {str(error).splitlines()[0]}") from None
    is_image = pc.is_in(pc.utf8_lower(table["suffix"]), value_set=pa.array(sorted(IMAGE_SUFFIXES)))
    table = table.filter(is_image)
    return table["offset"].to_numpy().astype(np.int64), table["size"].to_numpy().astype(np.int64)
