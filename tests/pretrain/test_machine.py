"""Cores and shared memory for the loader, in the plan, at the start and in what is submitted; signals past torchrun."""

import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pretrain import launch, machine
from pretrain.config import load_train_config
from pretrain.data.crops import CropSizes
from tests.conftest import REPOSITORY
from tests.pretrain.tiny_train import TINY, run, wait_for_step

USAGE = namedtuple("USAGE", "total used free")
TWO_WORKERS = ["execution.loader.num_workers=2", "execution.loader.prefetch=2"]
TORCHRUN = ["--nproc-per-node", "2", "--master-port", "29618", "--signals-to-handle"]
TORCHRUN += ["SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", "--shutdown-timeout", "600", "-m", "pretrain.train"]


def test_waiting_batches_are_counted_at_the_largest_size(config: Path) -> None:
    tiny = load_train_config(str(config), TWO_WORKERS, [])
    pixels = 3 * (2 * 32**2 + 2 * 16**2)
    assert machine.waiting_bytes(tiny, 1) == 2 * 2 * 8 * pixels
    assert machine.waiting_bytes(tiny, 4) == 2 * 2 * 2 * pixels
    sizes = [CropSizes(global_px=32, local_px=16), CropSizes(global_px=64, local_px=32, probability=0.1)]
    larger = replace(tiny, crops=replace(tiny.crops, sizes=sizes))
    assert machine.waiting_bytes(larger, 1) == 4 * 2 * 2 * 8 * pixels
    assert machine.waiting_bytes(load_train_config(str(config), [], []), 1) == 0


def test_too_little_shared_memory_is_told_before_the_first_step(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: USAGE(100_000, 0, 100_000))
    assert run(config, shards, tmp_path / "run", *TWO_WORKERS) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "take 0.000246 GB of shared memory on this machine" in message
    assert "execution.loader.num_workers=2 with prefetch=2" in message
    assert run(config, shards, tmp_path / "run", *TWO_WORKERS, "--dry-run") == 0
    plan = capsys.readouterr().out
    assert "for batches that wait: 246 kB on each rank (2 workers x 2 batches); this machine has 100 kB" in plan


def test_a_slurm_job_asks_for_a_core_a_worker(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the job and in its srun, which does not take it from the job."""
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/usr/bin/{name}")
    asked = ["--config", str(config), "--data", str(shards), "--out", str(tmp_path / "run"), "--dry-run"]
    asked += ["--cluster", "slurm", "--gpus-per-node", "2", "execution.loader.num_workers=12"]
    assert launch.main(asked) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --cpus-per-task=13" in script
    assert "--cpus-per-task=13" in next(line for line in script.splitlines() if line.startswith("srun"))
    assert launch.main([*asked, "--cpus-per-task", "4"]) == 0
    assert "#SBATCH --cpus-per-task=4" in capsys.readouterr().out


def test_torchrun_that_would_end_by_a_slurm_signal_is_told(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = load_train_config(str(config), [], [])
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert list(machine.notes(tiny, 1, 1)) == []
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT")
    (line,) = machine.notes(tiny, 1, 1)
    assert "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout 600" in line
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGUSR1,SIGUSR2")
    assert list(machine.notes(tiny, 1, 1)) == []


@pytest.mark.slow
def test_usr1_reaches_the_ranks_of_a_torchrun(shards: Path, tmp_path: Path) -> None:
    """As README writes it: all ranks save at one step, and the last checkpoint is that of the stop."""
    long = {**TINY, "steps": 100_000, "checkpoint": {"every_steps": 100_000}}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(long))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, "--config", str(tmp_path / "long.yaml")]
    command += ["--data", str(shards), "--out", str(out)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    wait_for_step(out, 2, process)
    process.send_signal(signal.SIGUSR1)
    _, messages = process.communicate(timeout=90)
    assert len(list((out / "checkpoints").glob("step-*/manifest.json"))) == 1, messages
    assert "stopped as asked at step" in messages


def test_cores_of_a_rank_follow_workers_and_threads(config: Path) -> None:
    tiny = load_train_config(str(config), [], [])
    for workers, threads, cores in ((12, 0, 13), (0, 4, 4), (2, 2, 4)):
        loader = replace(tiny.execution.loader, num_workers=workers)
        asked = replace(tiny, execution=replace(tiny.execution, threads=threads, loader=loader))
        assert machine.loader_cpus(asked) == cores
