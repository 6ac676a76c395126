"""One run folder, one writer: real processes that want one folder, die in it, and follow each other."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from curation.engine import lock
from curation.engine.folder import Folder
from curation.engine.lock import NAME, hold
from tests.conftest import REPOSITORY, picture_tar

HOLDER = """
import sys, time
from curation.engine.folder import Folder
from curation.engine.lock import hold
try:
    with hold(Folder(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except ValueError as error:
    print("refused", error, flush=True)
"""


def start(url: object, seconds: float, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDER, str(url), str(seconds)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )


def first_line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate(timeout=30)


def locks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(NAME))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "_LOOK_S", 0.1)
    monkeypatch.setattr(lock, "STALE_S", 1.0)


def test_the_second_is_told_who_and_since_when(tmp_path: Path) -> None:
    process = start(tmp_path / "run", 60)
    try:
        assert first_line(process) == "held\n"
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        began = time.monotonic()
        with pytest.raises(ValueError, match=rf"process {process.pid} on {os.uname().nodename}, since 20\d\d-"):
            hold(Folder(str(tmp_path / "run"))).__enter__()
        assert time.monotonic() - began < 2
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    finally:
        end(process)


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_killed_holder_is_followed_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, deaths: int) -> None:
    for _ in range(deaths):
        process = start(tmp_path, 60)
        assert first_line(process) == "held\n"
        end(process)
    with hold(Folder(str(tmp_path))):
        assert f"taking over from process {process.pid}" in caplog.text
        assert len(locks(tmp_path)) > deaths
        with pytest.raises(ValueError, match=f"process {os.getpid()}"):
            hold(Folder(str(tmp_path))).__enter__()
    assert locks(tmp_path) == []


@pytest.mark.parametrize("error", [None, ValueError("wrong"), KeyboardInterrupt()])
def test_the_lock_is_given_back_whatever_happens(tmp_path: Path, error: BaseException | None) -> None:
    try:
        with hold(Folder(str(tmp_path))):
            assert len(locks(tmp_path)) == 2
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error  # noqa: PT017
    assert locks(tmp_path) == []


@pytest.mark.parametrize("after", ["nobody", "a dead one"])
def test_of_ten_at_once_exactly_one_has_it(tmp_path: Path, after: str) -> None:
    if after == "a dead one":
        process = start(tmp_path, 60)
        assert first_line(process) == "held\n"
        end(process)
    processes = [start(tmp_path, 60) for _ in range(10)]
    try:
        answers = [first_line(process) for process in processes]
        assert sorted(answer.split()[0] for answer in answers) == ["held", *["refused"] * 9]
        holder = processes[answers.index("held\n")]
        assert all(f"process {holder.pid} on" in answer for answer in answers if answer != "held\n")
    finally:
        for process in processes:
            end(process)


def elsewhere(folder: Path, token: str = "0" * 16, **changes: object) -> Path:
    """The lock of a process on another machine; returns its beat."""
    record = {
        "token": token, "host": "node-42", "machine": "another", "process": 7, "started": "1", "command": "a.py",
        "since": "2026-01-02T03:04:05+00:00", **changes,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(record))
    beat = folder / f"{NAME}.{token}.beat"
    beat.touch()
    return beat


def test_a_holder_elsewhere_lives_as_long_as_it_beats(tmp_path: Path, quick: None) -> None:
    beat, over = elsewhere(tmp_path), threading.Event()

    def live() -> None:
        while not over.wait(0.2):
            beat.touch()

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(ValueError, match="process 7 on node-42, since 2026-01-02 03:04:05 UTC"):
            hold(Folder(str(tmp_path))).__enter__()
    finally:
        over.set()
        thread.join()
    began = time.monotonic()
    with hold(Folder(str(tmp_path))):  # it beats no more
        assert time.monotonic() - began > 0.9
    assert locks(tmp_path) == []


def test_a_holder_elsewhere_that_ends_while_it_is_watched(tmp_path: Path, quick: None) -> None:
    elsewhere(tmp_path)
    threading.Timer(0.3, (tmp_path / NAME).unlink).start()
    began = time.monotonic()
    with hold(Folder(str(tmp_path))):
        assert time.monotonic() - began < 0.9


def test_a_job_that_slurm_queued_again_follows_itself_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(lock, "STALE_S", 60)
    for name, value in {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name, value)
    beat = elsewhere(tmp_path, job="c/77", restart=1)
    with hold(Folder(str(tmp_path))):
        pass
    beat = elsewhere(tmp_path, job="c/77", restart=2)  # another task of this very try
    threading.Timer(0.3, beat.touch).start()
    with pytest.raises(ValueError, match="node-42"):
        hold(Folder(str(tmp_path))).__enter__()


@pytest.mark.parametrize("how", ["taken over", "removed"])
def test_who_lost_the_lock_stops(tmp_path: Path, quick: None, how: str) -> None:
    lost = threading.Event()
    with hold(Folder(str(tmp_path)), lost.set) as held:
        held.check()
        if how == "removed":
            (tmp_path / NAME).unlink()
        else:
            successor = json.loads((tmp_path / NAME).read_text()) | {"token": "f" * 16, "host": "node-42"}
            (tmp_path / f"{NAME}.{held.own.token}").write_text(json.dumps(successor))
        assert lost.wait(5)
        with pytest.raises(ValueError, match=how):
            held.check()
    assert (NAME in locks(tmp_path)) == (how == "taken over"), "the lock of the other one stays"


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    own = lock._this_process()
    elsewhere(tmp_path, machine=own.machine, process=own.process, started="1")
    with hold(Folder(str(tmp_path))):
        pass


@pytest.mark.parametrize("content", ["", "{", '{"someone": "else"}', "[]"])
def test_a_file_that_is_no_lock_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    with pytest.raises(ValueError, match=r"lock\.json is no lock of ours"):
        hold(Folder(str(tmp_path))).__enter__()
    assert (tmp_path / NAME).read_text() == content


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with hold(Folder(str(tmp_path))), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        hold(Folder(str(tmp_path))).__enter__()
    assert list(tmp_path.iterdir()) == []


# --- an object store --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket():  # type: ignore[no-untyped-def]
    """Environment and URL of a bucket behind a real S3 server (moto, on loopback)."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
    }
    patch = pytest.MonkeyPatch()
    for name, value in environment.items():
        patch.setenv(name, value)
    fsspec.config.set_conf_env(fsspec.config.conf)
    fsspec.filesystem("s3").mkdir("locks")
    yield "s3://locks"
    patch.undo()
    fsspec.config.conf.pop("s3", None)
    server.stop()


def test_a_bucket_creates_a_file_once(bucket: str) -> None:
    folder = Folder(f"{bucket}/once")
    assert [folder.create_bytes("x", content) for content in (b"a", b"b")] == [True, False]
    assert folder.read_bytes("x") == b"a"


def test_one_holder_in_a_bucket_and_its_successor(bucket: str) -> None:
    url = f"{bucket}/run"
    processes = [start(url, 60) for _ in range(4)]
    try:
        answers = [first_line(process) for process in processes]
        assert sorted(answer.split()[0] for answer in answers) == ["held", *["refused"] * 3]
    finally:
        for process in processes:
            end(process)
    with hold(Folder(url)):
        assert NAME in Folder(url).entries()
    assert Folder(url).entries() == []


# --- the command ------------------------------------------------------------------------------------------------------


def command(out: Path, pool: Path, *more: str) -> list[str]:
    settings = ["--config", "offline", "execution.workers=1", "execution.memory_gb=0.5", "retrieve.k=2"]
    return [sys.executable, "-m", "curation.run", "--seed", str(pool), "--pool", str(pool), "--out", str(out),
            *settings, *more]  # fmt: skip


@pytest.mark.slow
def test_two_commands_on_one_folder_and_a_third_after_a_kill(tmp_path: Path) -> None:
    out, pool = tmp_path / "run", picture_tar(tmp_path / "pool.tar", range(8))
    first = subprocess.Popen(command(out, pool), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (out / "run.json").exists():
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.01)
        second = subprocess.run(command(out, pool, "retrieve.k=3"), cwd=REPOSITORY, capture_output=True, text=True)
        assert second.returncode == 1
        assert len(second.stderr.strip().splitlines()) == 1, second.stderr
        assert f"process {first.pid} on" in second.stderr
        planned = subprocess.run(command(out, pool, "--dry-run"), cwd=REPOSITORY, capture_output=True, text=True)
        assert planned.returncode == 0, planned.stderr
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=30)
    third = subprocess.run(command(out, pool), cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert third.returncode == 0, third.stderr
    assert f"taking over from process {first.pid}" in third.stderr
    assert locks(out) == []
    assert (out / "report.html").exists()
