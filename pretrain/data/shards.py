"""All images of a dataset as arrays, eight bytes an image, and a reader that fetches any one of them.

A dataset is what `pretrain.data.sources` finds: tars, Parquet files, folders of images, lists of files. Parquet shards
of `curation` are read by range as its tars are: their index says where each image's bytes lie in the file.
"""

import hashlib
import json
import logging
import os
import posixpath
import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from curation.reading.parquet import CellReader
from curation.reading.places import is_local, join, open_file, read_range
from curation.reading.samples import Member
from pretrain.data.decode import IMAGE_SUFFIXES, Damaged, ImageLimits
from pretrain.data.listing import block_bytes, indexed_name, list_images
from pretrain.data.sources import Shard, Source, find_sources
from pretrain.data.table_files import ArrayFiles, mapped, new_folder, read_about, write_about
from pretrain.data.tars import BLOCK, member_name
from pretrain.distributed import collectives

_ARRAYS = {"blocks": np.uint32, "sizes": np.uint32, "names": np.uint8}
_MAX_OPEN_FILES, _MAX_OPEN_TABLES = 64, 8
_READ_ATTEMPTS = 3
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageTable:
    """Where every image of a dataset lies. Rows are in the order of the shards, sorted by name, then of the shard.

    S shards, N images. What could not be used is counted in `refused`, by reason. The arrays of images are mapped from
    files (`pretrain.data.table_files`), so the processes of a machine share one copy.
    """

    shards: tuple[Shard, ...]
    starts: np.ndarray
    """int64 [S + 1]: shard s holds rows starts[s] to starts[s + 1]"""
    blocks: np.ndarray
    """uint32 [N]: where an image begins, as `Listing.blocks`; of files in the `names` of all shards"""
    sizes: np.ndarray
    """uint32 [N], as `Listing.sizes`"""
    names: np.ndarray
    """uint8: names of loose images, each with a zero byte behind it"""
    fingerprint_of: str = ""
    refused: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sizes)

    def locate(self, row: int) -> tuple[int, int, int]:
        """(shard number, offset in bytes, size in bytes) of a row; of Parquet rows the row for an offset."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, int(self.blocks[row]) * block_bytes(self.shards[shard]), int(self.sizes[row])

    def file_name(self, row: int) -> str:
        """Of a loose image: its name from the shard's folder."""
        start = int(self.blocks[row])
        length = 256
        while not (found := self.names[start : start + length].tobytes().partition(b"\0"))[1]:
            length *= 2
        return found[0].decode()

    def fingerprint(self) -> str:
        """32 hex digits over what decides the order: names of shards (not their folder), offsets and sizes."""
        return self.fingerprint_of


def read_table(shards: str, limits: ImageLimits) -> ImageTable:
    """List the images that `shards` names. With several ranks every rank calls it; the first one of a machine lists.

    Raises:
        ValueError: nothing there, or no image in it.
    """

    written: list[Path] = []

    def write() -> str:
        written.append(new_folder())
        _write_table(find_sources(shards), shards, limits, written[0])
        return str(written[0])

    try:
        folder = Path(collectives.from_first_of_machine(write))
        try:
            table, lost = _mapped_table(folder), ""
        except OSError as error:
            table, lost = None, f"{error}"
        # Nobody goes on, nor removes the files, before all have mapped them.
        if collectives.any_over_ranks(table is None) or table is None:
            raise ValueError(
                f"the table of images, written in {folder.parent} by the first rank of each machine, cannot be read by "
                f"its other ranks{f': {lost}' if lost else ''}. Let them share TMPDIR."
            )
    finally:
        for mine in written:
            shutil.rmtree(mine)
    return table


def _write_table(sources: Sequence[Source], shards: str, limits: ImageLimits, folder: Path) -> None:
    counts: list[int] = []
    listed: list[Shard] = []
    refused: Counter[str] = Counter()
    # Threads are for remote shards, where the time goes into waiting.
    with ThreadPoolExecutor(8) as pool, ArrayFiles(folder, _ARRAYS) as arrays:
        for listing in pool.map(lambda source: list_images(source, limits), sources):
            refused += listing.refused
            blocks = listing.blocks
            if listing.shard.kind == "rows" and not len(blocks):
                continue  # a table of something else
            if listing.shard.kind == "files":
                if (named := arrays.length("names")) + len(listing.names) >> 32:
                    raise ValueError(f"{shards!r} has more than 4 GB of file names: pack its images into tars.")
                blocks = blocks + np.uint32(named)
                arrays.append("names", np.frombuffer(listing.names, np.uint8))
            arrays.append("blocks", blocks)
            arrays.append("sizes", listing.sizes)
            listed.append(listing.shard)
            counts.append(len(blocks))
    if not sum(counts):
        why = f" Refused: {dict(refused)}." if refused else ""
        paths = " Its Parquet files hold paths and no bytes: embed the images." if set(refused) == {"no_image"} else ""
        raise ValueError(
            f"{shards!r} names {len(sources)} shard(s) without a usable image; names must end in one of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}.{why}{paths}"
        )
    if refused:
        _logger.warning("%s: refused before reading: %s", shards, dict(refused))
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    about = {"shards": [asdict(shard) for shard in listed], "starts": starts.tolist()}
    found = [mapped(folder / name, kind) for name, kind in _ARRAYS.items()]
    fingerprint = _fingerprint(listed, [starts, *(array for array in found if len(array))])
    write_about(folder, about | {"fingerprint": fingerprint, "refused": dict(sorted(refused.items()))})


