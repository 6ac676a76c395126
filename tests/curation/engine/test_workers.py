"""Tasks whose workers die: they are tried again so often, and pieces that are there are not made twice."""

from pathlib import Path

import pytest

from curation.engine import workers
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig, WorkerLost, run_pieces, run_tasks
from tests.mortal import dies, write_square

TWO = ExecutionConfig(workers=2)


def test_a_killed_worker_costs_a_new_try(tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture) -> None:
    done = run_tasks(dies, range(4), str(tmp_path), 2, execution=TWO, label="squares", unit="numbers", names="abcd")
    assert done == [0, 1, 4, 9]
    assert "squares: b: a Ray worker was lost" in caplog.text
    assert "it is tried again (2 of 5)" in caplog.text
    assert len(list(tmp_path.glob("try-1-*"))) == 3
    assert len(list(tmp_path.glob("try-0-*"))) == 1


def test_a_task_that_always_dies_ends_the_run(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(workers.TRIES, "worker", 2)
    with pytest.raises(WorkerLost, match="squares: task 2 lost its worker 2 times, the last time: a Ray worker was"):
        run_tasks(dies, range(2), str(tmp_path), 99, execution=TWO, label="squares", unit="numbers")
    assert len(list(tmp_path.glob("try-1-*"))) == 2


def test_pieces_that_are_there_are_not_made_again(tmp_path: Path, ray_session: None) -> None:
    folder, names = Folder(str(tmp_path)), [f"squares/{i}.txt" for i in range(5)]

    def make(failing: int) -> None:
        run_pieces(
            write_square, range(5), names, folder, failing, execution=ExecutionConfig(workers=1), label="", unit="",
            weights=[1] * 5,
        )  # fmt: skip

    with pytest.raises(ValueError, match="this one not"):
        make(failing=4)
    (tmp_path / "squares" / "3.txt").unlink(missing_ok=True)
    (tmp_path / "squares" / "3.txt.0123abcd.tmp").write_text("what a killed process left")
    before = {name for name in names if folder.exists(name)}
    make(failing=-1)
    assert [folder.read_bytes(name) for name in names] == [b"0", b"1", b"4", b"9", b"16"]
    assert all(len(list(tmp_path.glob(f"try-{i}-*"))) == 1 for i in range(5) if names[i] in before)
    make(failing=0)  # nothing is left to do
