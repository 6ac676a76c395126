"""A process of its own whose Ray counts two GPUs that nobody has; torch computes on the processor in their place.

Ray cannot be given GPUs later, and that of the other tests has none. `python -m tests.with_gpus dispatch` prints what
tasks saw; `python -m tests.with_gpus curate FOLDER` makes the run of tests/tiny_run.py.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from curation.engine import devices
from curation.engine.devices import num_at_once, run_on, task_device
from curation.engine.workers import ExecutionConfig, num_gpus
from curation.stages import embed


@contextmanager
def two_gpus() -> Iterator[None]:
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    ray.init(
        address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment,
        object_store_memory=256 << 20,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def seen(item: int, added: int) -> tuple[int, str, int]:
    time.sleep(0.3)
    return item + added, os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.getpid()


def error_of(call) -> str:
    try:
        call()
    except (AssertionError, RuntimeError, ValueError) as error:
        return str(error)
    return ""


def dispatch() -> dict[str, object]:
    from tests.with_gpus import seen  # under the name by which workers find it

    auto, cuda, cpu = (ExecutionConfig(device=device) for device in ("auto", "cuda", "cpu"))
    options = {"label": "x", "unit": ""}
    found: dict[str, object] = {
        "devices": [task_device(execution) for execution in (auto, cuda, cpu)],
        "at once": [num_at_once("cuda", auto), num_at_once(None, ExecutionConfig(workers=7))],
        "on gpus": run_on("cpu", seen, range(8), 100, execution=cuda, **options),
        "of nothing": run_on("cpu", seen, [], 100, execution=cuda, **options),
        "on cpus": run_on(None, seen, range(2), 100, execution=cpu, **options),
        "unusable": error_of(lambda: run_on("cuda", seen, range(2), 1, execution=cuda, **options)),
    }
    devices.find_spec = lambda name: None
    found["without torch"] = [task_device(auto), error_of(lambda: task_device(cuda))]
    return found


def curate(folder: Path) -> dict[str, object]:
    """The files of each step, and what actors with a GPU did."""
    from tests.tiny_run import full_run

    labels, run_actors = [], devices.run_actors

    def told(*arguments, **options):
        labels.append(options["label"])
        return run_actors(*arguments, **options)

    def asked(execution: ExecutionConfig) -> int:
        labels.append("embed")
        return num_gpus(execution)

    devices.TORCH_DEVICE, devices.run_actors, embed.num_gpus = "cpu", told, asked
    run = full_run(folder)
    files = {name: {file.path: file.sha256 for file in step.files} for name, step in run.manifests.items()}
    return {"files": files, "labels": labels}


if __name__ == "__main__":
    with two_gpus():
        told = dispatch() if sys.argv[1] == "dispatch" else curate(Path(sys.argv[2]))
    print(json.dumps(told))
