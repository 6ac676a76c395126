"""The raw pool of `benchmarks.curated`: what its truth says is so, and what a set holds is counted by it."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.curated import __main__ as curated
from benchmarks.curated.__main__ import ARMS, holds
from benchmarks.curated.pool import EVALUATION, Sample, Sizes, make_pool, read_images, write_tar
from curation.account.truth import TruthRow, read_truth

SIZES = Sizes(small=30, junk=20, copies=60, popular=6, leaks=8)


@pytest.fixture(scope="module")
def pool(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work") / "pool"
    make_pool(real_data, folder, SIZES)
    return folder


def test_every_image_has_its_row_and_every_part_its_number(pool: Path, real_data: Path) -> None:
    rows = read_truth(pool / "truth.csv").rows
    images = {key: content for key, _, content in read_images(pool / "web-*.tar")}
    assert images.keys() == rows.keys()
    with (real_data / "pool" / "pool_truth.csv").open(encoding="utf-8") as file:
        real = {row["key"] for row in csv.DictReader(file)}
    assert real <= images.keys()
    added = Counter(key[:4] for key in images.keys() - real)
    assert [added.pop(name) for name in ("junk", "copy", "leak")] == [SIZES.junk, SIZES.copies, SIZES.leaks]
    assert added.total() == SIZES.small


def test_copies_are_of_few_images_and_leaks_of_evaluation_images(pool: Path, real_data: Path) -> None:
    rows = read_truth(pool / "truth.csv").rows
    images = {key: content for key, _, content in read_images(pool / "web-*.tar")}
    copies = [row for key, row in rows.items() if key.startswith("copy")]
    of = Counter(row.duplicate_of for row in copies)
    assert len(of) == SIZES.popular
    assert max(of.values()) > 2 * min(of.values())
    for row in copies:
        assert rows[row.duplicate_of].cluster == row.cluster
        assert (images[row.key] == images[row.duplicate_of]) == (row.transform == "exact")
    folder = real_data / "eval"
    evaluation = {key: content for name in EVALUATION for key, _, content in read_images(folder / f"{name}-*.tar")}
    leaks = [row for key, row in rows.items() if key.startswith("leak")]
    assert sum(images[row.key] == evaluation[row.leak_of] for row in leaks) == SIZES.leaks // 2


def test_a_pool_that_is_there_is_left_as_it_is(pool: Path, real_data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pool.iterdir()}
    make_pool(real_data, pool, SIZES)
    assert {path: path.stat().st_mtime_ns for path in pool.iterdir()} == before


def test_without_the_images_it_says_what_is_wanted_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file is called .*: give the folder of images"):
        make_pool(tmp_path, tmp_path / "pool", SIZES)
    assert not (tmp_path / "pool").exists()


def test_what_is_half_written_is_written_again_and_what_is_not_ours_stays(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "web-0000.tar").write_bytes(b"half")
    make_pool(real_data, tmp_path, SIZES)
    assert next(read_images(tmp_path / "web-0000.tar"))[2]
    with pytest.raises(ValueError, match="holds a pool of other sizes: move it away"):
        make_pool(real_data, tmp_path, replace(SIZES, junk=3))
    (tmp_path / "pool.json").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt: move it away"):
        make_pool(real_data, tmp_path, SIZES)


def test_what_a_set_holds() -> None:
    rows = [
        TruthRow(key="a", kind="natural", cluster="a"),
        TruthRow(key="b", kind="natural", cluster="a"),
        TruthRow(key="c", kind="ui"),
        TruthRow(key="d", kind="natural", leak_of="e"),
    ]
    assert holds(rows) == {"natural": 0.75, "natural, different": 0.5, "copies": 0.25, "leaks": 0.25}


@pytest.mark.parametrize(
    ("status", "reason", "arms"),
    [
        ("rejected", "size", []),
        ("leak", "exact", []),
        ("duplicate", "embedding", ["raw"]),
        ("not_retrieved", "", ["raw", "deduplicated"]),
        ("kept", "balanced", ["raw", "deduplicated", "balanced", "retrieved_or_balanced"]),
        ("kept", "retrieved and balanced", list(ARMS)),
    ],
)
def test_which_images_may_be_in_which_set(status: str, reason: str, arms: list[str]) -> None:
    assert [name for name, belongs in ARMS.items() if belongs(status, reason)] == arms


def test_sets_of_equal_size_are_cut_from_what_the_decisions_leave(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(curated, "IMAGES", 2)
    decided = {
        "a": ("kept", "retrieved"), "b": ("kept", "retrieved and balanced"), "c": ("kept", "balanced"),
        "d": ("not_retrieved", None), "e": ("duplicate", "embedding"), "f": ("leak", "exact"),
    }  # fmt: skip
    write_tar(tmp_path / "web-0000.tar", [Sample(key=key, ext="jpg", data=key.encode()) for key in decided])
    rows = [{"gid": gid, "key": key, "status": s, "reason": r} for gid, (key, (s, r)) in enumerate(decided.items())]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "decisions.parquet")
    truth = tmp_path / "truth.csv"
    truth.write_text("key,kind,label\n" + "".join(f"{key},{'ui' if key == 'c' else 'natural'},\n" for key in decided))
    found = {str(one["images"]): one for one in curated.cut(str(tmp_path / "web-*.tar"), tmp_path, truth, tmp_path)}
    assert {name: one["of"] for name, one in found.items()} == {
        "raw": 5, "deduplicated": 4, "retrieved": 2, "balanced": 2, "retrieved_or_balanced": 3,
    }  # fmt: skip
    images = {name: sorted(key for key, _, _ in read_images(tmp_path / f"{name}.tar")) for name in found}
    assert images["retrieved"] == ["a", "b"]
    assert images["balanced"] == ["b", "c"]
    assert found["balanced"]["natural"] == 0.5
    assert all(len(keys) == 2 for keys in images.values())
    monkeypatch.setattr(curated, "IMAGES", 3)
    with pytest.raises(ValueError, match="retrieved has 2 images, fewer than the 3 asked for"):
        curated.cut(str(tmp_path / "web-*.tar"), tmp_path, truth, tmp_path)
