"""Every file of configs/: it loads, its sizes are consistent, and its plan and cost are printed, offline."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from configs.loader import CONFIGS, config_names, load_config
from curation.config import CurationConfig
from curation.reading.seeds import SeedConfig
from tests.conftest import picture_tar

TABLE_15_TOTAL = 142_109_386


@pytest.mark.parametrize("name", config_names("seeds"))
def test_seed_counts_follow_from_its_rule(name: str) -> None:
    seed = load_config(SeedConfig, "seeds", name)
    rule, published = seed.retrieve, seed.published
    images, retrieved, final = (published[key] for key in ("images", "retrieved", "final"))
    if rule.mode == "sample":
        assert retrieved == rule.k * images
        drawn = retrieved
    elif rule.mode == "cluster":
        assert retrieved % rule.images_per_cluster == 0
        assert (rule.min_hits, rule.images_per_cluster, rule.max_images) == (4, 10_000, 1_000_000)
        drawn = min(retrieved, rule.max_images)
    else:
        assert retrieved == 0
        assert seed.include_as_is
        drawn = 0
    assert final == drawn + (images if seed.include_as_is else 0)


def test_seed_counts_sum_to_the_published_total() -> None:
    seeds = {name: load_config(SeedConfig, "seeds", name) for name in config_names("seeds")}
    assert len(seeds) == 25
    assert sum(seed.published["final"] for seed in seeds.values()) == TABLE_15_TOTAL
    as_is = {name for name, seed in seeds.items() if seed.include_as_is}
    assert as_is == {"imagenet22k", "gldv2", "mapillary_sls"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_file_opens_with_a_comment_and_holds_a_mapping(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    assert isinstance(yaml.safe_load(text), dict)
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.mark.parametrize("num_images", [1, 30, 9400, 1_000_000, 17_000_000, 1_300_000_000, 17_000_000_000])
@pytest.mark.parametrize("name", config_names("curation"))
def test_levels_decrease_and_fit_any_pool(name: str, num_images: int) -> None:
    levels = load_config(CurationConfig, "curation", name).cluster.levels_for(num_images)
    assert levels
    assert all(a > b for a, b in pairwise(levels))
    assert 1 <= levels[-1] <= levels[0] <= num_images


def test_published_hierarchy_scales_with_the_pool() -> None:
    cluster = load_config(CurationConfig, "curation", "lvd1689m").cluster
    assert cluster.levels_for(17_000_000_000) == [200_000_000, 8_000_000, 800_000, 100_000, 25_000]
    assert cluster.levels_for(17_000_000) == [200_000, 8_000, 800, 100, 25]


@pytest.mark.slow
@pytest.mark.parametrize("name", config_names("curation"))
def test_dry_run_prints_the_plan_and_writes_nothing(name: str, tmp_path: Path) -> None:
    """In a process of its own, with no network and no cached weights: as on a fresh machine."""
    pool = picture_tar(tmp_path / "pool.tar", range(30))
    seed = picture_tar(tmp_path / "seed.tar", range(30, 40))
    evaluation = picture_tar(tmp_path / "evaluation.tar", range(40, 44))
    before = sorted(tmp_path.iterdir())
    arguments = [
        "--config",
        name,
        "--seed",
        seed,
        "--pool",
        pool,
        "--evaluation",
        evaluation,
        "--out",
        tmp_path / "run",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "curation.run", *map(str, arguments), "--dry-run"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "no-cache")},
        cwd=CONFIGS.parent,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.iterdir()) == before
    for step in ("embed/pool", "embed/seed-seed", "embed/evaluation-evaluation", "dedup", "retrieve/seed", "shards"):
        assert step in done.stdout
    assert "FLOP" in done.stdout
    assert ("balance" in done.stdout) == (name == "lvd1689m")
    assert ("does not exist" in done.stdout) == name.startswith("lvd")
    assert ("not in the cache" in done.stdout) == (name in ("web", "lvd142m", "lvd1689m"))
