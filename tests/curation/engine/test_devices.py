"""Tasks on GPUs: actors get one each, from Ray. No GPU is needed: see tests/with_gpus.py."""

import json
import subprocess
import sys

import pytest

from curation.engine.devices import task_device
from curation.engine.workers import ExecutionConfig
from tests.conftest import REPOSITORY

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def found() -> dict:
    command = [sys.executable, "-m", "tests.with_gpus", "dispatch"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_gpu_has_one_actor_that_takes_one_item_after_another(found: dict) -> None:
    assert [value for value, _, _ in found["on gpus"]] == list(range(100, 108))
    assert {gpu for _, gpu, _ in found["on gpus"]} == {"0", "1"}
    assert len({(gpu, process) for _, gpu, process in found["on gpus"]}) == 2  # a process keeps its GPU
    assert found["of nothing"] == []


def test_without_a_device_tasks_ask_for_no_gpu(found: dict) -> None:
    assert {gpu for _, gpu, _ in found["on cpus"]} == {""}


def test_the_device_is_what_execution_says_and_what_is_there(found: dict) -> None:
    assert found["devices"] == ["cuda", "cuda", None]
    assert found["at once"] == [2, 7]
    assert found["without torch"][0] is None
    assert "execution.device=cuda needs torch; install seedbed[encoders]" in found["without torch"][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_torch_cannot_use_is_told(found: dict) -> None:
    assert "CUDA" in found["unusable"] or "NVIDIA" in found["unusable"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_gpu_is_said_and_auto_takes_the_processor(ray_session: None) -> None:
    assert task_device(ExecutionConfig()) is None
    with pytest.raises(ValueError, match=r"execution.device=cuda, but Ray knows of no GPU"):
        task_device(ExecutionConfig(device="cuda"))
