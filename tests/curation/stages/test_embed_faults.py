"""Processes of the embed stage that are killed in the middle of a part: the files are those of a run without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.workers import ExecutionConfig
from curation.reading.filters import Filter, build_filters
from curation.reading.listing import find_parts
from curation.stages.embed import EmbedConfig, count_losses, embed_set
from tests.conftest import REPOSITORY, picture_tar


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for number in range(3):
        picture_tar(folder / f"{number}.tar", range(number * 10, number * 10 + 10), f"p{number}")
    return folder


def embedded(pool: Path, out: Path, filters: list[Filter]) -> list[File]:
    config, execution = EmbedConfig(encoder="descriptors", batch_size=4), ExecutionConfig(workers=2)
    return embed_set(Folder(str(out)), find_parts([str(pool)]), ["descriptors"], config, filters, execution, "embed")[0]


def pixels(name: str, **options: object) -> list[Filter]:
    return build_filters([{"kind": "pixels", "path": f"tests.mortal:{name}", "options": options}])


@pytest.fixture(scope="module")
def undisturbed(pool: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> list[File]:
    return embedded(pool, tmp_path_factory.mktemp("undisturbed"), [])


def test_a_killed_actor_costs_its_parts_once_more(
    pool: Path, tmp_path: Path, undisturbed: list[File], caplog: pytest.LogCaptureFixture
) -> None:
    assert embedded(pool, tmp_path / "run", pixels("DiesAtView", folder=str(tmp_path), at=2)) == undisturbed
    assert (tmp_path / "died").exists()
    assert "another takes its place" in caplog.text


@pytest.mark.parametrize("times", [1, 2, 3])
def test_killed_decode_workers_change_nothing(
    pool: Path, tmp_path: Path, undisturbed: list[File], times: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice: its images are then decoded in processes of their own; thrice: one of those is killed, too."""
    filters = pixels("dies_at", folder=str(tmp_path), key="p10015", times=times)
    files = embedded(pool, tmp_path / "run", filters)
    rows = [r for path in (tmp_path / "run" / "index").iterdir() for r in pq.read_table(path).to_pylist()]
    assert {r["key"]: r["reason"] for r in rows if r["reason"]} == ({} if times < 3 else {"p10015": "decoder_crashed"})
    assert (files == undisturbed) == (times < 3)
    assert f"{min(times, 2)} decode workers were lost under it" in caplog.text


@pytest.mark.slow
def test_a_part_that_kills_every_reader_is_a_row(pool: Path, tmp_path: Path, ray_session: None) -> None:
    files = embedded(pool / "0.tar", tmp_path / "run", pixels("DiesAtOnce"))
    (row,) = pq.read_table(tmp_path / "run" / files[0].path).to_pylist()
    assert (row["key"], row["reason"], row["unread_bytes"]) == (
        "0.tar@0",
        "reader_crashed",
        (pool / "0.tar").stat().st_size,
    )
    assert [file.rows for file in files] == [1, 1]


@pytest.mark.slow
def test_a_lost_node_costs_what_ran_there(pool: Path, tmp_path: Path, undisturbed: list[File]) -> None:
    """Embedding and tasks on two real Ray nodes; in each, one node is killed when a first file is there."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.lost_node", str(pool), str(tmp_path)],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert [name for name in ("run/done", "pieces") if f"lost a node in {name}" not in done.stdout] == []
    assert "a node of the cluster was lost" in done.stderr
    assert [File(**entry) for entry in json.loads((tmp_path / "files.json").read_text())] == undisturbed


def test_what_pixel_filters_reject_is_not_unreadable(pool: Path, tmp_path: Path, ray_session: None) -> None:
    """A filter that drops most of a pool must not end the run, as files that cannot be read would."""
    config, execution = EmbedConfig(encoder="descriptors", batch_size=4), ExecutionConfig(workers=2)
    parts = find_parts([str(pool / "1.tar")])
    rules = pixels("drops", reason="dull", but="p10015")
    _, tallies, _ = embed_set(Folder(str(tmp_path)), parts, ["descriptors"], config, rules, execution, "embed")
    counts, lost, total, worst = count_losses(parts, tallies)
    assert counts == {"images": 10, "rejected: dull": 9}
    assert (lost, total, worst) == (0, 10, "")
