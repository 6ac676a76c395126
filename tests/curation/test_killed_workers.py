"""kill -9 of a Ray worker in every step of a whole run: the run goes on, and gives the bytes of one without.

Embedding's own actors and decode workers die in stages/test_embed_faults.py, nodes there and in test_nodes.py.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from curation.engine import workers
from curation.engine.folder import Folder
from curation.pipeline import run_pipeline
from curation.run import finished_run
from curation.state import Run
from tests.mortal import doomed
from tests.tiny_run import full_run


class DoomedTasks:
    """Ray, as `run_tasks` sees it in one run, where one task of each step kills its worker.

    Args:
        groups: how many groups of tasks each step has, by the number of steps before it; the n-th step's task is one of
            group n modulo that, so that maps and reduces, first and last groups all come to be killed somewhere.
    """

    def __init__(self, run: Run, folder: Path, groups: Counter[int]) -> None:
        self.seen: Counter[int] = Counter()
        self._run, self._folder, self._groups = run, folder, groups

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        step = len(self._run.manifests)
        group, self.seen[step] = self.seen[step], self.seen[step] + 1
        if not self._groups[step] or group != step % self._groups[step]:
            return ray.remote(**options)
        return lambda function: ray.remote(**options)(doomed(function, str(self._folder), step))


@pytest.mark.slow
def test_a_worker_killed_in_every_step_changes_nothing(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = full_run(tmp_path_factory.getbasetemp())
    runs, groups = [], Counter()
    for name in ("undisturbed", "killed"):
        run = Run(
            Folder(str(tmp_path / name)),
            replace(whole.config, range_rows=20),
            whole.inputs,
            excluded={"other": finished_run(whole.folder.url)},
        )
        deaths = tmp_path / f"deaths-{name}"
        deaths.mkdir()
        tasks = DoomedTasks(run, deaths, groups)
        monkeypatch.setattr(workers, "ray", tasks)
        run_pipeline(run)
        groups = tasks.seen
        runs.append(run)
    undisturbed, killed = runs
    names = [name for number, name in enumerate(killed.manifests) if groups[number]]
    assert {name.partition("/")[0] for name in killed.manifests} - {name.partition("/")[0] for name in names} == {
        "embed"
    }
    assert len(list(deaths.iterdir())) == len(names) == caplog.text.count("it is tried again (1 of")
    for name, manifest in undisturbed.manifests.items():
        assert killed.manifests[name].files == manifest.files, name
