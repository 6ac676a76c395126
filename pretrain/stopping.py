"""Signals that ask a training to save and end: Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2. A second Ctrl-C ends it at once."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pretrain.distributed import collectives

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
INTERRUPTED = 130
# Ranks ask each other whether to stop after so many seconds of steps, and after so many steps at most.
ASK_EVERY_S, ASK_EVERY_STEPS = 5.0, 50
# One Ctrl-C under torchrun comes twice: from the terminal, and from torchrun.
_ONE_PRESS_S = 1.0


class Stopped(BaseException):
    """The run is asked to stop while it waits for something that it can do without.

    A BaseException, so that nothing between the wait and the loop takes it for an error of its own.
    """


class StopRequest:
    """The stop signals that this process got; true when there is one."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._may_leave = False
        self._interrupted_at = 0.0

    def __bool__(self) -> bool:
        return bool(self.received)

    @contextmanager
    def leaving_waits(self, allowed: bool = True) -> Iterator[None]:
        """Around a wait that a stop signal ends by `Stopped`. Not `allowed` where other ranks wait for this one."""
        self._may_leave = allowed
        try:
            if allowed and self.received:
                raise Stopped
            yield
        finally:
            self._may_leave = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at and now - self._interrupted_at > _ONE_PRESS_S:
                _end_at_once()
            self._interrupted_at = self._interrupted_at or now
        self.received.append(number)
        if self._may_leave:
            self._may_leave = False
            raise Stopped


class SharedStop:
    """Whether any rank is asked to stop; the same answer on all, which do not wait for each other in every step."""

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self._due = 0
        self._asked: tuple[int, float] | None = None

    def after(self, step: int) -> bool:
        """Call it after every step, with its number in the run."""
        if collectives.world_size() == 1:
            return bool(self.request)
        if step < self._due:
            return False
        now, steps = time.monotonic(), 1
        if self._asked is not None:
            steps = int(ASK_EVERY_S * (step - self._asked[0]) / max(now - self._asked[1], 1e-9))
        steps = min(max(steps, 1), ASK_EVERY_STEPS)
        # One number says both: whether one stops, and else the fewest steps that any would wait.
        fewest = ASK_EVERY_STEPS - collectives.max_over_ranks(ASK_EVERY_STEPS - (0 if self.request else steps))
        self._asked, self._due = (step, now), step + fewest
        return fewest == 0


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Collect stop signals instead of ending by them. An interrupt that the parent ignores (nohup, &) stays ignored."""
    request = StopRequest()
    former = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            former[number] = signal.signal(number, request.note)
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def ignore_stop_signals(_worker: int = 0) -> None:
    """For a loader's worker: it ends when the training does, which may still need its batches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_at_once() -> None:
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""
    text = f"{show_cursor}\nended at once; the same command continues from the last checkpoint.\n"
    os.write(sys.stderr.fileno(), text.encode())
    os._exit(INTERRUPTED)
