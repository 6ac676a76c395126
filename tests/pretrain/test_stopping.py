"""Ctrl-C and its like, in real processes: saved and continued, at every moment; a second one ends it at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.stopping import Stopped, stop_signals
from pretrain.train import FINISHED, STOPPED
from tests.conftest import REPOSITORY
from tests.pretrain.tiny_train import losses, run, same_teacher, wait_for_step

LONG = ["steps=400", "optim.warmup_steps=2", "checkpoint.every_steps=1000"]


def start(config: Path, shards: Path, out: Path, *overrides: str, module: str = "pretrain.train") -> subprocess.Popen:
    """As from a terminal: a process group of its own, of which every member gets the signals of Ctrl-C."""
    command = [sys.executable, "-m", module, "--config", str(config), "--shards", str(shards), "--out", str(out)]
    return subprocess.Popen(
        [*command, *overrides], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def press(process: subprocess.Popen, number: int = signal.SIGINT) -> None:
    os.killpg(process.pid, number)


def ended(process: subprocess.Popen, limit_s: float = 90) -> tuple[int, str]:
    try:
        _, messages = process.communicate(timeout=limit_s)
    finally:
        process.kill()
    return process.returncode, messages


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_saves_and_the_command_continues(config: Path, shards: Path, tmp_path: Path, number: int) -> None:
    """With loader workers, which get the signal too and must not die of it."""
    settings = ["steps=60", "checkpoint.every_steps=1000", "execution.loader.num_workers=2"]
    process = start(config, shards, tmp_path / "run", *settings)
    wait_for_step(tmp_path / "run", 3, process)
    press(process, number)
    status, messages = ended(process)
    assert status == STOPPED, messages
    assert "Traceback" not in messages
    assert "the same command continues" in messages
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] != []
    assert run(config, shards, tmp_path / "run", *settings) == FINISHED
    assert run(config, shards, tmp_path / "whole", *settings) == FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same_teacher(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.3, 1.5, 3.0])
def test_ctrl_c_while_it_starts_leaves_no_traceback(config: Path, shards: Path, tmp_path: Path, delay_s: float) -> None:
    process = start(config, shards, tmp_path / "run", *LONG)
    time.sleep(delay_s)
    press(process)
    status, messages = ended(process)
    assert status in (STOPPED, -signal.SIGINT), messages
    assert "Traceback" not in messages
    assert "KeyboardInterrupt" not in messages


@pytest.mark.slow
def test_ctrl_c_while_it_waits_for_images(config: Path, shards: Path, tmp_path: Path) -> None:
    """A batch that never comes, since the worker is stopped: the steps before it are saved all the same."""
    process = start(config, shards, tmp_path / "run", *LONG, "execution.loader.num_workers=1")
    wait_for_step(tmp_path / "run", 2, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    for child in children:
        os.kill(int(child), signal.SIGCONT)
    status, messages = ended(process)
    assert status == STOPPED, messages
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_second_interrupt_later_does_not_wait() -> None:
    """In a process that never comes to look at the request."""
    code = (
        "import signal, sys, time\nfrom pretrain.stopping import stop_signals\n"
        "with stop_signals():\n    print('ready', flush=True)\n    time.sleep(60)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # torchrun passes the same press on
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    status, messages = ended(process)
    assert status == 130
    assert "ended at once" in messages
    assert "Traceback" not in messages


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_waits_are_left_and_handlers_put_back(number: int) -> None:
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop
        with pytest.raises(Stopped), stop.leaving_waits():
            subprocess.run(["sh", "-c", f"kill -{int(number)} {os.getpid()}; sleep 5"])
        assert stop
        with pytest.raises(Stopped), stop.leaving_waits():
            raise AssertionError("asked already")
        with stop.leaving_waits(allowed=False):
            pass
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_children_do_not_inherit_what_the_tests_were_told_to_ignore(number: int) -> None:
    """`nohup make test &` starts pytest with interrupts ignored, and so its children: tests send them signals."""
    test = f"{Path(__file__).relative_to(REPOSITORY)}::test_a_child_ends_by_a_signal"
    code = (
        f"import os, signal, sys\nsignal.signal({int(number)}, signal.SIG_IGN)\n"
        f"os.execv(sys.executable, [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', {test!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_child_ends_by_a_signal(number: int) -> None:
    process = subprocess.Popen(["sleep", "20"])
    process.send_signal(number)
    assert process.wait(timeout=10) == -number


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch.distributed.run", "pretrain.launch"])
def test_ctrl_c_reaches_two_ranks(config: Path, shards: Path, tmp_path: Path, module: str) -> None:
    out = tmp_path / "run"
    if module == "pretrain.launch":
        process = start(config, shards, out, *LONG, "--cluster", "local", "--tasks-per-node", "2", module=module)
    else:
        command = [sys.executable, "-m", module, "--nproc-per-node", "2", "--master-port", "29617", "-m"]
        command += ["pretrain.train", "--config", str(config), "--shards", str(shards), "--out", str(out), *LONG]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_step(out, 2, process)
    press(process)
    status, messages = ended(process)
    assert list((out / "checkpoints").glob("step-*")), messages
    if module == "pretrain.launch":
        assert status == STOPPED, messages
        assert "Traceback" not in messages
