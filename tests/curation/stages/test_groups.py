"""Heads and groups over files of ranges, against the same over whole arrays; for any number of ranges and buckets."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.engine.folder import Folder
from curation.engine.manifest import File, Manifest
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops.components import duplicate_groups, representatives
from curation.ops.hashes import equal_groups
from curation.stages import filter as filter_stage
from curation.stages.choosing import GroupRules
from curation.stages.groups import STEPS, EdgeFiles, read_groups, write_groups
from curation.stages.heads import find_heads, read_heads
from curation.stages.members import unit_rows

NUM, LOOKS = 1000, 160


def pool_of(folder: Folder, vectors: np.ndarray) -> ImageSet:
    """Four parts, with the vectors of one encoder."""
    files = []
    for part, rows in enumerate(np.array_split(vectors, 4)):
        folder.write_array(f"e/part-{part}.npy", rows)
        files.append(File(path=f"index/part-{part}.parquet", rows=len(rows), bytes=0, sha256=""))
    return ImageSet.of(folder, Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=files))


@pytest.fixture(scope="module")
def index() -> dict[str, np.ndarray]:
    """1,000 images of 160 looks; one in ten is left out, one in eight has a hash that says little."""
    rng = np.random.default_rng(0)
    look = rng.integers(0, LOOKS, NUM)
    pdq, mirrored = (rng.integers(0, 256, (LOOKS, 32), np.uint8) for _ in range(2))
    sha = rng.integers(0, 256, (NUM, 32), np.uint8)
    sha[1::3] = sha[0::3][: len(sha[1::3])]
    vectors = rng.normal(size=(NUM, 16))
    return {
        "out": rng.random(NUM) < 0.1,
        "sha256": sha,
        "pdq": pdq[look],
        "pdq_mirrored": mirrored[look],
        "pdq_quality": np.where(rng.random(NUM) < 0.125, 20, 100).astype(np.int32),
        "standing": np.zeros(NUM, np.uint8),
        "pixels": rng.integers(1, 4, NUM),
        "bytes": rng.integers(1, 4, NUM),
        "vectors": (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16),
    }


def write_filtered(folder: Folder, index: dict[str, np.ndarray], ranges: Ranges) -> None:
    for number in range(len(ranges)):
        rows = slice(*ranges.bounds(number))
        columns = {"reason": pa.array(np.where(index["out"][rows], "small", None), pa.string())}
        for field in filter_stage.SCHEMA:
            if field.name != "reason":
                values = index[field.name][rows]
                columns[field.name] = pa.array(
                    [v.tobytes() for v in values] if values.ndim == 2 else values, field.type
                )
        folder.write_table(range_file("range", number), pa.table(columns, schema=filter_stage.SCHEMA))


def expected_heads(index: dict[str, np.ndarray]) -> np.ndarray:
    passed = np.flatnonzero(~index["out"])
    looks = np.concatenate([index["pdq"], index["pdq_mirrored"]], axis=1)[passed]
    vague = index["pdq_quality"][passed] < 50
    looks[vague] = np.pad(index["sha256"][passed][vague], ((0, 0), (0, 32)))
    head = np.full(NUM, -1)
    keys = [index["pixels"][passed], index["bytes"][passed]]
    head[passed] = passed[representatives(equal_groups(looks), keys)]
    return head


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("rows", "memory_gb"), [(NUM, 4.0), (333, 4.0), (100, 0.25)])
def test_heads_and_groups_are_those_of_whole_arrays(
    tmp_path: Path, index: dict[str, np.ndarray], rows: int, memory_gb: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges, execution = Ranges(NUM, rows), ExecutionConfig(workers=2, memory_gb=memory_gb)
    if memory_gb < 1:  # many buckets
        monkeypatch.setattr("curation.stages.groups.buckets_for", lambda *_: 7)
        monkeypatch.setattr("curation.stages.heads.buckets_for", lambda *_: 5)
    filtered, heads, dedup = (Folder(str(tmp_path / name)) for name in ("filter", "heads", "dedup"))
    write_filtered(filtered, index, ranges)
    head = expected_heads(index)
    _, counts = find_heads(heads, filtered, ranges, execution)
    assert np.array_equal(np.concatenate([read_heads(heads, r, ranges) for r in range(len(ranges))]), head)
    assert counts == {"images in": int((head >= 0).sum()), "images joined": int((head == np.arange(NUM)).sum())}

    rng = np.random.default_rng(1)
    distinct = np.flatnonzero(head == np.arange(NUM))
    ends = np.sort(rng.choice(distinct, (300, 2)), axis=1)
    ends = np.unique(ends[ends[:, 0] != ends[:, 1]], axis=0)
    similarity = rng.uniform(0.4, 1, len(ends)).astype(np.float32)
    for number, part in enumerate(np.array_split(np.arange(len(ends)), 3)):
        table = pa.table({"a": ends[part, 0], "b": ends[part, 1], "similarity": similarity[part]})
        dedup.write_table(f"edges/{number}.parquet", table)
    edges = [
        EdgeFiles(dedup, [f"edges/{n}.parquet" for n in range(3)], 0.6),
        EdgeFiles(dedup, ["edges/1.parquet"], 0.5),
    ]
    rules = GroupRules(("resolution", "bytes", "central"), 6, None, 16, 0.5, None)
    pool = pool_of(Folder(str(tmp_path / "pool")), index["vectors"])
    split, together = write_groups(
        dedup, filtered, heads, ranges, pool, "e", edges, edges, (ends[:, 0], ends[:, 1]), 300, rules, execution
    )
    found = pa.concat_tables([read_groups(dedup, r) for r in range(len(ranges))])

    counted = (similarity >= np.float32(0.6)) | (
        (similarity >= np.float32(0.5)) & np.isin(np.arange(len(ends)), np.array_split(np.arange(len(ends)), 3)[1])
    )
    a, b = np.searchsorted(distinct, ends[counted].T)
    pairs = [(a, b, similarity[counted])]
    labels = duplicate_groups(len(distinct), pairs, [np.zeros(len(distinct))], max_component_size=NUM).labels
    np.testing.assert_array_equal(together, np.equal(*labels[np.searchsorted(distinct, ends.T)]))
    keys = [index["pixels"][distinct], index["bytes"][distinct], centrality(index["vectors"][distinct], labels)]
    groups = duplicate_groups(len(distinct), pairs, keys, max_component_size=6)
    at = np.searchsorted(distinct, head[head >= 0])
    representative = np.full(NUM, -1)
    representative[head >= 0] = distinct[groups.representatives[at]]
    assert np.array_equal(found["representative"].fill_null(-1).to_numpy(), representative)
    component = found["component"].fill_null(-1).to_numpy()
    passed = np.flatnonzero(head >= 0)
    _, first, inverse, sizes = np.unique(groups.labels[at], return_index=True, return_inverse=True, return_counts=True)
    assert np.array_equal(component[passed], passed[first[inverse]])
    assert np.array_equal(found["component_size"].fill_null(0).to_numpy()[passed], sizes[inverse])
    own = np.where(representative[passed] == passed, 1, groups.similarity[at])
    kept_similarity = found["similarity"].fill_null(np.nan).to_numpy()[passed]
    heads_only = head[passed] == passed
    assert np.array_equal(kept_similarity[heads_only], own[heads_only], equal_nan=True)
    step = found["step"].fill_null(0).to_numpy()
    same_bytes = (index["sha256"][passed] == index["sha256"][representative[passed]]).all(axis=1)
    copies = representative[passed] != passed
    assert np.array_equal(step[passed] == STEPS.index("exact"), same_bytes & copies)
    assert np.array_equal(step[passed] == 0, ~copies)
    assert split.num_rows == len(groups.split.label) > 0
    names = {range_file("range", number) for number in range(len(ranges))}
    assert set(filtered.names()) == set(heads.names()) == names
    assert set(dedup.names()) == names | {f"edges/{n}.parquet" for n in range(3)}


def centrality(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of two members each is as near to the mean as the other, so the rounding decides: it has to be the same here."""
    rows = unit_rows(vectors)
    mean = np.stack([rows[labels == label].sum(axis=0, dtype=np.float64) for label in labels])
    return (np.einsum("nd,nd->n", rows, mean) / np.linalg.norm(mean, axis=1)).astype(np.float32)
