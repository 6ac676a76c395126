"""Rules on the index: which decodable images are not worth having, and the first reason for each."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.reading.filters import Filter, first_reasons

VERSION = 1
_FILE = "reasons.parquet"
_COLUMNS = ["key", "sha256", "metadata", "width", "height", "luma_deviation", "status", "reason"]


def filter_pool(folder: Folder, pool: ImageSet, filters: Sequence[Filter], execution: ExecutionConfig) -> list[File]:
    """Write reasons.parquet: one row a gid, `reason` null for the images that go on."""
    reasons = run_tasks(
        _part_reasons,
        range(pool.num_parts),
        pool,
        list(filters),
        execution=execution,
        label="filter",
        unit="images",
        weights=np.diff(pool.part_base).tolist(),
    )
    column = (
        pa.chunked_array(reasons, pa.string()).dictionary_encode() if reasons else pa.chunked_array([], pa.string())
    )
    return [folder.write_table(_FILE, pa.table({"reason": column}))]


def read_reasons(folder: Folder) -> pa.ChunkedArray:
    """string [num_images], null for the images that go on."""
    return folder.read_table(_FILE)["reason"].cast(pa.string())


def passed(folder: Folder) -> np.ndarray:
    """int64, ascending: the gids that go on."""
    return np.flatnonzero(read_reasons(folder).is_null().to_numpy()).astype(np.int64)


def _part_reasons(part: int, pool: ImageSet, filters: list[Filter]) -> pa.Array:
    return pa.array(first_reasons(pool.index(part, _COLUMNS), filters).tolist(), pa.string())
