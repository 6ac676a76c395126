"""--extend: a release on top of an earlier one. What is there stays, what is new is added, what goes is listed."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.account.explain import explain
from curation.run import main
from pretrain.data.decode import ImageLimits
from pretrain.data.shards import read_table
from tests.conftest import encoded, picture, write_tar

SETTINGS = ["--config", "offline", "balance.num_images=6", "execution.workers=2", "shard.max_images=4"]


def rows_of(run: Path) -> dict[int, dict]:
    return {row["gid"]: row for row in pq.read_table(run / "decisions.parquet").to_pylist()}


def kept_of(rows: dict[int, dict]) -> dict[int, dict]:
    return {gid: row for gid, row in rows.items() if row["status"] == "kept"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory, ray_session) -> Path:
    pool = tmp_path_factory.mktemp("releases") / "pool"
    write_tar(pool / "old.tar", [(f"p{i}.jpg", encoded(picture(i), quality=90)) for i in range(10)])
    return pool


@pytest.fixture(scope="module")
def first(pool: Path) -> Path:
    out = pool.parent / "first"
    assert main(["--pool", str(pool), "--out", str(out), *SETTINGS]) == 0
    return out


@pytest.fixture(scope="module")
def second(pool: Path, first: Path) -> Path:
    """New shards that sort first, with a larger copy of each kept image; one kept image is an evaluation image now."""
    numbers = [int(row["key"][1:]) for row in kept_of(rows_of(first)).values()]
    copies = [(f"big{i}.jpg", encoded(picture(i, (192, 144)), quality=95)) for i in numbers]
    write_tar(pool / "added.tar", [*copies, *((f"n{i}.jpg", encoded(picture(i))) for i in range(20, 26))])
    held = write_tar(pool.parent / "held.tar", [("x.jpg", encoded(picture(numbers[0]), quality=90))])
    out = pool.parent / "second"
    arguments = ["--pool", str(pool), "--evaluation", str(held), "--extend", str(first), "--out", str(out)]
    assert main([*arguments, *SETTINGS]) == 0
    return out


@pytest.mark.slow
def test_what_was_kept_keeps_its_place(first, second):
    before, now = rows_of(first), rows_of(second)
    assert [now[gid]["key"] for gid in before] == [row["key"] for row in before.values()]
    kept = kept_of(before)
    leaked = min(kept)
    assert (now[leaked]["status"], now[leaked]["release"], now[leaked]["shard"]) == ("leak", 1, None)
    for gid in kept.keys() - {leaked}:
        same = ("status", "reason", "seed", "seed_match", "similarity", "release", "shard")
        assert [now[gid][name] for name in same] == [before[gid][name] for name in same]
        assert now[gid]["status"] == "kept"
    copies = [row for row in now.values() if row["key"].startswith("big")]
    assert {row["duplicate_of"] for row in copies} == {kept[gid]["key"] for gid in kept.keys() - {leaked}} | {None}
    assert {row["status"] for row in copies} == {"duplicate", "leak"}


def test_shards_stay_and_new_ones_come_behind(first, second):
    before, now = kept_of(rows_of(first)), kept_of(rows_of(second))
    old = sorted(path.name for path in (first / "shards").glob("*.tar"))
    assert old == sorted({row["shard"] for row in before.values()})
    for name in old:
        assert (first / "shards" / name).samefile(second / "shards" / name)
    added = {gid: row for gid, row in now.items() if row["release"] == 2}
    assert added
    assert not added.keys() & before.keys()
    assert min(row["shard"] for row in added.values()) > max(old)
    dropped = pq.read_table(second / "shards" / "dropped.parquet").to_pylist()
    assert [row["gid"] for row in dropped] == [min(before)]
    assert dropped[0]["shard"] == before[min(before)]["shard"]
    assert dropped[0]["status"] == "leak"
    table = read_table(str(second / "shards"), ImageLimits())
    assert len(table) == len(now) == len(before) - 1 + len(added)


def test_only_new_parts_are_embedded(first, second):
    old, now = (sorted((run / "embed/pool/index").iterdir()) for run in (first, second))
    assert len(now) == len(old) + 1
    assert all(path.samefile(second / path.relative_to(first)) for path in old)


def test_the_account_tells_releases_apart(first, second):
    before, now = kept_of(rows_of(first)), kept_of(rows_of(second))
    page = (second / "report.html").read_text()
    assert "Release 2, which extends" in page
    assert "Release 1" not in (first / "report.html").read_text()
    assert "release 1 first kept it; release 2 drops it." in explain(str(second), gid=min(before))
    assert "release 1 kept it first, and it stays." in explain(str(second), gid=max(before))
    new = next(gid for gid, row in now.items() if row["release"] == 2)
    assert "release 2, this one, keeps it first." in explain(str(second), gid=new)


def test_a_release_of_nothing_new_adds_and_drops_nothing(pool, second, capsys):
    out = pool.parent / "third"
    held = pool.parent / "held.tar"
    arguments = ["--pool", str(pool), "--evaluation", str(held), "--extend", str(second), "--out", str(out)]
    balance = ["balance.num_images=1" if word.startswith("balance") else word for word in SETTINGS]
    assert main([*arguments, *balance]) == 0
    assert (
        f"release 3, extending {second}: 0 added, {len(kept_of(rows_of(second)))} stay, 0 dropped"
        in capsys.readouterr().out
    )
    names = ("status", "reason", "release", "shard")
    assert [[row[name] for name in names] for row in kept_of(rows_of(out)).values()] == [
        [row[name] for name in names] for row in kept_of(rows_of(second)).values()
    ]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--out", "OTHER", "--extend", "ANOTHER"], "--extend is given 2 times"),
        (["--out", "FIRST"], "a release has a folder of its own, give another --out."),
        (
            ["--out", "OTHER", "range_rows=7"],
            "was made with range_rows=8388608, and this run has 7: give range_rows=8388608",
        ),
        (
            ["--out", "OTHER", "embed.max_pixels=90"],
            "with other settings of `embed` (max_pixels): give those, or start",
        ),
    ],
)
def test_mistakes_are_one_sentence(pool, first, tmp_path, capsys, more, sentence):
    words = {"FIRST": str(first), "OTHER": str(tmp_path / "run")}
    arguments = ["--pool", str(pool), "--extend", str(first), *SETTINGS, *(words.get(word, word) for word in more)]
    assert main(arguments) == 1
    assert sentence in capsys.readouterr().err


def test_a_release_is_not_replaced_by_a_run_that_forgets_it(pool, first, second, capsys):
    before = {path: path.stat().st_mtime_ns for path in second.rglob("*") if path.is_file()}
    assert main(["--pool", str(pool), "--out", str(second), *SETTINGS]) == 1
    assert f"is a release that extends {first}: give --extend {first} again" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in second.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", ["threshold", "seed"])
def test_another_threshold_and_a_new_seed_set_keep_what_was_kept(pool, first, second, tmp_path, change):
    """A lower threshold makes duplicates of images that the first release keeps: they stay all the same."""
    arguments = ["--pool", str(pool), "--extend", str(first), "--out", str(tmp_path / "next"), *SETTINGS]
    if change == "threshold":
        arguments += ["dedup.similarity_threshold=0.2"]
    else:
        seed = write_tar(tmp_path / "seed.tar", [("s.jpg", encoded(picture(3)))])
        arguments += ["--seed", str(seed), "retrieve.k=2"]
    assert main(arguments) == 0
    before, now = kept_of(rows_of(first)), rows_of(tmp_path / "next")
    assert {gid: (now[gid]["status"], now[gid]["release"], now[gid]["shard"]) for gid in before} == {
        gid: ("kept", 1, row["shard"]) for gid, row in before.items()
    }
    if change == "seed":
        assert any(row["release"] == 2 and row["status"] == "kept" for row in now.values())
    else:
        assert max(row["component_size"] for row in now.values()) > 2
