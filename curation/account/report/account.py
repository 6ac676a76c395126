"""A finished run, read back from its folder alone: for those who ask it questions afterwards."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.account.report.wording import visible
from curation.engine.folder import Folder
from curation.engine.manifest import MANIFEST_NAME, Manifest
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet


@dataclass(frozen=True)
class Account:
    """A finished run, read back without its sources or its configuration."""

    folder: Folder
    steps: dict[str, str]
    """manifest hash of every step, by name"""
    _manifests: dict[str, Manifest] = field(default_factory=dict)

    def manifest(self, step: str) -> Manifest:
        if step not in self._manifests:
            self._manifests[step] = Manifest.from_json((self.folder / step).read_bytes(MANIFEST_NAME).decode())
        return self._manifests[step]

    def images(self, step: str) -> ImageSet:
        return ImageSet.of(self.folder / step, self.manifest(step))

    @cached_property
    def pool(self) -> ImageSet:
        return self.images("embed/pool")

    def names(self, prefix: str) -> list[str]:
        """`NAME` of every step `<prefix>NAME`."""
        return [step.removeprefix(prefix) for step in self.steps if step.startswith(prefix)]

    def rows(self, name: str, condition: pc.Expression, columns: list[str] | None = None) -> pa.Table:
        """The rows of one Parquet file that meet a condition; the others are not kept in memory."""
        return self.folder.table_where(name, condition, columns)

    @cached_property
    def decision_files(self) -> list[str]:
        """The files of decisions.parquet, one a range of gids."""
        return [file.path for file in self.manifest("report").files]

    @cached_property
    def ranges(self) -> Ranges:
        """How per-image state is cut into files."""
        return Ranges(self.pool.num_images, self.manifest("decide").settings["range_rows"])

    def decision(self, gid: int) -> dict[str, Any]:
        """The decision of one image."""
        number, row = divmod(gid, self.ranges.size)
        return self.folder.table_rows(self.decision_files[number], row, row + 1).to_pylist()[0]

    def decisions(self, condition: pc.Expression, columns: list[str]) -> pa.Table:
        """Columns of the decisions that meet a condition, in gid order."""
        return pa.concat_tables(self.rows(name, condition, columns) for name in self.decision_files)

    def key(self, images: ImageSet, gid: int) -> str:
        return visible(images.take(np.array([gid]), ["key"])["key"][0].as_py())


def open_account(run: str) -> Account:
    """Raises ValueError when the folder is not a finished run, with what was found there."""
    folder = Folder(run)
    try:
        manifest = Manifest.from_json((folder / "report").read_bytes(MANIFEST_NAME).decode())
        if folder.exists("decisions.parquet"):
            return Account(folder, manifest.inputs, {"report": manifest})
        raise FileNotFoundError
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{run}/report/{MANIFEST_NAME} is not readable: run the same command again to mend it."
        ) from None
    if not folder.exists():
        raise ValueError(f"there is no folder {run}: give the run folder, the --out of curation.run.")
    done = [
        step
        for step in ("embed/pool", "filter", "join", "dedup", "survivors", "cluster", "shards")
        if folder.exists(f"{step}/{MANIFEST_NAME}")
    ]
    if done:
        raise ValueError(
            f"{run} is a run that has not finished (done: {', '.join(done)}): run its command again to the end."
        )
    raise ValueError(f"{run} is no run folder (no report/{MANIFEST_NAME} in it): give the --out of curation.run.")
