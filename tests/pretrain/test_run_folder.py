"""A training's folder: what is not ours stays as it is, and a second command does not disturb a live run."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from curation.engine import lock
from pretrain.run_folder import check_run_folder
from pretrain.train import FINISHED, WRONG_INPUT
from tests.conftest import REPOSITORY, picture_tar
from tests.pretrain.tiny_train import TINY, losses, run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    picture_tar(folder / "a.tar", range(24))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def test_a_mode_that_cannot_be_had_leaves_no_trace(config: Path, shards: Path, tmp_path: Path, capsys) -> None:
    assert run(config, shards, tmp_path / "run", "execution.parallel=fsdp") == WRONG_INPUT
    assert "start with torchrun, or use single" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in (folder, *folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def someones(*names: str) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        for name in names:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(f"{name} is mine")

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (someones("checkpoints/step-00000002/weights.bin"), "is not empty (checkpoints)"),
        (someones("checkpoints/.writing-step-00000002-abcd/manifest.json"), "is not empty (checkpoints)"),
        (someones("teacher/teacher.safetensors", "teacher/config.json"), "is not empty (teacher)"),
        (someones("report.html"), "is not empty (report.html)"),
        (someones("config.yaml"), "is not empty (config.yaml)"),
        (someones("metrics.jsonl"), "is not empty (metrics.jsonl)"),
        (someones("evaluation/baselines.json"), "is not empty (evaluation)"),
        (someones("jobs/thesis.txt"), "is not empty (jobs)"),
        (someones("a.txt", "b.txt", "c.txt", "d.txt"), "is not empty (a.txt, b.txt, c.txt and 1 more)"),
        (lambda out: out.write_text("a file"), "is a file"),
    ],
)
def test_what_is_not_ours_is_named_and_left(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable, words: str
) -> None:
    out = tmp_path / "out"
    make(out)
    before = digests(out)
    assert run(config, shards, out, "steps=1") == WRONG_INPUT
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert str(out) in error
    assert digests(out) == before


def test_a_folder_below_a_file(config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert run(config, shards, tmp_path / "file" / "run", "steps=1") == WRONG_INPUT
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_our_own_and_what_systems_leave_are_no_obstacle(config: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in (".DS_Store", "slurm-12.out", "train.log", "lock.json.beat"):
        (out / name).write_text("x")
    job = out / "jobs" / "12"
    job.mkdir(parents=True)
    (job / "12_submitted.pkl").write_bytes(b"x")
    assert run(config, shards, out, "steps=1") == FINISHED
    assert run(config, shards, out, "steps=1") == FINISHED
    (out / "config.yaml").unlink()  # its checkpoints say whose it is
    check_run_folder(out)
    (out / "config.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(ValueError, match=r"config\.yaml is not of pretrain\.train"):
        check_run_folder(out)


def test_a_curation_s_folder_is_no_training_s(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"seeds": [], "pool": [], "evaluations": {}, "config": {}}))
    (tmp_path / "report.html").write_text("the account")
    with pytest.raises(ValueError, match=r"is not empty \(report\.html, run\.json\) and holds no run of pretrain"):
        check_run_folder(tmp_path)


@pytest.mark.slow
def test_other_commands_do_not_disturb_a_live_run(config: Path, shards: Path, tmp_path: Path) -> None:
    """Refused for its settings, for its shards, or by the lock: the live run's unfinished checkpoint stays."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pretrain.train", "--config", str(config), "--shards", str(shards)]
    command += ["--out", str(out), "steps=40"]
    live = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while not list((out / "checkpoints").glob("step-*/manifest.json")):
            assert live.poll() is None, live.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(live.pid, signal.SIGSTOP)  # it cannot end while the others try
        unfinished = out / "checkpoints" / ".writing-step-00009999-abcd"
        unfinished.mkdir()
        (unfinished / "rank-00000-of-00001.safetensors.partial").write_bytes(b"half")
        before = digests(out)
        other = picture_tar(tmp_path / "other" / "b.tar", range(30, 54)).parent
        for data, setting, words in (
            (shards, "model.depth=3", "model.depth"),
            (other, "steps=40", "data.datasets"),
            (shards, "steps=40", f"process {live.pid} on {os.uname().nodename}, since 20"),
        ):
            second = [str(data) if part == str(shards) else part for part in command[:-1]] + ["steps=40", setting]
            done = subprocess.run(second, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
            assert done.returncode == WRONG_INPUT, done.stderr
            assert words in done.stderr
            assert "Traceback" not in done.stderr
            assert digests(out) == before
        os.kill(live.pid, signal.SIGCONT)
        _, messages = live.communicate(timeout=120)
        assert live.returncode == FINISHED, messages
    finally:
        live.kill()
        live.wait()
    assert len(losses(out)) == 40
    assert not list(out.glob("lock.json*"))


def test_a_run_that_lost_its_lock_stops_without_saving(
    config: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    out = tmp_path / "run"

    def take_over() -> None:
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
        holder = json.loads((out / lock.NAME).read_text())
        (out / f"{lock.NAME}.{holder['token']}").write_text(json.dumps(holder | {"token": "f" * 16, "host": "node-42"}))

    thread = threading.Thread(target=take_over)
    thread.start()
    assert run(config, shards, out, "steps=5000", "checkpoint.every_steps=5000") == WRONG_INPUT
    thread.join()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the lock of")
    assert "node-42" in error
    assert not list((out / "checkpoints").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_command_continues_after_an_end(config: Path, shards: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pretrain.train", "--config", str(config), "--shards", str(shards)]
    command += ["--out", str(out), "steps=30"]
    live = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while not list((out / "checkpoints").glob("step-*/manifest.json")):
            assert live.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        live.send_signal(number)
        live.wait(timeout=60)
    finally:
        live.kill()
        live.wait()
    assert bool(list(out.glob("lock.json*"))) == (number == signal.SIGKILL)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == FINISHED, done.stderr
    assert (f"taking over from process {live.pid}" in done.stderr) == (number == signal.SIGKILL)
    assert len(losses(out)) == 30
    assert not list(out.glob("lock.json*"))
