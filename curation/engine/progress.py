"""Progress with rate and time left: a live bar on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

_LOG_INTERVAL_S = 10.0


class StageProgress:
    """Shows `done` of `total` units for one stage; use as a context manager.

    On a terminal it redraws one line; elsewhere it writes a line at most every ten seconds, and one at the end.
    """

    def __init__(self, label: str, total: float, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.start = 0.0, time.monotonic()
        self._last_line = self.start
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = TextColumn("{task.description:<24}"), BarColumn(), _Rate(unit), TimeElapsedColumn()
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(label, total=total or None)

    def advance(self, amount: float) -> None:
        self.done += amount
        if self._bar is not None:
            self._bar.advance(self._task, amount)
        elif time.monotonic() - self._last_line >= _LOG_INTERVAL_S:
            self._last_line = time.monotonic()
            print(f"{self.label}: {self.line()}", file=sys.stderr, flush=True)

    def line(self) -> str:
        """For example `1,200 of 9,400 images, 410 images/s, 20 s left`."""
        elapsed = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / elapsed
        left = f", {duration((self.total - self.done) / rate)} left" if 0 < self.done < self.total else ""
        return f"{amount(self.done)} of {amount(self.total)} {self.unit}, {amount(rate)} {self.unit}/s{left}"

    def __enter__(self) -> "StageProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self.total:
            elapsed = time.monotonic() - self.start
            print(f"{self.label}: {amount(self.done)} {self.unit} in {duration(elapsed)}", file=sys.stderr, flush=True)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = f"{amount(task.speed) if task.speed else '-'} {self.unit}/s"
        left = duration(task.time_remaining) + " left" if task.time_remaining is not None else "..."
        total = amount(task.total) if task.total is not None else "?"
        return Text(f"{amount(task.completed)}/{total} {self.unit}  {speed}  {left}")


def amount(value: float) -> str:
    """A count for people: whole numbers as they are, others with two digits while they are small."""
    return f"{value:,.2g}" if 0 < value < 10 and value != int(value) else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """For people: `0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
