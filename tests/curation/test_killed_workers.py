"""kill -9 of a Ray worker in every group of tasks of a whole run: the run goes on, and gives the bytes of one without.

Embedding's own actors and decode workers die in stages/test_embed_faults.py, nodes there and in test_nodes.py.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import ray

from curation.engine import workers
from curation.engine.folder import Folder
from curation.pipeline import run_pipeline
from curation.run import finished_run
from curation.state import Run
from curation.steps import plan_steps
from tests.mortal import doomed
from tests.tiny_run import full_run


class DoomedTasks:
    """Ray, as `run_tasks` sees it, where one task of each group kills its worker."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._groups = folder, count()

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        return lambda function: ray.remote(**options)(doomed(function, str(self._folder), next(self._groups)))


@pytest.mark.slow
def test_a_worker_killed_in_every_group_of_tasks_changes_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None, monkeypatch, caplog
) -> None:
    whole = full_run(tmp_path_factory.getbasetemp())
    config = replace(whole.config, range_rows=20)
    other = {"other": finished_run(whole.folder.url)}

    def curated(name: str) -> Run:
        run = Run(Folder(str(tmp_path / name)), config, whole.inputs, excluded=other)
        run_pipeline(run)
        return run

    undisturbed = curated("undisturbed")
    (tmp_path / "deaths").mkdir()
    monkeypatch.setattr(workers, "ray", DoomedTasks(tmp_path / "deaths"))
    killed = curated("killed")
    monkeypatch.undo()
    deaths = list((tmp_path / "deaths").iterdir())
    assert caplog.text.count("it is tried again") >= len(deaths) > 30
    steps = {step.name: step.stage for step in plan_steps(killed)}
    assert {name: killed.manifests[name].files for name in steps} == {
        name: undisturbed.manifests[name].files for name in steps
    }
