"""Tasks that compute on GPUs: an actor a GPU, which takes one item after another; and where tasks compute at all."""

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import ray

from curation.engine.actors import run_actors
from curation.engine.workers import ExecutionConfig, num_gpus, num_workers, run_tasks

R = TypeVar("R")

TORCH_DEVICE = "cuda"  # the one that Ray gave the actor: it sets CUDA_VISIBLE_DEVICES


def task_device(execution: ExecutionConfig) -> str | None:
    """Where the join, k-means, assignment and retrieval compute: a torch device, or None, the processor's own kernels.

    Results are the same. `auto` takes GPUs where Ray has some and torch is installed.

    Raises:
        ValueError: execution.device=cuda, and there is no GPU or no torch.
    """
    gpus = num_gpus(execution)
    if gpus and find_spec("torch") is None:
        if execution.device == "cuda":
            raise ValueError("execution.device=cuda needs torch; install seedbed[encoders], or use auto or cpu.")
        return None
    return TORCH_DEVICE if gpus else None


def num_at_once(device: str | None, execution: ExecutionConfig) -> int:
    """How many tasks of `run_on` compute at a time."""
    return num_workers(execution) if device is None else num_gpus(execution)


def run_on(
    device: str | None,
    function: Callable[..., R],
    items: Sequence[Any],
    *shared: Any,
    execution: ExecutionConfig,
    label: str,
    unit: str,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> list[R]:
    """function(item, *shared) for each item, as `run_tasks`: in its tasks where device is None, else an actor a GPU.

    Actors, for a process that has begun to use a GPU keeps it: Ray would end it after one task, and each would import
    torch and set up CUDA anew.
    """
    told = {"label": label, "unit": unit}
    if device is None:
        return run_tasks(function, items, *shared, execution=execution, weights=weights, names=names, **told)
    results: list[Any] = [None] * len(items)
    if not items:
        return results
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1, "max_restarts": 0, "max_concurrency": 2}
    actor = ray.remote(**options)(_GpuWorker)
    arguments = ray.put((device, function, shared))
    for number, result in run_actors(
        lambda: actor.remote(arguments),
        "call",
        items,
        num_actors=min(num_at_once(device, execution), len(items)),
        at_once=1,
        weights=weights if weights is not None else [1.0] * len(items),
        names=names if names is not None else [f"task {number + 1:,}" for number in range(len(items))],
        **told,
    ):
        results[number] = result
    return results


def call_on(
    device: str | None, function: Callable[..., R], *arguments: Any, execution: ExecutionConfig, label: str
) -> R:
    """function(*arguments): here, on all threads, where device is None; else in an actor, for here need be no GPU."""
    if device is None:
        return function(*arguments)
    return run_on(device, _call, [None], function, arguments, execution=execution, label=label, unit="")[0]


def _call(_: None, function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    return function(*arguments)


class _GpuWorker:
    """The actor that has a GPU to itself."""

    def __init__(self, arguments: tuple[str, Callable[..., Any], tuple[Any, ...]]) -> None:
        self.device, self.function, self.shared = arguments

    def start(self) -> None:
        """Find out whether torch can use what Ray gave."""
        import torch

        torch.zeros(1, device=self.device)

    def beats(self) -> int:
        """A task tells nothing before its end, so this says no more than that the process lives."""
        return int(time.monotonic())

    def call(self, item: Any) -> Any:
        return self.function(item, *self.shared)
