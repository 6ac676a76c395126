"""Submitit jobs on this machine: rendezvous, signals, requeue, continuation."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import submitit
import torch
from safetensors.torch import load_file

from pretrain.downstream.backbone import load_backbone
from pretrain.launch import (
    FINISHED,
    Resources,
    Training,
    follow,
    main,
    make_executor,
    received_signals,
    submission_text,
)
from tests.conftest import picture_tar

COUNTING = '''
"""A stand-in for pretrain.train with its contract: counts steps in a file, one a tick, and agrees with all ranks."""
import json, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist


def main(arguments):
    out, steps = Path(arguments[0]), int(arguments[1])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stop = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: stop.append(number))
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        file = out / f"rank-{rank}.json"
        step = json.loads(file.read_text())["step"] if file.exists() else 0
        starts = json.loads(file.read_text())["starts"] + 1 if file.exists() else 1
        (out / f"alive-{rank}-{starts}").touch()
        while step < steps:
            time.sleep(0.05)
            step += 1
            flag = torch.tensor([float(len(stop)), 1.0])
            dist.all_reduce(flag)
            assert flag[1] == world
            if flag[0]:
                file.write_text(json.dumps({"step": step, "starts": starts}))
                dist.barrier()
                return 75
        file.write_text(json.dumps({"step": step, "starts": starts}))
        return 0
    finally:
        dist.destroy_process_group()
'''


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder; the stand-in can be imported by the jobs."""
    modules, out = tmp_path / "modules", tmp_path / "out"
    modules.mkdir()
    out.mkdir()
    (modules / "counting.py").write_text(COUNTING)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(modules), str(root)]))
    return out


def submit(out: Path, steps: int, tasks: int = 2, module: str = "counting") -> submitit.Job:
    executor = make_executor(out / "jobs", Resources(tasks_per_node=tasks, time_min=5), "test", "local")
    return executor.submit(Training([str(out), str(steps)], module=module))


