"""Tasks on GPUs, with GPUs that Ray counts and nobody has: actors get one each. torch computes on the processor."""

import os
import time
from collections.abc import Iterator

import pytest
import ray

from curation.engine import devices
from curation.engine.devices import num_at_once, run_on, task_device
from curation.engine.workers import ExecutionConfig, start_ray

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    if ray.is_initialized():
        ray.shutdown()
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def seen(item: int, added: int) -> tuple[int, str, int]:
    time.sleep(0.3)
    return item + added, os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.getpid()


def test_every_gpu_has_one_actor_that_takes_one_item_after_another(two_gpus: None) -> None:
    options = {"execution": ExecutionConfig(device="cuda"), "label": "x", "unit": ""}
    done = run_on("cpu", seen, range(8), 100, **options)
    assert [value for value, _, _ in done] == list(range(100, 108))
    assert {gpu for _, gpu, _ in done} == {"0", "1"}
    assert len({(gpu, process) for _, gpu, process in done}) == 2  # a process keeps its GPU, and comes to work again
    assert run_on("cpu", seen, [], 1, **options) == []


def test_without_a_device_tasks_ask_for_no_gpu(two_gpus: None) -> None:
    done = run_on(None, seen, range(2), 1, execution=ExecutionConfig(device="cpu"), label="x", unit="")
    assert {gpu for _, gpu, _ in done} == {""}


def test_the_device_is_what_execution_says_and_what_is_there(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_device(ExecutionConfig(device="cpu")) is None
    assert task_device(ExecutionConfig(device="auto")) == task_device(ExecutionConfig(device="cuda")) == "cuda"
    assert num_at_once("cuda", ExecutionConfig()) == 2
    assert num_at_once(None, ExecutionConfig(workers=7)) == 7
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert task_device(ExecutionConfig(device="auto")) is None
    with pytest.raises(ValueError, match=r"execution.device=cuda needs torch; install seedbed\[encoders\]"):
        task_device(ExecutionConfig(device="cuda"))


def test_a_gpu_that_torch_cannot_use_is_told(two_gpus: None) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises((RuntimeError, AssertionError), match=r"NVIDIA|CUDA"):
        run_on("cuda", seen, range(2), 1, execution=ExecutionConfig(device="cuda"), label="x", unit="")


def test_no_gpu_is_said_and_auto_takes_the_processor() -> None:
    if ray.is_initialized():
        ray.shutdown()
    start_ray(ExecutionConfig(workers=1))
    try:
        if ray.cluster_resources().get("GPU"):
            pytest.skip("there is one")
        assert task_device(ExecutionConfig()) is None
        with pytest.raises(ValueError, match=r"execution.device=cuda, but Ray knows of no GPU"):
            task_device(ExecutionConfig(device="cuda"))
    finally:
        ray.shutdown()
