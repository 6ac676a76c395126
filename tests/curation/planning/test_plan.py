"""--dry-run: the costs against closed forms and published figures, the estimates against the truth, and no effect."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.loader import load_config
from curation.config import CurationConfig
from curation.encoders.load import encoder_view
from curation.engine.folder import Folder
from curation.pipeline import run_pipeline
from curation.planning import costs
from curation.planning.estimates import SetEstimate, estimate_set
from curation.planning.plan import Plan, describe
from curation.reading.listing import find_parts
from curation.reading.seeds import SeedSet
from curation.state import Inputs, Run
from tests.conftest import encoded, picture, picture_tar

LIMIT = 64 << 20


def make_run(folder: Path, *overrides: str, pool: str | None = None, config: str = "offline") -> Run:
    settings = load_config(CurationConfig, "curation", config, overrides)
    seed = SeedSet(name="few", urls=(), rule=settings.retrieve)
    return Run(
        Folder(str(folder / "run")),
        settings,
        Inputs(
            pool=find_parts([pool or str(folder / "pool-*.tar")]),
            seeds={"few": (seed, find_parts([str(folder / "seed.tar")]))},
            evaluations={"exam": find_parts([str(folder / "exam.tar")])},
        ),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pool tars of 20 pictures, a seed set of 10, an evaluation set of 4."""
    folder = tmp_path_factory.mktemp("plan")
    for number in range(3):
        picture_tar(folder / f"pool-{number}.tar", range(20 * number, 20 * number + 20))
    picture_tar(folder / "seed.tar", range(100, 110), "s")
    picture_tar(folder / "exam.tar", range(200, 204), "e")
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def state(text: str, step: str) -> str:
    """The state column of a step's first line in the second table."""
    table = text[text.index("Does and writes") :]
    line = next(line for line in table.splitlines() if line.split()[:1] == [step])
    return line.strip().removeprefix(step).strip()


# --- costs -----------------------------------------------------------------------------------------------------------


def test_embedding_cost_is_the_published_one() -> None:
    """curation.md 3.2: 10^9 images through ViT-L/14 at 224 px take 320 A100-hours at 45% of peak."""
    spec = "vit_large_patch14_dinov2.lvd142m"
    cost = costs.encoder_cost(spec, encoder_view(spec))
    assert cost.dim == 1024
    assert costs.encode_work(1e9, cost).gpu_s / 3600 == pytest.approx(320, rel=0.03)


def test_operations_are_near_two_a_parameter_and_token() -> None:
    """Attention adds a tenth at 257 tokens; position embeddings and norms are parameters without products."""
    spec = "vit_small_patch14_dinov2.lvd142m"
    cost = costs.encoder_cost(spec, encoder_view(spec))
    assert cost.parameters == pytest.approx(21.6e6, rel=0.01)
    assert cost.flop == pytest.approx(2 * cost.parameters * 257, rel=0.15)


def test_kmeans_cost_is_the_published_one() -> None:
    """curation.md 3.2: an iteration over 10^9 rows, 100,000 clusters, 1024-d: 2.0e17 operations, 0.36 A100-hours."""
    work = costs.product_work(1e9, 100_000, 1024)
    assert work.flop == pytest.approx(2.05e17, rel=0.01)
    assert work.gpu_s / 3600 == pytest.approx(0.36, rel=0.03)


def test_hierarchy_without_resampling_is_kmeans_of_each_level() -> None:
    work = costs.level_work(1000, 1000, 100, 1, 0, 8, 1) + costs.level_work(100, 100, 10, 1, 0, 8, 1)
    assert work.flop == 2 * 2 * 8 * (1000 * 100 + 100 * 10)  # an iteration, and the assignment at the end


def test_a_split_level_costs_its_groups_and_what_is_inside() -> None:
    work = costs.level_work(10**6, 10**6, 10_000, 100, 0, 8, 1)
    # 0.7 iterations: the first look at a quarter of the rows.
    assert work.flop == pytest.approx(2 * 8 * (1.7 * 10**6 * 100 + (0.7 * 25_600 + 10**6) * 100))


