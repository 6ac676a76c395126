"""The hash as a second opinion on pairs of the join, against brute force over the same pairs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.engine.folder import Folder
from curation.engine.ranges import Ranges, range_file
from curation.engine.workers import ExecutionConfig
from curation.stages import filter as filter_stage
from curation.stages.groups import EdgeFiles
from curation.stages.perceptual import second_opinion

NUM, DISTANCE = 300, 16


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("buckets", [1, 7])
def test_pairs_below_the_threshold_count_where_their_hashes_are_near(
    tmp_path: Path, buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (20, 32), np.uint8)
    hashes = np.unpackbits(base[rng.integers(0, 20, NUM)], axis=1)
    hashes ^= rng.random(hashes.shape) < 0.04  # about ten bits: pairs on both sides of the limit
    pdq = np.packbits(hashes, axis=1)
    mirrored = np.roll(pdq, 1, axis=0)  # an image's mirror image looks like the image before it
    quality = np.where(rng.random(NUM) < 0.2, 10, 90)
    ranges, filtered, folder = Ranges(NUM, 90), Folder(str(tmp_path / "filter")), Folder(str(tmp_path / "dedup"))
    for number in range(len(ranges)):
        rows = slice(*ranges.bounds(number))
        columns = {
            "pdq": [row.tobytes() for row in pdq[rows]],
            "pdq_mirrored": [row.tobytes() for row in mirrored[rows]],
            "pdq_quality": quality[rows],
        }
        size = len(quality[rows])
        arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(size, f.type) for f in FIELDS]
        filtered.write_table(range_file("range", number), pa.Table.from_arrays(arrays, schema=filter_stage.SCHEMA))
    ends = np.unique(np.sort(rng.integers(0, NUM, (3000, 2)), axis=1), axis=0)
    ends = ends[ends[:, 0] < ends[:, 1]]
    similarity = rng.uniform(0.5, 0.7, len(ends)).astype(np.float32)
    for number, part in enumerate((slice(0, 900), slice(700, None))):  # some stand in both files
        columns = {"a": ends[part, 0], "b": ends[part, 1], "similarity": similarity[part]}
        folder.write_table(f"edges/part-{number}.parquet", pa.table(columns))
    edges = EdgeFiles(folder, ["edges/part-0.parquet", "edges/part-1.parquet"], -2.0)
    monkeypatch.setattr("curation.stages.perceptual.buckets_for", lambda *_: buckets)
    execution = ExecutionConfig(workers=2)
    names = second_opinion(folder, filtered, ranges, edges, 0.6, len(ends), DISTANCE, execution)
    found = pa.concat_tables([folder.read_table(name) for name in names]).sort_by(
        [("a", "ascending"), ("b", "ascending")]
    )

    bits = {name: np.unpackbits(values, axis=1) for name, values in (("pdq", pdq), ("mirrored", mirrored))}
    expected = []
    for (a, b), value in zip(ends, similarity, strict=True):
        distance = min(int((bits[side][a] != bits["pdq"][b]).sum()) for side in bits)
        if value < np.float32(0.6) and distance <= DISTANCE and min(quality[a], quality[b]) >= 50:
            expected.append((int(a), int(b), float(value), distance))
    assert (
        list(zip(*(found[name].to_pylist() for name in ("a", "b", "similarity", "distance")), strict=True)) == expected
    )
    assert 10 < len(expected) < (similarity < 0.6).sum() / 2


FIELDS = list(filter_stage.SCHEMA)
