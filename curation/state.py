"""What a run is: its folder, its config, what it reads, and which of its steps are done."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.config import CurationConfig
from curation.engine.folder import Folder
from curation.engine.manifest import File, Manifest
from curation.engine.ownership import TIMING, scratch_folder
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet, encoder_folder
from curation.ops.cells import Cells, open_cells
from curation.reading.filters import Filter, build_filters
from curation.reading.listing import Listing
from curation.reading.seeds import SeedSet
from curation.stages import decontaminate, dedup
from curation.stages import filter as filter_stage

Written = tuple[list[File], dict[str, int], dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """What a run reads, located and listed."""

    pool: Listing
    seeds: dict[str, tuple[SeedSet, Listing]]
    evaluations: dict[str, Listing]

    def listings(self) -> dict[str, Listing]:
        """Every set by the step that reads it."""
        return {
            "embed/pool": self.pool,
            **{f"embed/seed-{name}": listing for name, (_, listing) in self.seeds.items()},
            **{f"embed/evaluation-{name}": listing for name, listing in self.evaluations.items()},
        }


def set_label(step: str) -> str:
    """What people call the set that a step reads: `pool`, `seed NAME`, `evaluation NAME`."""
    return step.removeprefix("embed/").replace("-", " ", 1)


@dataclass(frozen=True)
class Earlier:
    """The finished run that a run extends: its release."""

    folder: Folder
    release: int
    """1 for a run that extends none"""
    num_images: int
    manifests: dict[str, Manifest]

    @property
    def key(self) -> str:
        """Of all that it decided and wrote."""
        return hashlib.sha256(
            "".join(self.manifests[step].hash() for step in ("shards", "report")).encode()
        ).hexdigest()

    def decided(self) -> "Earlier":
        """What tasks need to read its decisions."""
        return replace(self, manifests={step: self.manifests[step] for step in ("decide", "report")})

    def decisions(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Decisions of those of the gids [start, stop), all of one range, that it had."""
        files, size = self.manifests["report"].files, self.manifests["decide"].settings["range_rows"]
        if start >= self.num_images:
            return self.folder.table_rows(files[0].path, 0, 0, columns)
        number, first = start // size, start // size * size
        return self.folder.table_rows(files[number].path, start - first, min(stop, self.num_images) - first, columns)


@dataclass
class Run:
    """One run: its folder, its config, what it reads, and the manifests of the steps that are done."""

    folder: Folder
    config: CurationConfig
    inputs: Inputs
    manifests: dict[str, Manifest] = field(default_factory=dict)
    earlier: Earlier | None = None

    @property
    def release(self) -> int:
        """How many runs this one extends, and itself."""
        return self.earlier.release + 1 if self.earlier is not None else 1

    def standing(self) -> np.ndarray | None:
        """uint8 [num_images]: 2 for images that the earlier release kept, 1 for those that stood for their group
        there, 0 for the others; None where there is none."""
        if self.earlier is None:
            return None
        standing = np.zeros(self.pool.num_images, np.uint8)
        for number in range(len(self.ranges)):
            start, stop = self.ranges.bounds(number)
            status = self.earlier.decisions(start, stop, ["status"])["status"]
            standing[start : start + len(status)] = np.select(
                [pc.equal(status, "kept").to_numpy(), pc.equal(status, "not_retrieved").to_numpy()], [2, 1], 0
            )
        return standing

    @property
    def filters(self) -> list[Filter]:
        return build_filters(self.config.filters)

    @property
    def retrieval_encoder(self) -> str:
        return encoder_folder(self.config.embed.encoders()[0])

    @property
    def copy_encoder(self) -> str:
        return encoder_folder(self.config.embed.encoders()[-1])

    def images(self, step: str) -> ImageSet:
        return ImageSet.of(self.folder / step, self.manifests[step])

    @property
    def pool(self) -> ImageSet:
        return self.images("embed/pool")

    @property
    def ranges(self) -> Ranges:
        """How per-image state is cut into files."""
        return Ranges(self.pool.num_images, self.config.range_rows)

    def local(self, step: str) -> Path:
        """Where a step's random-access files lie: in the run folder, or, where that is remote, in a scratch folder."""
        if self.folder.is_local:
            return Path(self.folder.path(step))
        return scratch_folder(self.folder) / step

    def cells(self, step: str) -> Cells:
        return open_cells(self.local(step) / "cells")

    def joined(self) -> np.ndarray:
        """int64, ascending: of the images that passed the filters, those that the join compares (dedup.heads)."""
        passed = filter_stage.passed(self.folder / "filter")
        return passed[dedup.heads(self.pool, passed, self.standing()) == passed]

    def survivors(self) -> np.ndarray:
        """int64, ascending: representatives that are no leaks."""
        return np.flatnonzero(decontaminate.read_survivors(self.folder / "decontaminate")).astype(np.int64)


def step_seconds(run: Run, step: str) -> float:
    """How long a step took when it ran."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        return float(json.loads((run.folder / step).read_bytes(TIMING))["seconds"])
    return 0.0
