"""What the URLs of a pool, a seed or an evaluation set hold: tars, Parquet files and folders -> parts."""

import glob
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import fsspec
from braceexpand import braceexpand
from fsspec.core import url_to_fs

from curation.reading.own_shards import own_shards
from curation.reading.samples import Part, split_key

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def find_parts(urls: Sequence[str], images_per_folder_part: int = 1000) -> list[Part]:
    """List what the URLs (braces, globs, folders, files) hold, in the order given, names sorted within each.

    Raises:
        ValueError: nothing there, an unreachable place, or a file of an unknown kind.
    """
    parts = [part for url in urls for part in _expand(url, images_per_folder_part)]
    seen: dict[tuple[str, tuple[str, ...]], Part] = {}
    for part in parts:
        seen.setdefault((part.url, part.files), part)  # a shard named twice is read once
    return list(seen.values())


def _expand(url: str, images_per_folder_part: int) -> list[Part]:
    found: list[Part] = []
    for pattern in braceexpand(url):
        try:
            fs, path = url_to_fs(pattern)
            names = sorted(fs.glob(path)) if glob.has_magic(path) else ([path] if fs.exists(path) else [])
            for name in names:
                found += _parts_at(fs, str(name), images_per_folder_part)
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot read {pattern!r}: {_sentence(error)}") from None
        except Exception as error:  # every remote file system has its own errors for "cannot get there"
            raise ValueError(
                f"cannot list {pattern!r}: {_sentence(error)}. Check the address, the credentials and the network."
            ) from None
    if not found:
        raise ValueError(
            f"nothing found at {url!r}: give a .tar, a .parquet, a folder of them or of images, or a glob."
        )
    return found


def _parts_at(fs: fsspec.AbstractFileSystem, path: str, images_per_folder_part: int) -> list[Part]:
    if not fs.isdir(path):
        return [_file_part(fs, fs.info(path))]
    files = fs.find(path, detail=True)
    root = path.rstrip("/") + "/"
    own = own_shards({name.removeprefix(root) for name in files}, lambda name: bytes(fs.cat_file(root + name)))
    if own is not None:
        return [_file_part(fs, files[root + name]) for name in own]
    shards = [info for name, info in sorted(files.items()) if _kind(name) is not None]
    if shards:
        return [_file_part(fs, info) for info in shards]
    names = [name.removeprefix(root) for name in sorted(files)]
    if not names:
        raise ValueError("the folder is empty")
    parts, chunk, last_key = [], [], None
    for name in names:  # a picture and its caption stay together
        key = split_key(name)[0]
        if len(chunk) >= images_per_folder_part and key != last_key:
            parts.append(chunk)
            chunk = []
        chunk.append(name)
        last_key = key
    parts.append(chunk)
    url = fs.unstrip_protocol(path) if not _is_local(fs) else path
    return [
        Part(
            "folder",
            url,
            sum(files[root + name].get("size") or 0 for name in chunk),
            hashlib.sha256("".join(_version(files[root + name]) for name in chunk).encode()).hexdigest()[:16],
            tuple(chunk),
        )
        for chunk in parts
    ]


def _file_part(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> Part:
    name = info["name"]
    kind = _kind(name)
    if kind is None:
        raise ValueError(f"{name} is neither a .tar nor a .parquet file; for loose images give their folder")
    url = name if _is_local(fs) else fs.unstrip_protocol(name)
    return Part(kind, url, info.get("size") or 0, _version(info))


def _kind(name: str) -> Literal["tar", "parquet"] | None:
    if name.endswith(_TAR_SUFFIXES):
        return "tar"
    return "parquet" if name.endswith(".parquet") else None


def _version(info: dict[str, Any]) -> str:
    for field_name in ("ETag", "etag", "LastModified", "mtime", "updated", "last_modified"):
        if info.get(field_name) is not None:
            return str(info[field_name])
    return ""


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
