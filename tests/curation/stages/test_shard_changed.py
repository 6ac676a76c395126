"""Sources that change between judging and copying: a row with a reason, never other bytes in a shard, never a stop."""

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from curation.account.explain import explain
from curation.config import CurationConfig
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig
from curation.pipeline import run_pipeline
from curation.reading.again import CHANGED, GONE, LOST_REASONS, UNREADABLE, Lost, SecondReader, _reason
from curation.reading.listing import find_parts
from curation.reading.samples import Member
from curation.reading.sources import SourceChanged
from curation.run import main
from curation.stages.balance import BalanceConfig
from curation.stages.embed import EmbedConfig
from curation.stages.shard import ShardConfig
from curation.state import Inputs, Run
from tests.conftest import encoded, picture, write_tar

KEYS = [f"k{i:02d}" for i in range(14)]


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """key -> JPEG."""
    return {key: encoded(picture(i)) for i, key in enumerate(KEYS)}


def other_bytes(content: bytes, seed: int = 50) -> bytes:
    """Another sound image of the very same size."""
    other = encoded(picture(seed, (24, 24)))
    return other + bytes(len(content) - len(other))


def as_folder(path: Path, contents: dict[str, bytes]) -> str:
    path.mkdir(parents=True, exist_ok=True)
    for key, content in contents.items():
        (path / f"{key}.jpg").write_bytes(content)
        (path / f"{key}.txt").write_bytes(b"caption of " + key.encode())
    return str(path)


