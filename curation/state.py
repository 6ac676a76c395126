"""What a run is: its folder, its config, what it reads, and which of its steps are done."""

import contextlib
import json
from dataclasses import dataclass, field
from typing import Any

from curation.config import CurationConfig
from curation.engine.earlier import Earlier
from curation.engine.folder import Folder
from curation.engine.manifest import File, Manifest
from curation.engine.ownership import TIMING
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet, encoder_folder
from curation.ops.cells import Cells
from curation.reading.filters import Filter, build_filters
from curation.reading.listing import Listing
from curation.reading.seeds import SeedSet
from curation.stages.grouped import open_cells

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

    def cells(self, step: str) -> Cells:
        return open_cells(self.folder / step)


def step_seconds(run: Run, step: str) -> float:
    """How long a step took when it ran."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        return float(json.loads((run.folder / step).read_bytes(TIMING))["seconds"])
    return 0.0
