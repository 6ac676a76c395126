"""Reading from and writing to a real S3 server (moto, on loopback)."""

import contextlib
import gzip
import hashlib
import io
import json
import socket
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.engine.folder import Folder
from curation.reading.again import Lost, SecondReader, Wanted, read_again
from curation.reading.listing import find_parts
from curation.reading.places import Fetched
from curation.reading.samples import Member, Sample
from curation.reading.sources import MemberReader, read_samples
from tests.conftest import REPOSITORY, encoded, picture, picture_tar


def test_tars_are_listed_read_and_range_read(s3, tmp_path):
    for name in ("a-00", "a-01"):
        s3.put(str(picture_tar(tmp_path / f"{name}.tar", range(4), prefix=name[-1])), f"bucket/pool/{name}.tar")
    parts = find_parts(["s3://bucket/pool/a-{00..01}.tar"])
    assert [part.url for part in parts] == ["s3://bucket/pool/a-00.tar", "s3://bucket/pool/a-01.tar"]
    assert parts == find_parts(["s3://bucket/pool/*.tar"]) == find_parts(["s3://bucket/pool"])
    samples = [sample for part in parts for sample in read_samples(part, 1 << 20)]
    assert [sample.key for sample in samples] == [f"{p}{i:04d}" for p in "01" for i in range(4)]
    with MemberReader("tar", parts[1].url) as reader:
        assert reader.read(samples[6].image) == samples[6].content


@pytest.mark.parametrize("name", ["a::b.jpg", "x[1].jpg", "x*.jpg", "{1,2}.jpg", "a b+c.JPG", "POOL.TAR"])
def test_odd_names_are_listed_read_and_read_again(s3, tmp_path, name):
    folder = f"bucket/odd-{zlib.crc32(name.encode())}"
    if name.endswith("TAR"):
        s3.put(str(picture_tar(tmp_path / "a.tar", range(1))), f"{folder}/{name}")
    else:
        s3.pipe_file(f"{folder}/{name}", encoded(picture(1)))
    for url in (f"s3://{folder}", f"s3://{folder}/{name}"):
        (part,) = find_parts([url])
        (sample,) = read_samples(part, 1 << 20)
        with MemberReader(part.kind, part.url) as reader:
            assert reader.read(sample.image) == sample.content != b""


@pytest.mark.parametrize("name", ["a.tar", "*.tar", "{0..2}.tar", "folder/"])
def test_a_missing_bucket_is_said(s3, name):
    with pytest.raises(ValueError, match=r"there is no s3://no-such-bucket|bucket does not exist"):
        find_parts([f"s3://no-such-bucket/{name}"])
    with pytest.raises(ValueError, match=r"nothing found .*s3://bucket is there"):
        find_parts([f"s3://bucket/nowhere/{name}"])


@pytest.mark.parametrize("name", ["a.tar", "*.tar"])
def test_missing_credentials_are_said(s3, monkeypatch, tmp_path, name):
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    for variable in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setitem(fsspec.config.conf["s3"], "skip_instance_cache", True)
    with pytest.raises(ValueError, match=r"cannot list .*credentials"):
        find_parts([f"s3://bucket/pool/{name}"])


def test_parts_missing_from_braces_are_named(s3, tmp_path):
    s3.put(str(picture_tar(tmp_path / "a.tar", range(1))), "bucket/braces/a-01.tar")
    listing = find_parts(["s3://bucket/braces/a-{00..02}.tar"])
    assert listing.missing == ("s3://bucket/braces/a-00.tar", "s3://bucket/braces/a-02.tar")


def test_a_folder_writes_whole_files(s3):
    folder = Folder("s3://bucket/some/run")
    file = folder.write_bytes("x/y.bin", b"0123456789")
    assert (folder.names(), folder.read_bytes("x/y.bin"), file.bytes) == (["x/y.bin"], b"0123456789", 10)
    folder.clear(["x/*.bin"])
    assert folder.names() == []


