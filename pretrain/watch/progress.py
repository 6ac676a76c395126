"""Live progress of a training: a line on a terminal that renews itself, plain lines in a log."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_LOG_INTERVAL_S = 10.0


class TrainProgress:
    """Step, loss, k-NN, images per second, time left; use as a context manager.

    On a terminal one line is redrawn; elsewhere a line is written at most every ten seconds, and one at the end.

    Args:
        total_steps: of the whole run, all phases.
        start_step: steps done before (a resumed run): the time left counts only what is measured now.
        shown: false on all ranks but the first.
    """

    def __init__(self, total_steps: int, start_step: int = 0, shown: bool = True) -> None:
        self.total_steps, self.step, self._start_step = total_steps, start_step, start_step
        self.phase, self._line, self._knn = "", {}, None
        self._skipped: Counter[str] = Counter()
        self._said = 0  # of them, in the last message
        self._start = self._last_line = time.monotonic()
        self._shown = shown
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if shown and console.is_terminal:
            columns = TextColumn("{task.fields[phase]}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}")
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, phase="", text="starting")

    def advance(self, step: int, phase: str) -> None:
        """Every step; `step` steps are done."""
        self.step, self.phase = step, phase
        self._show()

    def metrics(self, line: Mapping[str, Any]) -> None:
        """A new line of metrics (Metrics.flush)."""
        self._line = dict(line)

    def evaluation(self, figures: Mapping[str, float]) -> None:
        """What an evaluation found (run_evaluation)."""
        self._knn = figures.get("knn", self._knn)
        if self.step == self._start_step:  # the evaluation before the first step says nothing of what is left
            self._start = time.monotonic()

    def message(self, text: str) -> None:
        """Something to be read, above the live line: an alarm, a phase, a checkpoint."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def skipped(self, reasons: Iterable[str]) -> None:
        """Damaged images that were replaced; said with counts by reason at the 1st, 10th, 100th ..., and at the end."""
        self._skipped.update(reasons)
        if self._skipped and (not self._said or len(str(self._skipped.total())) > len(str(self._said))):
            self._say_skipped()

    def _say_skipped(self) -> None:
        self._said = self._skipped.total()
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self._skipped.most_common())
        self.message(f"damaged images replaced so far: {counts}; skipped.jsonl names each")

    def line(self) -> str:
        """For example `step 1,200 of 10,000, loss 8.12, k-NN 45.1%, 1,830 img/s, data wait 1%, 2 h 5 min left`."""
        parts = [f"step {self.step:,} of {self.total_steps:,}"]
        if self._line.get("loss") is not None:
            parts.append(f"loss {self._line['loss']:.3f}")
        if self._knn is not None:
            parts.append(f"k-NN {100 * self._knn:.1f}%")
        if self._line.get("images_per_second"):
            parts.append(f"{rate(self._line['images_per_second'])} img/s")
        if self._line.get("mfu"):
            parts.append(f"MFU {100 * self._line['mfu']:.0f}%")
        if self._line.get("data_wait", 0) >= 0.01:
            parts.append(f"data wait {100 * self._line['data_wait']:.0f}%")
        done = self.step - self._start_step
        if done > 0 and self.step < self.total_steps:
            left = (time.monotonic() - self._start) / done * (self.total_steps - self.step)
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.step, phase=self.phase, text=self.line())
        elif self._shown and time.monotonic() - self._last_line >= _LOG_INTERVAL_S:
            self._last_line = time.monotonic()
            print(f"{self.phase}: {self.line()}", file=sys.stderr, flush=True)

    def __enter__(self) -> "TrainProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and kind is None and self.step > self._start_step:
            took = duration(time.monotonic() - self._start)
            print(f"{self.phase}: {self.line()}; {self.step - self._start_step:,} steps in {took}", file=sys.stderr)
        if self._skipped.total() > self._said:
            self._say_skipped()


def rate(value: float) -> str:
    """For people: three digits of a small rate, whole numbers of a large one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """For people: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
