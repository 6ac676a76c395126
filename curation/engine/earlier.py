"""Another finished run: the one that a run extends, or one whose images it excludes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine.folder import Folder
from curation.engine.manifest import Manifest


@dataclass(frozen=True)
class Earlier:
    """A finished run, and which release it is."""

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

    @property
    def range_rows(self) -> int:
        """gids in a file of its decisions."""
        return self.manifests["decide"].settings["range_rows"]

    def decided(self) -> "Earlier":
        """What tasks need to read its decisions."""
        return replace(self, manifests={step: self.manifests[step] for step in ("decide", "report")})

    def decisions(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Decisions of those of the gids [start, stop), all of one range, that it had."""
        files, size = self.manifests["report"].files, self.range_rows
        if start >= self.num_images:
            return self.folder.table_rows(files[0].path, 0, 0, columns)
        number, first = start // size, start // size * size
        return self.folder.table_rows(files[number].path, start - first, min(stop, self.num_images) - first, columns)

    def standing(self, start: int, stop: int) -> np.ndarray:
        """uint8: of the gids [start, stop), all of one range, 2 for images that it kept, 1 for those that stood for
        their group, 0 for the others and those that it did not have."""
        status = self.decisions(start, stop, ["status"])["status"]
        standing = np.zeros(stop - start, np.uint8)
        for value, name in ((1, "not_retrieved"), (2, "kept")):
            standing[np.flatnonzero(pc.equal(status, name).to_numpy())] = value
        return standing