def _fingerprint(shards: Sequence[Shard], arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps([posixpath.basename(shard.url) for shard in shards]).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]


def _mapped_table(folder: Path) -> ImageTable:
    about = read_about(folder)
    return ImageTable(
        shards=tuple(Shard(**shard) for shard in about["shards"]),
        starts=np.array(about["starts"], np.int64),
        **{name: mapped(folder / name, kind) for name, kind in _ARRAYS.items()},
        fingerprint_of=about["fingerprint"],
        refused=about["refused"],
    )


class ShardReader:
    """Reads images of one table. Files stay open, a bounded number of them; cheap to pickle and to fork."""

    def __init__(self, table: ImageTable) -> None:
        self.table = table
        self._files: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._tables: OrderedDict[int, tuple[IO[bytes], CellReader]] = OrderedDict()
        self._process = os.getpid()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, ImageTable]:
        return {"table": self.table}

    def __setstate__(self, state: dict[str, ImageTable]) -> None:
        self.__init__(state["table"])

    def read(self, row: int) -> bytes:
        """The bytes of one image.

        Raises:
            Damaged: truncated or changed (the file has another length now), no_image (a row without one), unreadable
                (gone, or refused after several attempts).
        """
        number, offset, size = self.table.locate(row)
        shard = self.table.shards[number]
        if shard.kind == "rows":
            content = _patiently(lambda: self._cell(number, offset), shard.url)
            if not content:
                raise Damaged("no_image")
            return content
        if shard.kind == "files":
            url = _file_url(shard, self.table.file_name(row))
            content = _patiently(lambda: _read_file(url, size + 1), url)
        else:
            content = self._read_range(number, offset, size)
        if len(content) != size:
            raise Damaged("truncated" if len(content) < size else "changed")
        return content

    def name(self, row: int) -> str:
        """shard:member, or the name of a loose image, for a report. Read from the tar's header or the index."""
        number, offset, _ = self.table.locate(row)
        shard = self.table.shards[number]
        if shard.kind == "files":
            return self.table.file_name(row)
        try:
            if shard.kind == "tar":
                member = member_name(self._read_range(number, offset - BLOCK, BLOCK))
            else:
                member = indexed_name(_index_beside(shard.url), offset) if shard.kind == "indexed" else ""
        except (Damaged, OSError):
            member = ""
        return f"{posixpath.basename(shard.url)}:{member or offset}"

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()
        while self._tables:
            self._tables.popitem()[1][0].close()

    def _read_range(self, number: int, offset: int, size: int) -> bytes:
        url = self.table.shards[number].url
        if is_local(url):
            return _patiently(lambda: os.pread(self._open(number).fileno(), size, offset), url)
        return _patiently(lambda: read_range(url, offset, offset + size), url)

    def _open(self, number: int) -> IO[bytes]:
        if number not in self._files:
            if len(self._files) >= _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[number] = open_file(self.table.shards[number].url)
        self._files.move_to_end(number)
        return self._files[number]

    def _cell(self, number: int, row: int) -> bytes:
        if self._process != os.getpid():  # a fork has the files, and one place in each with its parent
            self._tables.clear()
            self._process = os.getpid()
        file, cells = self._tables.pop(number, (None, None))
        if file is None or cells is None:
            if len(self._tables) >= _MAX_OPEN_TABLES:
                self._tables.popitem(last=False)[1][0].close()
            file = open_file(self.table.shards[number].url)
            cells = None
        try:
            cells = cells or CellReader(file)
            content = cells.read(Member("", self.table.shards[number].column, row, 0))
        except BaseException:
            file.close()
            raise
        self._tables[number] = (file, cells)
        return content


def _patiently(read: Callable[[], bytes], url: str) -> bytes:
    """Raises Damaged("unreadable"): gone, or refused after several attempts."""
    is_remote = not is_local(url)
    for attempt in range(_READ_ATTEMPTS):
        if attempt:
            time.sleep(0.5 * 4 ** (attempt - 1))
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError):
            break
        except MemoryError:
            raise
        except OSError as error:
            if error.errno is None and not is_remote:
                break  # no regular file, or damage inside it
        except Exception:  # out of a damaged Parquet file anything; each store has errors of its own
            break
    raise Damaged("unreadable")


def _read_file(url: str, most: int) -> bytes:
    """At most so many bytes of a file."""
    if not is_local(url):
        return read_range(url, 0, most)
    with open_file(url) as file:
        return file.read(most)


def _file_url(shard: Shard, name: str) -> str:
    return name if os.path.isabs(name) or not is_local(name) else join(shard.url, name)


def _index_beside(shard: str) -> str:
    folder, base = posixpath.split(shard)
    return posixpath.join(folder, "index", posixpath.splitext(base)[0] + ".parquet")
