"""Every mode on one, two and four gloo ranks: losses of one process, its checkpoints, its evaluation.

All of it in one set of processes, which form a group anew for each job: starting them takes longer than the jobs.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.loader import merge_config
from pretrain.checkpoint import Checkpoints
from pretrain.config import TrainConfig
from pretrain.data.loader import read_tables
from pretrain.distributed import collectives
from pretrain.evaluating import Answering, evaluate_teacher, saved_teacher
from pretrain.optim.clip import clip_by_module
from pretrain.phase import Phase, phase_loader, start_phase
from pretrain.resume import Standing
from tests.conftest import encoded, picture, picture_tar, write_tar
from tests.pretrain.ranks import run_ranks
from tests.pretrain.tiny_train import TINY

CPU = torch.device("cpu")
STEPS, SAVED, AFTER = 20, 10, 2
JOBS = {
    "single": (1, "single", 0),
    "two ddp": (2, "ddp", 0),
    "two fsdp": (2, "fsdp", 0),
    "two hybrid": (2, "hybrid", 1),
    "four ddp": (4, "ddp", 0),
    "four fsdp": (4, "fsdp", 0),
    "four hybrid": (4, "hybrid", 2),
}
# KoLeo over the whole batch, for its neighbours otherwise depend on which images share a rank.
SETTINGS = {"steps": STEPS, "loss": {"koleo_group_size": 8}}


@contextmanager
def group(folder: Path, name: str, num_ranks: int) -> Iterator[bool]:
    """The first ranks as a process group of their own; whether this is one of them."""
    rank = int(os.environ["RANK"])
    if rank < num_ranks and num_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=num_ranks)
    yield rank < num_ranks
    collectives.stop()


def loss_of(phase: Phase, batch: Any, step: int) -> float:
    return collectives.mean_over_ranks(phase.step(batch, step, diagnose=False)["loss"].clone()).item()


def do_every_job(config: TrainConfig, folder: Path) -> dict[str, Any]:
    met: dict[str, Any] = {"in step": [attempt(kind) for kind in ("fine", "item", "work", "left")]}
    dist.destroy_process_group()
    tables = read_tables(config.data)
    for name, (ranks, mode, shard_ranks) in JOBS.items():
        with group(folder, f"first {name}", ranks) as mine:
            if mine:
                asked = merge_config(config, {"execution": {"parallel": mode, "shard_ranks": shard_ranks}}, "a job")
                met[name] = train(asked, tables, folder / name)
    for name, (ranks, mode, shard_ranks) in JOBS.items():
        with group(folder, f"second {name}", ranks) as mine:
            if mine:
                asked = merge_config(config, {"execution": {"parallel": mode, "shard_ranks": shard_ranks}}, "a job")
                met[f"{name} goes on"] = go_on(asked, tables, folder)
    with group(folder, "lost", 4):
        met["waited"] = wait_for_a_lost_rank()
    dist.init_process_group("gloo", init_method=f"file://{folder}/end", rank=int(os.environ["RANK"]), world_size=4)
    return met


def train(config: TrainConfig, tables: Any, folder: Path) -> dict[str, Any]:
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
    phase = start_phase(config, Standing(), checkpoints, CPU)
    figures = evaluate_teacher(Answering(phase.teacher, phase.wrapped), config, folder, 0, lambda: False)
    losses = []
    for step, batch in enumerate(phase_loader(config, 0, 0, tables)):
        losses.append(loss_of(phase, batch, step))
        if step + 1 == SAVED:
            checkpoints.save(phase.state(), SAVED, {"teacher": described(config)})
    checkpoints.wait()
    (broken,) = [p for n, p in phase.student.named_parameters() if n.endswith("cls_token")]
    broken.grad = torch.ones_like(broken)
    norm = clip_by_module({"cls": [broken]}, 0.0)["cls"].item()
    return {"figures": figures, "losses": losses, "norm": norm}


def described(config: TrainConfig) -> dict[str, Any]:
    return {"architecture": config.model.architecture, "model": {}, "image": {}}


def go_on(config: TrainConfig, tables: Any, folder: Path) -> dict[str, Any]:
    phase = start_phase(config, Standing(), Checkpoints(folder / "nowhere", config.checkpoint), CPU)
    batches = phase_loader(config, 0, SAVED, tables)
    first = [batch for batch, _ in zip(batches, range(AFTER), strict=False)]
    found = {}
    for name in JOBS:
        checkpoints = Checkpoints(folder / name / "checkpoints", config.checkpoint)
        latest = checkpoints.latest()
        assert latest is not None
        checkpoints.load(latest, phase.state())
        found[name] = [loss_of(phase, batch, SAVED + i) for i, batch in enumerate(first)]
    latest = Checkpoints(folder / "four hybrid" / "checkpoints", config.checkpoint).latest()
    assert latest is not None
    figures = evaluate_teacher(saved_teacher(config, latest, CPU), config, folder / "late", SAVED, lambda: False)
    return {"losses": found, "figures": figures}


def attempt(kind: str) -> Any:
    """Rank 1 has one item more than the others, then fails or is asked to stop."""
    rank, turns = collectives.rank(), []

    def items() -> Iterator[int]:
        yield 0
        if rank == 1:
            yield 1
            if kind == "item":
                raise ValueError("the second image")

    def work(item: int | None) -> None:
        turns.append(item)
        collectives.sum_over_ranks(torch.ones(1))
        if kind == "work" and item == 1:
            raise MemoryError("on rank 1")

    try:
        return collectives.in_step(items(), work, lambda: kind == "left" and len(turns) == 1 and rank == 1), turns
    except Exception as error:
        return f"{type(error).__name__}: {error}", turns


def wait_for_a_lost_rank() -> float:
    """Seconds until the others notice; rank 0 says nothing for longer than that."""
    collectives.set_timeout(timedelta(seconds=1))
    start = time.monotonic()
    if collectives.rank() == 0:
        time.sleep(4)
        return 0.0
    with pytest.raises(RuntimeError) as met:
        collectives.any_over_ranks(False)
    assert collectives.lost_rank(met.value)
    return time.monotonic() - start


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    folder = tmp_path_factory.mktemp("modes")
    picture_tar(folder / "shards" / "a.tar", range(24))
    for split, numbers in (("train", range(60)), ("val", range(60, 95))):
        members = [(f"k{n:02d}.png", encoded(picture(n, (32, 32)), "PNG")) for n in numbers]
        members += [(f"k{n:02d}.json", json.dumps({"label": "abc"[n % 3]}).encode()) for n in numbers]
        write_tar(folder / f"{split}.tar", sorted(members))
    sets = {"train": str(folder / "train.tar"), "val": str(folder / "val.tar"), "every_steps": 10}
    sizes = {"px": 32, "resize_px": 32, "k": [5, 1, 20], "batch_size": 4, "pca_images": 2, "pca_grid": 3}
    data = {"datasets": {"a": {"shards": str(folder / "shards")}}}
    settings = SETTINGS | {"data": data, "evaluation": sets | sizes}
    config = merge_config(merge_config(TrainConfig(), TINY, "tiny"), settings, "the test")
    return replace(config, checkpoint=replace(config.checkpoint, asynchronous=True)), folder


@pytest.fixture(scope="module")
def ranks(setting: tuple[TrainConfig, Path]) -> list[dict[str, Any]]:
    config, folder = setting
    return run_ranks(do_every_job, folder / "ranks", config, folder, num_ranks=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in JOBS if name != "single"])
def test_every_mode_has_the_losses_of_one_process(ranks: Any, name: str) -> None:
    one = ranks[0]["single"]["losses"]
    assert len(one) == STEPS
    for rank in ranks[: JOBS[name][0]]:
        assert rank[name]["losses"] == pytest.approx(one, rel=1e-5)  # sums in another order, in float32
        assert rank[name]["norm"] == pytest.approx(ranks[0]["single"]["norm"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(JOBS))
def test_every_checkpoint_goes_on_in_every_mode(ranks: Any, name: str) -> None:
    expected = ranks[0]["single"]["losses"][SAVED : SAVED + AFTER]
    for rank in ranks[: JOBS[name][0]]:
        for source, losses in rank[f"{name} goes on"]["losses"].items():
            assert losses == pytest.approx(expected, rel=1e-5), source


@pytest.mark.slow
@pytest.mark.parametrize("name", list(JOBS))
def test_every_mode_evaluates_as_one_process(ranks: Any, setting: tuple[TrainConfig, Path], name: str) -> None:
    """First weights are equal to the bit, and a rank's batches are those of one process."""
    one, late = ranks[0]["single"]["figures"], ranks[0]["single goes on"]["figures"]
    assert {"knn", "knn/5", "knn/1", "knn/20", "knn_pixels", "knn_random", "pca_explained"} == one.keys()
    for rank in ranks[: JOBS[name][0]]:
        assert rank[name]["figures"] == pytest.approx(one, rel=1e-5)
        assert rank[f"{name} goes on"]["figures"] == pytest.approx(late, rel=1e-5)
    result = json.loads((setting[1] / name / "evaluation" / "step-00000000" / "result.json").read_text())
    knn = result["evaluations"]["knn"]
    assert (knn["images"], round(1 / knn["figures"]["chance"])) == ({"train": 60, "val": 35}, 3)


@pytest.mark.slow
def test_no_checkpoint_holds_a_replica_twice(ranks: Any, setting: tuple[TrainConfig, Path]) -> None:
    assert ranks
    sizes = {
        name: [file.stat().st_size for file in (setting[1] / name / "checkpoints").rglob("*.safetensors")]
        for name in JOBS
    }
    for name, of_ranks in sizes.items():
        assert len(of_ranks) == JOBS[name][0]
        assert sum(of_ranks) < 1.1 * sum(sizes["single"]), name
        assert max(of_ranks) < 1.7 * sum(of_ranks) / len(of_ranks), name


@pytest.mark.slow
def test_ranks_do_as_many_turns_and_fail_or_stop_together(ranks: Any) -> None:
    for number, rank in enumerate(ranks):
        mine = [0, 1 if number == 1 else None]
        assert rank["in step"] == [
            (True, mine),
            ("ValueError: the second image", mine),
            ("MemoryError: on rank 1", mine),
            (False, [0]),
        ]


@pytest.mark.slow
def test_a_lost_rank_is_seen_as_early_as_asked(ranks: Any) -> None:
    assert all(0.5 < rank["waited"] < 3.5 for rank in ranks[1:])
