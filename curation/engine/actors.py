"""Items for actors that hold something large, such as a model: each takes the next when it has a place free.

So a slow actor gets less and holds nobody up. One that dies, or cannot start where Ray put it, is replaced while the
others go on, and what it worked on goes back into the queue.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray

from curation.engine.progress import StageProgress, duration
from curation.engine.workers import Losses, Queue, Silence, WorkerLost, ready, unwrapped

logger = logging.getLogger(__name__)

HUNG_S = 2 * 3600.0
"""an actor whose count of beats stands still for so long under its work is ended; the longest that a part may take to
its first batch is that of an image each minute that hangs, in all of a batch"""
BEAT_S = 30.0  # between two questions for it
_MAX_FAILURES = 5  # of one actor, deaths and starts, since it last finished something


class Worker(Protocol):
    """What an actor's class has beside the method that is called for each item."""

    def start(self) -> None:
        """Load what is held. What it raises says that this place will not do."""
        ...

    def beats(self) -> int:
        """A count that grows while there is progress; answered in a thread of its own."""
        ...


@dataclass
class _Seat:
    """Where one actor after another works."""

    handle: Any = None
    started: bool = False
    failures: int = 0
    start_at: float = 0.0
    given_up: bool = False
    items: dict[Any, int] = field(default_factory=dict)
    beat: int = -1
    moved: float = 0.0
    """when there was progress last"""
    asked: bool = False
    ask_at: float = 0.0


def run_actors(
    make: Callable[[], Any],
    method: str,
    items: Sequence[Any],
    *,
    num_actors: int,
    at_once: int,
    label: str,
    unit: str,
    weights: Sequence[float],
    names: Sequence[str],
) -> Iterator[tuple[int, Any]]:
    """Call `method` of an actor with each item; give (number of the item, result) as they come, in no order.

    Args:
        make: a new handle of an actor like `Worker`, that restarts nothing by itself (`max_restarts` 0) and has
            `max_concurrency` of `at_once` + 1.
        at_once: items that one actor works on at a time.

    Raises:
        WorkerLost: an item lost its actors too often (`Losses`), or every actor died again and again.
        Exception: what the method raised; or what starting raised, when no actor could start.
    """
    pool = _Pool(make, method, items, num_actors, at_once, Losses(label, names), label)
    with StageProgress(label, sum(weights), unit) as progress:
        try:
            while pool.has_work():
                pool.fill()
                for number, result in pool.collect():
                    progress.advance(weights[number])
                    yield number, result
                pool.listen()
        finally:
            pool.close()


