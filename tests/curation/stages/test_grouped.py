"""Vectors grouped by cell in files: the cells of the same arrays, however files are cut, on disk and on a store."""

from functools import partial

import numpy as np
import pytest

from curation.engine.folder import Folder
from curation.engine.manifest import Manifest
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops.cells import cells_from_arrays, nearest_cells
from curation.ops.neighbours import self_pairs
from curation.stages import grouped
from curation.stages.grouped import open_cells, write_cells
from curation.stages.members import ImageRows, write_members

NUM, DIM, CELLS = 2000, 16, 25
SIZES = [700, 0, 50, 850, 400]
EXECUTION = ExecutionConfig(workers=2)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def chosen(number: int, ranges: Ranges) -> np.ndarray:
    return np.arange(*ranges.bounds(number)) % 7 != 3


def cells_of(_number: int, chunk: tuple[int, int], source: ImageRows, of_gid: np.ndarray) -> np.ndarray:
    return of_gid[source.ids(chunk)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory, ray_session):
    """Vectors of which most lie in one cell, on disk as parts, and the same grouped in memory."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((NUM, DIM))
    rows[: NUM * 2 // 3] = rows[0] + 0.5 * rows[: NUM * 2 // 3]
    rows = unit(generator.permutation(rows)).astype(np.float16)
    centroids = unit(generator.standard_normal((CELLS, DIM))).astype(np.float32)
    of_gid = nearest_cells(rows.astype(np.float32), centroids, 1)[:, 0]
    folder = Folder(str(tmp_path_factory.mktemp("pool")))
    files = []
    for part, some in enumerate(np.split(rows, np.cumsum(SIZES)[:-1])):
        folder.write_array(f"vectors/part-{part}.npy", some)
        files.append(folder.write_bytes(f"index/part-{part}.parquet", b"", rows=len(some)))
    images = ImageSet.of(folder, Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=files))
    ranges = Ranges(NUM, 600)
    members = write_members(folder / "members", ranges, partial(chosen, ranges=ranges), EXECUTION, "members")
    source = ImageRows(images, "vectors", members)
    gids = np.flatnonzero(np.arange(NUM) % 7 != 3)
    expected = cells_from_arrays(rows[gids], gids, of_gid[gids], centroids)
    assert np.diff(expected.offsets).max() > NUM // 3
    return source, partial(cells_of, source=source, of_gid=of_gid), centroids, expected


def check(found, expected) -> None:
    n = expected.num_rows
    assert found.num_rows == n
    np.testing.assert_array_equal(found.offsets, expected.offsets)
    for start, stop in ((0, n), (11, 500), (n - 1, n), (3, 3)):
        np.testing.assert_array_equal(found.read(start, stop), expected.read(start, stop))
        np.testing.assert_array_equal(found.read_sketches(start, stop), expected.read_sketches(start, stop))
        np.testing.assert_array_equal(found.read_gids(start, stop), expected.read_gids(start, stop))
    rows = np.array([5, n - 1, 5, 3])
    np.testing.assert_array_equal(found.gids_of_rows(rows), expected.read_gids(0, n)[rows])
    np.testing.assert_array_equal(found.read_rows(rows), expected.read(0, n)[rows])
    one, other = found.between(3, 9), expected.between(3, 9).between(0, 6)
    np.testing.assert_array_equal(one.read(0, one.num_rows), other.read(0, other.num_rows))


@pytest.mark.parametrize("rows_per_file", [None, 300, 90])
def test_files_are_the_cells_of_the_arrays(pool, tmp_path, monkeypatch, rows_per_file):
    source, of_chunk, centroids, expected = pool
    if rows_per_file:  # a cell, then every cell, is larger than a file; chunks are a part each
        monkeypatch.setattr(grouped, "_FILE_BYTES", rows_per_file * expected.row_bytes)
        monkeypatch.setattr("curation.stages.members.CHUNK_ROWS", 100)
    folder = Folder(str(tmp_path))
    files = write_cells(folder, source, of_chunk, centroids, EXECUTION, "cells")
    assert [file.path for file in files if file.path not in folder.names()] == []
    for file in files:
        assert folder.described(file.path, file.rows) == file
    number = len([file for file in files if file.path.endswith(".bin")])
    assert number == 1 if rows_per_file is None else number > 3
    found = open_cells(folder)
    check(found, expected)
    a, b = (self_pairs(x, 0, expected.num_rows, 0.8, 4, 180) for x in (found, expected))
    assert len(a.a) > 100
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_same_bytes_for_any_memory_and_after_an_interruption(pool, tmp_path, monkeypatch):
    source, of_chunk, centroids, expected = pool
    monkeypatch.setattr(grouped, "_FILE_BYTES", 300 * expected.row_bytes)
    once, again = Folder(str(tmp_path / "a")), Folder(str(tmp_path / "b"))
    files = write_cells(once, source, of_chunk, centroids, EXECUTION, "cells")
    small = ExecutionConfig(workers=1)
    monkeypatch.setattr(grouped, "_MOST_TABLE_BYTES", 5000)  # several tables an item
    assert write_cells(again, source, of_chunk, centroids, small, "cells") == files
    again.delete("cells/done/rows-00001.json")
    again.delete("cells/rows-00001.bin")
    kept = (tmp_path / "b/cells/rows-00000.bin").stat().st_mtime_ns
    assert write_cells(again, source, of_chunk, centroids, EXECUTION, "cells") == files
    assert (tmp_path / "b/cells/rows-00000.bin").stat().st_mtime_ns == kept
    assert again.described("cells/rows-00001.bin", files[1].rows).sha256 == files[1].sha256


def test_mistakes_are_named(pool, tmp_path):
    source, of_chunk, centroids, _ = pool
    with pytest.raises(ValueError, match="unit-norm"):
        write_cells(Folder(str(tmp_path)), source, of_chunk, 2 * centroids, EXECUTION, "cells")
    with pytest.raises(ValueError, match="no finished cells"):
        open_cells(Folder(str(tmp_path)))
    folder = Folder(str(tmp_path / "c"))
    write_cells(folder, source, of_chunk, centroids, EXECUTION, "cells")
    path = tmp_path / "c/cells/rows-00000.bin"
    path.write_bytes(path.read_bytes()[:-10])
    cells = open_cells(folder)
    with pytest.raises(OSError, match=r"is shorter than its cells\.json says: delete that folder"):
        cells.read(0, cells.num_rows)
