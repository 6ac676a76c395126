"""A finished run, read back from its folder alone: for those who ask it questions afterwards."""

import io
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.account.report.wording import visible
from curation.engine.folder import Folder
from curation.engine.manifest import MANIFEST_NAME, Manifest
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
        return ImageSet(self.folder / step, self.manifest(step))

    @cached_property
    def pool(self) -> ImageSet:
        return self.images("embed/pool")

    def names(self, prefix: str) -> list[str]:
        """`NAME` of every step `<prefix>NAME`."""
        return [step.removeprefix(prefix) for step in self.steps if step.startswith(prefix)]

    def rows(self, name: str, condition: pc.Expression, columns: list[str] | None = None) -> pa.Table:
        """The rows of one Parquet file that meet a condition; the others are not kept in memory."""
        source = self.folder.path(name) if self.folder.is_local else io.BytesIO(self.folder.read_bytes(name))
        return pq.read_table(source, columns=columns, filters=condition, partitioning=None)

    def key(self, images: ImageSet, gid: int) -> str:
        return visible(images.take(np.array([gid]), ["key"])["key"][0].as_py())


def open_account(run: str) -> Account:
    """Raises ValueError when the folder is not a finished run, with what was found there."""
    folder = Folder(run)
    try:
        manifest = Manifest.from_json((folder / "report").read_bytes(MANIFEST_NAME).decode())
        if folder.exists("decisions.parquet"):
            return Account(folder, manifest.inputs)
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
        for step in ("embed/pool", "filter", "dedup", "survivors", "cluster", "shards")
        if folder.exists(f"{step}/{MANIFEST_NAME}")
    ]
    if done:
        raise ValueError(
            f"{run} is a run that has not finished (done: {', '.join(done)}): run its command again to the end."
        )
    raise ValueError(f"{run} is no run folder (no report/{MANIFEST_NAME} in it): give the --out of curation.run.")
