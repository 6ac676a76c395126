import gzip
import io
import json
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.reading.listing import find_parts
from curation.reading.sources import MemberReader, read_samples
from tests.conftest import encoded, picture, picture_tar, write_tar

LIMIT = 1 << 20


def samples_of(*urls, limit=LIMIT):
    return [sample for part in find_parts([str(url) for url in urls]) for sample in read_samples(part, limit)]


def test_tar_samples_carry_everything(tmp_path):
    tar = picture_tar(tmp_path / "a.tar", range(3))
    samples = samples_of(tar)
    assert [sample.key for sample in samples] == ["p0000", "p0001", "p0002"]
    assert samples[1].content == encoded(picture(1), quality=90)
    assert json.loads(samples[1].metadata)["url"] == "https://example.org/p0001"
    assert [member.suffix for member in samples[1].others] == ["json", "txt"]
    with MemberReader("tar", str(tar)) as reader:
        assert reader.read(samples[1].image) == samples[1].content
        assert reader.read(samples[2].others[1]) == b"caption of p0002"


@pytest.mark.parametrize("suffix", ["JPG", "jpeg", "png", "webp", "tiff", "unknown", ""])
def test_any_image_suffix_and_none(tmp_path, suffix):
    name = f"key.{suffix}" if suffix else "key"
    samples = samples_of(write_tar(tmp_path / "a.tar", [("key.json", b"{}"), (name, encoded(picture(0)))]))
    assert [(s.key, s.reason) for s in samples] == [("key", None)]
    assert samples[0].content == encoded(picture(0))


def test_compressed_tar(tmp_path):
    plain = picture_tar(tmp_path / "a.tar", range(3))
    packed = tmp_path / "b.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    samples = samples_of(packed)
    assert [s.content for s in samples] == [s.content for s in samples_of(plain)]
    with MemberReader("tar", str(packed)) as reader:
        assert reader.read(samples[2].image) == samples[2].content


def test_cut_tar_keeps_whole_samples_and_reports_the_rest(tmp_path):
    whole = picture_tar(tmp_path / "a.tar", range(4)).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        cut_at = tar.getmember("p0002.jpg").offset_data + 100
    (tmp_path / "cut.tar").write_bytes(whole[:cut_at])
    samples = samples_of(tmp_path / "cut.tar")
    assert [(s.key, s.reason) for s in samples] == [("p0000", None), ("p0001", None), ("p0002", "damaged_shard")]


@pytest.mark.parametrize("content", [b"", b"\0" * 10240, b"not a tar at all" * 1000])
def test_empty_and_foreign_files_never_raise(tmp_path, content):
    (tmp_path / "odd.tar").write_bytes(content)
    samples = samples_of(tmp_path / "odd.tar")
    assert all(sample.reason == "damaged_shard" for sample in samples)
    assert len(samples) == (1 if b"not" in content or not content else 0)


def test_hostile_members_are_cleaned_or_rows_with_a_reason(tmp_path):
    link = tarfile.TarInfo("evil.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    long = "k" * 3000
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", encoding="utf-8", errors="surrogateescape") as tar:
        tar.addfile(link)
        for name in ("../../up.jpg", f"{long}.jpg", "b\udce9d.jpg"):
            info = tarfile.TarInfo(name)
            content = encoded(picture(0))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    samples = samples_of(tmp_path / "a.tar")
    assert [(len(s.key), s.reason) for s in samples] == [(4, "unresolved_link"), (8, None), (513, None), (3, None)]
    assert all(s.key.encode() for s in samples)


def test_too_large_a_member_is_not_read(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("big.jpg", b"x" * 2000), ("ok.jpg", encoded(picture(0)))])
    samples = samples_of(tar, limit=1999)
    assert (samples[0].reason, samples[0].content) == ("file_too_large", None)
    assert samples[1].reason is None


@pytest.mark.parametrize("text", [b"{broken", b"\xff\xfe\x00", b"[1, 2]", b"[" * 100_000])
def test_bad_metadata_costs_the_metadata_only(tmp_path, text):
    samples = samples_of(write_tar(tmp_path / "a.tar", [("k.jpg", encoded(picture(0))), ("k.json", text)]))
    assert (samples[0].reason, samples[0].metadata, samples[0].warning) == (None, None, "bad_metadata")