@pytest.mark.slow
def test_the_command_from_bucket_to_bucket(s3, tmp_path):
    s3.put(str(picture_tar(tmp_path / "pool.tar", range(20))), "bucket/raw/pool.tar")
    s3.put(str(picture_tar(tmp_path / "seed.tar", range(100, 104))), "bucket/seed/seed.tar")
    out = "s3://bucket/runs/one"
    arguments = ["--seed", "s3://bucket/seed/", "--pool", "s3://bucket/raw/*.tar", "--config", "offline", "--out", out]
    command = [sys.executable, "-m", "curation.run", *arguments, "retrieve.k=3", "execution.workers=2"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    manifest = json.loads(s3.cat_file("bucket/runs/one/shards/manifest.json"))
    assert sum(entry["rows"] for entry in manifest["files"]) == manifest["counts"]["pool"] > 0
    local = tmp_path / "shard.tar"
    s3.get("bucket/runs/one/shards/shard-000000.tar", str(local))
    originals = {
        sample.key: sample.content for sample in read_samples(find_parts([str(tmp_path / "pool.tar")])[0], 1 << 20)
    }
    written = list(read_samples(find_parts([str(local)])[0], 1 << 20))
    assert written
    assert all(sample.content == originals[sample.key] for sample in written)
    assert {Path(name).name for name in s3.ls("bucket/runs/one")} >= {"report.html", "report.json", "decisions.parquet"}


def test_an_object_that_is_gone_is_told_from_a_store_that_does_not_answer(s3, tmp_path):
    path = picture_tar(tmp_path / "a.tar", range(2))
    s3.put(str(path), "bucket/raw/a.tar")
    sample = next(iter(read_samples(find_parts([str(path)])[0], 1 << 20)))
    digest = hashlib.sha256(sample.content).digest()
    with SecondReader(pauses_s=()) as reader:
        assert reader.image("tar", "s3://bucket/raw/a.tar", sample.image, digest) == sample.content
        for gone in ("s3://bucket/raw/b.tar", "s3://no-such-bucket/a.tar"):
            with pytest.raises(Lost, match="gone_since_indexing"):
                reader.image("tar", gone, sample.image, digest)


# --- what a kept picture costs ----------------------------------------------------------------------------------------

NUM_PICTURES = 64


class Wire:
    """A proxy before the server that counts what the server sends, and how many connections it had."""

    def __init__(self, port: int) -> None:
        self.bytes_down = 0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                threading.Thread(target=self._pass, args=(near, far, False), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_down: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                self.bytes_down += len(content) if is_down else 0
                target.sendall(content)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def wire(s3) -> Iterator[Wire]:
    """The server of `s3`, reached through a wire that counts."""
    former = fsspec.config.conf["s3"]["endpoint_url"]
    wire = Wire(int(former.rpartition(":")[2]))
    fsspec.config.conf["s3"]["endpoint_url"] = f"http://127.0.0.1:{wire.port}"
    yield wire
    fsspec.config.conf["s3"]["endpoint_url"] = former
    wire.close()


def captions(sample: Sample) -> list[Member]:
    return [member for member in sample.others if member.suffix == "txt"]


@pytest.fixture(scope="module")
def sources(s3) -> dict[str, list[Wanted]]:
    """Pictures of the size of a web pool's (about 110 kB each) with caption and metadata, of every kind of source; one
    in eight is wanted."""
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 256, int(size), np.uint8).tobytes() for size in noise.normal(11e4, 3e4, NUM_PICTURES)]
    members = [
        (f"{i:04d}.{suffix}", content)
        for i, picture in enumerate(pictures)
        for suffix, content in (("jpg", picture), ("json", b'{"url": "https://example.org"}'), ("txt", b"a caption"))
    ]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    s3.pipe_file("bucket/cost/tar/a.tar", buffer.getvalue())
    s3.pipe_file("bucket/cost/packed/a.tar", gzip.compress(buffer.getvalue(), 1))
    s3.pipe({f"bucket/cost/folder/{name}": content for name, content in members[:48]})
    buffer = io.BytesIO()
    rows = [{"image": {"bytes": b, "path": f"{i:04d}.jpg"}, "caption": "a caption"} for i, b in enumerate(pictures)]
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=16, compression="none", use_dictionary=False)
    s3.pipe_file("bucket/cost/parquet/a.parquet", buffer.getvalue())
    found = {}
    for name in ("tar", "packed", "folder", "parquet"):
        found[name] = [
            Wanted(part.kind, part.url, s.image, hashlib.sha256(s.content).digest(), captions(s))
            for part in find_parts([f"s3://bucket/cost/{name}"])
            for i, s in enumerate(read_samples(part, 1 << 20))
            if i % 8 == 3
        ]  # fmt: skip
        assert len(found[name]) == (16 if name == "folder" else NUM_PICTURES) // 8
    return found


@pytest.mark.parametrize(("kind", "most"), [("tar", 1.1), ("folder", 1.1), ("parquet", 17), ("packed", 10)])
def test_a_kept_picture_costs_its_own_bytes(wire, sources, kind, most):
    """Of a tar and of a folder; of Parquet its row group up to the row; of a compressed tar what lies before it."""
    wanted, fetched, before = sources[kind], Fetched(), wire.bytes_down
    results = read_again(wanted, fetched)
    for w, result in zip(wanted, results, strict=True):
        assert isinstance(result, list)
        assert hashlib.sha256(result[0]).digest() == w.sha256
        assert result[1:] == [b"a caption"]
    size = sum(w.image.size for w in wanted)
    assert size < fetched.bytes < most * size
    assert fetched.bytes < wire.bytes_down - before < fetched.bytes + 2000 * (fetched.requests + 10)
    if kind in ("tar", "folder"):
        assert fetched.requests == len(wanted) * (1 if kind == "tar" else 2)  # caption and picture lie side by side
        before = wire.bytes_down  # and as the report reads a picture
        with MemberReader(wanted[1].kind, wanted[1].url) as reader:
            assert hashlib.sha256(reader.read(wanted[1].image)).digest() == wanted[1].sha256
        assert wire.bytes_down - before < wanted[1].image.size + 8000
