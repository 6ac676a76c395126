"""The one wrapper around Ray: start or join it, run a function over items again and again until each is done."""

import ctypes
import errno
import heapq
import logging
import os
import posixpath
import signal
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from configs.ranges import check_ranges
from curation.engine.folder import Folder
from curation.engine.progress import StageProgress, duration

R = TypeVar("R")
logger = logging.getLogger(__name__)

TRIES = {"worker": 6, "memory": 10, "node": 30}
"""how often a task may lose its worker, by what took it; the last time ends the run"""
SILENCE_S = 600.0
"""after so long without a finished task a message says what is waited for"""
_NODE_ERRORS = (ActorUnavailableError, NodeDiedError, ObjectLostError, RuntimeEnvSetupError)

_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # glibc has it

# Every task computes on one thread: parallelism comes from tasks, and results cannot depend on a thread count.
_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), "1"
)


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How to run; never part of a stage's key, and never changes a result."""

    workers: int = 0
    """CPU tasks at a time; 0: one for each core of the machine or cluster"""
    memory_gb: float = 4.0
    """what one task may hold in its tiles and buffers, in GB (10^9 bytes); with GPUs also its rows there, which leave a
    quarter of a GPU's memory to products: at most half of that memory"""
    device: str = "auto"
    """auto, cpu or cuda: where encoders, the join, k-means, assignment and retrieval compute"""

    def __post_init__(self) -> None:
        check_ranges("execution", self, workers="[0, inf)", memory_gb="[0.25, inf)")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"execution.device={self.device!r} must be auto, cpu or cuda.")

    def rows_at_once(self, row_bytes: float) -> int:
        """Into how many rows a task cuts what it works through, where one costs it so many bytes: those that fill a
        quarter of `memory_gb`, at most 2^20. Results must not depend on it."""
        return max(1, min(1 << 20, int(self.memory_gb * 1e9 / 4 / row_bytes)))


def start_ray(execution: ExecutionConfig) -> None:
    """Start an embedded Ray, or join the cluster that RAY_ADDRESS names; nothing if one is up already.

    Raises:
        ValueError: RAY_ADDRESS is set and nothing answers there.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    common: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "runtime_env": {"env_vars": _ONE_THREAD},
    }
    address = os.environ.get("RAY_ADDRESS")
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, **common)
        else:
            ray.init(
                address="local",  # or it would join any Ray that someone else started here
                num_cpus=execution.workers or os.cpu_count(),
                include_dashboard=False,
                object_store_memory=512 << 20,
                **common,
            )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray puts a bare exit there
    except ConnectionError as error:
        raise ValueError(f"RAY_ADDRESS={address!r} does not answer: {error}. Start the cluster or unset it.") from None
    except (RuntimeError, RayError) as error:
        told = " ".join(str(error).split())[:300]
        raise OSError(f"Ray does not start, with its temporary files in {ray_folder()}: {told}") from None


class WorkerLost(RuntimeError):
    """A process of Ray's died under a task, or its node did, or memory was short there.

    `taken_by` is worker, node or memory; `actor` says that the actor is gone, and not only a task of it.
    """

    def __init__(self, told: str, taken_by: str = "worker", actor: bool = False) -> None:
        super().__init__(told, taken_by, actor)  # all of it, or it would not come out of a pickle
        self.taken_by, self.actor = taken_by, actor

    def __str__(self) -> str:
        return self.args[0]


def num_workers(execution: ExecutionConfig) -> int:
    return execution.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))


def num_gpus(execution: ExecutionConfig) -> int:
    """GPUs that may be used.

    Raises:
        ValueError: execution.device=cuda, and Ray knows of none.
    """
    gpus = 0 if execution.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    if execution.device == "cuda" and not gpus:
        raise ValueError("execution.device=cuda, but Ray knows of no GPU; use auto or cpu, or run where there is one.")
    return gpus


def run_tasks(
    function: Callable[..., R],
    items: Sequence[Any],
    *shared: Any,
    execution: ExecutionConfig,
    label: str,
    unit: str,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    take: Callable[[R], None] | None = None,
) -> list[R]:
    """function(item, *shared) for each item, in Ray tasks of one CPU; results in the order of items.

    At most two tasks a worker are in flight. A task that lost its worker is tried again, a bounded number of times
    (`Losses`). The first error of its own cancels the rest and is raised as itself.

    Args:
        names: what to call each item in messages.
        take: gets each result as it comes, in any order; none is kept then, and None stands in its place.
    """
    if not items:
        return []
    task = ray.remote(max_retries=0)(_task)  # `Losses` counts, tells and waits; Ray would do neither
    task = task.options(name=getattr(function, "__name__", "task"))
    try:
        arguments = [ray.put(value) for value in (function, *shared)]
    except RayError as error:
        raise _in_words(error) from None
    results: list[Any] = [None] * len(items)
    weights = weights if weights is not None else [1.0] * len(items)
    queue, losses, silence = Queue(len(items)), Losses(label, names), Silence(label)
    pending: dict[Any, int] = {}
    with StageProgress(label, sum(weights), unit) as progress:
        try:
            while True:
                while len(pending) < 2 * num_workers(execution) and (number := queue.pop()) is not None:
                    pending[task.remote(items[number], *arguments)] = number
                if not pending and not queue:
                    return results
                silence.tell(len(pending))
                for reference in ready(list(pending), queue.wait_s()):
                    number = pending.pop(reference)
                    try:
                        result = unwrapped(reference)
                    except WorkerLost as error:
                        queue.put_back(number, losses.wait_s(number, error))
                    else:
                        if take is None:
                            results[number] = result
                        else:
                            take(result)
                        silence.heard()
                        progress.advance(weights[number])
        except BaseException:
            for reference in pending:
                ray.cancel(reference, force=False)
            raise


def _task(item: Any, function: Callable[..., R], *shared: Any) -> R:
    try:
        return function(item, *shared)
    finally:
        free_memory()  # or the worker keeps it, and the next task comes on top


def free_memory() -> None:
    """Give back to the system what is not in use: Arrow's pool and the C library keep most of what was freed."""
    pa.default_memory_pool().release_unused()
    _trim(0)


