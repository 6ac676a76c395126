"""The command on real images with known truth: what the README quotes, as floors that any pool should hold."""

import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from curation.account.truth import read_truth, score
from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_real_pool_against_its_truth(real_data, tmp_path):
    arguments = ["--config", "offline", "--seed", str(real_data / "seed"), "--out", str(tmp_path / "run")]
    arguments += ["--pool", f"{real_data}/pool/*.tar", "--pool", str(real_data / "pool_bad/pool_bad.tar")]
    arguments += ["--pool", str(real_data / "pool_bad/cut_shard.tar")]
    arguments += ["--evaluation", f"{real_data}/eval/eval20-train-*.tar"]
    arguments += ["--evaluation", f"{real_data}/eval/eval20-val-*.tar"]
    command = [sys.executable, "-m", "curation.run", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    decisions = pq.read_table(tmp_path / "run" / "decisions.parquet")
    truth = read_truth(real_data / "pool/pool_truth.csv", real_data / "pool_bad/pool_bad_truth.csv")
    figures = score(decisions, truth)
    assert figures["pairs"]["natural"]["precision"] >= 0.97
    assert figures["copies"]["recall"] >= 0.93
    assert figures["leaks"]["verbatim"]["kept"] == []
    assert figures["damage"]["wrong"] == []
    assert figures["kinds"]["natural_over_junk"] >= 4
    cut = [row for row in decisions.to_pylist() if row["source"].endswith("cut_shard.tar")]
    assert [row["reason"] for row in cut if row["status"] == "rejected"] == ["damaged_shard"]
    assert len(cut) == 10