def tar_of(contents: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key, content in contents.items():
            for suffix, member in (("jpg", content), ("txt", b"caption of " + key.encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    return buffer.getvalue()


def as_tar(path: Path, contents: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(contents))
    return str(path)


def as_gzip(path: Path, contents: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(tar_of(contents), mtime=0))
    return str(path)


def as_parquet(path: Path, contents: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"key": k, "image": {"bytes": c, "path": f"{k}.jpg"}, "caption": k} for k, c in contents.items()]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return str(path)


def make_run(out: Path, pool: str, **changes) -> Run:
    settings = {
        "embed": EmbedConfig(encoder="descriptors"),
        "balance": BalanceConfig(num_images=14),
        "filters": [],
        "shard": ShardConfig(max_images=3),
        "execution": ExecutionConfig(workers=2),
    } | changes
    return Run(Folder(str(out)), CurationConfig(**settings), Inputs(find_parts([pool]), {}, {}))


def written(out: Path) -> dict[str, bytes]:
    """key -> image bytes of every sample in the shards, each checked against its .json."""
    found = {}
    for path in sorted((out / "shards").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            about = json.loads(sample["json"])
            assert about["sha256"] == about["sha256_original"] == hashlib.sha256(sample["jpeg"]).hexdigest()
            found[about["key"]] = sample["jpeg"]
    return found


def assert_account(run: Run, lost: dict[str, str], contents: dict[str, bytes]) -> None:
    """Exactly these are missing, for these reasons, wherever it is said; the others are whole."""
    out = Path(run.folder.path())
    assert written(out) == {key: content for key, content in contents.items() if key not in lost}
    rows = {row["key"]: row for row in pq.read_table(out / "decisions.parquet").to_pylist()}
    assert {key: row["reason"] for key, row in rows.items() if row["status"] == "rejected"} == lost
    assert all((row["shard"] is not None) == (row["status"] == "kept") for row in rows.values())
    figures = json.loads((out / "report.json").read_text())
    assert figures["shards"]["images"] == figures["funnel"]["status"]["kept"] == len(contents) - len(lost)
    assert sum(figures["funnel"]["status"].values()) == len(contents)
    assert [count for _, count in figures["funnel"]["stages"]] == [len(contents)] * 4 + [len(contents) - len(lost)]
    counts = Counter(lost.values())
    manifest = run.manifests["shards"]
    assert manifest.counts == {"pool": len(contents) - len(lost), **counts}
    assert sum(file.rows for file in manifest.files) == len(contents) - len(lost)


def replace(path: Path, contents: dict[str, bytes], write) -> dict[str, str]:
    write(path, {**contents, "k02": other_bytes(contents["k02"])})
    return {"k02": CHANGED}


def cut_file(path: Path, contents: dict[str, bytes], write) -> dict[str, str]:
    file = path / "k03.jpg"
    file.write_bytes(file.read_bytes()[:-1])
    return {"k03": CHANGED}


def cut_tar(path: Path, contents: dict[str, bytes], write) -> dict[str, str]:
    with tarfile.open(path) as tar:
        end = tar.getmember("k12.jpg").offset_data + 100
    os.truncate(path, end)
    return {"k12": CHANGED, "k13": CHANGED}


def grown(path: Path, contents: dict[str, bytes], write) -> dict[str, str]:
    with (path / "k01.jpg").open("ab") as file:
        file.write(b"more")
    return {"k01": CHANGED}


def deleted(path: Path, contents: dict[str, bytes], write) -> dict[str, str]:
    (path / "k05.jpg").unlink()
    return {"k05": GONE}


def now_a_folder(path: Path, contents: dict[str, bytes], write) -> dict[str, str]:
    (path / "k06.jpg").unlink()
    (path / "k06.jpg").mkdir()
    return {"k06": CHANGED}


def caption_changed(path: Path, contents: dict[str, bytes], write) -> dict[str, str]:
    (path / "k07.txt").write_bytes(b"another caption")
    (path / "k04.txt").unlink()
    return {"k07": CHANGED, "k04": GONE}


def fewer_rows(path: Path, contents: dict[str, bytes], write) -> dict[str, str]:
    write(path, {key: content for key, content in contents.items() if key not in ("k12", "k13")})
    return {"k12": CHANGED, "k13": CHANGED}


def swapped_rows(path: Path, contents: dict[str, bytes], write) -> dict[str, str]:
    rows = pq.read_table(path).to_pylist()
    rows[5]["image"]["bytes"], rows[6]["image"]["bytes"] = rows[6]["image"]["bytes"], rows[5]["image"]["bytes"]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=8)
    return {"k05": CHANGED, "k06": CHANGED}


@pytest.mark.parametrize(
    ("name", "write", "changes"),
    [
        ("folder", as_folder, [replace, cut_file, grown, deleted, now_a_folder, caption_changed]),
        ("pool.tar", as_tar, [replace, cut_tar]),
        ("pool.tar.gz", as_gzip, [replace]),
        ("pool.parquet", as_parquet, [fewer_rows]),
        ("pool.parquet", as_parquet, [replace, swapped_rows]),
    ],
)
def test_what_changed_is_a_row_and_the_run_goes_on(tmp_path, ray_session, contents, name, write, changes):
    path = tmp_path / name
    run = make_run(tmp_path / "run", write(path, contents))
    run_pipeline(run, "balance")
    lost: dict[str, str] = {}
    for change in changes:
        lost |= change(path, contents, write)
    run_pipeline(run)
    assert_account(run, lost, contents)
    for key, reason in lost.items():
        story = explain(str(tmp_path / "run"), key)
        assert f"rejected as {reason.replace('_', ' ')}" in story
        assert "it was chosen, but" in " ".join(story.split())


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["gone", "cut_gzip", "no_parquet"])
def test_a_whole_source_that_went_costs_its_own_images_only(tmp_path, ray_session, contents, damage):
    """Two sources; one of them goes."""
    pool = tmp_path / "pool"
    kept, rest = dict(list(contents.items())[:9]), dict(list(contents.items())[9:])
    as_tar(pool / "a.tar", kept)
    name, write = {
        "gone": ("b.tar", as_tar),
        "cut_gzip": ("b.tar.gz", as_gzip),
        "no_parquet": ("b.parquet", as_parquet),
    }[damage]
    write(pool / name, rest)
    run = make_run(tmp_path / "run", str(pool))
    run_pipeline(run, "balance")
    if damage == "gone":
        (pool / name).unlink()
    elif damage == "cut_gzip":
        os.truncate(pool / name, 100)
    else:
        (pool / name).write_bytes(b"PAR1 no more PAR1")
    run_pipeline(run)
    assert_account(run, dict.fromkeys(rest, GONE if damage == "gone" else CHANGED), contents)


def test_rows_are_the_same_for_any_number_of_workers_and_after_a_kill(tmp_path, ray_session, contents):
    path = tmp_path / "pool"
    run = make_run(tmp_path / "run", as_folder(path, contents))
    run_pipeline(run, "balance")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    lost = {**replace(path, contents, as_folder), **deleted(path, contents, as_folder)}
    run_pipeline(run)
    assert_account(run, lost, contents)
    names = ["decisions.parquet", "shards/manifest.json", "shards/not_written.parquet", "shards/README.md"]
    names += [str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run/shards").glob("*/*.parquet")]
    names += [str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run/shards").glob("*.tar")]
    before = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    again = make_run(tmp_path / "again", str(path), execution=ExecutionConfig(workers=1))
    again.inputs = dataclasses.replace(again.inputs, pool=run.inputs.pool)
    run_pipeline(again)
    assert {name: (tmp_path / "again" / name).read_bytes() for name in names} == before
    # Killed before its last shard was whole; the file that had gone is back, but its shard was done without it.
    record = next(p for p in (tmp_path / "run/shards/done").iterdir() if not json.loads(p.read_text())["lost"])
    (tmp_path / "run/shards/index" / f"{record.stem}.parquet").unlink()
    (tmp_path / "run/shards/manifest.json").unlink()
    (path / "k05.jpg").write_bytes(contents["k05"])
    run_pipeline(make_run_like(run))
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == before


def make_run_like(run: Run) -> Run:
    return Run(run.folder, run.config, run.inputs)


def test_when_most_of_the_pool_went_the_run_stops_and_nothing_of_it_is_kept(tmp_path, ray_session, contents):
    path = tmp_path / "pool"
    run = make_run(tmp_path / "run", as_folder(path, contents))
    run_pipeline(run, "balance")
    path.rename(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"14 of the 14 images .* 'gone_since_indexing'.*max_rejected_fraction=0.5"):
        run_pipeline(run)
    assert not (tmp_path / "run/shards/manifest.json").exists()
    (tmp_path / "unmounted").rename(path)
    run_pipeline(make_run_like(run))
    assert written(tmp_path / "run") == contents


@pytest.mark.slow
def test_seed_images_that_are_included_are_checked_too(tmp_path, ray_session, contents):
    from curation.reading.seeds import RetrievalRule, SeedSet

    seed = SeedSet(
        name="s", urls=(as_folder(tmp_path / "seed", contents),), rule=RetrievalRule(k=1), include_as_is=True
    )
    run = make_run(tmp_path / "run", as_tar(tmp_path / "pool.tar", contents), balance=BalanceConfig())
    run = Run(run.folder, run.config, Inputs(run.inputs.pool, {"s": (seed, find_parts(seed.urls))}, {}))
    run_pipeline(run, "retrieve")
    (tmp_path / "seed/k04.jpg").write_bytes(other_bytes(contents["k04"]))
    run_pipeline(run)
    counts = run.manifests["shards"].counts
    assert counts["seed:s"] == 13
    assert counts[CHANGED] == 1
    assert run.manifests["report"].counts.get("rejected", 0) == 0  # of the pool, nothing is missing
    lost = pq.read_table(tmp_path / "run/shards/not_written.parquet").to_pylist()
    assert lost == [{"set": "seed:s", "gid": 4, "reason": CHANGED}]


@pytest.mark.slow
def test_the_command_says_it_in_its_last_lines_and_mends_it_when_given_again(tmp_path, ray_session, contents, capsys):
    """The file keeps its size and time, so only its bytes tell; the second time it has another time."""
    pool = tmp_path / "pool"
    as_folder(pool, contents)
    arguments = ["--pool", str(pool), "--config", "offline", "--out", str(tmp_path / "run"), "balance.num_images=14"]
    assert main([*arguments, "--until", "balance"]) == 0
    file = pool / "k02.jpg"
    times = file.stat()
    file.write_bytes(other_bytes(contents["k02"]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1 chosen image not in the shards" in printed
    assert "1 changed since indexing" in printed
    assert set(written(tmp_path / "run")) == set(contents) - {"k02"}
    os.utime(file)
    assert main(arguments) == 0
    assert "not in the shards" not in capsys.readouterr().out
    assert written(tmp_path / "run")["k02"] == file.read_bytes()


# --- what passes, and what does not ----------------------------------------------------------------------------------


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves one file by range; answers 503 as often as `failures` says."""

    content = b""
    failures = 0
    path_served = "/pool.tar"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        if self.path != self.path_served:
            return self.send_error(404)
        if type(self).failures > 0:
            type(self).failures -= 1
            return self.send_error(503)
        start, end = 0, len(self.content)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(self.content)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if with_body:
            self.wfile.write(self.content[start:end])
        return None

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(content: bytes):
    handler = type("Handler", (Flaky,), {"content": content})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_port}/pool.tar"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def member(contents) -> tuple[bytes, Member, bytes]:
    """A tar, the place of one image in it, and that image's sha256."""
    tar = tar_of(contents)
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        info = file.getmember("k03.jpg")
    return tar, Member("jpg", "k03.jpg", info.offset_data, info.size), hashlib.sha256(contents["k03"]).digest()


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_store_that_fails_for_a_moment_is_asked_again(contents, member, failures):
    tar, place, digest = member
    with serve(tar) as (handler, url), SecondReader(pauses_s=(0.01, 0.01, 0.01)) as reader:
        handler.failures = failures
        assert reader.image("tar", url, place, digest) == contents["k03"]


def test_a_store_that_stays_away_stops_the_run_with_advice(member):
    tar, place, digest = member
    with serve(tar) as (handler, url), SecondReader(pauses_s=(0.01,)) as reader:
        handler.failures = 1000
        with pytest.raises(ValueError, match=r"cannot read http.*run the same command; it continues"):
            reader.image("tar", url, place, digest)
    with SecondReader(pauses_s=(0.01,)) as reader, pytest.raises(ValueError, match="the same command"):
        reader.image("tar", url, place, digest)  # nobody listens there any more


def test_a_store_that_answers_that_it_is_gone_or_other_is_a_row(member):
    tar, place, digest = member
    with serve(tar) as (_, url), SecondReader(pauses_s=(60.0,)) as reader:
        with pytest.raises(Lost) as lost:
            reader.image("tar", url.replace("pool", "gone"), place, digest)
        assert lost.value.reason == GONE
        with pytest.raises(Lost) as lost:
            reader.image("tar", url, place, bytes(32))
        assert lost.value.reason == CHANGED
    with serve(tar[: place.offset + 10]) as (_, url), SecondReader(pauses_s=(60.0,)) as reader:
        with pytest.raises(Lost) as lost:
            reader.image("tar", url, place, digest)
        assert lost.value.reason == CHANGED


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(errno.ENOENT, "gone"), GONE),
        (NotADirectoryError(errno.ENOTDIR, "gone"), GONE),
        (PermissionError(errno.EACCES, "not yours"), UNREADABLE),
        (IsADirectoryError(errno.EISDIR, "a folder now"), CHANGED),
        (SourceChanged("grew"), CHANGED),
        (gzip.BadGzipFile("no gzip any more"), CHANGED),
        (EOFError("cut"), CHANGED),
        (pa.ArrowInvalid("no Parquet"), CHANGED),
        (OSError(errno.EIO, "the disk"), None),
        (OSError(errno.ESTALE, "the share"), None),
        (OSError(errno.EMFILE, "too many open files"), None),
        (TimeoutError(errno.ETIMEDOUT, "the share"), None),
    ],
)
def test_what_the_system_says_of_a_file_is_told_from_what_may_pass(tmp_path, error, reason):
    assert reason is None or reason in LOST_REASONS
    assert _reason(error, str(tmp_path / "x")) == reason


@pytest.mark.parametrize("error", [PermissionError("expired token"), OSError("reset"), ValueError("bad gateway")])
def test_a_remote_store_is_never_taken_to_have_lost_what_it_may_still_have(error):
    assert _reason(error, "memory://bucket/x.tar") is None
    assert _reason(FileNotFoundError("x"), "memory://bucket/x.tar") == GONE


def test_bytes_of_the_same_size_differ_by_digest(tmp_path, contents):
    path = write_tar(tmp_path / "a.tar", [("k.jpg", other_bytes(contents["k00"]))])
    with tarfile.open(path) as tar:
        place = Member("jpg", "k.jpg", tar.getmembers()[0].offset_data, len(contents["k00"]))
    with SecondReader() as reader, pytest.raises(Lost, match=CHANGED):
        reader.image("tar", str(path), place, hashlib.sha256(contents["k00"]).digest())
