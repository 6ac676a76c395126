"""The raw pool of `benchmarks.curated`: what its truth says is so, and what a set holds is counted by it."""

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.curated.__main__ import ARMS, holds
from benchmarks.curated.pool import EVALUATION, Sizes, make_pool, read_images
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
