"""Evaluation sets are steps of their own: a new one costs its own pass, and what follows runs for what it removed."""

import pytest

from curation.pipeline import run_pipeline
from curation.reading.listing import find_parts
from curation.reading.seeds import RetrievalRule, SeedSet
from curation.stages import decontaminate
from curation.stages.balance import BalanceConfig
from curation.stages.survivors import Survivors
from curation.state import Inputs, Run
from tests.conftest import encoded, picture, write_tar
from tests.tiny_run import curate


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Forty pictures, seeds that look like some, and evaluation sets: near, far, and near again."""
    root = tmp_path_factory.mktemp("sets")

    def tar(name, numbers, quality):
        return str(
            write_tar(root / f"{name}.tar", [(f"{n}.jpg", encoded(picture(n), quality=quality)) for n in numbers])
        )

    return {
        "pool": tar("pool", range(40), 90),
        "seed": tar("seed", range(12), 60),
        "first": tar("first", [3, 30, 700], 70),
        "far": tar("far", [801, 802], 70),
        "second": tar("second", [30, 31], 50),
    }


def curated(out, sets, names):
    seed = SeedSet(name="seed", urls=(sets["seed"],), rule=RetrievalRule(k=2))
    settings = {"balance": BalanceConfig(num_images=5), "filters": []}
    return curate(out, sets["pool"], {"seed": seed}, {name: sets[name] for name in names}, **settings)


def with_sets(run, sets, names) -> tuple[Run, set[str]]:
    """The run with these evaluation sets instead, and the steps that ran for it."""
    evaluations = {name: find_parts([sets[name]]) for name in names}
    again = Run(run.folder, run.config, Inputs(run.inputs.pool, run.inputs.seeds, evaluations))
    return again, {name for name, seconds in run_pipeline(again) if seconds is not None}


def shards(run):
    return {file.path: file.sha256 for file in run.manifests["shards"].files}


def leaks(run):
    table = Survivors(run.folder / "survivors").leaks(0)
    return dict(zip(table["gid"].to_pylist(), table["evaluation"].to_pylist(), strict=True))


@pytest.mark.slow
def test_a_new_evaluation_set_runs_its_own_steps_and_what_it_changes(tmp_path, sets, ray_session):
    run = curated(tmp_path / "run", sets, ["first"])
    assert leaks(run) == {3: "first", 30: "first"}

    # A set that matches nothing: its own pass, the union, and no more than the report that names it.
    run, ran = with_sets(run, sets, ["first", "far"])
    assert ran == {"embed/evaluation-far", "decontaminate/far", "survivors", "decide", "report"}
    assert run.manifests["decontaminate/far"].counts["matches, embedding"] == 0

    # A set that matches more: the other sets are not asked again.
    run, ran = with_sets(run, sets, ["first", "far", "second"])
    assert {"embed/evaluation-second", "decontaminate/second", "survivors", "retrieve/seed", "shards"} <= ran
    assert not {"embed/pool", "cells", "dedup", "decontaminate/first", "decontaminate/far"} & ran
    assert leaks(run) == {3: "first", 30: "first", 31: "second"}

    # In whatever order sets came, the run is the one that has them all from the start.
    whole = curated(tmp_path / "whole", sets, ["first", "far", "second"])
    assert {name: m.hash() for name, m in whole.manifests.items()} == {n: m.hash() for n, m in run.manifests.items()}
    assert shards(whole) == shards(run)


@pytest.mark.slow
def test_sets_that_are_not_done_share_one_pass(tmp_path, sets, ray_session, monkeypatch):
    asked = []
    together = decontaminate.match_sets

    def count(evaluations, *rest):
        asked.append([one.folder.url.rsplit("/", 1)[1] for one in evaluations])
        return together(evaluations, *rest)

    monkeypatch.setattr(decontaminate, "match_sets", count)
    run = curated(tmp_path / "run", sets, ["first", "second"])
    assert asked[0] == ["first", "second"]
    alone = curated(tmp_path / "alone", sets, ["second"])
    for name in (file.path for file in run.manifests["decontaminate/second"].files):
        assert (run.folder / "decontaminate/second").read_bytes(name) == (
            alone.folder / "decontaminate/second"
        ).read_bytes(name)