def run_pieces(
    function: Callable[..., Any],
    items: Sequence[Any],
    names: Sequence[str],
    folder: Folder,
    *shared: Any,
    execution: ExecutionConfig,
    label: str,
    unit: str,
    weights: Sequence[float] | None = None,
    run: Callable[..., list[None]] = run_tasks,
) -> None:
    """function(item, folder, name, *shared) for each item whose file `names[i]` is not in `folder` yet.

    Each call writes its file last, whole, under that name: who finds it need not do the work again, after whatever
    death. What a stage wrote for other settings is not there any more (the pipeline clears it).

    Args:
        run: what runs the tasks, called as `run_tasks` is.
    """
    done = finished_pieces(folder, names)
    todo = [i for i, name in enumerate(names) if name not in done]
    run(
        _write_piece,
        [(items[i], names[i]) for i in todo],
        function,
        folder,
        *shared,
        execution=execution,
        label=label,
        unit=unit,
        weights=[weights[i] for i in todo] if weights is not None else None,
        names=[names[i] for i in todo],
    )


def finished_pieces(folder: Folder, names: Iterable[str]) -> set[str]:
    """Those of the files `names` that are in `folder`: a listing of each folder that they name, not of all."""
    found: set[str] = set()
    for inside in {posixpath.dirname(name) for name in names}:
        here = folder / inside if inside else folder
        found.update(posixpath.join(inside, name) for name in here.entries())
    return found & set(names)


def _write_piece(piece: tuple[Any, str], function: Callable[..., Any], folder: Folder, *shared: Any) -> None:
    item, name = piece
    function(item, folder, name, *shared)


