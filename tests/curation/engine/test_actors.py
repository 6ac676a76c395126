"""Actors that are slow, die, hang or cannot start: the others go on, and every item is done."""

import contextlib
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import ray

from curation.engine import actors
from curation.engine.actors import run_actors
from tests.mortal import Squares


def squares(folder: Path, trouble: str, num_items: int = 12) -> tuple[list[int], list[int]]:
    """Squares, and the processes that made them, in the order of items."""
    actor = ray.remote(num_cpus=0, max_concurrency=2)(Squares)
    found: dict[int, tuple[int, int]] = dict(
        run_actors(
            lambda: actor.remote(str(folder), trouble), "square", range(num_items), num_actors=2, at_once=1, unit="",
            label="squares", weights=[1.0] * num_items, names=[f"item {i}" for i in range(num_items)],
        )
    )  # fmt: skip
    return [found[i][0] for i in range(num_items)], [found[i][1] for i in range(num_items)]


def processes(folder: Path, item: int) -> list[int]:
    return [int(path.name.split("-")[2]) for path in folder.glob(f"item-{item}-*")]


EXPECTED = [i * i for i in range(12)]


def test_a_slow_actor_gets_less(tmp_path: Path, ray_session: None) -> None:
    done, by = squares(tmp_path, "slow")
    assert done == EXPECTED
    shares = sorted(Counter(by).values())
    assert len(shares) == 2
    assert shares[0] <= 3 < 9 <= shares[1]


def test_a_dead_actor_is_replaced(tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture) -> None:
    done, _ = squares(tmp_path, "dies")
    assert done == EXPECTED
    assert "another takes its place" in caplog.text
    assert sum(len(processes(tmp_path, item)) == 2 for item in range(12)) == 1  # what it was at was done again


def test_an_actor_that_cannot_start_holds_nobody_up(
    tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert squares(tmp_path, "broken")[0] == EXPECTED
    assert "squares: no such device; another takes its place" in caplog.text


def test_when_no_actor_can_start_its_reason_is_told(tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(ValueError, match="no such device"):
        squares(tmp_path, "all-broken")


def test_an_actor_that_stands_still_is_ended(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(actors, "HUNG_S", 1.5)
    monkeypatch.setattr(actors, "BEAT_S", 0.3)
    try:
        assert squares(tmp_path, "hangs")[0] == EXPECTED
    finally:
        for path in tmp_path.glob("item-*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.name.split("-")[2]), signal.SIGCONT)
    assert "an actor has stood still for" in caplog.text
