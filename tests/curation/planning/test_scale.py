"""The plan of a pool that no one has here: its numbers beside those that are known, how they grow, and its options."""

import math
import re
from pathlib import Path

import pytest

from configs.loader import config_names, load_config
from curation.config import CurationConfig
from curation.engine.folder import Folder
from curation.pipeline import run_pipeline
from curation.planning import costs
from curation.planning.costs import Work
from curation.planning.estimates import described_set
from curation.planning.machines import Cluster, load_cluster
from curation.planning.numbers import PlannedStep
from curation.planning.steps import Plan
from curation.reading.listing import Listing, find_parts
from curation.reading.seeds import SeedSet
from curation.run import main
from curation.state import Inputs, Run, step_seconds
from tests.conftest import picture_tar

H100 = load_cluster("h100x160")


def planned(num_images: int, *overrides: str, cluster: Cluster = H100, evaluation: int = 300_000) -> Plan:
    """Descriptors (256-d) as copies, so that no weights are needed."""
    config = load_config(CurationConfig, "curation", "offline", ["retrieve.mode=none", *overrides])
    inputs = Inputs(Listing(()), {}, {"exam": Listing(())} if evaluation else {})
    described = {"embed/pool": described_set(num_images), "embed/evaluation-exam": described_set(evaluation)}
    return Plan(Run(Folder("runs/none"), config, inputs), cluster, described)


def step(plan: Plan, name: str) -> PlannedStep:
    return next(one for one in plan.steps() if one.name == name)


def gpu_hours(work: Work) -> float:
    return H100.gpu_s(work) / 3600


# --- known figures, each within a factor of two ----------------------------------------------------------------------


def within_two(value: float, known: float) -> bool:
    return known / 2 <= value <= known * 2


def test_join_of_a_billion_images_is_that_of_dense_products() -> None:
    """29 H100-hours for 1.2 B x 512-d at a share of 2.8%, 6,600 core-hours for 1.3 B; brute force 410 H100-hours."""
    assert within_two(gpu_hours(costs.join_work(1.2e9, 1.2e9, 65_536, 512, False, share=0.028)), 29)
    assert within_two(gpu_hours(costs.join_work(1.2e9, 1.2e9, 65_536, 512, False, share=1.0)) / 2, 410)
    cores = costs.join_work(1.3e9, 1.3e9, 65_536, 512, False)
    assert within_two(cores.core_s / 3600, 6_600)


def test_decontamination_against_300_000_images_takes_a_quarter_of_an_hour_of_a_gpu() -> None:
    assert within_two(gpu_hours(costs.join_work(3e5, 1.3e9, 1, 512, False, share=1.0)) * 60, 15)


def test_driver_stays_below_its_limits() -> None:
    for num_images, most in ((100_000_000, 2e9), (1_300_000_000, 16e9)):
        dedup = step(planned(num_images), "dedup")
        assert num_images * 5 <= dedup.driver_bytes < most - costs.DRIVER_PROCESS_BYTES
    # No column of the pool: what other steps hold does not grow with it.
    for name in ("filter", "heads", "survivors", "decide", "report"):
        assert step(planned(1_300_000_000), name).driver_bytes == 0


def test_index_steps_are_those_of_the_benchmark_within_two() -> None:
    """`benchmarks.scale index --rows 3000000`: processor seconds; GB of the driver and of the largest task at 2 GB."""
    plan = planned(3_000_000, "execution.memory_gb=2")
    for name, processor_s in (
        ("filter", 2.17), ("heads", 8.88), ("dedup", 5.70), ("survivors", 0.71), ("decide", 5.22),
    ):  # fmt: skip
        one = step(plan, name)
        assert within_two(one.work.core_s + (one.driver_s if name != "dedup" else 0), processor_s), name
    assert within_two(costs.DRIVER_PROCESS_BYTES + step(plan, "dedup").driver_bytes, 0.70e9)
    assert within_two(costs.PROCESS_BYTES + max(step(plan, name).task_bytes for name in ("filter", "dedup")), 1.44e9)


def test_grouping_vectors_is_what_was_measured_within_two() -> None:
    """stages.grouped, all tasks: 5.3, 13 and 26 us a row of 128, 512 and 1024 dimensions (2,000 cells)."""
    for dim, row_s in ((128, 5.3e-6), (512, 13e-6), (1024, 26e-6)):
        assert within_two(costs.grouping_work(1e5, dim).core_s / 1e5, row_s), dim


# --- how they grow ---------------------------------------------------------------------------------------------------


def test_join_grows_with_the_square_whatever_the_cells() -> None:
    small, large = (costs.join_work(n, n, 65_536, 512, False) for n in (1e8, 1e9))
    assert large.gpu_s / small.gpu_s == pytest.approx(100, rel=0.1)
    few, many = (costs.join_work(1e8, 1e8, cells, 512, False).core_s for cells in (4_096, 65_536))
    assert 1 <= many / few < 1.5  # centroids are met as well, by few operations


