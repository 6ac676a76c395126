"""A whole run whose products torch computes, in actors that Ray gave a GPU, against one on the processor's kernels.

torch's device is the processor here (tests/with_gpus.py), so no GPU has to be there.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.tiny_run import full_run

pytest.importorskip("torch")


@pytest.mark.slow
def test_a_run_on_gpus_writes_the_same_bytes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None
) -> None:
    command = [sys.executable, "-m", "tests.with_gpus", "curate", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    products = {"cells: k-means", "cells: assignment", "join", "decontaminate: vectors"}
    products |= {"cluster: level 1", "cluster: level 1: assignment", "retrieve: sample"}
    assert products <= set(told["labels"])
    assert "embed" not in told["labels"]  # descriptors are the processor's work, and leave GPUs to others
    # The other steps write the places of their files, which differ.
    own = ("cells", "join", "dedup", "decontaminate", "cluster", "balance", "retrieve")
    steps = [name for name in told["files"] if name.split("/")[0] in own]
    assert {name.split("/")[0] for name in steps} == set(own)
    manifests = full_run(tmp_path_factory.getbasetemp()).manifests
    for name in steps:
        assert told["files"][name] == {file.path: file.sha256 for file in manifests[name].files}
