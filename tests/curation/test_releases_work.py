"""A release does new work only: in several ranges, with seed sets as they are, killed on the way, and on a store."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.config import CurationConfig
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig
from curation.pipeline import run_pipeline
from curation.reading.listing import find_parts
from curation.reading.seeds import RetrievalRule, SeedSet
from curation.run import extended
from curation.stages.balance import BalanceConfig
from curation.stages.cluster import Clustering
from curation.stages.embed import EmbedConfig
from curation.stages.shard import ShardConfig
from curation.state import Inputs, Run
from tests.conftest import REPOSITORY, encoded, picture, write_tar

RANGE_ROWS = 6


def release(out: str, root: str, earlier: str = "") -> Run:
    """A run of all that lies in root, on top of another."""
    config = CurationConfig(
        embed=EmbedConfig(encoder="descriptors"), balance=BalanceConfig(num_images=5), range_rows=RANGE_ROWS,
        shard=ShardConfig(max_images=4), execution=ExecutionConfig(workers=2),
    )  # fmt: skip
    seed = SeedSet(name="s", urls=(f"{root}/seed",), rule=RetrievalRule(k=2), include_as_is=True)
    folder, seeds = Folder(out), {"s": (seed, find_parts(seed.urls))}
    asked = {"seeds": [f"{root}/seed"], "pool": [f"{root}/pool"], "evaluations": {}, "config": asdict(config)}
    folder.write_bytes("run.json", json.dumps(asked).encode())
    before = extended([earlier] if earlier else None, folder, config)
    run = Run(folder, config, Inputs(find_parts([f"{root}/pool"]), seeds, {}), earlier=before)
    run_pipeline(run)
    return run


def started(*arguments: str) -> subprocess.Popen:
    """`release` in a process of its own, with a Ray of its own."""
    code = "import sys; from tests.curation.test_releases_work import release; release(*sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE, start_new_session=True
    )


def add(root: Path) -> None:
    """A copy of an old image, new images, and one more of the seed set."""
    new = [(f"n{i}.jpg", encoded(picture(i))) for i in range(20, 25)]
    write_tar(root / "pool/added.tar", [("copy.jpg", encoded(picture(3), quality=60)), *new])
    write_tar(root / "seed/more.tar", [("s9.jpg", encoded(picture(60)))])


def written(run: str) -> dict[str, bytes]:
    """What people take from a run."""
    folder = Folder(run)
    return {
        name: folder.read_bytes(name)
        for name in folder.names()
        if name.startswith(("decisions.parquet", "shards/shard", "shards/index", "join/edges", "level-"))
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ray_session) -> tuple[Path, Run, Run]:
    root = tmp_path_factory.mktemp("work")
    write_tar(root / "pool/old.tar", [(f"p{i}.jpg", encoded(picture(i), quality=90)) for i in range(14)])
    write_tar(root / "seed/s.tar", [(f"s{i}.jpg", encoded(picture(50 + i))) for i in range(3)])
    first = release(str(root / "first"), str(root))
    add(root)
    return root, first, release(str(root / "second"), str(root), str(root / "first"))


@pytest.mark.slow
def test_only_new_images_ask_and_the_others_stay(runs):
    root, first, second = runs
    assert len(second.ranges) > len(first.ranges) == 3
    figures = second.manifests["join"].figures
    assert figures["new_images"] < second.manifests["join"].counts["images"]
    assert second.manifests["dedup"].figures["new_images"] == figures["new_images"]
    was, now = (Clustering(run.folder / "cluster").between(0, 14) for run in (first, second))
    np.testing.assert_array_equal(was, now)
    assert "is new in this release" in (root / "second/report.html").read_text()
    assert "is new in this release" not in (root / "first/report.html").read_text()
    rows = {row["key"]: row for row in pq.read_table(root / "second/decisions.parquet").to_pylist()}
    assert rows["copy"]["status"] == "duplicate"
    assert rows["copy"]["duplicate_of"] == "p3"
    before = {row["key"]: row for row in pq.read_table(root / "first/decisions.parquet").to_pylist()}
    for key, row in before.items():
        if row["status"] == "kept":
            assert (rows[key]["status"], rows[key]["shard"], rows[key]["release"]) == ("kept", row["shard"], 1)


@pytest.mark.slow
def test_seed_sets_as_they_are_go_on_where_they_ended(runs):
    _, first, second = runs
    assert [run.manifests["shards"].counts["seed:s"] for run in (first, second)] == [3, 1]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["cells/started.json", "join/certificate.json", "cluster/started.json"])
def test_an_extension_that_is_killed_goes_on_to_the_same_bytes(runs, tmp_path, at):
    root, *_ = runs
    out = str(tmp_path / "killed")
    process = started(out, str(root), str(root / "first"))
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / at).exists():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/report.html").exists()
    release(out, str(root), str(root / "first"))
    assert written(out) == written(str(root / "second"))


@pytest.mark.slow
def test_a_release_on_a_store_is_that_on_a_disk(runs, s3):
    root, *_ = runs
    # The first release, as it was before there was more.
    s3.put(str(root / "first"), "bucket/first", recursive=True)
    process = started("s3://bucket/second", str(root), "s3://bucket/first")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told.decode()
    assert written("s3://bucket/second") == written(str(root / "second"))
