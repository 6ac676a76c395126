"""A whole run from bucket to bucket on two Ray nodes that share no disk: bytes as of one machine, and nothing local."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from tests.conftest import REPOSITORY, picture_tar
from tests.ray_nodes import ray_nodes

pytestmark = pytest.mark.slow
OUT = "bucket/nodes/run"
# Each node has its own TMPDIR below one folder, where this hook sees what its processes touch. A path of another node's
# is written down; so is the node when curation is imported there, that is, when it has work.
HOOK = """
import os, sys

NODES, OWN, LOG = os.environ["TEST_NODES"], os.environ["TMPDIR"], os.environ["TEST_LOG"]

def hook(event, args):
    if event == "import" and args[0] == "curation.stages.shard":
        tell("worked " + os.path.basename(OWN))
    for value in args:
        if isinstance(value, str) and value.startswith(NODES + os.sep) and not value.startswith(OWN):
            tell(f"{os.path.basename(OWN)}: {event} {value}")

def tell(line):
    log = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, line.encode() + b"\\n")
    os.close(log)

sys.addaudithook(hook)
"""


@dataclass(frozen=True)
class Runs:
    alone: Path
    """run folder of the run on this machine"""
    nodes: Path
    """folders of the nodes and of the driver"""
    log: list[str]


def curate(out: str, environment: dict[str, str]) -> None:
    arguments = ["--pool", "s3://bucket/nodes/pool/*.tar", "--seed", "s3://bucket/nodes/seed/", "--out", out]
    arguments += ["--evaluation", "s3://bucket/nodes/evaluation/", "--config", "offline"]
    settings = ["retrieve.k=3", "shard.max_images=2", "execution.memory_gb=0.5"]
    command = [sys.executable, "-m", "curation.run", *arguments, *settings]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def runs(s3: fsspec.AbstractFileSystem, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("nodes")
    for name, numbers in (
        ("pool/a", range(14)),
        ("pool/b", range(12, 24)),
        ("seed/s", range(4)),
        ("evaluation/e", [5]),
    ):
        tar = picture_tar(root / f"{name}.tar", numbers, prefix=name[-1])
        s3.pipe_file(f"bucket/nodes/{name}.tar", tar.read_bytes())
    (root / "hook").mkdir()
    (root / "hook" / "sitecustomize.py").write_text(HOOK)
    environments = []
    for name in ("one", "two", "driver"):
        (root / "nodes" / name).mkdir(parents=True)
        environments.append(
            {
                "TMPDIR": str(root / "nodes" / name),
                "HOME": str(root / "nodes" / name),
                "TEST_NODES": str(root / "nodes"),
                "TEST_LOG": str(root / "log"),
                "PYTHONPATH": os.pathsep.join([str(root / "hook"), str(REPOSITORY)]),
            }
        )
    curate(str(root / "alone"), {**os.environ, "PYTHONPATH": str(REPOSITORY)})
    with ray_nodes(environments[:2]) as joined:
        curate(f"s3://{OUT}", {**os.environ, **environments[2], **joined})
    return Runs(root / "alone", root / "nodes", (root / "log").read_text().splitlines())


def test_two_nodes_write_the_bytes_of_one_machine(runs, s3):
    for path in sorted(runs.alone.rglob("manifest.json")):
        name = path.relative_to(runs.alone).as_posix()
        assert json.loads(s3.cat_file(f"{OUT}/{name}"))["files"] == json.loads(path.read_text())["files"], name
    paths = [*sorted((runs.alone / "shards").rglob("*.tar")), *sorted((runs.alone / "shards").rglob("*.parquet"))]
    assert len([path for path in paths if path.suffix == ".tar"]) > 2
    for path in (*paths, runs.alone / "decisions.parquet"):
        name = path.relative_to(runs.alone).as_posix()
        assert hashlib.sha256(s3.cat_file(f"{OUT}/{name}")).digest() == hashlib.sha256(path.read_bytes()).digest(), name


def test_what_was_kept_cost_its_own_bytes(runs, s3):
    manifest = json.loads(s3.cat_file(f"{OUT}/shards/manifest.json"))
    assert json.loads(s3.cat_file(f"{OUT}/shards/fetched.json"))["bytes"] <= 2 * manifest["figures"]["bytes"]


def test_both_nodes_worked_and_nothing_of_the_run_lay_on_a_disk(runs):
    assert {"worked one", "worked two"} <= set(runs.log)
    assert [line for line in runs.log if not line.startswith("worked ")] == []
    assert [path for path in runs.nodes.rglob("*") if path.is_file()] == []
