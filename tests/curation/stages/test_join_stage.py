"""The join stage on real tasks: files that no memory or interruption changes, thresholds that are filters of them."""

import numpy as np
import pytest

from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig
from curation.ops.cells import cells_from_arrays, nearest_cells
from curation.ops.components import component_labels
from curation.ops.neighbours import PIECE_ROWS, self_pairs
from curation.stages.join import Joined, JoinSettings, join_pool

DIM, NUM_ROWS, NUM_PAIRS = 16, PIECE_ROWS + 5000, 9000
SETTINGS = JoinSettings(floor=0.9, target_recall=0.95, seed=3)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((NUM_ROWS, DIM), np.float32))
    cosine = rng.uniform(0.85, 0.999, (NUM_PAIRS, 1)).astype(np.float32)
    away = rng.standard_normal((NUM_PAIRS, DIM), np.float32)
    away = unit(away - (away * x[:NUM_PAIRS]).sum(axis=1, keepdims=True) * x[:NUM_PAIRS])
    x[NUM_PAIRS : 2 * NUM_PAIRS] = cosine * x[:NUM_PAIRS] + np.sqrt(1 - cosine**2) * away
    x[-300:] = unit(x[-1:] + 0.02 * rng.standard_normal((300, DIM), np.float32))  # a crowd
    centroids = unit(rng.standard_normal((64, DIM), np.float32))
    x = x.astype(np.float16)
    own = nearest_cells(x.astype(np.float32), centroids, 1)[:, 0]
    return cells_from_arrays(x, np.arange(NUM_ROWS) * 2, own, centroids)


@pytest.fixture(scope="module")
def joined(cells, ray_session, tmp_path_factory):
    folder = Folder(str(tmp_path_factory.mktemp("joined") / "join"))
    files, counts, figures = join_pool(folder, cells, None, SETTINGS, ExecutionConfig(workers=2, memory_gb=2))
    return Joined(folder), files, counts, figures


def contents(folder):
    return {name: folder.read_bytes(name) for name in folder.names()}


@pytest.mark.slow
def test_edges_are_the_join_at_the_certified_settings(joined, cells):
    joined, files, counts, figures = joined
    assert figures["basis"] == "sample"
    assert figures["lower_bound"] >= 0.95
    expected = self_pairs(cells, 0, NUM_ROWS, 0.9, figures["nprobe"], figures["sketch_radius"])
    tables = [joined.edges(piece, 0.9) for piece in joined.pieces()]
    assert len(tables) == 2
    found = {pair for table in tables for pair in zip(table["a"].to_pylist(), table["b"].to_pylist(), strict=True)}
    assert found == set(zip(expected.a.tolist(), expected.b.tolist(), strict=True))
    assert counts["edges"] == sum(table.num_rows for table in tables)
    assert counts["capped images"] >= 300
    assert {file.path for file in files} == set(joined.folder.names()) - {
        "certificate.json", "truth.parquet", *(f"done/{piece}".replace("parquet", "json") for piece in joined.pieces())
    }  # fmt: skip


def test_another_threshold_is_a_filter(joined):
    joined = joined[0]
    for threshold in (0.9, 0.95, 0.99):
        batches = [
            [
                tuple(
                    table[name].to_numpy() // 2 if name != "similarity" else None for name in ("a", "b", "similarity")
                )
                for table in (read(piece, threshold) for piece in joined.pieces())
            ]
            for read in (joined.edges, joined.forest)
        ]
        labels = [component_labels(NUM_ROWS, edges) for edges in batches]
        np.testing.assert_array_equal(*labels)
        truth, found = joined.truth(threshold)
        assert (truth.similarity >= np.float32(threshold)).all()
        assert found.mean() >= 0.95
        together = labels[0][truth.query // 2] == labels[0][truth.gid // 2]
        assert together[found].all()
    assert sum(joined.forest(piece, 0.9).num_rows for piece in joined.pieces()) < NUM_ROWS


def test_memory_workers_and_interruptions_change_no_byte(joined, cells, tmp_path):
    whole = contents(joined[0].folder)
    folder = Folder(str(tmp_path / "join"))
    join_pool(folder, cells, None, SETTINGS, ExecutionConfig(workers=1, memory_gb=0.25))
    assert contents(folder) == whole
    for name in ("done/part-000001.json", "edges/part-000001.parquet", "found.parquet"):  # killed just before
        folder.delete(name)
    before = folder.read_bytes("certificate.json")
    again = join_pool(folder, cells, None, SETTINGS, ExecutionConfig(workers=1, memory_gb=8))
    assert again[0] == joined[1]
    assert contents(folder) == whole
    assert folder.read_bytes("certificate.json") == before
