"""Progress: what the line says, how often a log gets one, and what a terminal sees."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.watch import progress
from pretrain.watch.progress import TrainProgress, duration, rate

LINE = {"loss": 8.1234, "images_per_second": 1830.4, "data_wait": 0.02, "mfu": 0.41}


def test_line_says_what_is_known() -> None:
    shown = TrainProgress(10_000, start_step=1000)
    assert shown.line() == "step 1,000 of 10,000"
    shown.metrics(LINE)
    shown.evaluation({"knn": 0.451})
    shown.advance(1200, "pretrain")
    assert shown.line().startswith(
        "step 1,200 of 10,000, loss 8.123, k-NN 45.1%, 1,830 img/s, MFU 41%, data wait 2%, 0.0 s left"
    )


def test_time_left_counts_only_this_session(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = TrainProgress(2000, start_step=1000)
    now[0] += 50
    shown.advance(1500, "pretrain")
    assert shown.line().endswith("50 s left")


def test_log_gets_a_line_at_most_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with TrainProgress(100) as shown:
        for step in range(1, 101):
            now[0] += 0.5
            shown.advance(step, "pretrain")
        shown.message("an alarm")
    written = capsys.readouterr().err.splitlines()
    assert len(written) == 5 + 1 + 1
    assert written[0] == "pretrain: step 20 of 100, 40 s left"
    assert written[-2:] == ["an alarm", "pretrain: step 100 of 100; 100 steps in 50 s"]


def test_other_ranks_write_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with TrainProgress(100, shown=False) as shown:
        now[0] += 60
        shown.advance(50, "pretrain")
        shown.message("an alarm")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_terminal_gets_a_live_line(tmp_path: Path) -> None:
    code = (
        "from pretrain.watch.progress import TrainProgress\n"
        "with TrainProgress(3) as shown:\n"
        "    shown.metrics({'loss': 2.5, 'images_per_second': 10.0})\n"
        "    for step in (1, 2, 3):\n"
        "        shown.advance(step, 'pretrain')\n"
        "    shown.message('[alarm] said above')\n"
    )
    main, terminal = pty.openpty()
    try:
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        done = subprocess.run([sys.executable, "-c", code], stderr=terminal, timeout=60, env=environment)
        seen = os.read(main, 1 << 16).decode()
    finally:
        os.close(main)
        os.close(terminal)
    assert done.returncode == 0
    assert "step 3 of 3, loss 2.500, 10 img/s" in seen
    assert "[alarm] said above" in seen


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.42, "0.4 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (273600, "3 d 4 h")]
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(("value", "words"), [(1.8349, "1.83"), (42.24, "42.2"), (1830.4, "1,830")])
def test_rate(value: float, words: str) -> None:
    assert rate(value) == words
