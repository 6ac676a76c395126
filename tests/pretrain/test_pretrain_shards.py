"""The table of a dataset's images: where each lies, what is refused and why, and the reader."""

import gzip
import io
import pickle
import re
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.engine.manifest import File, Manifest
from pretrain.data.decode import Damaged, ImageLimits
from pretrain.data.shards import IMAGE_SUFFIXES, ShardReader, read_table
from pretrain.data.sources import find_sources
from pretrain.data.tars import scan
from tests.conftest import picture_tar, write_tar

LIMITS = ImageLimits()


def with_tarfile(path: Path) -> list[tuple[int, int]]:
    """Offsets and sizes of the image members, by the standard library, which resolves a link to what it links to."""
    found = []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.rpartition("/")[2].partition(".")[2].lower() in IMAGE_SUFFIXES:
                file = tar._find_link_target(member) if member.issym() or member.islnk() else member
                found.append((file.offset_data, file.size))
    return found


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_finds_what_tarfile_finds(tmp_path: Path, tar_format: int) -> None:
    """Long and non-ASCII names, folders, links, other suffixes, empty members; in all three formats."""
    path = tmp_path / "a.tar"
    long = "folder/" * 12 + "name" * 10
    with tarfile.open(path, "w", format=tar_format) as tar:
        for i, name in enumerate(
            ["a.jpg", "a.json", "b/c.PNG", "a.seg.png", "e", f"{long}.webp", "café_猫.jpg", "z.jpeg"]
        ):
            info = tarfile.TarInfo(name)
            info.size = 100 * i
            tar.addfile(info, io.BytesIO(bytes(100 * i)))
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "b/c.PNG"
            tar.addfile(info)
    with path.open("rb") as file:
        offsets, sizes, damage = scan(file, path.stat().st_size, IMAGE_SUFFIXES)
    assert damage == ""
    assert list(zip(offsets.tolist(), sizes.tolist(), strict=True)) == with_tarfile(path)
    assert len(offsets) == 5 + 2


def test_a_large_pax_size_and_base_256_are_read(tmp_path: Path) -> None:
    """Members of 8 GiB and more write their size outside the octal field."""
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        info = tarfile.TarInfo("a.jpg")
        info.size = 9 << 30
        header = info.tobuf(tar_format, "utf-8", "surrogateescape")
        size = len(header) + (9 << 30) + 1024
        with (tmp_path / "a.tar").open("w+b") as file:  # a hole: it takes no disk
            file.write(header)
            file.truncate(size)
            offsets, sizes, damage = scan(file, size, IMAGE_SUFFIXES)
            assert (offsets.tolist(), sizes.tolist(), damage) == ([len(header)], [9 << 30], "")
        assert "ends inside" in scan(io.BytesIO(header), len(header), IMAGE_SUFFIXES)[2]


@pytest.mark.parametrize("cut", [100, 512, 700, 5000, 10239])
def test_a_cut_tar_keeps_what_is_whole(tmp_path: Path, cut: int) -> None:
    path = picture_tar(tmp_path / "a.tar", range(6))
    whole = with_tarfile(path)
    path.write_bytes(path.read_bytes()[:cut])
    good = [(offset, size) for offset, size in whole if offset + size <= cut]
    if not good:
        with pytest.raises(ValueError, match="without a usable image"):
            read_table(str(path), LIMITS)
        return
    table = read_table(str(path), LIMITS)
    assert [table.locate(row)[1:] for row in range(len(table))] == good
    assert table.refused


