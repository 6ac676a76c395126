"""Images of seed and evaluation sets, as queries: which of them can be asked, and their vectors in blocks."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.stages.members import unit_rows


@dataclass(frozen=True)
class Asked:
    """Images of one set that are compared with the pool."""

    images: ImageSet
    gids: np.ndarray
    """int64, ascending"""
    encoder: str

    def vectors(self) -> np.ndarray:
        """float32 [len(gids), D], unit-norm."""
        return unit_rows(self.images.take_embeddings(self.encoder, self.gids))


def asked_of(images: ImageSet, encoder: str) -> Asked:
    """Every image of a set that could be read."""
    good = [images.index(part, ["status"])["status"].to_numpy() == "ok" for part in range(images.num_parts)]
    return Asked(images, np.flatnonzero(np.concatenate(good)).astype(np.int64), encoder)


def blocks(asked: Sequence[Asked], rows: int) -> Iterator[list[tuple[int, Asked]]]:
    """(position in `asked`, some of its images) in runs of at most `rows` images: sets that are small go together."""
    run: list[tuple[int, Asked]] = []
    room = rows
    for number, one in enumerate(asked):
        start = 0
        while start < len(one.gids):
            piece = one.gids[start : start + room]
            run.append((number, replace(one, gids=piece)))
            start, room = start + len(piece), room - len(piece)
            if not room:
                yield run
                run, room = [], rows
    if run:
        yield run


def pieces(folder: Folder, prefix: str | tuple[str, ...], execution: ExecutionConfig, label: str) -> list[File]:
    """Manifest entries of finished pieces, tables or arrays; tasks read them."""
    names = [name for name in folder.names() if name.startswith(prefix)]
    return run_tasks(_described, names, folder, execution=execution, label=f"{label}: checksums", unit="files")


def _described(name: str, folder: Folder) -> File:
    content = folder.read_bytes(name)
    is_table = name.endswith(".parquet")
    rows = pq.read_metadata(pa.BufferReader(content)).num_rows if is_table else len(np.load(io.BytesIO(content)))
    return File(path=name, rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
