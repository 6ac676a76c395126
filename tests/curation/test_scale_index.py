"""`benchmarks.scale index`, from filters to the plan of shards, at a size that takes seconds."""

import argparse

import pytest

from benchmarks.scale import index


@pytest.mark.slow
def test_a_small_index_goes_through_every_step(tmp_path, ray_session):
    parser = argparse.ArgumentParser()
    index.add_arguments(parser)
    figures = index.run(parser.parse_args(["--rows", "20000", "--workers", "2", "--folder", str(tmp_path)]))
    assert list(figures["steps"]) == ["filter", "heads", "groups", "survivors", "decide", "shard plan"]
    assert (figures["passed"], figures["split"]) == (20_000, 1)
    assert 0.75 < figures["heads"] / 20_000 < 0.85
    assert 4 <= figures["leaks"] < 200
    assert 0.15 < figures["kept"] / 20_000 < 0.3
    assert figures["shards"] >= 1
    assert list(tmp_path.iterdir()) == []
