"""The table of a dataset on several ranks: listed once a machine, mapped by all, gone from the disk, hashed once."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data import listing, shards
from pretrain.data.decode import ImageLimits
from pretrain.data.shards import ShardReader, read_table
from pretrain.data.sources import Shard, Source
from tests.conftest import picture_tar
from tests.pretrain.ranks import run_ranks

LIMITS = ImageLimits()


def seen_by_a_rank(place: str, folder: str) -> dict[str, Any]:
    tempfile.tempdir = folder
    calls, find = [], shards.find_sources
    shards.find_sources = lambda asked: calls.append(asked) or find(asked)
    try:
        table = read_table(place, LIMITS)
    except ValueError as error:
        return {"calls": len(calls), "error": str(error)}
    maps = {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "seedbed-table" in line}
    read = [ShardReader(table).read(row) for row in range(len(table))]
    return {"calls": len(calls), "fingerprint": table.fingerprint(), "inodes": maps, "read": read}


def test_ranks_of_a_machine_share_one_table(tmp_path: Path) -> None:
    picture_tar(tmp_path / "data" / "a.tar", range(6))
    (tmp_path / "tmp").mkdir()
    first, second = run_ranks(seen_by_a_rank, tmp_path / "ranks", str(tmp_path / "data"), str(tmp_path / "tmp"))
    assert (first.pop("calls"), second.pop("calls")) == (1, 0)
    assert first == second
    assert first["inodes"]
    assert len(first["read"]) == 6
    assert first["fingerprint"] == read_table(str(tmp_path / "data"), LIMITS).fingerprint()
    assert not list((tmp_path / "tmp").iterdir())


def test_what_the_first_rank_cannot_list_is_told_on_all(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    first, second = run_ranks(seen_by_a_rank, tmp_path / "ranks", str(tmp_path / "none"), str(tmp_path / "tmp"))
    assert first["error"] == second["error"]
    assert "nothing found at" in first["error"]
    assert not list((tmp_path / "tmp").iterdir())


def heap_mb() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))


def test_a_large_table_takes_no_heap_and_its_fingerprint_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 M images: 32 MB of arrays, mapped."""
    images = 4_000_000
    sources = [Source(Shard("tar", f"/x/{i}.tar"), 1 << 41, "index") for i in range(100)]
    sizes = np.full(images // 100, 1000)
    monkeypatch.setattr(shards, "find_sources", lambda _: sources)
    monkeypatch.setattr(listing, "_read_index", lambda _: (np.cumsum(sizes * 0 + 1024), sizes))
    before = heap_mb()
    table = read_table("x", LIMITS)
    assert len(table) == images
    assert heap_mb() - before < 16
    monkeypatch.setattr(shards.hashlib, "sha256", None)
    assert len(table.fingerprint()) == 32
