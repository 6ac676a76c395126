"""What the URLs of a pool, a seed or an evaluation set hold: tars, Parquet files and folders -> parts."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import overload

from curation.reading.folders import begins_like_image, clusters, has_image_name
from curation.reading.own_shards import own_shards
from curation.reading.parquet import has_column, holds_images
from curation.reading.pictures.images import sniff
from curation.reading.places import is_local, join, read_file, read_head
from curation.reading.samples import Part, PartKind
from curation.reading.walking import Found, Ledger, files_at, resolved

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.json", "dataset_info.json", "dataset_infos.json")
_METADATA_NAMES += ("dataset_dict.json", "state.json", "readme.md", "_success", "_metadata", "_common_metadata")
_METADATA_ENDS = ("_stats.json",)  # img2dataset, beside each shard
_OPEN_AT_ONCE = 16
_EXAMPLES = 3
_MAX_MANIFEST_BYTES = 1 << 30
METADATA, UNKNOWN, ACCOUNT = "known metadata", "unknown kind", "a run's files beside its shards"


@dataclass(frozen=True)
class Ignored:
    """Files that were met and are not read: why, how many, and the first of them."""

    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class Listing(Sequence[Part]):
    """The parts of one set, and what was left out."""

    parts: tuple[Part, ...]
    ignored: tuple[Ignored, ...] = ()
    num_missing: int = 0
    """names made by braces where nothing is"""
    missing: tuple[str, ...] = ()
    """the first of them"""

    @overload
    def __getitem__(self, index: int) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Part]: ...
    def __getitem__(self, index: int | slice) -> Part | Sequence[Part]:
        return self.parts[index]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    @property
    def num_ignored(self) -> int:
        return sum(entry.count for entry in self.ignored)

    def notes(self) -> list[str]:
        """What was left out, a line each: `ignored, system file: 12 (/pool/.DS_Store ...)`."""
        lines = [
            f"ignored, {entry.reason}: {entry.count:,} ({_shown(entry.example)}{' ...' if entry.count > 1 else ''})"
            for entry in self.ignored
        ]
        if self.num_missing:
            more = f" and {self.num_missing - len(self.missing):,} more" if self.num_missing > len(self.missing) else ""
            lines.append(f"missing, named in braces: {self.num_missing:,} ({', '.join(self.missing)}{more})")
        return lines


def find_parts(urls: Sequence[str], images_per_folder_part: int = 1000, run_folder: str | None = None) -> Listing:
    """List what the URLs (braces, globs, folders, files) hold, in the order given, names sorted within each.

    A folder's tars and Parquet files are parts of their own; its loose images are cut into parts of about
    images_per_folder_part files. Nothing that lies in run_folder is read.

    Raises:
        ValueError: nothing there, an unreachable place, or a file of an unknown kind.
    """
    ledger = Ledger(resolved(run_folder) if run_folder is not None else None)
    parts: list[Part] = []
    for url in urls:
        repeated, before = ledger.num_repeated, ledger.ignored.copy()
        found = _parts(url, files_at(url, ledger), images_per_folder_part, ledger)
        if not found and ledger.num_repeated == repeated:
            raise ValueError(_nothing(url, ledger, before, run_folder))
        parts += found
    ignored = tuple(Ignored(reason, count, name) for reason, (count, name) in sorted(ledger.ignored.items()))
    return Listing(tuple(parts), ignored, len(ledger.missing), tuple(ledger.missing[:_EXAMPLES]))


def choose_column(sets: Sequence[Listing], column: str) -> list[Listing]:
    """The sets with the images of their Parquet files in a named column (dotted where nested), where a file has it.

    Raises:
        ValueError: no Parquet file has it; the columns of the first one are listed.
    """
    first, chosen = None, []
    for listing in sets:
        parts = []
        for part in listing:
            found = has_column(part.url, column) if part.kind == "parquet" else []
            parts.append(replace(part, column=column) if found is True else part)
            first = first or (part.url, found) if found is not True and found else first
        chosen.append(replace(listing, parts=tuple(parts)))
    if any(part.column for listing in chosen for part in listing):
        return chosen
    if first is None:
        raise ValueError(f"--image-column {column!r} is for Parquet files, and there is none that can be read.")
    raise ValueError(f"--image-column {column!r}: no Parquet file has it; {first[0]} has {', '.join(first[1])}.")


def _parts(url: str, files: Sequence[Found], images_per_folder_part: int, ledger: Ledger) -> list[Part]:
    parts, loose = shards_and_loose(files, ledger)
    has_shards = bool(parts)
    for root, named in loose.items():
        parts += _folder_parts(root, named, images_per_folder_part, has_shards, ledger)
    return parts


def shards_and_loose(files: Sequence[Found], ledger: Ledger) -> tuple[list[Part], dict[str, dict[str, Found]]]:
    """Of listed files, tars and Parquet files as parts; and by folder the files that are images, or may come with one.

    Raises:
        ValueError: a file that was given by its name and is of no known kind.
    """
    files = _without_accounts(files, ledger)
    kinds = [_kind(file) for file in files]
    shards = [(file, kind) for file, kind in zip(files, kinds, strict=True) if kind is not None]
    loose = [file for file, kind in zip(files, kinds, strict=True) if kind is None]
    metadata = _metadata_tables(files, shards)
    parts = []
    for file, kind in shards:
        if file in metadata:
            ledger.ignore(METADATA, join(file.root, file.name))
        else:
            parts.append(Part(kind, join(file.root, file.name), file.size, file.version))
    by_root: dict[str, dict[str, Found]] = {}
    for file in loose:
        if not file.is_named and _is_metadata(file.name):
            ledger.ignore(METADATA, join(file.root, file.name))
        else:
            by_root.setdefault(file.root, {})[file.name] = file
    return parts, by_root


def _without_accounts(files: Sequence[Found], ledger: Ledger) -> list[Found]:
    """Of each folder that curation wrote, its shards alone: the tables and pictures beside them are an account."""
    names: dict[str, set[str]] = {}
    for file in files:
        if not file.is_named:
            names.setdefault(file.root, set()).add(file.name)
    own = {root: own_shards(found, lambda name, root=root: _whole(join(root, name))) for root, found in names.items()}
    left = []
    for file in files:
        shards = None if file.is_named else own[file.root]
        if shards is None or file.name in shards:
            left.append(file)
        else:
            ledger.ignore(ACCOUNT, join(file.root, file.name))
    return left


def _whole(url: str) -> bytes:
    content = read_file(url, _MAX_MANIFEST_BYTES)[1]
    return b"" if content is None else content


def _folder_parts(
    root: str, files: dict[str, Found], images_per_folder_part: int, has_shards: bool, ledger: Ledger
) -> list[Part]:
    parts, chunk = [], list[Found]()
    if has_shards:  # checksums, lists, notes: what lies beside shards and is no image is no lost sample either
        loose = [name for cluster in clusters(files) for name in cluster.loose]
        others = set(loose) - set(hidden_images(root, loose))
        for name in sorted(others):
            ledger.ignore(UNKNOWN, join(root, name))
        files = {name: file for name, file in files.items() if name not in others}
    for cluster in clusters(files):
        if len(chunk) >= images_per_folder_part:  # a picture and its caption stay together
            parts.append(_folder_part(root, chunk))
            chunk = []
        chunk += [files[name] for name in cluster.names]
    return [*parts, _folder_part(root, chunk)] if chunk else parts


def hidden_images(root: str, names: Sequence[str]) -> list[str]:
    """Of files without the name of an image, those that begin like one."""
    with ThreadPoolExecutor(_OPEN_AT_ONCE) as pool:
        are_images = list(pool.map(lambda name: begins_like_image(root, name), names))
    return [name for name, is_image in zip(names, are_images, strict=True) if is_image]


def _folder_part(root: str, files: Sequence[Found]) -> Part:
    version = hashlib.sha256("".join(file.version for file in files).encode()).hexdigest()[:16]
    return Part("folder", root, sum(file.size for file in files), version, tuple(file.name for file in files))


def _kind(file: Found) -> PartKind | None:
    """tar or parquet; None for a file that is an image, or may come with one.

    Raises ValueError for a file that was given by its name and is none of these.
    """
    name = file.name if is_local(file.root) else file.name.split("?")[0]  # https://host/a.tar?download=1
    if name.lower().endswith(_TAR_SUFFIXES):
        return "tar"
    if name.lower().endswith(".parquet"):
        return "parquet"
    if not file.is_named or has_image_name(name):
        return None
    head = read_head(join(file.root, file.name), 512)
    if head[257:262] == b"ustar":
        return "tar"
    if head[:4] == b"PAR1":
        return "parquet"
    if not sniff(head):
        raise ValueError(
            f"{join(file.root, file.name)} is neither a .tar nor a .parquet file nor an image; "
            "give one of these, or the folder of loose images"
        )
    return None


def _is_metadata(name: str) -> bool:
    base = name.rpartition("/")[2].lower()
    return base in _METADATA_NAMES or base.endswith(_METADATA_ENDS)


def _metadata_tables(files: Sequence[Found], shards: Sequence[tuple[Found, PartKind]]) -> set[Found]:
    """Parquet files that tell about the images beside them. Only those that may are opened: a listing stays cheap."""
    tables = [file for file, kind in shards if kind == "parquet" and not file.is_named]
    if not tables:
        return set()
    beside = {_stem(file) for file, kind in shards if kind == "tar"}  # 00000.tar + 00000.parquet
    for file in files:
        if has_image_name(file.name):  # 00000/000000000.jpg + 00000.parquet, and pictures in the same folder
            folder = join(file.root, file.name).rpartition("/")[0]
            while len(folder) > len(file.root):
                beside.add(folder)
                folder = folder.rpartition("/")[0]
            beside.add(join(file.root, file.name).rpartition("/")[0] + "/")
    doubtful = [
        file
        for file in tables
        if _stem(file) in beside
        or _stem(file).rpartition("/")[0] + "/" in beside
        or file.name.rpartition("/")[2].lower().startswith(("metadata", "_"))
    ]
    with ThreadPoolExecutor(_OPEN_AT_ONCE) as pool:
        holding = pool.map(lambda file: holds_images(join(file.root, file.name)), doubtful)
        return {file for file, holds in zip(doubtful, holding, strict=True) if not holds}


def _stem(file: Found) -> str:
    name = join(file.root, file.name)
    suffix = next((end for end in (*_TAR_SUFFIXES, ".parquet") if name.lower().endswith(end)), "")
    return name[: len(name) - len(suffix)]


def _nothing(url: str, ledger: Ledger, before: dict[str, tuple[int, str]], run_folder: str | None) -> str:
    fresh = {
        reason: (count - before.get(reason, (0, ""))[0], example)
        for reason, (count, example) in sorted(ledger.ignored.items())
        if count > before.get(reason, (0, ""))[0]
    }
    if not fresh:
        return f"cannot list {url!r}: the folder is empty. Give a folder of tars, Parquet files or images."
    if list(fresh) == ["in the run folder"]:
        return f"all of {url!r} lies in the run folder {run_folder}: give another --out, or another address."
    told = "; ".join(f"{reason}: {count:,} ({_shown(example)})" for reason, (count, example) in fresh.items())
    return f"nothing to read at {url!r}, all of it is left out: {told}."


def _shown(name: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