class _Pool:
    def __init__(
        self,
        make: Callable[[], Any],
        method: str,
        items: Sequence[Any],
        num_actors: int,
        at_once: int,
        losses: Losses,
        label: str,
    ) -> None:
        self.make, self.method, self.items, self.at_once = make, method, items, at_once
        self.losses, self.label, self.silence = losses, label, Silence(label)
        self.queue = Queue(len(items))
        self.seats = [_Seat() for _ in range(num_actors)]
        self.calls: dict[Any, tuple[_Seat, str]] = {}
        """every call that is under way: of which seat; start, beat or item"""

    def has_work(self) -> bool:
        return bool(self.queue) or any(seat.items for seat in self.seats)

    def fill(self) -> None:
        """Start actors where there are none, and hand out items to those with the fewest."""
        now = time.monotonic()
        for seat in self.seats:
            if seat.handle is None and not seat.given_up and seat.start_at <= now and self.queue:
                seat.handle, seat.started, seat.asked, seat.beat = self.make(), False, False, -1
                self.calls[seat.handle.start.remote()] = seat, "start"
        while free := [seat for seat in self.seats if seat.started and len(seat.items) < self.at_once]:
            number = self.queue.pop()
            if number is None:
                return
            seat = min(free, key=lambda seat: len(seat.items))
            seat.moved = now if not seat.items else seat.moved
            reference = getattr(seat.handle, self.method).remote(self.items[number])
            seat.items[reference] = number
            self.calls[reference] = seat, "item"

    def collect(self) -> Iterator[tuple[int, Any]]:
        """Wait for some calls, and give those that finished an item."""
        self.silence.tell(len(self.calls))
        for reference in ready(list(self.calls), self._wait_s()):
            if reference not in self.calls:  # of an actor that was found dead a moment ago
                continue
            seat, kind = self.calls.pop(reference)
            try:
                result = unwrapped(reference)
            except WorkerLost as error:
                if error.actor or kind != "item":
                    self._lost(seat, error)  # with all that it had in hand
                else:
                    number = seat.items.pop(reference)
                    self.queue.put_back(number, self.losses.wait_s(number, error))
                continue
            except Exception as error:
                if kind != "start":
                    raise
                self._did_not_start(seat, error)
                continue
            now = time.monotonic()
            if kind == "beat":
                seat.asked = False
                seat.moved = now if result != seat.beat else seat.moved
                seat.beat = result
                continue
            seat.started, seat.moved = True, now
            if kind == "item":
                seat.failures = 0
                self.silence.heard()
                yield seat.items.pop(reference), result

    def listen(self) -> None:
        """Ask actors at work for their beats, and end those that have stood still for too long."""
        for seat in self.seats:
            if not seat.items:
                continue
            still_s = time.monotonic() - seat.moved
            if still_s > HUNG_S:
                self._lost(seat, WorkerLost(f"an actor has stood still for {duration(still_s)}", actor=True))
            elif still_s > BEAT_S and not seat.asked and seat.ask_at <= time.monotonic():
                seat.asked, seat.ask_at = True, time.monotonic() + BEAT_S
                self.calls[seat.handle.beats.remote()] = seat, "beat"

    def close(self) -> None:
        for seat in self.seats:
            self._end(seat)

    def _lost(self, seat: _Seat, error: WorkerLost) -> None:
        numbers = self._end(seat)
        self._failed(seat, error, 0 if error.taken_by == "node" else 1)
        for number in numbers:
            self.queue.put_back(number, self.losses.wait_s(number, error))

    def _did_not_start(self, seat: _Seat, error: Exception) -> None:
        self._end(seat)
        self._failed(seat, error, 1)
        if all(other.failures and not other.started for other in self.seats):
            raise error

    def _failed(self, seat: _Seat, error: Exception, count: int) -> None:
        seat.failures += count
        seat.given_up = seat.failures >= _MAX_FAILURES
        if all(other.given_up for other in self.seats):
            raise error
        wait_s = 5.0 * 2.0 ** (seat.failures - 2) if seat.failures > 1 else 0.0
        seat.start_at = time.monotonic() + wait_s
        at_work = sum(other.started for other in self.seats)
        then = "it is given up" if seat.given_up else "another takes its place"
        logger.warning("%s: %s; %s; %d of %d actors are at work", self.label, error, then, at_work, len(self.seats))

    def _end(self, seat: _Seat) -> list[int]:
        """End a seat's actor; returns what it was working on."""
        numbers = list(seat.items.values())
        self.calls = {reference: call for reference, call in self.calls.items() if call[0] is not seat}
        if seat.handle is not None:
            with contextlib.suppress(Exception):  # it may be dead, with its node or Ray itself
                ray.kill(seat.handle)
        seat.handle, seat.started, seat.items = None, False, {}
        return numbers

    def _wait_s(self) -> float | None:
        """Until something is to be done even if no call ends; None: nothing is."""
        times = [self.queue.wait_s()] if any(seat.started for seat in self.seats) else []
        now = time.monotonic()
        times += [max(0.0, s.start_at - now) for s in self.seats if s.handle is None and not s.given_up and self.queue]
        if any(seat.items for seat in self.seats):
            times.append(BEAT_S)
        return min((t for t in times if t is not None), default=None)