def test_noise_links_and_bombs_are_refused_with_a_reason(tmp_path: Path) -> None:
    """A shard of noise, one whose header claims an exabyte, an empty file: counted; the good shard counts."""
    picture_tar(tmp_path / "a.tar", range(3))
    (tmp_path / "b.tar").write_bytes(np.random.default_rng(0).bytes(20_000))
    (tmp_path / "c.tar").write_bytes(b"")
    info = tarfile.TarInfo("bomb.jpg")
    info.size = 1 << 60
    (tmp_path / "d.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    write_tar(tmp_path / "e.tar", [("big.jpg", bytes(3000)), ("none.jpg", b""), ("ok.jpg", bytes(2000))])
    table = read_table(str(tmp_path), ImageLimits(max_file_bytes=2500))
    assert len(table) == 3 + 1
    assert table.refused == {"damaged_shard": 3, "empty": 1, "file_too_large": 1}


def in_the_middle(content: bytes, start: int) -> bytes:
    """One bit of a header flipped."""
    return content[: start + 130] + bytes([content[start + 130] ^ 1]) + content[start + 131 :]


@pytest.mark.parametrize(
    ("damage", "left", "words"),
    [
        (in_the_middle, 9, r"no tar header at byte \d+; [\d,]+ bytes cannot be read"),
        (lambda content, start: content[:start], 3, "its end marker is missing$"),
        (lambda content, start: content[:start] + bytes(10240) + content[start:], 10, ""),
        (lambda content, start: content + content, 20, ""),
        (lambda content, start: gzip.compress(content), 0, r"compressed \(gzip\); .* unpack it"),
    ],
    ids=["flipped header", "cut between members", "zeros in the middle", "concatenated", "gzip"],
)
def test_what_stands_around_damage_is_used(tmp_path: Path, damage, left: int, words: str) -> None:
    path = picture_tar(tmp_path / "a.tar", range(10))
    with tarfile.open(path) as tar:
        start = tar.getmember("p0003.jpg").offset
    content = damage(path.read_bytes(), start)
    _, sizes, said = scan(io.BytesIO(content), len(content), IMAGE_SUFFIXES)
    assert len(sizes) == left
    assert re.search(words, said) if words else said == ""
    path.write_bytes(content)
    if left:
        assert read_table(str(path), LIMITS).refused == ({"damaged_shard": 1} if words else {})
    else:
        with pytest.raises(ValueError, match=r"Refused: {'damaged_shard': 1}"):
            read_table(str(path), LIMITS)


def test_hostile_headers_never_raise() -> None:
    """Random damage of a real tar ends in a shorter list, not in an error or an endless loop."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(4):
            info = tarfile.TarInfo(f"{'é' * 60}{i}.jpg")
            info.size = 300
            tar.addfile(info, io.BytesIO(bytes(300)))
    sound = np.frombuffer(buffer.getvalue(), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(300):
        content = sound.copy()
        content[rng.integers(len(content), size=20)] = rng.integers(256, size=20)
        offsets, sizes, _ = scan(io.BytesIO(content.tobytes()), len(content), IMAGE_SUFFIXES)
        assert len(offsets) == len(sizes) <= 4
        assert (sizes >= 0).all()


def test_globs_braces_folders_and_single_tars_mean_the_same(tmp_path: Path) -> None:
    for i in range(3):
        picture_tar(tmp_path / f"s-{i}.tar", range(2), prefix=f"{i}")
    expected = [f"s-{i}.tar" for i in range(3)]
    for shards in (f"{tmp_path}", f"{tmp_path}/*.tar", f"{tmp_path}/s-{{0..2}}.tar", f"{tmp_path}/s-{{2,1,0}}.tar"):
        assert [Path(source.shard.url).name for source in find_sources(shards)] == expected
    assert len(read_table(f"{tmp_path}/s-1.tar", LIMITS)) == 2
    for missing in (f"{tmp_path}/none", f"{tmp_path}/x*.tar", f"{tmp_path}/s-7.tar"):
        with pytest.raises(ValueError, match="nothing found at"):
            read_table(missing, LIMITS)


def curated(folder: Path, num_shards: int = 2) -> Path:
    """A run folder as curation leaves it: shards/*.tar, shards/index/*.parquet, shards/manifest.json."""
    files = []
    for i in range(num_shards):
        path = picture_tar(folder / "shards" / f"shard-{i:06d}.tar", range(4), prefix=f"{i}x")
        rows = []
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                rows.append({"key": key, "suffix": suffix, "offset": member.offset_data, "size": member.size})
        index = folder / "shards" / "index" / f"shard-{i:06d}.parquet"
        index.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), index)
        files.append(File(path=path.name, rows=4, bytes=path.stat().st_size, sha256=""))
    manifest = Manifest(stage="shard", version=1, key="", settings={}, inputs={}, files=files)
    (folder / "shards" / "manifest.json").write_text(manifest.to_json())
    return folder


def test_a_curated_folder_is_read_through_its_index(tmp_path: Path) -> None:
    """The same table as by scanning; a tar that the manifest does not list is left out."""
    run = curated(tmp_path / "run")
    by_index = read_table(str(run), LIMITS)
    by_scan = read_table(f"{run}/shards/shard-00000[01].tar", LIMITS)
    (run / "shards" / "index").rename(tmp_path / "away")
    assert by_index.fingerprint() == by_scan.fingerprint() == read_table(f"{run}/shards/*.tar", LIMITS).fingerprint()
    picture_tar(run / "shards" / "stray.tar", range(1))
    assert read_table(str(run / "shards"), LIMITS).fingerprint() == by_index.fingerprint()


def test_an_unfinished_or_incomplete_curated_folder_is_refused(tmp_path: Path) -> None:
    run = curated(tmp_path / "run")
    (run / "shards" / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match="lists 1 shards that are not there"):
        read_table(str(run), LIMITS)
    (run / "shards" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="did not finish"):
        read_table(str(run), LIMITS)


def test_what_an_index_claims_beyond_its_tar_is_refused(tmp_path: Path) -> None:
    run = curated(tmp_path / "run", num_shards=1)
    index = run / "shards" / "index" / "shard-000000.parquet"
    rows = pq.read_table(index).to_pylist()
    rows += [
        {"key": "x", "suffix": "jpg", "offset": offset, "size": size}
        for offset, size in ((1 << 20, 100), (-512, 100), (700, 100), (512, -1), (1 << 50, 5))
    ]
    pq.write_table(pa.Table.from_pylist(rows), index)
    table = read_table(str(run), LIMITS)
    assert len(table) == 4
    assert table.refused == {"empty": 1, "misplaced": 3, "truncated": 1}


def test_the_reader_returns_the_bytes_and_names_the_member(tmp_path: Path) -> None:
    picture_tar(tmp_path / "a.tar", range(3))
    picture_tar(tmp_path / "b.tar", range(5), prefix="q")
    table = read_table(str(tmp_path), LIMITS)
    assert table.blocks.nbytes + table.sizes.nbytes == 8 * len(table)
    reader = pickle.loads(pickle.dumps(ShardReader(table)))
    names = []
    for path in (tmp_path / "a.tar", tmp_path / "b.tar"):
        with tarfile.open(path) as tar:
            names += [(f"{path.name}:{m.name}", tar.extractfile(m).read()) for m in tar if m.name.endswith(".jpg")]
    for row, (name, content) in enumerate(names):
        assert reader.read(row) == content
        assert reader.name(row) == name
    reader.close()


def test_a_shard_that_shrank_or_went_away_is_damage_with_a_reason(tmp_path: Path) -> None:
    path = picture_tar(tmp_path / "a.tar", range(3))
    table = read_table(str(path), LIMITS)
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(Damaged, match="truncated"):
        ShardReader(table).read(2)
    path.unlink()
    with pytest.raises(Damaged, match="unreadable"):
        ShardReader(table).read(0)
    assert ShardReader(table).name(0).startswith("a.tar:")


def test_open_files_are_bounded(tmp_path: Path) -> None:
    for i in range(70):
        picture_tar(tmp_path / f"{i:02d}.tar", range(1))
    reader = ShardReader(read_table(str(tmp_path), LIMITS))
    for row in [*range(70), 0, 69]:
        assert reader.read(row)
    assert len(reader._files) == 64
    reader.close()
    assert not reader._files


def test_a_url_is_listed_and_read_by_range(tmp_path: Path) -> None:
    run = curated(tmp_path / "run")
    fs = fsspec.filesystem("memory")
    fs.put(str(run), "/remote/run", recursive=True)
    try:
        table = read_table("memory://remote/run", LIMITS)
        assert table.fingerprint() == read_table(str(run), LIMITS).fingerprint()
        scanned = read_table("memory://remote/run/shards/*1.tar", LIMITS)
        assert ShardReader(scanned).read(2) == ShardReader(table).read(6)
        assert ShardReader(table).name(6) == "shard-000001.tar:1x0002.jpg"
    finally:
        fs.rm("/remote", recursive=True)


def test_real_shards(real_data: Path) -> None:
    assert len(read_table(str(real_data / "train"), LIMITS)) == 24_000
    cut = read_table(str(real_data / "pool_bad" / "cut_shard.tar"), LIMITS)
    assert len(cut) == 9
    assert sum(cut.refused.values()) >= 1
