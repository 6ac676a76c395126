"""Tars as people have them: damaged, cut, concatenated, linked, compressed, with the files of a key apart.

The invariant everywhere: each byte belongs to a member, to padding or to a gap, and each sample that the damage does
not touch is there with its bytes.
"""

import bz2
import errno
import gzip
import io
import lzma
import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from curation.reading.compression import Unpacked
from curation.reading.listing import find_parts
from curation.reading.samples import Part, Sample
from curation.reading.sources import MemberReader, read_samples
from curation.reading.tar_samples import HeadersFirst
from curation.reading.tars import NO_END, Gap, Span, TarMember, walk
from tests.conftest import encoded, picture

LIMIT = 1 << 20
KEYS = [f"p{i}" for i in range(10)]
PICTURES = {key: encoded(picture(i)) for i, key in enumerate(KEYS)}
JSON = {key: b'{"of": "%s"}' % key.encode() for key in KEYS}


def tar_of(names: Sequence[str], tar_format: int = tarfile.PAX_FORMAT, prefix: str = "") -> bytes:
    """A tar of these files, pictures, .json or texts by their suffix; `a -> b` is a hard link, `a ~> b` a soft one."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name in names:
            for arrow, kind in ((" -> ", tarfile.LNKTYPE), (" ~> ", tarfile.SYMTYPE)):
                if arrow in name:
                    info = tarfile.TarInfo(name.split(arrow)[0])
                    info.type, info.linkname = kind, name.split(arrow)[1]
                    tar.addfile(info)
                    break
            else:
                key, _, suffix = name.partition(".")
                content = {"json": JSON.get(key, b"{}"), "txt": f"text of {key}".encode()}.get(suffix)
                content = PICTURES.get(key.rpartition("/")[2], b"") if content is None else content
                info = tarfile.TarInfo(prefix + name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


NAMES = [f"{key}.{suffix}" for key in KEYS for suffix in ("jpg", "json", "txt")]
TEN = tar_of(NAMES)


def start_of(name: str, content: bytes = TEN) -> int:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.getmember(name).offset


def samples_of(path: Path, content: bytes, limit: int = LIMIT) -> list[Sample]:
    path.write_bytes(content)
    return list(read_samples(find_parts([str(path)])[0], limit))


def fates(samples: Sequence[Sample]) -> list[tuple[str, str | None]]:
    return [(sample.key, sample.reason) for sample in samples]


def accounted(content: bytes, stream: bool = False) -> list[Span]:
    """walk, with every byte checked to be in exactly one span."""
    spans: list[Span] = []
    file = io.BytesIO(content)
    for span in walk(file, None if stream else len(content)):
        if stream and spans and isinstance(span, Gap) and span.offset == getattr(spans[-1], "start", -1):
            spans.pop()  # a member that turned out to be cut
        spans.append(span)
        if isinstance(span, TarMember):
            file.seek(span.offset)
            file.read(span.size)  # as a caller does
    at = 0
    for span in spans:
        start, end = (span.start, span.end) if isinstance(span, TarMember) else (span.offset, span.offset + span.size)
        assert start == at, span
        at = min(end, len(content)) if isinstance(span, TarMember) else end
    assert at == len(content)
    return spans


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [0, 100, 124, 129, 135, 148, 156, 257, 345])
@pytest.mark.parametrize("name", ["p0.jpg", "p3.jpg", "p9.jpg"])
def test_one_header_byte_flipped_costs_one_sample(tmp_path: Path, name: str, field: int) -> None:
    content = bytearray(TEN)
    content[start_of(name) + field] ^= 4
    samples = samples_of(tmp_path / "a.tar", bytes(content))
    accounted(bytes(content))
    lost = name[:2]
    assert fates(samples) == [(key, None) for key in KEYS if key != lost] + [(lost, "damaged_shard")]
    assert all(s.content == PICTURES[s.key] and s.metadata == JSON[s.key].decode() for s in samples[:-1])
    assert samples[-1].unread_bytes == 512 + -(-len(PICTURES[lost]) // 512) * 512
    assert samples[-1].unread_images == 1


@pytest.mark.parametrize("name", ["p3.json", "p3.txt"])
def test_what_lies_beside_the_image_is_not_lost_in_silence_either(tmp_path: Path, name: str) -> None:
    content = bytearray(TEN)
    content[start_of(name)] ^= 4
    samples = samples_of(tmp_path / "a.tar", bytes(content))
    assert fates(samples)[-1] == ("p3", "damaged_shard")
    assert [s.key for s in samples[:-1]] == [key for key in KEYS if key != "p3"]


@pytest.mark.parametrize(
    ("cut", "whole", "last"),
    [
        (start_of("p4.jpg"), 4, ("a.tar@{cut}", "no_end_marker", 0)),
        (start_of("p4.json"), 4, ("p4", "damaged_shard", 0)),
        (start_of("p4.jpg") + 100, 4, ("a.tar@{start}", "damaged_shard", 100)),
        (start_of("p4.jpg") + 512, 4, ("p4", "damaged_shard", 512)),
        (start_of("p4.jpg") + 1500, 4, ("p4", "damaged_shard", 1500)),
        (start_of("p4.json") + 513, 4, ("p4", "damaged_shard", 513)),
        (len(TEN.rstrip(b"\0")), 10, ("a.tar@{cut}", "no_end_marker", 0)),
    ],
    ids=["between samples", "between members", "in a header", "behind a header", "in data", "in json", "no marker"],
)
def test_a_cut_leaves_the_whole_samples_and_a_row(tmp_path: Path, cut: int, whole: int, last: tuple) -> None:
    samples = samples_of(tmp_path / "a.tar", TEN[:cut])
    accounted(TEN[:cut])
    key = last[0].format(cut=cut, start=start_of("p4.jpg"))
    assert fates(samples) == [*((k, None) for k in KEYS[:whole]), (key, last[1])]
    assert samples[-1].unread_bytes == last[2]
    assert accounted(TEN[:cut], stream=True) == accounted(TEN[:cut]) or last[1] == "damaged_shard"


def without_padding(content: bytes) -> bytes:
    return content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512)


@pytest.mark.parametrize("end", [0, 512, 1024, 10240], ids=["none", "one", "two", "record"])
@pytest.mark.parametrize("number", [2, 3])
def test_concatenated_tars_are_read_to_the_end(tmp_path: Path, number: int, end: int) -> None:
    """With any end marker between them; equal keys in two of them are two samples, each with its own files."""
    halves = [tar_of([n for n in NAMES if int(n[1]) % number == i]) for i in range(number)]
    content = b"".join(without_padding(half) + bytes(end) for half in halves)
    content += b"" if end else bytes(1024)
    samples = samples_of(tmp_path / "a.tar", content)
    assert sorted(fates(samples)) == [(key, None) for key in KEYS]
    twice = samples_of(tmp_path / "b.tar", (without_padding(TEN) + bytes(end)) * number + bytes(0 if end else 1024))
    assert fates(twice) == [(key, None) for key in KEYS] * number
    assert all(s.metadata == JSON[s.key].decode() and len(s.others) == 2 for s in twice)


@pytest.mark.parametrize("zeros", [512, 1024, 5120, 10240])
def test_zeros_in_the_middle_are_read_over(tmp_path: Path, zeros: int) -> None:
    at = start_of("p5.jpg")
    samples = samples_of(tmp_path / "a.tar", TEN[:at] + bytes(zeros) + TEN[at:])
    assert fates(samples) == [(key, None) for key in KEYS]


def test_a_hole_of_zeros_is_damage(tmp_path: Path) -> None:
    """Longer than any padding: what a transfer leaves that fetched the ends first, or stopped in a file made whole."""
    first, second = start_of("p3.jpg"), start_of("p9.jpg")
    hole = samples_of(tmp_path / "a.tar", TEN[:first] + bytes(second - first) + TEN[second:])
    assert fates(hole)[:-1] == [(key, None) for key in ("p0", "p1", "p2", "p9")]
    assert hole[-1].reason == "damaged_shard"
    assert hole[-1].unread_images == 6
    tail = samples_of(tmp_path / "b.tar", TEN[:first] + bytes(len(TEN) - first))
    assert (len(tail), tail[-1].reason, tail[-1].unread_bytes) == (4, "damaged_shard", len(TEN) - first)
    assert tail[-1].unread_images in (7, 8)  # the old padding is among the zeros


def test_a_large_record_is_padding() -> None:
    """tar -b 2048 fills up to a mebibyte."""
    content = TEN + bytes((1 << 20) - len(TEN))
    assert not [span for span in accounted(content) if isinstance(span, Gap)]


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + bytes(3) + b"\xff" * 8, b"\xff" * 12, b"12x45678901\0"])
def test_a_size_that_cannot_be_is_a_gap_and_reading_resumes(tmp_path: Path, size: bytes) -> None:
    """Too large for the file, base 256, negative, no number; with a checksum that holds, as an attacker writes it."""
    content = bytearray(TEN)
    start = start_of("p3.jpg")
    content[start + 124 : start + 136] = size
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    samples = samples_of(tmp_path / "a.tar", bytes(content))
    assert fates(samples) == [(key, None) for key in KEYS if key != "p3"] + [("p3", "damaged_shard")]


def test_many_claims_beyond_the_end_cost_no_time() -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136], header[148:156] = b"77777777777\0", b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    sound = tarfile.TarInfo("b.txt").tobuf(tarfile.GNU_FORMAT)
    content = (bytes(header) + bytes(range(256)) * 2 + sound) * 3000
    spans = accounted(content)  # quadratic would take minutes
    assert sum(isinstance(span, Gap) and span.size > 0 for span in spans) == 3000


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_random_damage_touches_what_it_touches(tmp_path: Path, tar_format: int) -> None:
    """Single bytes, zeroed and random blocks, cuts: never an error, no byte unaccounted for, the others whole."""
    rng = np.random.default_rng(tar_format)
    sound = tar_of(NAMES, tar_format, prefix="é" * 60 if tar_format != tarfile.USTAR_FORMAT else "d/")
    spans = [span for span in accounted(sound) if isinstance(span, TarMember)]
    expected = samples_of(tmp_path / "sound.tar", sound)
    ranges = [(3 * [s.start for s in spans[3 * i : 3 * i + 3]][:1] + [spans[3 * i + 2].end])[-2:] for i in range(10)]
    for _ in range(120):
        content = bytearray(sound)
        kind = rng.integers(4)
        at = int(rng.integers(len(content)))
        if kind == 0:
            first, last = at, at + 1
            content[at] ^= 1 << int(rng.integers(8))
        elif kind in (1, 2):
            first = at // 512 * 512
            last = first + 512
            content[first:last] = bytes(512) if kind == 1 else rng.bytes(512)
        else:
            first, last = at, len(content)
            del content[at:]
        accounted(bytes(content))
        accounted(bytes(content), stream=True)
        samples = samples_of(tmp_path / "a.tar", bytes(content))
        good = [(s.key, s.content, s.metadata) for s in samples if s.reason is None]
        for (begin, end), sample in zip(ranges, expected, strict=True):
            if last <= begin or end <= first:
                assert (sample.key, sample.content, sample.metadata) in good
        if first < ranges[-1][1]:  # all ten are there, or there is a row that says why not
            assert len([s for s in samples if s.content]) == 10 or any(s.reason for s in samples)


# --- links, long names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrow", ["->", "~>"])
def test_links_to_earlier_members_are_those_members(tmp_path: Path, arrow: str) -> None:
    names = [
        "p0.jpg",
        "p0.json",
        f"copy.jpg {arrow} p0.jpg",
        f"copy.json {arrow} p0.json",
        f"third.jpg {arrow} copy.jpg",
    ]
    samples = samples_of(tmp_path / "a.tar", tar_of(names))
    assert fates(samples) == [("p0", None), ("copy", None), ("third", None)]
    assert [s.content for s in samples] == [PICTURES["p0"]] * 3
    assert samples[1].metadata == JSON["p0"].decode()
    with MemberReader("tar", str(tmp_path / "a.tar")) as reader:
        assert reader.read(samples[2].image) == PICTURES["p0"]


@pytest.mark.parametrize(
    "link", ["x.jpg -> p1.jpg", "x.jpg -> x.jpg", "x.jpg -> none.jpg", "x.jpg ~> /etc/passwd", "x.jpg ~> ../p0.jpg.jpg"]
)
def test_a_link_to_anything_else_is_a_row_with_a_reason(tmp_path: Path, link: str) -> None:
    """To a later member, to itself, to nothing, out of the tar."""
    samples = samples_of(tmp_path / "a.tar", tar_of(["p0.jpg", link, "p1.jpg"]))
    assert fates(samples) == [("p0", None), ("x", "unresolved_link"), ("p1", None)]


def test_a_lost_caption_is_a_warning(tmp_path: Path) -> None:
    samples = samples_of(tmp_path / "a.tar", tar_of(["p0.jpg", "p0.txt -> none.txt"]))
    assert [(s.key, s.reason, s.warning) for s in samples] == [("p0", None, "unresolved_link")]


@pytest.mark.parametrize("type_", [b"S", b"M", b"Z"])
def test_sparse_files_and_volumes_are_rows_with_a_reason(tmp_path: Path, type_: bytes) -> None:
    content = bytearray(tar_of(["p0.jpg", "p1.jpg", "p2.jpg"]))
    start = start_of("p1.jpg", bytes(content))
    content[start + 156 : start + 157], content[start + 148 : start + 156] = type_, b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    assert fates(samples_of(tmp_path / "a.tar", bytes(content))) == [("p0", None), ("p1", "not_unpacked"), ("p2", None)]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", ["k" * 99, "k" * 150, "folder/" * 40 + "k", "猫" * 90])
def test_long_names_are_those_of_tarfile(tmp_path: Path, name: str, tar_format: int) -> None:
    content = tar_of([f"{name}{i}.jpg" for i in range(3)], tar_format)
    assert [s.key for s in samples_of(tmp_path / "a.tar", content)] == [f"{name}{i}" for i in range(3)]
    assert [m.name for m in accounted(content) if isinstance(m, TarMember)] == [f"{name}{i}.jpg" for i in range(3)]


# --- compression ------------------------------------------------------------------------------------------------------


FAST = {"gzip": {"compresslevel": 1}, "bz2": {"compresslevel": 1}, "xz": {"preset": 0}}


def packed(content: bytes, kind: str) -> bytes:
    return {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "plain": bytes}[kind](content)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.tgz", "gzip"), ("a.tar", "gzip"), ("a.tar.gz", "gzip"), ("a.tar.gz", "plain"), ("a.tgz", "plain"),
        ("a.tar", "bz2"), ("a.tar", "xz"),
    ],
)  # fmt: skip
def test_compression_is_known_by_content(tmp_path: Path, name: str, kind: str) -> None:
    samples = samples_of(tmp_path / name, packed(TEN, kind))
    assert fates(samples) == [(key, None) for key in KEYS]
    assert all(s.content == PICTURES[s.key] and s.metadata == JSON[s.key].decode() for s in samples)
    with MemberReader("tar", str(tmp_path / name)) as reader:
        for sample in [*reversed(samples), samples[3]]:
            assert sample.image is not None
            assert reader.read(sample.image) == PICTURES[sample.key]


def test_what_cannot_be_decompressed_is_a_row(tmp_path: Path) -> None:
    samples = samples_of(tmp_path / "a.tar", b"\x28\xb5\x2f\xfd" + bytes(3000))
    assert [(s.key, s.reason, s.unread_bytes) for s in samples] == [("a.tar@0", "unsupported_compression", 3004)]


@pytest.mark.parametrize("kind", ["gzip", "bz2", "xz"])
def test_a_cut_or_broken_stream_is_a_row(tmp_path: Path, kind: str) -> None:
    half = packed(TEN[: start_of("p5.jpg")], kind)
    whole = half + packed(TEN[start_of("p5.jpg") :], kind)  # streams behind one another are one
    assert fates(samples_of(tmp_path / "a.tar", whole)) == [(key, None) for key in KEYS]
    cut = samples_of(tmp_path / "b.tar", whole[:-300])
    assert cut[-1].reason == "damaged_shard"
    assert fates(cut)[:5] == [(key, None) for key in KEYS[:5]]
    broken = samples_of(tmp_path / "c.tar", half + b"garbage" * 1000)
    assert fates(broken)[:5] == [(key, None) for key in KEYS[:5]]
    assert (broken[-1].reason, broken[-1].unread_bytes) == ("damaged_shard", 7000)


@pytest.mark.parametrize("kind", ["gzip", "bz2", "xz"])
def test_a_bomb_fills_no_memory(tmp_path: Path, kind: str) -> None:
    """A small file that expands to 300 MB: as one member's data, and as a tail of nothing."""
    info = tarfile.TarInfo("bomb.jpg")
    info.size = 150 << 20
    with {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}[kind](tmp_path / "a.tar", "wb", **FAST[kind]) as file:
        file.write(without_padding(tar_of(["p0.jpg"])) + info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(150):
            file.write(bytes(1 << 20))
        file.write(tar_of(["p1.jpg"]))
        for _ in range(150):
            file.write(bytes(1 << 20))
    part = find_parts([str(tmp_path / "a.tar")])[0]
    assert part.size < 2 << 20
    tracemalloc.start()
    samples = list(read_samples(part, LIMIT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert fates(samples) == [
        ("p0", None),
        ("bomb", "file_too_large"),
        ("p1", None),
        (samples[-1].key, "damaged_shard"),
    ]
    assert peak < 80 << 20


def test_any_order_of_reads_decompresses_twice() -> None:
    content = np.random.default_rng(0).bytes(80 << 20)
    unpacked = Unpacked(io.BytesIO(gzip.compress(content, 0)), "gzip")
    for at in (70 << 20, 69 << 20, 5, 79 << 20, 40 << 20, 0):
        unpacked.seek(at)
        assert unpacked.read(1000) == content[at : at + 1000]
    assert unpacked.seek(0, 2) == len(content)
    unpacked.close()


# --- a key's files apart ----------------------------------------------------------------------------------------------

APART = {
    "pictures, then texts": [f"{key}.{suffix}" for suffix in ("jpg", "json") for key in KEYS],
    "texts, then pictures": [f"{key}.{suffix}" for suffix in ("json", "jpg") for key in KEYS],
    "interleaved by two": [
        f"{KEYS[i + j]}.{suffix}" for i in range(0, 10, 2) for suffix in ("jpg", "json") for j in range(2)
    ],
    "three kinds": [f"{key}.{suffix}" for suffix in ("jpg", "json", "txt") for key in KEYS],
    "texts behind whole samples": [*(n for n in NAMES if n[3:] != "txt"), *(f"{key}.txt" for key in KEYS)],
}


def in_full(part: Part) -> list[Sample]:
    """As the embed stage reads: again, with the headers first, where that turns out to be needed."""
    try:
        return list(read_samples(part, LIMIT))
    except HeadersFirst:
        return list(read_samples(part, LIMIT, headers_first=True))


@pytest.mark.parametrize("kind", ["plain", "gzip", "xz", "memory"])
@pytest.mark.parametrize("names", APART.values(), ids=APART)
def test_files_of_a_key_that_lie_apart_are_joined(tmp_path: Path, names: list[str], kind: str) -> None:
    url = str(tmp_path / "a.tar")
    if kind == "memory":
        import fsspec

        url = f"memory://{tmp_path.name}/a.tar"
        with fsspec.open(url, "wb") as file:
            file.write(tar_of(names))  # type: ignore[union-attr]
    else:
        Path(url).write_bytes(packed(tar_of(names), kind))
    samples = in_full(find_parts([url])[0])
    assert fates(samples) == [(key, None) for key in KEYS]
    suffixes = sorted({name[3:] for name in names} - {"jpg"})
    for sample in samples:
        assert (sample.content, sample.metadata) == (PICTURES[sample.key], JSON[sample.key].decode())
        assert sorted(member.suffix for member in sample.others) == suffixes


def test_headers_first_gives_what_streaming_gives(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(TEN[: start_of("p7.json") + 100])
    part = find_parts([str(tmp_path / "a.tar")])[0]
    assert list(read_samples(part, LIMIT)) == list(read_samples(part, LIMIT, headers_first=True))


def test_nothing_that_comes_twice_vanishes(tmp_path: Path) -> None:
    """A picture again under its key, near and far; another kind of picture, far; each with the texts behind it."""
    near = samples_of(tmp_path / "a.tar", tar_of(["p0.jpg", "p0.json", "p0.jpg", "p1.jpg"]))
    assert [(s.key, len(s.others)) for s in near] == [("p0", 1), ("p0", 0), ("p1", 0)]
    far = samples_of(tmp_path / "b.tar", tar_of(["p0.jpg", "p1.jpg", "p0.jpg", "p0.json"]))
    assert [(s.key, len(s.others)) for s in far] == [("p0", 0), ("p1", 0), ("p0", 1)]
    kinds = samples_of(tmp_path / "c.tar", tar_of(["p0.jpg", "p0.json", "p1.jpg", "p0.png", "p0.txt"]))
    assert [(s.key, [m.suffix for m in s.others]) for s in kinds] == [("p0", ["json"]), ("p1", []), ("p0", ["txt"])]
    assert all(s.content for s in [*near, *far, *kinds])
    alone = samples_of(tmp_path / "d.tar", tar_of(["p0.txt", "p1.jpg", "p0.txt", "p0.jpg"]))
    assert fates(alone) == [("p0", "no_image"), ("p1", None), ("p0", None)]


def test_apart_and_damaged(tmp_path: Path) -> None:
    content = bytearray(tar_of(APART["pictures, then texts"]))
    content[start_of("p4.jpg", bytes(content))] ^= 1
    samples = samples_of(tmp_path / "a.tar", bytes(content))
    assert [s.key for s in samples if s.reason is None] == [key for key in KEYS if key != "p4"]
    assert [(s.key, s.reason) for s in samples if s.reason == "no_image"] == [("p4", "no_image")]
    assert (samples[-1].reason, samples[-1].unread_images) == ("damaged_shard", 1)


def test_the_real_cut_shard(real_data: Path) -> None:
    samples = list(read_samples(find_parts([str(real_data / "pool_bad" / "cut_shard.tar")])[0], 64 << 20))
    assert [s.reason for s in samples] == [None] * 9 + ["damaged_shard"]
    assert samples[-1].unread_bytes


def test_the_end_marker_may_be_missing_without_harm() -> None:
    content = without_padding(TEN)
    assert accounted(content)[-1] == Gap(len(content), 0, NO_END)
    assert accounted(content, stream=True)[-1] == Gap(len(content), 0, NO_END)


def test_a_bad_sector_costs_what_lies_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk itself fails: no file can be made so, so the reads of a real one are."""
    from curation.reading import places

    class Failing(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            at = self.tell()
            if at < last and at + (size or 0) > first:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    first, last = start_of("p3.jpg") + 1024, start_of("p3.json")

    opened = places.open_file
    monkeypatch.setattr("curation.reading.compression.open_file", lambda url: Failing(opened(url).detach()))
    samples = samples_of(tmp_path / "a.tar", TEN)
    assert fates(samples) == [(key, "unreadable" if key == "p3" else None) for key in KEYS]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["Shot at 10.11.12.jpg", "Shot at 10.11.13.jpg"], ["Shot at 10.11.12", "Shot at 10.11.13"]),
        (["v1.0_cat.PNG", "v1.1_dog.jpg", "v1.1_dog.txt"], ["v1.0_cat", "v1.1_dog"]),
        (["./img.0.jpg", "./img.1.jpg", "./img.2.jpg"], ["./img.0", "./img.1", "./img.2"]),
        (["a.depth.png", "a.edge.png", "a.jpg"], ["a"]),
        (["a.seg.png", "a.txt"], ["a"]),
    ],
)
@pytest.mark.parametrize("kind", ["tar", "gz"])
def test_pictures_with_dots_in_their_names_are_samples_of_their_own(
    tmp_path: Path, names: list[str], keys: list[str], kind: str
) -> None:
    """Where a key has no image by WebDataset's rule; masks beside an image stay with it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number, name in enumerate(names):
            data = f"caption {number}".encode() if name.endswith("txt") else encoded(picture(number))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    packed = gzip.compress(content.getvalue()) if kind == "gz" else content.getvalue()
    path = tmp_path / f"a.{kind}.tar"
    path.write_bytes(packed)
    (part,) = find_parts([str(path)])
    try:
        samples = list(read_samples(part, 1 << 20))
    except HeadersFirst:
        samples = list(read_samples(part, 1 << 20, headers_first=True))
    assert [sample.key for sample in samples] == keys
    assert all(sample.content is not None and sample.reason is None for sample in samples)
    assert sum(1 + len(sample.others) for sample in samples) == len(names)
