"""Reading from and writing to a real S3 server (moto, on loopback)."""

import json
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from curation.folder import Folder
from curation.reading.listing import find_parts
from curation.reading.sources import MemberReader, read_samples
from tests.conftest import REPOSITORY, picture_tar


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
