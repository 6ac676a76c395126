"""Part numbers, and so gids, stay: whatever comes, goes, sorts first, or returns."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.store import register, registered
from curation.stages.balance import BalanceConfig
from tests.tiny_run import curate, jpeg, picture, write_tar


def files_of(id_: str) -> list[File]:
    return [File(path=f"index/part-{id_}.parquet", rows=3, bytes=1, sha256="")]


def test_numbers_are_given_once_and_never_changed(tmp_path):
    folder = Folder(str(tmp_path))
    register(folder, {id_: files_of(id_) for id_ in ("m", "z")})
    first = (tmp_path / "registry/parts-00000.json").read_bytes()
    register(folder, {id_: files_of(id_) for id_ in ("a", "m", "k", "z")})
    register(folder, {id_: files_of(id_) for id_ in ("z", "a")})
    assert list(registered(folder)) == ["m", "z", "a", "k"]
    assert registered(folder)["k"] == files_of("k")
    assert (tmp_path / "registry/parts-00000.json").read_bytes() == first
    assert len(folder.names()) == 2


def tar(folder: Path, name: str, numbers: range) -> Path:
    return Path(write_tar(folder / f"{name}.tar", {f"{name}{i}": {"jpg": jpeg(picture(i))} for i in numbers}))


def rows_of(run) -> dict[int, tuple]:
    rows = pq.read_table(run.folder.path("decisions.parquet")).to_pylist()
    return {row["gid"]: (row["key"], row["status"], row["reason"]) for row in rows}


def test_gids_stay_when_parts_come_and_go(tmp_path, ray_session):
    pool, out, balance = tmp_path / "pool", tmp_path / "run", {"balance": BalanceConfig(fraction=1.0)}
    m = tar(pool, "m", range(5))
    first = rows_of(curate(out, str(pool), **balance))
    assert [key for key, *_ in first.values()] == [f"m{i}" for i in range(5)]

    tar(pool, "a", range(10, 13))  # sorts before the other
    grown = curate(out, str(pool), **balance)
    second = rows_of(grown)
    assert {gid: second[gid] for gid in first} == first
    assert [second[gid][0] for gid in range(5, 8)] == ["a10", "a11", "a12"]
    assert all(status == "kept" for _, status, _ in second.values())

    away = m.rename(tmp_path / "m.tar")
    gone = curate(out, str(pool), **balance)
    third = rows_of(gone)
    assert {gid: third[gid] for gid in first} == {
        gid: (key, "rejected", "not_in_pool") for gid, (key, *_) in first.items()
    }
    assert {gid: third[gid] for gid in range(5, 8)} == {gid: second[gid] for gid in range(5, 8)}
    assert gone.manifests["embed/pool"].counts == {"images": 3, "not_in_pool": 5}
    assert sum(file.rows for file in gone.manifests["shards"].files) == 3
    np.testing.assert_array_equal(gone.pool.part_base, grown.pool.part_base)
    assert not gone.pool.column("sha256")[:5].any()

    away.rename(m)
    assert rows_of(curate(out, str(pool), **balance)) == second
    batches = [json.loads(path.read_text()) for path in sorted((out / "embed/pool/registry").iterdir())]
    assert [len(batch) for batch in batches] == [1, 1]
