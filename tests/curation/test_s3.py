"""Reading from and writing to a real S3 server (moto, on loopback)."""

import hashlib
import json
import subprocess
import sys
import zlib
from pathlib import Path

import fsspec
import pytest

from curation.engine.folder import Folder
from curation.reading.again import Lost, SecondReader
from curation.reading.listing import find_parts
from curation.reading.sources import MemberReader, read_samples
from tests.conftest import REPOSITORY, encoded, picture, picture_tar


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The bucket `bucket` behind a server of our own; credentials and endpoint come from the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("FSSPEC_S3_ENDPOINT_URL", f"http://{host}:{port}")
    fsspec.config.set_conf_env(fsspec.config.conf)
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    yield fs
    patch.undo()
    fsspec.config.conf.pop("s3", None)
    server.stop()


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