def test_a_task_with_more_memory_reads_less() -> None:
    reads = [step(planned(1_300_000_000, f"execution.memory_gb={gb}"), "join").read for gb in (4, 16, 64)]
    assert reads[0] > 1.5 * reads[1] > 3 * reads[2]
    # The spec's 0.1 to 0.4 PB, of 512-d, where a run has millions of rows.
    assert 0.05e15 < reads[2] < 0.4e15


def test_steps_of_the_index_grow_with_the_pool() -> None:
    small, large = planned(100_000_000), planned(1_000_000_000)
    for name in ("filter", "heads", "dedup", "survivors", "decide"):
        assert step(large, name).work.core_s / step(small, name).work.core_s == pytest.approx(10)
        assert step(large, name).task_bytes == step(small, name).task_bytes


@pytest.mark.parametrize("num_images", [1, 1000, 20_000, 17_000_000_000])
def test_any_pool_has_a_plan_of_finite_numbers(num_images: int) -> None:
    plan = planned(num_images)
    for one in plan.steps():
        numbers = (one.seconds(H100), one.read, one.written, one.requests, one.driver_bytes, one.task_bytes)
        assert all(math.isfinite(n) and n >= 0 for n in numbers), one.name


# --- clusters --------------------------------------------------------------------------------------------------------


def test_time_is_that_of_what_is_scarce() -> None:
    cluster = Cluster(nodes=2, cores=10, network_gb_per_s=1, store_gb_per_s=1.5, store_requests_per_s=100)
    assert cluster.seconds(Work(core_s=200), 1000, 0, 0, 0) == 10
    assert cluster.seconds(Work(core_s=200), 4, 0, 0, 0) == 50  # four tasks keep four cores busy
    assert cluster.seconds(Work(core_s=200), 1000, 7, 150e9, 0) == 107
    assert cluster.seconds(Work(core_s=200), 1000, 0, 0, 5000) == 50
    with_gpus = Cluster(nodes=2, cores=10, gpus=1, gpu="a100")
    assert with_gpus.seconds(Work(0, 200, 30, 180), 1000, 0, 0, 0) == 15


@pytest.mark.parametrize("name", config_names("clusters"))
def test_clusters_load(name: str) -> None:
    assert load_cluster(name).told()


@pytest.mark.parametrize(
    ("text", "message"),
    [("nodes: 0", "nodes=0 must be"), ("gpu: tpu", "gpu='tpu' is not known"), ("gpus_per_node: 8", "gpus_per_node")],
)
def test_a_wrong_cluster_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_cluster(str(tmp_path / "mine.yaml"))


def test_tasks_that_want_more_memory_than_a_node_has_are_told() -> None:
    assert any("want 6,144 GB" in note for note in planned(10**8, "execution.memory_gb=64").notes())


def test_gpus_that_may_not_be_used_are_not_planned() -> None:
    on_cores = planned(10**8, "execution.device=cpu")
    work = step(on_cores, "join").work
    assert on_cores.cluster.gpu_s(work) == 0
    assert on_cores.cluster.core_s(work) > H100.core_s(work)


# --- the command -----------------------------------------------------------------------------------------------------

DESCRIBED = ["--images", "1300000000", "--cluster", "h100x160", "--dry-run", "--config", "offline"]


def test_a_described_pool_is_planned_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main([*DESCRIBED, "--seed", "imagenet22k", "--evaluation-images", "300000", *out]) == 0
    told = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    takes = told[told.index("Takes, on 20 nodes of 96 cores and 8 H100") :]
    names = [line.split()[0] for line in takes.splitlines() if line.strip()]
    for name in ("embed/pool", "join", "dedup", "decontaminate/any", "retrieve/imagenet22k", "shards", "all"):
        assert name in names
    assert "14,197,086" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "5", "--seed", "imagenet22k"], "--images describes what --dry-run"),
        (["--cluster", "h100x160", "--seed", "imagenet22k", "--pool", "x"], "--cluster describes what --dry-run"),
        (["--images", "5", "--pool", "x", "--seed", "imagenet22k", "--dry-run"], "without --pool"),
        (["--evaluation-images", "5", "--pool", "x", "--seed", "ade20k", "--dry-run"], "goes with --images"),
        (["--images", "0", "--seed", "imagenet22k", "--dry-run"], "--images 0"),
        (["--images", "5", "--cluster", "none", "--seed", "imagenet22k", "--dry-run"], "no clusters config named"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_takes_what_was_planned_but_for_starting(tmp_path: Path, ray_session: None) -> None:
    """Loose: of a run of seconds most is starting tasks, about a second a step; it never takes less than half."""
    pool = find_parts([str(picture_tar(tmp_path / "pool.tar", range(60)))])
    seed = SeedSet(name="few", urls=(), rule=load_config(CurationConfig, "curation", "offline").retrieve)
    config = load_config(CurationConfig, "curation", "offline", ["execution.workers=2"])
    run = Run(Folder(str(tmp_path / "run")), config, Inputs(pool, {"few": (seed, pool)}, {}))
    plan = Plan(run)
    planned_s = {one.name: one.seconds(plan.cluster) for one in plan.steps()}
    run_pipeline(run)
    for name, seconds in planned_s.items():
        assert seconds / 2 <= step_seconds(run, name) <= 10 * seconds + 30, name