class Queue:
    """Numbers of tasks: those not tried yet, in order, and those to be tried again, each from its time on."""

    def __init__(self, count: int) -> None:
        self._first = deque(range(count))
        self._again: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._first) + len(self._again)

    def pop(self) -> int | None:
        """The next one; None where there is none yet."""
        if self._again and self._again[0][0] <= time.monotonic():
            return heapq.heappop(self._again)[1]
        return self._first.popleft() if self._first else None

    def put_back(self, number: int, wait_s: float) -> None:
        heapq.heappush(self._again, (time.monotonic() + wait_s, number))

    def wait_s(self) -> float | None:
        """Until one comes whose time has not; None where none waits."""
        return max(0.0, self._again[0][0] - time.monotonic()) if self._again else None


class Losses:
    """How often each task lost its worker. It is tried again a number of times that depends on what took the worker.

    A worker that dies by itself may die of what it works on. A node that goes, or memory that others took, says nothing
    about the task.
    """

    def __init__(self, label: str, names: Sequence[str] | None = None) -> None:
        self.label, self.names = label, names
        self._counts: Counter[tuple[int, str]] = Counter()

    def wait_s(self, number: int, error: WorkerLost) -> float:
        """Seconds until the task is tried again: none at first, then 1, 2, 4, up to a minute; more for memory.

        Raises:
            WorkerLost: it was tried often enough.
        """
        self._counts[number, error.taken_by] += 1
        count, most = self._counts[number, error.taken_by], TRIES[error.taken_by]
        name = self.names[number] if self.names is not None else f"task {number + 1:,}"
        if count >= most:
            raise WorkerLost(f"{self.label}: {name} lost its worker {count} times, the last time: {error}") from None
        logger.warning("%s: %s: %s; it is tried again (%d of %d)", self.label, name, error, count, most - 1)
        if error.taken_by == "memory":
            return min(60.0, 2.0**count)
        return min(60.0, 2.0 ** (count - 2)) if count > 1 else 0.0


class Silence:
    """Tells, every `SILENCE_S` in which nothing was finished, that the run waits, and for what."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._heard = self._told = time.monotonic()

    def heard(self) -> None:
        self._heard = self._told = time.monotonic()

    def tell(self, num_pending: int) -> None:
        now = time.monotonic()
        if now - self._told >= SILENCE_S:
            self._told = now
            has = ray.cluster_resources()
            logger.warning(
                "%s: nothing was finished for %s; %d tasks are under way or wait for one of %d CPUs and %d GPUs",
                self.label, duration(now - self._heard), num_pending, has.get("CPU", 0), has.get("GPU", 0),
            )  # fmt: skip


def ready(pending: list[Any], timeout_s: float | None) -> list[Any]:
    """Those of the references that are done: one at least, unless the time is over."""
    timeout_s = min(timeout_s if timeout_s is not None else SILENCE_S, SILENCE_S)
    if not pending:
        time.sleep(timeout_s)
        return []
    done, rest = ray.wait(pending, num_returns=1, timeout=timeout_s)
    return done + ray.wait(rest, num_returns=len(rest), timeout=0)[0] if done and rest else done


def unwrapped(reference: Any) -> Any:
    """ray.get, with a task's own exception raised as it was, and Ray's own failures in a sentence."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception) and cause.cause is not cause:
            cause = cause.cause
        if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):  # what it was to work on is lost
            cause = _in_words(cause)
        raise cause from None
    except RayError as error:
        raise _in_words(error) from None


def _in_words(error: RayError) -> Exception:
    if isinstance(error, OutOfDiskError):
        return OSError(errno.ENOSPC, "No space left on device", ray_folder())
    if isinstance(error, RaySystemError):  # arguments or results that do not unpickle: no other try helps
        return RuntimeError(str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    actor = isinstance(error, RayActorError)
    if isinstance(error, OutOfMemoryError):
        return WorkerLost(f"a Ray worker was stopped, for its node has no memory left: {lines[0]}", "memory")
    if isinstance(error, _NODE_ERRORS) or (actor and "its node has died" in str(error)):
        return WorkerLost(f"a node of the cluster was lost: {lines[0]}", "node", actor)
    return WorkerLost(f"a Ray worker was lost: {lines[0]}", "worker", actor)


def ray_folder() -> str:
    """Where Ray keeps its sockets, logs and what does not fit its memory."""
    return os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray")
