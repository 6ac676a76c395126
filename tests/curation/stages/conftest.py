"""Where stages compute."""

import pytest

from curation.engine import devices, exchange
from curation.engine.workers import num_workers, run_tasks
from curation.stages import cluster, kmeans, retrieve, seed_neighbours, split


@pytest.fixture(params=[None, "cpu"], ids=["processor", "torch"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The processor's kernels, or torch, whose device is the processor, in ordinary tasks.

    tests/curation/test_device_runs.py has actors that Ray gave a GPU.
    """
    if request.param is not None:
        pytest.importorskip("torch")
        for module in (cluster, kmeans, retrieve, seed_neighbours, split):
            monkeypatch.setattr(module, "task_device", lambda execution: request.param)
        for module in (devices, exchange, kmeans, seed_neighbours):
            monkeypatch.setattr(module, "run_on", lambda device, *items, **told: run_tasks(*items, **told))
        monkeypatch.setattr(kmeans, "num_at_once", lambda device, execution: num_workers(execution))
    return request.param