def wait_for(path: Path, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def read(out: Path, rank: int) -> dict[str, int]:
    return json.loads((out / f"rank-{rank}.json").read_text())


@pytest.mark.slow
def test_preempted_job_saves_and_continues(counting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Submitit's own test signal, after both ranks have started; then the job restarts and counts on, on its own."""
    job = submit(counting, steps=60)
    wait_for(counting / "alive-0-1")
    wait_for(counting / "alive-1-1")
    time.sleep(0.3)
    for child in _children(int(job.job_id)):
        os.kill(child, signal.SIGUSR2)
    assert follow(job) == FINISHED
    assert [read(counting, rank) for rank in (0, 1)] == [{"step": 60, "starts": 2}] * 2
    assert "Requeued job" in capsys.readouterr().out


@pytest.mark.slow
def test_terminated_job_saves_and_does_not_restart(counting: Path) -> None:
    """SIGTERM is a person's, or Slurm's, which queues a preempted job again itself."""
    job = submit(counting, steps=2000)
    wait_for(counting / "alive-0-1")
    wait_for(counting / "alive-1-1")
    time.sleep(0.3)
    os.kill(int(job.job_id), signal.SIGTERM)
    assert follow(job) == 75
    assert read(counting, 0)["starts"] == 1
    assert 0 < read(counting, 0)["step"] == read(counting, 1)["step"] < 2000


def test_failed_job_says_so(counting: Path) -> None:
    job = submit(counting, steps=1, tasks=1, module="no_such_module")
    assert follow(job) == 1
    assert "no_such_module" in str(job.exception())


TRAINING = """
global_batch_size: 4
steps: 30
precision: float32
model: {architecture: dinov3_tiny, depth: 1}
heads:
  dino: {num_prototypes: 64, hidden_dim: 32, bottleneck_dim: 16}
  ibot: {num_prototypes: 64, hidden_dim: 32, bottleneck_dim: 16}
crops: {global_px: 32, local_px: 16, num_local_crops: 2}
optim: {warmup_steps: 5, freeze_last_layer_steps: 2, teacher_temperature_warmup_steps: 10}
checkpoint: {every_steps: 5}
execution: {threads: 1, loader: {num_workers: 0}}
"""


@pytest.mark.slow
def test_real_training_on_two_ranks_continues_and_ends_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: launch's command line, a signal in the middle, requeue, a teacher equal to the last bit."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    picture_tar(tmp_path / "shards" / "a.tar", range(24))
    (tmp_path / "tiny.yaml").write_text(TRAINING)

    def arguments(run: str) -> list[str]:
        asked = ["--config", str(tmp_path / "tiny.yaml"), "--shards", str(tmp_path / "shards")]
        return [*asked, "--out", str(tmp_path / run), "seed=3"]

    # The signal is sent from beside `follow`, which waits for the job in this thread.
    def disturb() -> None:
        wait_for(tmp_path / "disturbed" / "checkpoints" / "step-00000010")
        jobs = (tmp_path / "disturbed" / "jobs").iterdir()
        (job,) = (path.name for path in jobs if path.name.isdecimal())
        for child in _children(int(job)):
            os.kill(child, signal.SIGUSR2)

    thread = threading.Thread(target=disturb)
    thread.start()
    asked = ["--cluster", "local", "--tasks-per-node", "2", "--time-min", "10"]
    assert main([*arguments("disturbed"), *asked]) == FINISHED
    thread.join(timeout=60)
    log = capsys.readouterr().out
    assert "Requeued job" in log
    assert main([*arguments("undisturbed"), *asked]) == FINISHED
    teachers = [load_file(tmp_path / run / "teacher" / "teacher.safetensors") for run in ("disturbed", "undisturbed")]
    assert all(torch.equal(teachers[0][name], value) for name, value in teachers[1].items())
    assert load_backbone(tmp_path / "disturbed").description["step"] == 30


def test_dry_run_prints_plan_and_submission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(TRAINING)
    asked = ["--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--cluster", "local", "--dry-run"]
    assert main([*asked, "--tasks-per-node", "2"]) == FINISHED
    printed = capsys.readouterr().out
    assert "64 prototypes" in printed
    assert "2 local processes of python -m pretrain.train --config" in printed
    assert not (tmp_path / "run").exists()
    assert main([*asked, "--tasks-per-node", "3"]) == 2
    assert "does not split over 3 ranks" in capsys.readouterr().err
    assert main([*asked, "--nodes", "2", "global_batch_size=8"]) == 2
    assert "needs Slurm" in capsys.readouterr().err


def test_received_signals_are_seen_whoever_handles_them() -> None:
    before = signal.signal(signal.SIGUSR2, lambda number, frame: None)
    try:
        with received_signals() as received:
            assert received() == set()
            os.kill(os.getpid(), signal.SIGUSR2)
            assert received() == {signal.SIGUSR2}
            os.kill(os.getpid(), signal.SIGUSR2)
            assert received() == {signal.SIGUSR2}
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_resources() -> None:
    assert Resources(nodes=2, gpus_per_node=8).world_size == 16
    assert Resources(tasks_per_node=3).world_size == 3
    assert Resources().world_size == 1
    with pytest.raises(ValueError, match="differs from --gpus-per-node 8"):
        Resources(gpus_per_node=8, tasks_per_node=2)
    with pytest.raises(ValueError, match="ask for nothing"):
        Resources(nodes=0)
    with pytest.raises(ValueError, match="leaves no time"):
        Resources(time_min=2)


def test_local_submission_is_described_without_writing(tmp_path: Path) -> None:
    training = Training(["--config", "x", "--out", "run"])
    text = submission_text(tmp_path / "jobs", Resources(tasks_per_node=2), "test", "local", training)
    assert text == "2 local processes of python -m pretrain.train --config x --out run"
    assert list(tmp_path.iterdir()) == []


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in tasks]
