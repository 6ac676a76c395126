"""Pairs of near hashes where those of an earlier run are taken over: the same as those of all images anew."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.engine.folder import Folder
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import ImageSet, Parts
from curation.engine.workers import ExecutionConfig
from curation.stages import filter as filter_stage
from curation.stages.perceptual import PairsBefore, perceptual_pairs

OLD, NUM, DISTANCE, DIM = 220, 300, 16, 8
EXECUTION = ExecutionConfig(workers=2)


def write_run(root: Folder, num: int, heads: np.ndarray, pdq: np.ndarray, mirrored: np.ndarray, quality: np.ndarray):
    ranges = Ranges(num, 90)
    head = np.where(np.isin(np.arange(num), heads), np.arange(num), 0)
    for number in range(len(ranges)):
        rows = slice(*ranges.bounds(number))
        columns = {
            "pdq": [row.tobytes() for row in pdq[:num][rows]],
            "pdq_mirrored": [row.tobytes() for row in mirrored[:num][rows]],
            "pdq_quality": quality[:num][rows],
        }
        fields, size = list(filter_stage.SCHEMA), len(head[rows])
        arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(size, f.type) for f in fields]
        name = range_file("range", number)
        (root / "filter").write_table(name, pa.Table.from_arrays(arrays, schema=filter_stage.SCHEMA))
        (root / "heads").write_table(name, pa.table({"head": head[rows]}))
    return ranges


@pytest.mark.usefixtures("ray_session")
def test_only_new_heads_are_compared_and_nothing_is_missed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (20, 32), np.uint8)
    bits = np.unpackbits(base[rng.integers(0, 20, NUM)], axis=1)
    bits ^= rng.random(bits.shape) < 0.04
    pdq = np.packbits(bits, axis=1)
    mirrored = np.roll(pdq, 1, axis=0)
    quality = np.where(rng.random(NUM) < 0.2, 10, 90)
    vectors = rng.standard_normal((NUM, DIM)).astype(np.float16)
    pool_folder = Folder(str(tmp_path / "pool"))
    pool_folder.write_array("e/part-p.npy", vectors)
    pool = ImageSet(pool_folder, Parts(np.array([b"p"]), np.array([0, NUM]), 0))
    before, now = (Folder(str(tmp_path / name)) for name in ("before", "now"))
    was, heads = np.setdiff1d(np.arange(OLD), [7, 60]), np.setdiff1d(np.arange(NUM), [3, 100, 250])
    hashes = pdq, mirrored, quality
    old_ranges, ranges = write_run(before, OLD, was, *hashes), write_run(now, NUM, heads, *hashes)

    def pairs(root: Folder, name: str, ranges: Ranges, earlier: PairsBefore | None = None) -> dict:
        count = perceptual_pairs(
            root, name, root / "filter", root / "heads", ranges, pool, "e", DISTANCE, EXECUTION, earlier
        )
        table = root.read_table(name)
        assert table.num_rows == count
        return table.to_pydict()

    old = pairs(before, "edges/perceptual.parquet", old_ranges)
    whole = pairs(now, "edges/whole.parquet", ranges)
    earlier = PairsBefore(before, "edges/perceptual.parquet", before / "heads", old_ranges)
    assert pairs(now, "edges/perceptual.parquet", ranges, earlier) == whole
    assert len(whole["a"]) > 1.5 * len(old["a"]) > 100
    assert {3, 100} & {*old["a"], *old["b"]}
