import io
import tarfile

import numpy as np
import pytest
import webdataset

from curation.writing.tars import ShardBuilder, safe_key, safe_suffix, split_shards
from tests.conftest import encoded, picture


def test_plain_webdataset_reads_it_back_and_the_index_points_at_the_bytes(tmp_path):
    builder = ShardBuilder()
    contents = {f"k{i}": encoded(picture(i)) for i in range(5)}
    for key, content in contents.items():
        builder.add(key, [("jpg", content), ("json", b'{"a": 1}'), ("txt", "é".encode())])
    path = tmp_path / "shard.tar"
    path.write_bytes(builder.finish())
    read = {s["__key__"]: s for s in webdataset.WebDataset(str(path), shardshuffle=False)}
    assert {key: sample["jpg"] for key, sample in read.items()} == contents
    assert read["k3"]["txt"] == "é".encode()
    content = path.read_bytes()
    for entry in builder.entries:
        assert content[entry.offset : entry.offset + entry.size] == read[entry.key][entry.suffix]


def test_the_same_samples_give_the_same_bytes():
    def build():
        builder = ShardBuilder()
        builder.add("k", [("jpg", b"content")])
        return bytes(builder.finish())

    assert build() == build()
    with tarfile.open(fileobj=io.BytesIO(build())) as tar:
        info = tar.getmembers()[0]
    assert (info.mtime, info.uid, info.mode) == (0, 0, 0o644)


@pytest.mark.parametrize(
    ("key", "is_unique", "expected"),
    [
        ("sp000001", True, "sp000001"),
        ("folder/name", True, "folder/name"),
        ("sp000001", False, "sp000001_g7"),
        ("../../etc/passwd", True, "_/_/etc/passwd_g7"),
        ("/absolute", True, "absolute_g7"),
        ("a.b\nc\0", True, "a_b_c__g7"),
        ("", True, "image_g7"),
        ("café_猫", True, "café_猫"),
        ("x" * 5000, True, "x" * 150 + "_g7"),
        ("__hidden", True, "hidden_g7"),
        ("folder/__hidden", True, "folder/hidden_g7"),
        ("__folder/x", True, "__folder/x"),
        ("other_g9", True, "other_g9_g7"),
        ("other_s1g9", True, "other_s1g9_g7"),
    ],
)
def test_keys_are_safe(key, is_unique, expected):
    assert safe_key(key, "g7", is_unique) == expected


@pytest.mark.parametrize(("suffix", "expected"), [("TXT", "txt"), ("../x", "x"), ("", "bin"), ("seg.png", "seg.png")])
def test_suffixes_are_safe(suffix, expected):
    assert safe_suffix(suffix) == expected


def test_split_keeps_both_limits_and_every_sample():
    sizes = np.random.default_rng(0).integers(1, 40, 200).tolist()
    runs = split_shards(sizes, max_images=9, max_bytes=100)
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(200))
    assert all(stop - start <= 9 and sum(sizes[start:stop]) <= 100 for start, stop in runs)
    assert split_shards([500], 9, 100) == [(0, 1)]
    assert split_shards([], 9, 100) == []
