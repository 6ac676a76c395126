"""A join that takes over the edges of an earlier one: only new rows ask, and what has gone leaves no edge."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from curation.engine.folder import Folder
from curation.engine.manifest import MANIFEST_NAME, Manifest
from curation.engine.ranges import Ranges, range_file
from curation.engine.workers import ExecutionConfig
from curation.ops import recall
from curation.ops.cells import cells_from_arrays, nearest_cells
from curation.ops.components import component_labels
from curation.ops.neighbours import PIECE_ROWS
from curation.ops.recall import measured_recall
from curation.stages import join as join_stage
from curation.stages.dedup import DedupConfig
from curation.stages.join import Extension, Joined, JoinSettings, join_pool
from curation.stages.joined_before import JoinedBefore, find_new_rows

DIM, OLD, NEW, RANGE_ROWS = 16, PIECE_ROWS + 3000, 10_000, 30_000
SETTINGS = JoinSettings(floor=0.9, target_recall=0.95, seed=3)
EXECUTION = ExecutionConfig(workers=2, memory_gb=2)
LOST = np.array([17, 40_000, OLD - 1])  # heads of the earlier run that are none any more
LATE = np.array([5, 50_000])  # none then, and heads now


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def cells_of(x, gids, centroids):
    half = x[gids].astype(np.float16)
    return cells_from_arrays(half, gids, nearest_cells(half.astype(np.float32), centroids, 1)[:, 0], centroids)


def write_heads(folder, num_rows, heads):
    """Heads are their own; others follow the image before them."""
    ranges = Ranges(num_rows, RANGE_ROWS)
    head = np.arange(num_rows)
    others = np.setdiff1d(head, heads)
    head[others] = others - 1
    for number in range(len(ranges)):
        start, stop = ranges.bounds(number)
        folder.write_table(range_file("range", number), pa.table({"head": head[start:stop]}))
    return ranges


def close(folder, written, settings):
    files, counts, figures = written
    manifest = Manifest(stage="join", version=join_stage.VERSION, key="", settings=settings, inputs={}, files=files,
                        counts=counts, figures=figures)  # fmt: skip
    folder.write_bytes(MANIFEST_NAME, manifest.to_json().encode())
    return manifest


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, ray_session):
    """Vectors of both, and the join of the first: neighbours in the order of gids are pairs, old and new alike."""
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((OLD + NEW, DIM), np.float32))
    copies = np.concatenate([np.arange(20_000), OLD + np.arange(NEW)])
    of = np.concatenate([copies[:20_000] + 20_000, 20_000 + rng.choice(20_000, NEW)])
    cosine = rng.uniform(0.85, 0.999, (len(copies), 1)).astype(np.float32)
    away = rng.standard_normal((len(copies), DIM), np.float32)
    away = unit(away - (away * x[of]).sum(axis=1, keepdims=True) * x[of])
    x[copies] = cosine * x[of] + np.sqrt(1 - cosine**2) * away
    centroids = unit(rng.standard_normal((64, DIM), np.float32))
    root = Folder(str(tmp_path_factory.mktemp("before")))
    heads = np.setdiff1d(np.arange(OLD), LATE)
    ranges = write_heads(root / "heads", OLD, heads)
    cells = cells_of(x, heads, centroids)
    written = join_pool(root / "join", cells, None, SETTINGS, EXECUTION)
    manifest = close(root / "join", written, {"floor": 0.9, "target_recall": 0.95, "seed": 3})
    return x, centroids, JoinedBefore(root / "join", manifest, root / "heads", ranges)


@pytest.fixture(scope="module")
def extended(earlier, tmp_path_factory):
    x, centroids, before = earlier
    root = Folder(str(tmp_path_factory.mktemp("extended")))
    heads = np.setdiff1d(np.arange(OLD + NEW), LOST)
    extension = Extension(before, root / "heads", write_heads(root / "heads", OLD + NEW, heads))
    cells = cells_of(x, heads, centroids)
    written = join_pool(root / "join", cells, None, SETTINGS, EXECUTION, extension)
    close(root / "join", written, {})
    return root, cells, extension, written


def edges_of(joined):
    tables = [joined.edges(piece, -1.0) for piece in joined.pieces()]
    table = pa.concat_tables(tables)
    return {
        (a, b): (s, m)
        for a, b, s, m in zip(*(table[c].to_pylist() for c in ("a", "b", "similarity", "mirrored")), strict=True)
    }


def test_edges_are_the_old_ones_and_those_of_new_images(earlier, extended):
    before = earlier[2]
    root, cells, _, (files, counts, figures) = extended
    joined, old = Joined(root / "join"), edges_of(Joined(before.folder))
    found = edges_of(joined)
    lost, new = set(LOST.tolist()), {*LATE.tolist(), *range(OLD, OLD + NEW)}
    taken = {pair: edge for pair, edge in old.items() if not lost & set(pair)}
    assert len(taken) < len(old)
    assert {pair: edge for pair, edge in found.items() if not new & set(pair)} == taken
    own = {pair for pair in found if new & set(pair)}
    assert len(own) > NEW / 2
    assert not any(lost & set(pair) for pair in found)
    assert figures["new_images"] == len(new)
    pieces = [joined.edges(f"part-{number:06d}.parquet", -1.0) for number in range(2)]
    assert figures["earlier_edges"] == sum(table.num_rows for table in pieces)
    assert figures["earlier_lower_bound"] == before.manifest.figures["lower_bound"] >= 0.95
    assert counts["edges"] == sum(joined.edges(piece, -1.0).num_rows for piece in joined.pieces())
    assert counts["forest edges"] == sum(joined.forest(piece, -1.0).num_rows for piece in joined.pieces())
    assert counts["images"] == cells.num_rows
    assert {file.path for file in files} <= set(joined.folder.names())
    assert not (joined.folder / "new").names()
    for file in files:  # a file is what its entry says, taken or made
        assert joined.folder.described(file.path, file.rows) == file
    truth, is_found = joined.truth(0.9)
    assert np.isin(truth.query, sorted(new)).all()
    assert measured_recall(is_found, truth)[0] >= 0.95


def test_forests_join_what_edges_join(extended):
    root, *_ = extended
    joined = Joined(root / "join")
    labels = []
    for read in (joined.edges, joined.forest):
        tables = [read(piece, 0.93) for piece in joined.pieces()]
        columns = [tuple(table[name].to_numpy() for name in ("a", "b", "similarity")) for table in tables]
        labels.append(component_labels(OLD + NEW, columns))
    np.testing.assert_array_equal(*labels)


def test_memory_workers_and_interruptions_change_no_byte(extended, tmp_path):
    root, cells, extension, written = extended
    whole = {name: (root / "join").read_bytes(name) for name in (root / "join").names()}
    folder = Folder(str(tmp_path / "join"))
    again = join_pool(folder, cells, None, SETTINGS, ExecutionConfig(workers=1, memory_gb=0.25), extension)
    assert again == written
    for name in ("done/part-000001.json", "edges/part-000002.parquet", "done/part-000002.json", "found.parquet"):
        folder.delete(name)
    assert join_pool(folder, cells, None, SETTINGS, EXECUTION, extension) == written
    assert {name: folder.read_bytes(name) for name in folder.names()} | {MANIFEST_NAME: b""} == whole | {
        MANIFEST_NAME: b""
    }


def test_new_rows_are_told_by_block(earlier, extended, tmp_path):
    _, cells, extension, _ = extended
    rows = find_new_rows(Folder(str(tmp_path)), cells, extension.before, EXECUTION)
    gids = cells.read_gids(0, cells.num_rows)
    expected = np.flatnonzero((gids >= OLD) | np.isin(gids, LATE))
    np.testing.assert_array_equal(rows.between(0, cells.num_rows), expected)
    np.testing.assert_array_equal(rows.numbered(0, len(rows)), expected)
    np.testing.assert_array_equal(rows.numbered(100, 4000), expected[100:4000])
    near = (expected >= 20_000) & (expected < 45_000)
    np.testing.assert_array_equal(rows.between(20_000, 45_000), expected[near])


def test_few_new_images_meet_all(earlier, extended, tmp_path):
    """So few that no sample is worth its while: no pair is missed."""
    x, centroids, before = earlier
    root = Folder(str(tmp_path))
    few = 200
    ranges = write_heads(root / "heads", OLD + few, np.arange(OLD + few))
    cells = cells_of(x, np.arange(OLD + few), centroids)
    assert (few + len(LATE)) * cells.num_rows < recall._EXACT_ROWS**2
    extension = Extension(before, root / "heads", ranges)
    _, _, figures = join_pool(root / "join", cells, None, SETTINGS, EXECUTION, extension)
    assert figures["basis"] == "exact"
    new = x[OLD : OLD + few].astype(np.float16).astype(np.float64)
    similar = (new @ x[: OLD + few].astype(np.float16).astype(np.float64).T).astype(np.float32) >= np.float32(0.9)
    expected = {(min(a, b), max(a, b)) for a, b in (np.argwhere(similar) + np.array([OLD, 0])).tolist() if a != b}
    found = edges_of(Joined(root / "join"))
    assert {pair for pair in found if max(pair) >= OLD} == expected


@pytest.mark.parametrize(
    ("version", "floor", "recall", "why"),
    [
        (join_stage.VERSION, 0.9, 0.95, None),
        (join_stage.VERSION, 0.95, 0.9, None),
        (join_stage.VERSION + 1, 0.9, 0.95, "another version"),
        (join_stage.VERSION, 0.85, 0.95, "down to cosine 0.9 only, and 0.85 is asked for"),
        (join_stage.VERSION, 0.9, 0.99, "dedup.target_recall=0.95 only"),
    ],
)
def test_what_cannot_be_taken_over_is_said(earlier, version, floor, recall, why):
    told = replace(earlier[2]).refusal(version, floor, recall)
    assert (told is None) if why is None else why in told


def test_the_floor_of_the_earlier_edges_is_kept():
    """A higher threshold needs no new join, and a lower one only where its edges do not reach down to it."""
    for config, highest in (
        (DedupConfig(similarity_threshold=0.7), 0.7),
        (DedupConfig(similarity_threshold=0.7, edge_floor=0.6), 0.6),
    ):
        assert config.highest_floor == highest
        assert config.join(0.55).floor == 0.55
    assert DedupConfig(similarity_threshold=0.7).join().floor == 0.65