def test_join_is_exact_below_the_limit_and_by_sketches_above() -> None:
    assert costs.join_work(1000, 1000, 4, 256, False).flop == 2 * 1000 * 1000 * 256
    assert costs.join_work(1000, 1000, 4, 256, True).flop == 2 * costs.join_work(1000, 1000, 4, 256, False).flop
    # A share of all pairs by sketches; the coarse products and what each row costs come on top.
    few = costs.join_work(1e6, 1e6, 64, 256, False)
    pairs = costs.PLANNED_SHARE * 1e12 / costs.SKETCHES_PER_S
    assert few.core_s == pytest.approx(pairs + 2 * 1e6 * 64 * 256 / costs.KMEANS_FLOPS + 1e6 * costs.JOIN_ROW_S)


def test_work_adds_up() -> None:
    assert costs.Work(1, 2, 3) + costs.Work(10, 20, 30) == costs.Work(11, 22, 33)


# --- estimates -------------------------------------------------------------------------------------------------------


def estimate(*urls: Path) -> SetEstimate:
    return estimate_set(find_parts([str(url) for url in urls]), LIMIT)


def test_small_sets_are_counted(folder: Path) -> None:
    found = estimate(folder / "pool-0.tar", folder / "pool-1.tar")
    assert (found.images, found.is_exact) == (40, True)
    assert found.megapixels == pytest.approx(96 * 72 / 1e6)
    assert found.bytes == sum((folder / f"pool-{n}.tar").stat().st_size for n in (0, 1))


def test_parts_that_are_not_looked_at_are_scaled_by_bytes(folder: Path) -> None:
    found = estimate(*(folder / f"pool-{n}.tar" for n in range(3)))
    assert not found.is_exact
    assert found.images == pytest.approx(60, abs=2)


def test_a_long_tar_is_scaled_from_its_head(tmp_path: Path) -> None:
    found = estimate(picture_tar(tmp_path / "long.tar", range(1500)))
    assert not found.is_exact
    assert found.images == pytest.approx(1500, rel=0.05)


def test_folders_are_counted_by_their_listing(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(picture(number)))
        (tmp_path / f"{number}.txt").write_text("caption")
    found = estimate(tmp_path)
    assert (found.images, found.is_exact) == (7, True)


