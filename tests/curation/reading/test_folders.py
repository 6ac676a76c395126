"""Folders as people have them: every image file is one sample, what is named after it comes along, names survive."""

import os
import socket
import zlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.reading.folders import clusters
from curation.reading.listing import find_parts
from curation.reading.sources import MemberReader, read_samples
from curation.run import losses
from curation.stages.balance import BalanceConfig
from tests.conftest import encoded, picture, write_tar
from tests.tiny_run import curate

LIMIT = 1 << 20


def put(root: Path, *names: str | bytes, content: bytes | None = None) -> None:
    """Write files below a folder: a picture of its own each, or the content given."""
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        number = zlib.crc32(os.fsencode(name))
        with open(path, "wb") as file:
            file.write(encoded(picture(number)) if content is None else content)


def read(*urls: object, limit: int = LIMIT):
    """Every sample, each image read back through MemberReader, by key."""
    found = {}
    for part in find_parts([str(url) for url in urls]):
        with MemberReader(part.kind, part.url) as reader:
            for sample in read_samples(part, limit):
                assert sample.key not in found
                found[sample.key] = sample
                if sample.content is not None:
                    assert reader.read(sample.image) == sample.content
                for member in sample.others:
                    assert len(reader.read(member)) == member.size
    return found


@pytest.mark.parametrize(
    "pattern", ["Screenshot 2024-01-01 at 10.00.{:02d}.jpg", "v1.2.{:02d}.PNG", "a.{:02d}.b.jpeg", "d.x/e.f.{:02d}.jpg"]
)
def test_names_with_dots_are_samples_of_their_own(tmp_path, pattern):
    put(tmp_path, *(pattern.format(i) for i in range(20)))
    found = read(tmp_path)
    assert sorted(found) == [pattern.format(i).rpartition(".")[0] for i in range(20)]
    assert all(sample.content for sample in found.values())


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["im.jpg", "im.png"], ["im.jpg", "im.png"]),
        (["im.jpg", "im.JPG", "im.webp"], ["im.JPG", "im.jpg", "im.webp"]),
        (["a.jpg", "a.png", "a.jpg.png"], ["a.jpg", "a.jpg.png", "a.png"]),
        (["a.jpg", "a.seg.png"], ["a", "a.seg"]),
        (["a.jpg", "a.heic"], ["a.heic", "a.jpg"]),
        (["a.jpg", "a"], ["a", "a.jpg"]),
        (["d/a.jpg", "d.jpg", "a.jpg"], ["a", "d", "d/a"]),
    ],
)
def test_every_image_file_is_one_sample_with_a_key_of_its_own(tmp_path, names, keys):
    put(tmp_path, *names)
    found = read(tmp_path)
    assert sorted(found) == keys
    assert sorted(sample.image.name for sample in found.values()) == sorted(names)
    assert all(sample.reason is None for sample in found.values())


@pytest.mark.parametrize(
    ("other", "suffix"),
    [
        ("a.b.txt", "txt"),
        ("a.b.jpg.txt", "txt"),
        ("a.b.seg", "seg"),
        ("a.b.d.npy", "d.npy"),
        ("a.b.XML", "XML"),
    ],
)
def test_other_files_attach_by_name(tmp_path, other, suffix):
    put(tmp_path, "a.b.jpg", "a.c.jpg")
    put(tmp_path, other, content=b"something")
    found = read(tmp_path)
    assert [(m.suffix, m.name, m.size) for m in found["a.b"].others] == [(suffix, other, 9)]
    assert found["a.c"].others == []


@pytest.mark.parametrize("name", ["a.json", "a.jpg.json", "a.JSON"])
def test_json_of_either_name_is_metadata(tmp_path, name):
    put(tmp_path, "a.jpg")
    put(tmp_path, name, content=b'{"score": 1}')
    assert read(tmp_path)["a"].metadata == '{"score": 1}'


