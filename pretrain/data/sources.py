"""What a dataset's `shards` names: tars, Parquet files, and loose files of images; local, or any fsspec URL.

They are listed as curation lists a pool, so folders, globs, braces, links and hidden files mean the same to both. A
list is a `.txt` file with a path a line: of an image, a tar or a Parquet file; relative to the list, absolute, or a
URL.
"""

import logging
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from curation.engine.manifest import MANIFEST_NAME, Manifest
from curation.reading.folders import clusters, split_name
from curation.reading.listing import hidden_images, shards_and_loose
from curation.reading.places import file_size, file_system, is_local, join, local_path, raw, read_file, readable
from curation.reading.samples import Part
from curation.reading.walking import Found, Ledger, files_at
from pretrain.data.decode import IMAGE_SUFFIXES

LIST = ".txt"
DATA_HELP = "a folder of images, tars or Parquet, a glob, a .txt list of paths, or what curation wrote; repeatable"
_MAX_LIST_BYTES = 4 << 30
_MAX_MANIFEST_BYTES = 1 << 30
_SPLITS = re.compile(r"(^|[^a-z])(val|valid|validation|dev|test|testing)([^a-z]|$)")
_STATS_AT_ONCE = 16
_logger = logging.getLogger(__name__)

Kind = Literal["tar", "indexed", "rows", "files"]
"""indexed: a Parquet shard of curation, whose index gives each image's bytes; rows: any other Parquet file, an image a
row; files: loose images, named from one folder"""


@dataclass(frozen=True)
class Shard:
    """A tar, a Parquet file, or all loose images named from one folder: what images are shuffled by."""

    kind: Kind
    url: str
    """as curation/reading/places.py writes names; for files the folder, with a slash at its end"""
    column: str = ""
    """of rows: where the images are"""


@dataclass(frozen=True)
class Source:
    """A shard that was found and is still to be listed."""

    shard: Shard
    size: int = 0
    """bytes of the tar or Parquet file"""
    index: str | None = None
    """the index that curation wrote beside it"""
    names: Sequence[str] = ()
    """of loose images, from the shard's folder; absolute or URLs where a list has them so"""
    sizes: Sequence[int] = ()
    """their bytes, -1 for what is no file that can be read"""
    unsupported: int = 0
    """pictures of a kind that is not read"""


def find_sources(shards: str) -> list[Source]:
    """What `shards` names, sorted by name; each source once.

    Raises:
        ValueError: nothing there, or a folder of curation that was not finished.
    """
    if shards.lower().endswith(LIST) and not _is_folder(shards):
        found = _of_list(shards)
    else:
        found = _of_place(shards)
    return sorted(found, key=lambda source: source.shard.url)


def _of_place(url: str) -> list[Source]:
    url, ledger = _with_shards_below(url), Ledger()
    files = files_at(url, ledger)
    if _is_folder(url):
        _check_finished(url, files)
    try:
        parts, loose = shards_and_loose(files, ledger)
    except ValueError as error:
        raise ValueError(f"{url!r}: {error}") from None
    found = [*_shards(parts), *_loose(loose)]
    _note_splits(url, files)
    for reason, (count, example) in sorted(ledger.ignored.items()):
        _logger.info("%s: left out, %s: %d, such as %s", url, reason, count, example)
    if not found:
        raise ValueError(
            f"{url!r} holds no images: give a folder of images, tars or Parquet files, a glob or {{0000..0009}} braces "
            f"of them, a {LIST} file with a path a line, or a run folder of curation."
        )
    return found


def _shards(parts: Iterable[Part]) -> Iterator[Source]:
    indexes: dict[str, set[str]] = {}
    for part in parts:
        folder, base = posixpath.split(part.url)
        if folder not in indexes:
            indexes[folder] = set(_names_in(posixpath.join(folder, "index")))
        name = posixpath.splitext(base)[0] + ".parquet"
        index = posixpath.join(folder, "index", name) if name in indexes[folder] else None
        kind: Kind = "tar" if part.kind == "tar" else "rows" if index is None else "indexed"
        yield Source(Shard(kind, part.url), part.size, index)