def test_parquet_rows_are_counted(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": encoded(picture(n)), "path": f"{n}.jpg"}, "label": n} for n in range(9)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    found = estimate(tmp_path / "some.parquet")
    assert (found.images, found.is_exact) == (9, True)


def test_damaged_and_empty_parts_do_not_stop_it(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 3000)
    (tmp_path / "cut.tar").write_bytes(b"")
    (tmp_path / "none.tar").write_bytes(bytes(10240))
    # Damage is a row with a reason; a tar without members has none.
    assert [estimate(tmp_path / f"{name}.tar").images for name in ("bad", "cut", "none")] == [1, 1, 0]


def test_an_empty_pool_has_a_plan(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.tar").write_bytes(bytes(10240))
    text = describe(make_run(folder, pool=str(tmp_path / "none.tar")))
    assert state(text, "embed/pool").startswith("to do")


def test_real_pool_is_estimated_within_a_few_per_cent(real_data: Path) -> None:
    found = estimate(real_data / "pool")
    assert found.images == pytest.approx(9400, rel=0.1)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_plan_names_what_is_read_done_and_written(folder: Path) -> None:
    text = describe(make_run(folder))
    assert not (folder / "run").exists()
    unfolded = "".join(text.split())  # a long path is folded within its column
    for words in ("pool-0.tar", "pool-2.tar", "128 x 128 px", "rejects by size, aspect, blank", "cosine >= 0.62"):
        assert words.replace(" ", "") in unfolded
    assert state(text, "embed/pool").startswith("to do")
    assert "the 4 nearest of each seed image" in text
    assert max(len(line) for line in text.splitlines() if "counts marked" not in line and "disk:" not in line) <= 120


def test_numbers_of_the_plan_follow_from_the_settings(folder: Path) -> None:
    plan = Plan(make_run(folder, "retrieve.k=2", "shard.max_images=6"))
    assert plan.num_kept == 20  # two for each of ten seed images
    shards = next(step for step in plan.steps() if step.name == "shards")
    assert shards.files == "4 tars"
    assert shards.images == 20
    everything = Plan(make_run(folder, "retrieve.mode=none", "balance.fraction=1.0"))
    assert everything.num_kept == everything.pool.images


def test_a_hierarchy_that_will_be_lowered_is_said(folder: Path) -> None:
    plan = Plan(make_run(folder, "cluster.levels=[1000,100]"))
    assert [shape.num_clusters for shape in plan.levels] == [15, 2]
    (note,) = plan.notes()
    assert "1,000 / 100 clusters were asked for, 15 / 2 will be made" in note


def test_the_published_hierarchy_is_planned(folder: Path) -> None:
    """17 B images: 200 M, 8 M and 800 k clusters in groups; levels 4 and 5 in one process."""
    config = load_config(CurationConfig, "curation", "lvd1689m", [])
    shapes = config.cluster.shapes_for(17_000_000_000)
    assert [shape.num_clusters for shape in shapes] == pytest.approx([2e8, 8e6, 8e5, 1e5, 25_000], rel=1e-3)
    assert [shape.num_groups for shape in shapes] == [97_656, 3_906, 391, 1, 1]
    assert [shape.num_resamplings for shape in shapes] == [1, 10, 10, 10, 10]
    scaled = load_config(CurationConfig, "curation", "lvd1689m", ["cluster.scale=0.001"]).cluster.shapes_for(10**8)
    assert [shape.num_clusters for shape in scaled] == pytest.approx([2e5, 8_000, 800, 100, 25], rel=0.01)


def test_a_split_level_is_said(folder: Path) -> None:
    levels = ["cluster.levels=[12,4]", "cluster.clusters_per_group=3", "cluster.kmeans.max_points_in_memory=30"]
    text = " ".join(describe(make_run(folder, *levels)).split())
    assert "12 (in 4 groups) / 4 clusters" in text


def test_unknown_encoder_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="nor a timm model"):
        describe(make_run(folder, "embed.encoder=vit_smal_patch14"))


def test_finished_steps_are_told_and_nothing_is_touched(folder: Path, ray_session: None) -> None:
    run_pipeline(make_run(folder), until="filter")
    before = snapshot(folder)
    text = describe(make_run(folder))
    assert snapshot(folder) == before
    for step in ("embed/pool", "embed/seed-few", "embed/evaluation-exam", "filter"):
        assert state(text, step).startswith("done")
    assert state(text, "cells").startswith("to do")
    assert "embed/pool" not in text[text.index("Takes") :]

    changed = describe(make_run(folder, "filters=[{kind: size, min_side_px: 20}]"))
    assert state(changed, "embed/pool").startswith("done")
    assert state(changed, "filter").startswith("to do")

    # A part came: the finished ones stay at hand.
    picture_tar(folder / "pool-3.tar", range(60, 80))
    grown = describe(make_run(folder))
    assert state(grown, "embed/pool").startswith("to do, 3 of")
    (folder / "pool-3.tar").unlink()

    # A file is gone: the step is to do, and what is left of it is not cleared by looking.
    victim = next((folder / "run" / "filter").glob("*.parquet"))
    victim.unlink()
    before = snapshot(folder)
    assert state(describe(make_run(folder)), "filter").startswith("to do")
    assert snapshot(folder) == before


def test_thousands_of_parts_take_seconds(folder: Path, tmp_path: Path) -> None:
    for number in range(4000):
        os.link(folder / "pool-0.tar", tmp_path / f"many-{number:04d}.tar")
    run = make_run(folder, pool=str(tmp_path / "many-*.tar"))
    plan = Plan(run)
    assert plan.pool.images == 80_000
    assert "4,000" in describe(run)
