"""What files a URL names: braces, globs, folders and links resolved; what is left out is written into a ledger."""

import glob
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import fsspec
from braceexpand import braceexpand

from curation.reading.places import file_system, is_local, local_path, readable

_MOST_EXPANSIONS = 1_000_000
_LOOK_UPS_AT_ONCE = 16
_SYSTEM_FILES = frozenset(
    ["thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "zbthumbnail.info"]
)
_SYSTEM_FOLDERS = frozenset(
    ["__macosx", "@eadir", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"]
)
_HIDDEN_SYSTEM = frozenset([".ds_store", ".localized", ".picasa.ini", ".directory", ".nomedia"])

SYSTEM, HIDDEN, NOT_REGULAR = "system file", "hidden", "not a regular file"
BROKEN_LINK, SEEN_LINK = "broken link", "already listed (link)"
IN_RUN_FOLDER, CLOSED_FOLDER = "in the run folder", "in a folder that cannot be opened"


@dataclass(frozen=True)
class Found:
    """One regular file: where it lies, and what it was when it was listed."""

    root: str
    """the folder that it is named from: a URL or an absolute path, as `readable` writes it"""
    name: str
    """relative to root, as `readable` writes it"""
    size: int
    version: str
    """etag or modification time"""
    is_named: bool = False
    """given by its own name, not met in a folder or by a glob"""


@dataclass
class Ledger:
    """What a listing left out, by reason, with the first examples; and what it has already."""

    run_folder: str | None = None
    """where the run writes: nothing in it is read; an absolute real path or a URL"""
    ignored: dict[str, tuple[int, str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """names that braces made and that are not there"""
    seen: set[str] = field(default_factory=set)
    """real paths and URLs of the files that are listed"""
    num_repeated: int = 0
    """files met again, by whatever name"""

    def ignore(self, reason: str, example: str, count: int = 1) -> None:
        before, first = self.ignored.get(reason, (0, readable(example)))
        if count:
            self.ignored[reason] = (before + count, min(first, readable(example)))

    def is_own(self, place: str) -> bool:
        """Whether a real path or URL lies in the run folder."""
        own = self.run_folder
        return own is not None and (place == own or place.startswith(own.rstrip("/") + "/"))


def resolved(folder: str) -> str:
    """A folder as Ledger.run_folder wants it."""
    if is_local(folder):
        return os.path.realpath(local_path(folder))
    fs, path = file_system(folder)
    return str(fs.unstrip_protocol(path)).rstrip("/")


def files_at(url: str, ledger: Ledger) -> list[Found]:
    """The files that a URL names, in the order of its braces, sorted within each.

    The literal name is tried before its braces, and each of those before it is taken for a glob.

    Raises:
        ValueError: nothing is there, or the place cannot be reached.
    """
    if not url.strip():
        raise ValueError("an empty address names no images: give tars, Parquet files, a folder or a glob.")
    try:
        matches = _match_local(url) if is_local(url) else _match_remote(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"cannot read {url!r}: {sentence(error)}") from None
    except Exception as error:  # every remote file system has its own errors for "cannot get there"
        raise ValueError(
            f"cannot list {url!r}: {sentence(error)}. Check the address, the credentials and the network."
        ) from None
    found = [file for pattern, hits in matches for hit in hits for file in _open_hit(url, pattern, hit, ledger)]
    missing = [pattern for pattern, hits in matches if not hits]
    if len(missing) == len(matches):
        raise ValueError(
            f"nothing found at {url!r}{_nearest(url)}: give a .tar, a .parquet, a folder, images or a glob."
        )
    ledger.missing += missing
    return found


def sentence(error: BaseException) -> str:
    """What an error says, in one line; what caused it where the error itself only names the place."""
    while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _expansions(url: str) -> list[str]:
    patterns = list(islice(braceexpand(url), _MOST_EXPANSIONS + 1)) if "{" in url else [url]
    if len(patterns) > _MOST_EXPANSIONS:
        raise ValueError(f"its braces make more than {_MOST_EXPANSIONS:,} names; use a glob or a folder")
    return patterns


def _left_out(name: str, is_folder: bool) -> str | None:
    """Why a name that nobody gave explicitly is left out; None for those that are read."""
    lower = name.lower()
    if name.startswith("._") or lower in _HIDDEN_SYSTEM or lower in (_SYSTEM_FOLDERS if is_folder else _SYSTEM_FILES):
        return SYSTEM
    return HIDDEN if name.startswith(".") else None


def _path_left_out(name: str) -> str | None:
    """The same for a relative path, by its folders and its last part."""
    *folders, base = name.split("/")
    reasons = [_left_out(folder, True) for folder in folders] + [_left_out(base, False)]
    return next((reason for reason in reasons if reason), None)


def _base(pattern: str) -> str:
    """The folder before the first part of a pattern that has magic in it."""
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[:first])


def _open_hit(url: str, pattern: str, hit: Any, ledger: Ledger) -> Iterator[Found]:
    if isinstance(hit, str):
        return _local_files(pattern, hit, ledger)
    try:
        return iter(_remote_files(pattern, hit, ledger))
    except Exception as error:
        raise ValueError(
            f"cannot list {url!r}: {sentence(error)}. Check the address, the credentials and the network."
        ) from None


# --- this machine ----------------------------------------------------------------------------------------------------


def _match_local(url: str) -> list[tuple[str, list[str]]]:
    """(pattern, paths that it names) for each expansion of the braces."""
    if os.path.lexists(local_path(url)):
        return [(url, [local_path(url)])]
    matches = []
    for pattern in _expansions(url):
        path = local_path(pattern)
        if os.path.lexists(path):
            matches.append((pattern, [path]))
        else:
            hits = glob.glob(path, recursive=True, include_hidden=True) if glob.has_magic(path) else []
            matches.append((pattern, sorted(hit.rstrip("/") for hit in hits)))
    return matches


def _local_files(pattern: str, path: str, ledger: Ledger) -> Iterator[Found]:
    literal = local_path(pattern)
    is_named = path == literal
    base = os.path.dirname(path) if is_named else _base(literal)
    name = _relative(path, base)
    if not is_named and (reason := _path_left_out(name)) and "/." not in pattern.removeprefix(base):
        ledger.ignore(reason, path, _count_files(path))
        return
    try:
        about = os.stat(path)
    except OSError as error:
        if is_named:
            raise ValueError(f"cannot read {pattern!r}: {error.strerror or error}") from None
        ledger.ignore(BROKEN_LINK, path)
        return
    real = os.path.realpath(path)
    if ledger.is_own(real):
        ledger.ignore(IN_RUN_FOLDER, path, max(_count_files(path), 1))
    elif stat.S_ISDIR(about.st_mode):
        yield from sorted(_walk(path, ledger), key=lambda file: file.name)
    elif stat.S_ISREG(about.st_mode):
        if (file := _listed(base, name, path, real, about, ledger, is_named)) is not None:
            yield file
    elif is_named:
        raise ValueError(
            f"{pattern!r} is not a regular file but a {_kind_of_file(about.st_mode)}: give files or folders"
        )
    else:
        ledger.ignore(NOT_REGULAR, path)


def _walk(root: str, ledger: Ledger) -> Iterator[Found]:
    """Every regular file below a folder. Links come last, so that what they name is listed by its own name first."""
    folders, links, entered = [(root, os.path.realpath(root))], list[str](), set[str]()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            path = links.pop()
            real = os.path.realpath(path)
            try:
                about = os.stat(path)
            except OSError:
                ledger.ignore(BROKEN_LINK, path)
                continue
            if ledger.is_own(real):
                ledger.ignore(IN_RUN_FOLDER, path, max(_count_files(real), 1))
            elif stat.S_ISDIR(about.st_mode):
                folders.append((path, real))
            elif not stat.S_ISREG(about.st_mode):
                ledger.ignore(NOT_REGULAR, path)
            elif (file := _listed(root, _relative(path, root), path, real, about, ledger)) is not None:
                yield file
            continue
        folder, real_folder = folders.pop()
        if real_folder in entered:
            ledger.ignore(SEEN_LINK, folder)
            continue
        entered.add(real_folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if folder == root:
                raise ValueError(f"cannot list {folder!r}: {error.strerror or error}") from None
            ledger.ignore(CLOSED_FOLDER, folder)
            continue
        for entry in entries:
            real = os.path.join(real_folder, entry.name)
            is_link, is_folder = entry.is_symlink(), entry.is_dir(follow_symlinks=False)
            if ledger.is_own(real):
                ledger.ignore(IN_RUN_FOLDER, entry.path, _count_files(entry.path))
            elif reason := _left_out(entry.name, is_folder or is_link):
                ledger.ignore(reason, entry.path, _count_files(entry.path))
            elif is_link:
                links.append(entry.path)
            elif is_folder:
                folders.append((entry.path, real))
            elif not entry.is_file(follow_symlinks=False):
                ledger.ignore(NOT_REGULAR, entry.path)
            else:
                about = entry.stat(follow_symlinks=False)
                if (file := _listed(root, _relative(entry.path, root), entry.path, real, about, ledger)) is not None:
                    yield file


def _listed(
    root: str, name: str, path: str, real: str, about: os.stat_result, ledger: Ledger, is_named: bool = False
) -> Found | None:
    if real in ledger.seen:
        ledger.num_repeated += 1
        if real != path:  # named twice by one name, there is nothing to tell
            ledger.ignore(SEEN_LINK, path)
        return None
    ledger.seen.add(real)
    return Found(readable(root), readable(name), about.st_size, str(about.st_mtime), is_named)


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root.rstrip("/") + "/")


def _count_files(path: str) -> int:
    """Files in a folder that is left out; 1 for anything that is no folder. Links are not followed."""
    if os.path.islink(path) or not os.path.isdir(path):
        return 1
    return sum(len(files) for _, _, files in os.walk(path))


def _kind_of_file(mode: int) -> str:
    kinds = [(stat.S_ISFIFO, "named pipe"), (stat.S_ISSOCK, "socket")]
    return next((word for is_kind, word in kinds if is_kind(mode)), "device")


# --- stores ----------------------------------------------------------------------------------------------------------


def _match_remote(url: str) -> list[tuple[str, list[Any]]]:
    """(pattern, [(store, info) of what it names]) for each expansion of the braces."""
    if "{" in url and (hit := _look_up(url)):
        return [(url, [hit])]
    patterns = _expansions(url)

    def matches(pattern: str) -> list[Any]:
        if hit := _look_up(pattern):
            return [hit]
        fs, path = file_system(pattern)
        if not glob.has_magic(path):
            return []
        found: Any = fs.glob(path, detail=True)
        return [(fs, found[name]) for name in sorted(found)]

    with ThreadPoolExecutor(_LOOK_UPS_AT_ONCE) as pool:
        return list(zip(patterns, pool.map(matches, patterns), strict=True))


def _look_up(url: str) -> tuple[fsspec.AbstractFileSystem, dict[str, Any]] | None:
    """What lies at exactly this URL; None if nothing does. A store that cannot be asked is an error, not nothing."""
    fs, path = file_system(url)
    try:
        return fs, fs.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, FileNotFoundError) or _is_absence(cause):
            return None
        raise


def _is_absence(error: BaseException) -> bool:
    """Whether a store's own error says that a thing is not there, and not that it could not be asked."""
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    return 404 in (status, getattr(error, "status", None), getattr(error, "code", None))


def _remote_files(pattern: str, hit: tuple[fsspec.AbstractFileSystem, dict[str, Any]], ledger: Ledger) -> list[Found]:
    fs, info = hit
    path = str(info["name"]).rstrip("/")
    asked = file_system(pattern)[1].rstrip("/")
    is_folder = info.get("type") == "directory"
    by_name = path == asked and not is_folder
    root = path if is_folder else path.rpartition("/")[0] if by_name else _base(asked)
    listed: Any = fs.find(path, detail=True) if is_folder else {path: info}
    found = []
    url = str(fs.unstrip_protocol(root))
    for place, about in sorted(listed.items()):
        name = place.removeprefix(root).lstrip("/")
        if not name or place.endswith("/") or about.get("type") == "directory":
            continue  # the mark of an empty folder
        identity = str(fs.unstrip_protocol(place))
        if ledger.is_own(identity):
            ledger.ignore(IN_RUN_FOLDER, identity)
        elif not by_name and (reason := _path_left_out(name)):
            ledger.ignore(reason, identity)
        elif identity in ledger.seen:
            ledger.num_repeated += 1
        else:
            ledger.seen.add(identity)
            found.append(Found(readable(url), readable(name), about.get("size") or 0, _version(about), by_name))
    return found


def _version(info: dict[str, Any]) -> str:
    for field_name in ("ETag", "etag", "LastModified", "mtime", "updated", "last_modified"):
        if info.get(field_name) is not None:
            return str(info[field_name])
    return ""


# --- words -----------------------------------------------------------------------------------------------------------


def _nearest(url: str) -> str:
    """How far the way to a place that is not there goes."""
    if is_local(url):
        path = _base(local_path(_expansions(url)[0]))
        while path and not os.path.lexists(path):
            path = os.path.dirname(path)
        below = re.split(r"[*?\[{]", local_path(url)[len(path.rstrip("/")) + 1 :])[0].split("/")[0]
        return f" ({path or '/'} is there, but nothing called {below!r} in it)" if below else f" ({path} is there)"
    fs, path = file_system(url)
    bucket = path.lstrip("/").split("/")[0]
    if not bucket or glob.has_magic(bucket) or str(fs.protocol).startswith("http"):
        return ""
    try:
        fs.info(bucket)
    except FileNotFoundError:
        return f" (there is no {fs.unstrip_protocol(bucket)})"
    except Exception as error:
        return f" ({sentence(error)})"
    return f" ({fs.unstrip_protocol(bucket)} is there)"