def test_hugging_face_parquet(tmp_path):
    rows = [
        {"image": {"bytes": encoded(picture(i)), "path": f"folder/name{i}.jpg"}, "label": i, "caption": f"text {i}"}
        for i in range(5)
    ]
    rows[3]["image"]["bytes"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-00000.parquet", row_group_size=2)
    samples = samples_of(tmp_path / "train-00000.parquet")
    assert [s.key for s in samples] == [f"folder/name{i}" for i in range(5)]
    assert [s.reason for s in samples] == [None, None, None, "no_image", None]
    assert json.loads(samples[2].metadata) == {"label": 2, "caption": "text 2"}
    with MemberReader("parquet", str(tmp_path / "train-00000.parquet")) as reader:
        assert reader.read(samples[4].image) == encoded(picture(4))
        assert reader.read(samples[4].others[1]) == b"text 4"
        assert json.loads(reader.read(samples[4].others[0])) == {"label": 4, "caption": "text 4"}


def test_binary_parquet_and_damage(tmp_path):
    table = pa.table({"key": ["a", "b"], "jpg": [encoded(picture(0)), b"broken"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [s.key for s in samples_of(tmp_path / "a.parquet")] == ["a", "b"]
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[: len(content) // 2])
    assert [s.reason for s in samples_of(tmp_path / "b.parquet")] == ["damaged_shard"]
    pq.write_table(pa.table({"text": ["no", "images"]}), tmp_path / "c.parquet")
    assert [s.reason for s in samples_of(tmp_path / "c.parquet")] == ["no_image_column"] * 2


def test_folder_with_captions(tmp_path):
    for i in range(7):
        (tmp_path / f"d{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"d{i % 2}" / f"i{i}.jpg").write_bytes(encoded(picture(i)))
        (tmp_path / f"d{i % 2}" / f"i{i}.txt").write_text(f"caption {i}")
    (tmp_path / "LICENSE.txt").write_text("terms")
    parts = find_parts([str(tmp_path)], images_per_folder_part=6)
    samples = [s for part in parts for s in read_samples(part, LIMIT)]
    assert len(parts) == 3
    assert [s.key for s in samples] == ["LICENSE", "d0/i0", "d0/i2", "d0/i4", "d0/i6", "d1/i1", "d1/i3", "d1/i5"]
    assert [s.reason for s in samples] == ["no_image"] + [None] * 7
    with MemberReader("folder", parts[0].url) as reader:
        assert reader.read(samples[2].others[0]) == b"caption 2"


def test_globs_braces_lists_and_repeats(tmp_path):
    for name in ("x-00", "x-01", "x-02", "y-00"):
        picture_tar(tmp_path / f"{name}.tar", range(1))
    names = [
        part.url.rsplit("/", 1)[1] for part in find_parts([f"{tmp_path}/x-{{02..01}}.tar", f"{tmp_path}/*-00.tar"])
    ]
    assert names == ["x-02.tar", "x-01.tar", "x-00.tar", "y-00.tar"]
    assert len(find_parts([f"{tmp_path}/*.tar", f"{tmp_path}/x-00.tar", str(tmp_path)])) == 4


def test_memory_file_system():
    with fsspec.open("memory://bucket/a.tar", "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("k.jpg")
        content = encoded(picture(0))
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    parts = find_parts(["memory://bucket/*.tar"])
    assert parts[0].url.startswith("memory://")
    assert [s.content for s in read_samples(parts[0], LIMIT)] == [content]


@pytest.mark.parametrize(
    ("url", "words"),
    [("missing/*.tar", "nothing found"), ("nosuch://bucket/a.tar", "cannot read"), ("{tmp}/note.md", "neither a .tar")],
)
def test_wrong_urls_say_what_to_do(tmp_path, url, words):
    (tmp_path / "note.md").write_text("x")
    with pytest.raises(ValueError, match=words):
        find_parts([url.replace("{tmp}", str(tmp_path))])


def test_a_changed_part_is_another_part(tmp_path):
    before = find_parts([str(picture_tar(tmp_path / "a.tar", range(1)))])[0]
    after = find_parts([str(picture_tar(tmp_path / "a.tar", range(2)))])[0]
    assert before.id != after.id
