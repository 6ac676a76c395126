"""Which files of a run folder are ours: what may be overwritten or deleted. Everything else stays, and is named."""

import json
import re

from curation.engine.folder import Folder, listed
from curation.engine.lock import check_folder
from curation.engine.manifest import MANIFEST_NAME, Manifest

STARTED, TIMING = "started.json", "timing.json"
COMMAND = "curation.run"
DEMO_RECORD = "demo.json"
_ASKED = ("seeds", "pool", "evaluations", "config")  # keys of run.json
_GROUPS = ("embed", "exclude", "decontaminate", "retrieve")  # folders of one folder a set
_REPORT_FILES = ("decisions.parquet", "report.json", "report.html")
_CELLS = (
    "cells/rows-*.bin",
    "cells/done/rows-*.json",
    "cells/offsets.npy",
    "cells/centroids.npy",
    "cells/directions.npy",
    "cells/cells.json",
)
_EXCHANGE = ("exchange/*/map-*.arrow", "exchange/*/map-*.npy", "exchange/*/piece-*")  # of any stage
_KMEANS = ("kmeans/*.npy", "kmeans/*.f64")
_DRAWN = ("drawn-*.parquet", "moved/map-*", "back/map-*")
_RANGE = "range-*.parquet"
_SHARD = "shard-" + 6 * "[0-9]"
_FILES: dict[str, tuple[str, ...]] = {
    "embed": ("index/part-*.parquet", "*/part-*.npy", "done/part-*.json", "registry/parts-*.json"),
    "exclude": (_RANGE,),
    "filter": (_RANGE,),
    "heads": (_RANGE,),
    "cells": (*_CELLS, *_KMEANS, "members/*.npy", "new/members-*.npy", "staying/members-*.npy", "assigned/*.npy"),
    "join": (
        "certificate.json",
        "truth.parquet",
        "found.parquet",
        "done/part-*.json",
        "edges/part-*.parquet",
        "forest/part-*.parquet",
        "new/members-*.npy",
        "before/members-*.npy",
        "lost/members-*.npy",
    ),
    "dedup": (
        _RANGE,
        "edges/*.parquet",
        "split.parquet",
        "near.parquet",
    ),
    "decontaminate": ("looks-*.parquet", "vectors-*.parquet"),
    "survivors": ("leaks-*.parquet", "representative-*.npy", "elected-*.npy", "counts-*.npy"),
    "cluster": (
        "level-*/*.npy",
        "members/*.npy",
        *(f"level-*/{name}" for name in (*_KMEANS, "assigned/assigned-*", "moved/map-*", "back/map-*")),
        *(f"level-*/placed/{name}" for name in ("*.npy", "assigned/assigned-*", "moved/map-*", "back/map-*")),
        "new/members-*.npy",
        *_CELLS,
    ),
    "retrieve": (
        "matches.parquet",
        "sample.parquet",
        "certificate.json",
        "neighbours-*.parquet",
        "left/members-*.npy",
        "probes-*.bin",
        "pass-*/map-*",
        *_DRAWN,
    ),
    "balance": ("balanced-*.parquet", *_DRAWN),
    "decide": ("decisions-*.parquet",),
    "shard": (
        f"{_SHARD}.tar",
        f"{_SHARD}.parquet",
        f"done/{_SHARD}.json",
        f"index/{_SHARD}.parquet",
        "not_written.parquet",
        "dropped.parquet",
        "placed/placed-*.parquet",
        "plan/bucket-*.arrow",
        "plan/bucket-*.json",
        "plan/keys-*.npy",
        "plan/shared-*.npy",
        "fetched.json",
        "README.md",
    ),
    "report": ("tally-*.json",),
}


def file_names(stage: str) -> tuple[str, ...]:
    """Patterns of the files that a stage writes to its folder."""
    return (STARTED, TIMING, MANIFEST_NAME, *_EXCHANGE, *_FILES[stage])


def check_run_folder(folder: Folder) -> None:
    """See that a run may be written to a folder: nothing in it that is not ours would be overwritten. Only looks.

    Raises:
        ValueError: it holds something else than a run of ours, or someone's files where ours would go.
    """
    check_folder(folder, _has_record, COMMAND)
    if folder.exists("run.json") and not _is_run_json(folder):
        raise ValueError(f"{folder.url}/run.json is not of {COMMAND}, which writes a file of that name: move it away.")
    for name in _stage_folders(folder):
        check_stage_folder(folder / name)
    reports = [name for name in _REPORT_FILES if folder.exists(name)]
    if reports and not _is_stage(folder / "report"):
        raise ValueError(
            f"{folder.url} holds {listed(reports)}, which no run here has written, and this one would: move them away, "
            "or give another --out. Nothing was changed there."
        )


def check_stage_folder(folder: Folder) -> None:
    """See that a stage's folder is empty or was begun by us. Raises ValueError."""
    if not _is_stage(folder) and (found := folder.entries()):
        raise ValueError(
            f"{folder.url} is where a stage of this run is written, and holds what no run has written "
            f"({listed(found)}): move it away, or give another --out. Nothing was changed there."
        )


def clear_stage_folder(folder: Folder, stage: str) -> None:
    """Delete what a stage wrote. Raises ValueError, with nothing deleted, when other files lie there."""
    check_stage_folder(folder)
    folder.clear(file_names(stage))


def _stage_folders(folder: Folder) -> list[str]:
    names = [name for name in folder.entries() if name in (*_FILES, "shards")]
    groups = [name for name in names if name in _GROUPS]
    inside = [f"{name}/{part}" for name in groups for part in (folder / name).folders()]
    return [name for name in names if name not in _GROUPS] + inside


def _has_record(folder: Folder) -> bool:
    if _is_run_json(folder) or folder.exists(f"demo/{DEMO_RECORD}"):  # a demo is drawn before run.json is written
        return True
    return any(_is_stage(folder / name) for name in _stage_folders(folder))


def _is_run_json(folder: Folder) -> bool:
    try:
        content = json.loads(folder.read_bytes("run.json"))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return False
    return isinstance(content, dict) and all(name in content for name in _ASKED)


def _is_stage(folder: Folder) -> bool:
    """Whether a stage began there, or ended."""
    try:
        started = json.loads(folder.read_bytes(STARTED))
        if isinstance(started, str) and re.fullmatch("[0-9a-f]{32}", started):
            return True
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        pass
    try:
        Manifest.from_json(folder.read_bytes(MANIFEST_NAME).decode())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, TypeError, KeyError):
        return False
    return True