def _loose(by_root: dict[str, dict[str, Found]]) -> Iterator[Source]:
    for root, files in by_root.items():
        groups = clusters(files)
        named = [name for group in groups for name in group.images]
        images = [name for name in named if split_name(name)[1].lower() in IMAGE_SUFFIXES]
        others = len(named) - len(images)
        images = sorted([*images, *hidden_images(root, [name for group in groups for name in group.loose])])
        if images or others:
            sizes = [files[name].size for name in images]
            yield Source(Shard("files", root.rstrip("/") + "/"), names=images, sizes=sizes, unsupported=others)


def _of_list(url: str) -> list[Source]:
    """Raises ValueError: it cannot be read, or names nothing."""
    try:
        content = read_file(readable(url), _MAX_LIST_BYTES)[1]
    except OSError as error:
        raise ValueError(f"cannot read the list {url!r}: {error.strerror or error}.") from None
    lines = (content or b"").decode("utf-8-sig", "surrogateescape").split("\n")
    lines = [line for each in lines if (line := each.rstrip("\r")).strip()]
    if not lines:
        raise ValueError(f"the list {url!r} names nothing: give a path a line.")
    root = posixpath.dirname(url if not is_local(url) else local_path(url)) + "/"
    places = [line if is_local(line) is False or os.path.isabs(line) else root + line for line in lines]
    is_shard = [line.lower().endswith((".tar", ".parquet")) for line in lines]
    found = {s.shard: s for place, yes in zip(places, is_shard, strict=True) if yes for s in _of_place(place)}
    images = [i for i, yes in enumerate(is_shard) if not yes]
    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        sizes = list(pool.map(_size, [places[i] for i in images]))
    if images:
        shard = Shard("files", readable(root))
        found[shard] = Source(shard, names=[readable(lines[i]) for i in images], sizes=sizes)
    return list(found.values())


def _size(url: str) -> int:
    """Bytes of a file, -1 for what is no file that can be read."""
    try:
        if is_local(url):
            about = os.stat(local_path(url))
            return about.st_size if stat.S_ISREG(about.st_mode) else -1
        return file_size(readable(url))
    except Exception:  # a name may be anything, and each store has errors of its own
        return -1


def _with_shards_below(url: str) -> str:
    """A run folder of curation stands for its shards."""
    below = join(url, "shards")
    names = set(_names_in(below)) if _is_folder(below) else set()
    return below if MANIFEST_NAME in names or _names_in(join(below, "index")) else url


def _check_finished(url: str, files: Sequence[Found]) -> None:
    """Raises ValueError: curation writes here, and has not come to its shards' end."""
    names = {file.name for file in files}
    index = any(re.fullmatch(r"index/[^/]+\.parquet", name) for name in names)
    if index and MANIFEST_NAME not in names:
        raise ValueError(f"{url} has an index and no {MANIFEST_NAME}: curation did not finish there; run it again.")
    for name in sorted(names):
        if re.fullmatch(rf"[^/]+/{MANIFEST_NAME}", name) and _stage(join(url, name)) not in ("", "shard"):
            raise ValueError(f"{url} is a run folder of curation without shards: curation did not finish there.")


def _stage(url: str) -> str:
    """The stage whose manifest this is; empty for a file of someone else."""
    try:
        return Manifest.from_json((read_file(readable(url), _MAX_MANIFEST_BYTES)[1] or b"").decode()).stage
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return ""


def _note_splits(url: str, files: Sequence[Found]) -> None:
    """Folders and file names of a training set and of a test set at one place: say that both are trained on."""
    first = Counter(file.name.partition("/")[0] for file in files)
    tests = [name for name in first if _SPLITS.search(name.lower().partition(".")[0])]
    if tests and any("train" in name.lower() for name in first):
        _logger.warning(
            "%s holds %s beside a training set, and all of it is trained on; name the training set alone to leave it "
            "out, by its folder or a glob",
            url,
            ", ".join(sorted(tests)[:3]),
        )


def _is_folder(url: str) -> bool:
    if is_local(url):
        return os.path.isdir(local_path(url))
    fs, path = file_system(url)
    fs.invalidate_cache()
    try:
        return fs.isdir(path)
    except Exception:  # each store has its own; listing says what is wrong
        return False


def _names_in(folder: str) -> list[str]:
    """Names of the files directly in a folder; none where there is no folder."""
    folder = raw(folder)
    if not _is_folder(folder):
        return []
    if is_local(folder):
        return [readable(name) for name in os.listdir(local_path(folder))]
    fs, path = file_system(folder)
    return [posixpath.basename(str(name)) for name in fs.find(path, maxdepth=1)]