def test_a_caption_of_two_images_goes_to_both(tmp_path):
    put(tmp_path, "a.jpg", "a.png")
    put(tmp_path, "a.txt", content=b"both")
    put(tmp_path, "a.png.txt", content=b"one")
    found = read(tmp_path)
    assert [m.name for m in found["a.jpg"].others] == ["a.txt"]
    assert [m.name for m in found["a.png"].others] == ["a.png.txt", "a.txt"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("photo", None, None),
        ("photo.download", None, None),
        ("IMG.2024", None, None),
        ("notes.txt", b"BMW and other cars", "no_image"),
        ("LICENSE", b"terms", "no_image"),
        ("data.npy", b"\x93NUMPY", "no_image"),
        ("empty", b"", "no_image"),
    ],
)
def test_files_of_no_image_name_are_judged_by_content(tmp_path, name, content, reason):
    put(tmp_path, "other.jpg")
    put(tmp_path, name, content=content)
    found = read(tmp_path)
    found.pop("other")
    ((_, sample),) = found.items()
    assert sample.reason == reason
    assert (sample.image is None) == (reason is not None)


NAMES = [
    "a::b.jpg", "x[1].jpg", "x*.jpg", "q?.jpg", "{1,2}.jpg", b"caf\xe9.jpg", b"d\xe9r/b\xff.JPG", "100%.jpg", "%41.jpg",
    "lit\\xe9.jpg", "new\nline.jpg", "~.jpg", "s3:/x.jpg", "日本.jpg", "e\u0301.jpg", "n" * 240 + ".jpg", "#1&2.jpg",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_read_and_read_again(tmp_path, name):
    put(tmp_path, name)
    for url in (tmp_path, os.fsdecode(os.path.join(os.fsencode(tmp_path), os.fsencode(name)))):
        ((key, sample),) = read(url).items()
        assert sample.reason is None
        assert key.encode()


@pytest.mark.parametrize("folder", ["a::b", "x[1]", "{1,2}", "with space", b"caf\xe9", "p*"])
@pytest.mark.parametrize("name", ["POOL.TAR", "x.PARQUET", "im.JPG"])
def test_any_folder_and_suffix_is_read(tmp_path, folder, name):
    root = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), os.fsencode(folder))))
    put(root, "k.jpg")
    content = (root / "k.jpg").read_bytes()
    (root / "k.jpg").unlink()
    if name.endswith("TAR"):
        write_tar(root / name, [("k.jpg", content)])
    elif name.endswith("PARQUET"):
        with open(root / name, "wb") as file:
            pq.write_table(pa.table({"jpg": [content]}), file)
    else:
        (root / name).write_bytes(content)
    for url in (root, root / name):
        assert [sample.content for sample in read(url).values()] == [content]


def test_long_keys_stay_apart(tmp_path):
    folder = "/".join(["d" * 200] * 3)
    put(tmp_path, f"{folder}/a.jpg", f"{folder}/b.jpg")
    found = read(tmp_path)
    assert len(found) == 2
    assert all(len(key) <= 512 for key in found)


@pytest.mark.parametrize("per_part", [1, 2, 3, 1000])
def test_samples_do_not_depend_on_how_a_folder_is_cut(tmp_path, per_part):
    put(tmp_path, "a.jpg", "a.k1.jpg", "a.k2.jpg", "a.k3.jpg", "a.png", "b.jpg", "a.jpg.png", "a")
    put(tmp_path, "a.txt", "a.jpg.json", "a.k2.txt", content=b"{}")
    parts = find_parts([str(tmp_path)], per_part)
    assert len(parts) == {1: 6, 2: 4, 3: 3, 1000: 1}[per_part]
    assert [(s.key, [m.name for m in s.others]) for part in parts for s in read_samples(part, LIMIT)] == [
        ("a", []),
        ("a.jpg", ["a.jpg.json", "a.txt"]),
        ("a.png", ["a.txt"]),
        ("a.jpg.png", []),
        ("a.k1", []),
        ("a.k2", ["a.k2.txt"]),
        ("a.k3", []),
        ("b", []),
    ]


