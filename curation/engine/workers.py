"""The one wrapper around Ray: start or join it, run a function over items, unwrap what went wrong."""

import errno
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import OutOfDiskError, RayError, RayTaskError

from configs.ranges import check_ranges
from curation.engine.progress import StageProgress

R = TypeVar("R")

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
    """what one task may hold in its tiles and buffers, in GB (10^9 bytes)"""
    device: str = "auto"
    """auto, cpu or cuda: where encoders run"""

    def __post_init__(self) -> None:
        check_ranges("execution", self, workers="[0, inf)", memory_gb="[0.25, inf)")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"execution.device={self.device!r} must be auto, cpu or cuda.")


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
    """A Ray worker died under a task, and did so again when the task was tried again."""


def num_workers(execution: ExecutionConfig) -> int:
    return execution.workers or max(1, int(ray.cluster_resources().get("CPU", 1)))


def num_gpus(execution: ExecutionConfig) -> int:
    return 0 if execution.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))


def run_tasks(
    function: Callable[..., R],
    items: Sequence[Any],
    *shared: Any,
    execution: ExecutionConfig,
    label: str,
    unit: str,
    weights: Sequence[float] | None = None,
) -> list[R]:
    """function(item, *shared) for each item, in Ray tasks of one CPU; results in the order of items.

    At most two tasks a worker are in flight. The first error cancels the rest and is raised as itself.
    """
    task = ray.remote(max_retries=2)(function)
    try:
        arguments = [ray.put(value) for value in shared]
    except RayError as error:
        raise _in_words(error) from None
    return drive(
        (lambda item=item: task.remote(item, *arguments) for item in items),
        len(items),
        in_flight=2 * num_workers(execution),
        label=label,
        unit=unit,
        weights=weights,
    )


def drive(
    submits: Iterator[Callable[[], Any]],
    count: int,
    *,
    in_flight: int,
    label: str,
    unit: str,
    weights: Sequence[float] | None = None,
) -> list[Any]:
    """Submit lazily, keep at most `in_flight` under way, and gather results in submission order."""
    weights = weights if weights is not None else [1.0] * count
    results: list[Any] = [None] * count
    pending: dict[Any, int] = {}
    with StageProgress(label, sum(weights), unit) as progress:
        try:
            for number, submit in enumerate(submits):
                pending[submit()] = number
                while len(pending) >= in_flight:
                    _collect(pending, results, weights, progress)
            while pending:
                _collect(pending, results, weights, progress)
        except BaseException:
            for reference in pending:
                ray.cancel(reference, force=False)
            raise
    return results


def _collect(pending: dict[Any, int], results: list[Any], weights: Sequence[float], progress: StageProgress) -> None:
    done, _ = ray.wait(list(pending), num_returns=1)
    for reference in done:
        number = pending.pop(reference)
        results[number] = unwrapped(reference)
        progress.advance(weights[number])


def unwrapped(reference: Any) -> Any:
    """ray.get, with a task's own exception raised as it was, and Ray's own failures in a sentence."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else error
        while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception) and cause.cause is not cause:
            cause = cause.cause
        raise cause from None
    except RayError as error:
        raise _in_words(error) from None


def _in_words(error: RayError) -> Exception:
    if isinstance(error, OutOfDiskError):
        return OSError(errno.ENOSPC, "No space left on device", ray_folder())
    return WorkerLost(f"a Ray worker was lost: {str(error).splitlines()[0]}")


def ray_folder() -> str:
    """Where Ray keeps its sockets, logs and what does not fit its memory."""
    return os.environ.get("RAY_TMPDIR") or os.path.join(tempfile.gettempdir(), "ray")
