"""`make demo` on a pool of 240 images and with a few steps: raw pool, shards, teacher, export, the pool again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from curation.demo.pool import DemoPaths
from tests.conftest import REPOSITORY

FEW_STEPS = [
    "global_batch_size=8",
    "phases.pretrain.steps=4",
    "phases.high_resolution.steps=2",
    "optim.warmup_steps=2",
    "optim.freeze_last_layer_steps=1",
    "phases.high_resolution.optim.warmup_steps=1",
    "evaluation.every_steps=3",
    "evaluation.pca_images=2",
    "execution.threads=1",
]
SMALL_POOL = ["--config", "demo", "cluster.levels=[20, 6]", "cluster.num_resamplings=[1, 1]", "execution.workers=1"]


def run(*arguments: object) -> str:
    """A command in the repository root; its standard output."""
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_loop_from_a_pool_to_a_teacher_that_curates_it(demo_pool: DemoPaths, tmp_path: Path) -> None:
    curated, trained, teacher, again = (tmp_path / name for name in ("curated", "trained", "teacher", "again"))
    pool = ["--pool", demo_pool.pool, "--seed", demo_pool.seed, "--evaluation", demo_pool.evaluation, *SMALL_POOL]
    sets = [f"evaluation.train={demo_pool.labelled}", f"evaluation.val={demo_pool.evaluation}"]

    run("curation.run", "--out", curated, *pool)
    run("pretrain.train", "--config", "demo", "--shards", curated / "shards", "--out", trained, *FEW_STEPS, *sets)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines if "phase" in line} == {"pretrain", "high_resolution"}
    assert (trained / "report.html").stat().st_size > 0
    assert (trained / "evaluation" / "pca.png").stat().st_size > 0

    exported = run("pretrain.downstream.export", trained, teacher, "--format", "huggingface")
    assert str(teacher) in exported
    run("curation.run", "--out", again, *pool, f"embed.encoder=hf:{teacher}")
    asked = json.loads((again / "run.json").read_text())["config"]["embed"]
    assert asked["encoder"] == f"hf:{teacher}"
    assert asked["copy_encoder"] == "copies"

    figures = run("curation.demo.figures", demo_pool.truth, curated, trained, again)
    for words in ("random features", "teacher, step 6", "descriptors", "the teacher"):
        assert words in figures
    for page in (curated / "report.html", trained / "report.html", again / "report.html"):
        assert str(page) in figures
        assert page.is_file()


def test_figures_of_a_run_that_is_not_finished_say_what_is_missing(demo_pool: DemoPaths, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "curation.demo.figures", str(demo_pool.truth), *map(str, [tmp_path] * 3)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "holds no result.json" in done.stderr