def test_each_file_is_in_one_cluster():
    names = ["a", "a.jpg", "a.png", "a.txt", "a.jpg.txt", "a.jpg.png", "b.x.y", "b", "c.1.jpg", "c.1.2.txt", "c.npy"]
    counted = Counter(name for cluster in clusters(names) for name in cluster.names)
    assert counted == Counter(names)
    assert clusters(reversed(names)) == clusters(names)


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "gone"])
def test_what_became_no_file_after_the_listing_is_a_row(tmp_path, kind):
    put(tmp_path, "a.jpg", "b.jpg")
    (part,) = find_parts([str(tmp_path)])
    (tmp_path / "a.jpg").unlink()
    if kind == "fifo":
        os.mkfifo(tmp_path / "a.jpg")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "a.jpg"))
    elif kind == "folder":
        (tmp_path / "a.jpg").mkdir()
    assert [(s.key, s.reason) for s in read_samples(part, LIMIT)] == [("a", "unreadable"), ("b", None)]


def test_an_ugly_folder_from_end_to_end(tmp_path, ray_session):
    """Every file of the folder is a row, comes along with one, or is counted; what is kept is in the shards."""
    root = tmp_path / "ugly [1]::{x}"
    put(root, *NAMES, "im.jpg", "im.png", "UP.JPG", "noext", "sub/deep/p.jpg")
    put(root, "a.txt", "im.jpg.json", content=b"{}")
    put(root, ".DS_Store", "._im.jpg", "Thumbs.db", "__MACOSX/im.jpg", ".git/HEAD", "metadata.csv", content=b"x")
    put(root, "empty.jpg", content=b"")
    put(root, "broken.jpg", content=b"\xff\xd8\xff no")
    os.mkfifo(root / "pipe.jpg")
    os.symlink("nowhere", root / "broken-link.jpg")
    os.symlink("sub", root / "again")
    os.symlink(root, root / "sub" / "loop")
    put(tmp_path / "elsewhere", "linked.jpg")
    os.symlink(tmp_path / "elsewhere", root / "linked")
    write_tar(root / "SHARD.TAR", [("t.jpg", encoded(picture(1)))])
    pq.write_table(pa.table({"image": [encoded(picture(2))]}), root / "x.PARQUET")
    pq.write_table(pa.table({"file_name": ["im.jpg"], "text": ["hello"]}), root / "metadata.parquet")

    run = curate(tmp_path / "run", str(root), balance=BalanceConfig(fraction=1.0), filters=[])
    listing = run.inputs.pool
    decisions = run.folder.read_table("decisions.parquet")
    index = [row for part in range(run.pool.num_parts) for row in run.pool.index(part).to_pylist()]
    members = [m for row in index if row["source_kind"] == "folder" for m in [row["image"], *row["others"]] if m]
    shards = sum(part.kind != "folder" for part in listing)
    on_disk = sum(len(files) for _, _, files in os.walk(root)) + 3  # links to folders
    assert len({m["name"] for m in members}) + shards + listing.num_ignored == on_disk  # `linked` is one link, one file
    assert len(index) == decisions.num_rows == len(NAMES) + 5 + 2 + 1 + shards
    reasons = {entry.reason: entry.count for entry in listing.ignored}
    assert reasons == {
        "system file": 4, "hidden": 1, "known metadata": 2, "not a regular file": 1, "broken link": 1,
        "already listed (link)": 2, "unknown kind": 1,
    }  # fmt: skip
    assert {row["key"] for row in index if row["status"] == "rejected"} == {"empty", "broken"}
    status = Counter(row["status"] for row in decisions.to_pylist())
    assert status == {"rejected": 2, "kept": decisions.num_rows - 2}
    written = {s.content for part in find_parts([str(tmp_path / "run" / "shards")]) for s in read_samples(part, LIMIT)}
    for name in [*NAMES, "im.jpg", "im.png", "UP.JPG", "noext", "sub/deep/p.jpg"]:
        with open(os.path.join(os.fsencode(root), os.fsencode(name)), "rb") as file:
            assert file.read() in written, name
    told = "\n".join(losses(run))
    assert "pool: 0 damaged shards of 3 parts, 0 bytes not read; 12 files ignored" in told
    assert "system file: 4" in told
