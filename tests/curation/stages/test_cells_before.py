"""Cells and clusters that grow: the images of the run that is extended stay where they are, new ones find their own."""

from functools import partial

import numpy as np
import pytest

from curation.engine.folder import Folder
from curation.engine.manifest import Manifest
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops.cells import cells_from_arrays
from curation.ops.nearest import assign
from curation.stages import grouped
from curation.stages.cells import CellsConfig, build_cells
from curation.stages.cells_before import CellsBefore
from curation.stages.grouped import open_cells
from curation.stages.members import unit_rows

OLD, NUM, DIM, RANGE_ROWS = 1500, 1800, 16, 700
SIZES = [700, 0, 800, 300]
CONFIG = CellsConfig(rows_per_cell=60)
EXECUTION = ExecutionConfig(workers=2)
GONE, LATE = np.array([4, 700, 1499]), np.array([3, 1000])  # no longer compared; not compared before


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def among(number: int, gids: np.ndarray, ranges: Ranges) -> np.ndarray:
    return np.isin(np.arange(*ranges.bounds(number)), gids)


def image_set(folder: Folder, sizes: list[int], rows: np.ndarray) -> ImageSet:
    files = []
    for part, some in enumerate(np.split(rows[: sum(sizes)], np.cumsum(sizes)[:-1])):
        folder.write_array(f"vectors/part-{part}.npy", some)
        files.append(folder.write_bytes(f"index/part-{part}.parquet", b"", rows=len(some)))
    return ImageSet.of(folder, Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=files))


@pytest.fixture(scope="module")
def pool(tmp_path_factory, ray_session):
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((NUM, DIM))
    rows[::3] = rows[0] + 0.3 * rows[::3]  # a third in few cells
    rows = unit(rows).astype(np.float16)
    root = Folder(str(tmp_path_factory.mktemp("grown")))
    old, now = image_set(root / "old", SIZES[:3], rows), image_set(root / "now", SIZES, rows)
    was, ranges = np.setdiff1d(np.arange(OLD), LATE), Ranges(OLD, RANGE_ROWS)
    chosen = partial(among, gids=was, ranges=ranges)
    build_cells(root / "cells", old, "vectors", ranges, chosen, CONFIG, EXECUTION)
    return root, rows, now, CellsBefore(root / "cells", chosen, ranges)


@pytest.mark.parametrize("rows_per_file", [None, 100])
def test_cells_keep_their_images(pool, tmp_path, monkeypatch, rows_per_file):
    root, rows, images, before = pool
    old = open_cells(root / "cells")
    if rows_per_file:  # some cells are larger than a file
        monkeypatch.setattr(grouped, "_FILE_BYTES", rows_per_file * old.row_bytes)
        monkeypatch.setattr("curation.stages.members.CHUNK_ROWS", 400)
        monkeypatch.setattr("curation.stages.cells_before.CHUNK_ROWS", 400)
    members, ranges = np.setdiff1d(np.arange(NUM), GONE), Ranges(NUM, RANGE_ROWS)
    chosen = partial(among, gids=members, ranges=ranges)
    folder = Folder(str(tmp_path / "cells"))
    files = build_cells(folder, images, "vectors", ranges, chosen, CONFIG, EXECUTION, before)
    of_gid = np.full(NUM, -1)
    of_gid[old.read_gids(0, old.num_rows)] = old.cell_of_rows(np.arange(old.num_rows))
    new = np.flatnonzero(of_gid < 0)
    assert set(new) == {*LATE, *range(OLD, NUM)}
    of_gid[new] = assign(unit_rows(rows[new]), old.centroids)[0]
    expected = cells_from_arrays(rows[members], members, of_gid[members], old.centroids)
    found = open_cells(folder)
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_array_equal(found.centroids, old.centroids)
    n = expected.num_rows
    for read in ("read_gids", "read", "read_sketches"):
        np.testing.assert_array_equal(getattr(found, read)(0, n), getattr(expected, read)(0, n))
    assert {file.path for file in files} <= set(folder.names())
    assert not [name for name in folder.names() if name.startswith(("members", "new", "assigned"))]


def test_twice_as_many_images_make_cells_anew(pool, tmp_path):
    root, _, images, before = pool
    ranges = Ranges(NUM, RANGE_ROWS)
    chosen = partial(among, gids=np.arange(NUM), ranges=ranges)
    build_cells(Folder(str(tmp_path)), images, "vectors", ranges, chosen, CellsConfig(rows_per_cell=20), EXECUTION,
                before)  # fmt: skip
    assert open_cells(Folder(str(tmp_path))).num_cells == 90 > 2 * open_cells(root / "cells").num_cells
