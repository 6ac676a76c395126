"""Wrong input at the command line: one clear sentence that says what to do, no traceback, exit status 1 or 2."""

import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, picture_tar


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "curation.run", *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return picture_tar(tmp_path_factory.mktemp("cli") / "a.tar", range(6))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "imagnet22k", "--pool", "{tar}"], ["unknown seed 'imagnet22k'", "imagenet22k"]),
        (["--seed", "imagenet22k", "--pool", "{tar}"], ["--seed-root", "SEEDBED_SEED_ROOT"]),
        (["--seed", "{tar}", "--pool", "/nonexistent/*.tar"], ["nothing found at '/nonexistent/*.tar'"]),
        (["--seed", "{tar}"], ["--pool is missing"]),
        (["--pool", "{tar}"], ["nothing says what to keep", "--seed"]),
        (["--seed", "{tar}", "--pool", "{tar}", "--config", "webb"], ["'webb'", "Did you mean 'web'?"]),
        (["--seed", "{tar}", "--pool", "{tar}", "dedup.threshold=0.9"], ["'dedup.threshold'", "similarity_threshold"]),
        (["--seed", "{tar}", "--pool", "{tar}", "retrieve.k=many"], ["retrieve.k", "many"]),
        (
            ["--seed", "{tar}", "--pool", "{tar}", "dedup.similarity_threshold=2"],
            ["dedup.similarity_threshold=2.0 must be in (-1, 1]"],
        ),
        (["--seed", "{tar}", "--pool", "{tar}", "nonsense"], ["key=value"]),
        (["--seed", "demo", "--pool", "{tar}"], ["--seed demo", "alone"]),
        (
            ["--seed", "{tar}", "--pool", "{tar}", "embed.encoder=vit_smal_patch14_dinov2.lvd142m"],
            ["vit_small_patch14_dinov2"],
        ),
        (["--seed", "{tar}", "--pool", "{tar}", "embed.encoder=hf:/nonexistent"], ["/nonexistent"]),
    ],
)
def test_one_sentence(tar, tmp_path, arguments, words):
    arguments = [a.replace("{tar}", str(tar)) for a in arguments]
    result = run(*arguments, "--out", tmp_path / "run", SEEDBED_SEED_ROOT="")
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]


def test_unknown_flag_and_stage():
    assert "unknown flag '--sed'" in run("--sed", "demo").stderr
    result = run("--seed", "demo", "--until", "reprot")
    assert (result.returncode, "reprot" in result.stderr) == (2, True)


def test_missing_weights_name_the_offline_choices(tar, tmp_path):
    result = run("--seed", tar, "--pool", tar, "--out", tmp_path / "run", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for word in ("vit_small_patch14_dinov2.lvd142m", str(tmp_path), "descriptors", "hf:/folder"):
        assert word in result.stderr


def test_unreachable_bucket(tar, tmp_path):
    with socket.socket() as listener:  # a port that is ours, and closed again before the call
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_MAX_ATTEMPTS": "1",
        "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    result = run("--seed", tar, "--pool", "s3://bucket/*.tar", "--out", tmp_path / "run", **environment)
    assert result.returncode == 1
    assert "cannot list 's3://bucket/*.tar'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_and_then_space(tar, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    arguments = ["--seed", tar, "--pool", tar, "--config", "offline", "--out", disk / "run", "execution.workers=1"]
    try:
        result = run(*arguments)
        assert result.returncode == 1, result.stderr
        assert "the disk is full" in result.stderr
        assert "Traceback" not in result.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert run(*arguments).returncode == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_unreadable_pool_and_empty_folder(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run("--seed", empty, "--pool", empty, "--config", "offline", "--out", tmp_path / "run")
    assert result.returncode == 1
    assert "the folder is empty" in result.stderr


@pytest.mark.slow
def test_a_pool_of_no_images_says_so(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text("no image")
    result = run("--seed", folder, "--pool", folder, "--config", "offline", "--out", tmp_path / "run")
    assert result.returncode == 1
    assert "max_rejected_fraction" in result.stderr
    assert "no_image" in result.stderr
