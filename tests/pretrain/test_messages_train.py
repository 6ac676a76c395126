"""What goes wrong around a training is one sentence, with a status, and the last whole checkpoint stays."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from pretrain import launch
from pretrain.downstream.backbone import load_backbone
from pretrain.downstream.evals import __main__ as evaluations
from pretrain.downstream.export import __main__ as export
from pretrain.train import FAILED, FINISHED, WRONG_INPUT, main
from pretrain.watch.report import __main__ as report
from tests.conftest import REPOSITORY, encoded, picture, picture_tar, write_tar
from tests.pretrain.tiny_train import TINY


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml, shards/, labelled.tar, a file, an empty folder, and odd configs."""
    folder = tmp_path_factory.mktemp("messages")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    picture_tar(folder / "shards" / "a.tar", range(16))
    labelled(folder / "labelled.tar")
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    odd = {"list": "- a\n- b\n", "phases_list": "phases: [a]\n", "phases_int": "phases: {a: 3}\n", "word": "hello\n"}
    for name, text in odd.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "latin.yaml").write_bytes("seed: 1 # é".encode("latin1"))
    (folder / "folder.yaml").mkdir()
    damaged = [(f"x{i}.jpg", b"\xff\xd8\xff no image" + bytes(i)) for i in range(20)]
    write_tar(folder / "damaged.tar", damaged)
    write_tar(folder / "half.tar", [*damaged, *((f"p{i}.jpg", encoded(picture(i))) for i in range(16))])
    return folder


def labelled(path: Path) -> Path:
    members = []
    for i in range(8):
        members += [(f"l{i}.jpg", encoded(picture(i))), (f"l{i}.json", json.dumps({"label": i % 2}).encode())]
    return write_tar(path, members)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": main,
    "launch": launch.main,
    "export": export.main,
    "evals": evaluations.main,
    "report": report.main,
}
TRAIN = ["--config", "tiny.yaml", "--shards", "shards", "--out", "run"]
SETS = ["--data", "train=shards", "val=shards"]


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        *[
            (command, ["--config", config, *TRAIN[2:]], words)
            for command in ("train", "launch")
            for config, words in [
                ("folder.yaml", "that is a folder"),
                ("list.yaml", "found a list"),
                ("word.yaml", "found a str"),
                ("latin.yaml", "latin.yaml is not readable as YAML"),
                ("phases_list.yaml", "phases is a mapping"),
                ("phases_int.yaml", "phases.a is a mapping"),
            ]
        ],
        *[
            (command, [*TRAIN, setting], words)
            for command in ("train", "launch")
            for setting, words in [
                ("phases=[a]", "phases is a mapping"),
                ("data.datasets=[a]", "data.datasets is a mapping"),
                ("crops.sizes=[3]", "crops.sizes.0 is a section"),
                ("model.patch_size=0", "model.patch_size=0 must be 1 or more"),
                ("heads.dino.num_prototypes=0", "heads.dino.num_prototypes=0 must be 2 or more"),
                ("loss.student_temperature=0", "loss.student_temperature=0.0 must be above 0"),
                ("execution.device=mps", "execution.device='mps' is unknown"),
                ("optim.warmup_steps=7", "optim.warmup_steps=7: longer than the phase, steps=6"),
                ("evaluation={every_steps: 2, val: nowhere}", "evaluation.val=nowhere: nothing found"),
                (
                    "evaluation={every_steps: 2, val: labelled.tar, train: gone.tar}",
                    "evaluation.train=gone.tar: nothing found",
                ),
            ]
        ],
        *[
            (command, [*TRAIN[:2], "--shards", shards, *TRAIN[4:]], words)
            for command in ("train", "launch")
            for shards, words in [
                ("", "is empty: name images"),
                (" ", "is empty"),
                ("nowhere", "nothing found at 'nowhere'"),
            ]
        ],
        *[
            (command, [*TRAIN[:4], "--out", out], words)
            for command in ("train", "launch")
            for out, words in [
                ("file", "is a file"),
                ("", "it is empty"),
                ("file/below", "is a file: --out names a folder"),
            ]
        ],
        ("train", [*TRAIN, "--bogus"], "unrecognized arguments: --bogus"),
        ("train", ["--config", "tiny.yaml", "--shards", "damaged.tar", "--out", "run"], "are all damaged"),
        ("launch", [*TRAIN, "--cluster", "slurm"], "--cluster slurm needs sbatch, which is not here"),
        ("launch", [*TRAIN, "--mem-gb", "nan"], "must be 0 or more"),
        ("launch", [*TRAIN, "--bogus"], "unrecognized arguments: --bogus"),
        ("export", ["nowhere", "out"], "nowhere does not exist"),
        ("export", ["empty", "out"], "empty holds no weights"),
        ("export", ["file", "out"], "file is no file of weights"),
        ("export", ["empty", ""], "it is empty"),
        ("export", ["empty", "file"], "file exists"),
        ("export", ["empty", "out", "a=["], "has no value that can be read"),
        ("export", ["empty", "out", "position_offset=word"], "position_offset=word must be in"),
        ("evals", ["knn", "empty", *SETS], "empty holds no weights"),
        ("evals", ["knn", "file", *SETS], "file is no file of weights"),
        ("evals", ["knn", "empty", *SETS, "--device", "mps"], "--device='mps' is unknown; choose one of auto, cpu"),
        ("evals", ["knn", "empty", *SETS, "--device", "gpu:0"], "--device='gpu:0' is unknown"),
        ("evals", ["knn", "pixels", *SETS, "--px", "0"], "--px 0 must be 1 or more"),
        ("evals", ["knn", "pixels", *SETS, "train_labels=gone.csv"], "gone.csv"),
        ("evals", ["knn", "pixels", *SETS, "--out", ""], "it is empty"),
        ("evals", ["nkk", "pixels", *SETS], "there is no evaluation 'nkk'; name some of knn, linear"),
        ("evals", ["knn", "pixels", *SETS, "px=0", "knn.k=[]"], "knn.k=[] must be one or more"),
        ("evals", ["knn", "pixels", *SETS, "linear.epochs=3"], "linear is not among what is evaluated"),
        ("evals", ["knn", "pixels", "--data", "train=shards"], "give val; this kind of set has train, val"),
        ("evals", ["knn", "pixels", "--data", "train=shards", "val=gone/*.tar"], "data: val=gone/*.tar: nothing found"),
        ("evals", ["knn", "pixels", "--data", "gone.yaml"], "gone.yaml is not readable"),
        ("evals", ["knn", "pixels", "pixels", *SETS], "pixels is named twice"),
        ("evals", ["depth,knn", "pixels", *SETS], "sets of different kinds: give --data a file"),
        ("report", ["nowhere"], "there is no folder nowhere"),
        ("report", ["file"], "there is no folder file"),
        ("report", [""], "it is empty"),
    ],
)
def test_wrong_input_is_one_sentence(
    command: str,
    arguments: list[str],
    words: str,
    setting: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(setting)
    before = sorted(setting.rglob("*"))
    try:
        status = COMMANDS[command](arguments)
    except SystemExit as left:  # argparse prints the usage before its sentence
        status = int(left.code or 0)
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert status in (FAILED, WRONG_INPUT)
    assert len(said) == 1
    assert words in said[0]
    if command != "train" or "damaged.tar" not in arguments:
        assert sorted(setting.rglob("*")) == before, "nothing was written"
    shutil.rmtree(setting / "run", ignore_errors=True)


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="there may be a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_said(device: str, setting: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["knn", str(setting), "--data", "train=x", "val=x", "--device", device]
    assert evaluations.main(asked) == WRONG_INPUT
    assert f"--device={device}, but torch sees no GPU here" in capsys.readouterr().err


def start(setting: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pretrain.train", "--config", str(setting / "tiny.yaml")]
    command += ["--shards", str(setting / "shards"), "--out", str(out), *overrides]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, small enough to be filled."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("full", ["checkpoint", "metrics", "tensorboard"])
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(full: str, setting: Path, small_disk: Path) -> None:
    out = small_disk / "run"
    every = 2 if full == "checkpoint" else 1000
    asked = ["steps=2000", f"checkpoint.every_steps={every}", f"watch.tensorboard={full == 'tensorboard'}"]
    process = start(setting, out, *asked)

    def fill() -> None:
        first = out / ("checkpoints/step-00000002" if full == "checkpoint" else "metrics.jsonl")
        while process.poll() is None and not first.exists():
            time.sleep(0.02)
        with suppress(OSError), (small_disk / "filler").open("wb") as file:  # whatever is free, and what gets free
            while process.poll() is None:
                file.write(bytes(1 << 16))
                file.flush()

    def keep_filling() -> None:
        while process.poll() is None:
            fill()
            time.sleep(0.01)

    thread = threading.Thread(target=keep_filling)
    thread.start()
    _, messages = process.communicate(timeout=300)
    thread.join()
    assert "Traceback" not in messages
    assert process.returncode == FAILED, messages
    (said,) = [line for line in messages.splitlines() if line.startswith("error: ")]
    assert "the disk is full" in said
    (small_disk / "filler").unlink()
    if full == "checkpoint":
        whole = sorted((out / "checkpoints").glob("step-*"))
        assert whole
        assert load_backbone(whole[-1]).description["step"] >= 2


@pytest.mark.slow
def test_a_read_only_folder_is_one_sentence(setting: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        folder, words = tmp_path / "locked", "no permission"
    else:
        folder, words = Path("/proc/1/task"), ""  # nobody makes a folder there
    process = start(setting, folder / "run", "steps=1")
    _, messages = process.communicate(timeout=200)
    assert process.returncode == FAILED, messages
    assert "Traceback" not in messages
    assert words in next(line for line in messages.splitlines() if line.startswith("error: "))


@pytest.mark.slow
def test_a_killed_loader_worker_is_one_sentence(setting: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(setting, out, "steps=400", "execution.loader.num_workers=2")

    def kill_one() -> None:
        end = time.monotonic() + 150
        while time.monotonic() < end and not (out / "metrics.jsonl").exists():
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    _, messages = process.communicate(timeout=200)
    thread.join()
    assert process.returncode == FAILED, messages
    assert "Traceback" not in messages
    (said,) = [line for line in messages.splitlines() if line.startswith("error: ")]
    assert "a loader worker was killed" in said
    assert "execution.loader.num_workers" in said


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_said_by_reason_and_count(
    workers: int, setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "--config",
        str(setting / "tiny.yaml"),
        "--shards",
        str(setting / "half.tar"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*asked, "steps=3", f"execution.loader.num_workers={workers}"]) == FINISHED
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged images replaced" in line]
    assert 1 <= len(said) <= 4
    count = len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    assert f"so far: {count} not_an_image" in said[-1]


def test_only_damaged_images_in_workers_is_one_line(
    setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "--config",
        str(setting / "tiny.yaml"),
        "--shards",
        str(setting / "damaged.tar"),
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*asked, "execution.loader.num_workers=2"]) == WRONG_INPUT
    messages = capsys.readouterr().err
    assert "Traceback" not in messages
    assert "are all damaged" in messages.splitlines()[-1]


@pytest.mark.parametrize("harm", ["gone", "cut", "unlabelled"])
def test_an_evaluation_that_fails_later_costs_neither_run_nor_checkpoint(
    harm: str, setting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set is harmed by whoever writes the checkpoint of step 2, as a file system might at any time."""
    tar, out = labelled(tmp_path / "labelled.tar"), tmp_path / "run"

    def hurt() -> None:
        while not (out / "checkpoints" / "step-00000002").exists():
            time.sleep(0.001)
        if harm == "gone":
            tar.unlink()
        elif harm == "cut":
            tar.write_bytes(tar.read_bytes()[:700])
        else:
            write_tar(tar, [("a.jpg", encoded(picture(1)))])

    thread = threading.Thread(target=hurt)
    thread.start()
    evaluation = f"evaluation={{every_steps: 3, val: {tar}, train: {tar}, k: [1], px: 32, pca_images: 1}}"
    asked = ["--config", str(setting / "tiny.yaml"), "--shards", str(setting / "shards"), "--out", str(out)]
    assert main([*asked, "steps=6", evaluation]) == FINISHED
    thread.join()
    lines = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 3, 6]
    assert "knn" in lines[0]
    assert "failed" in lines[-1]
    assert "evaluation_failed" in (out / "alarms.jsonl").read_text()
    assert "the evaluation failed, and training goes on" in capsys.readouterr().err
    assert "the evaluation failed" in (out / "report.html").read_text()
    assert (out / "checkpoints" / "step-00000006" / "manifest.json").exists()


def test_an_evaluation_that_a_run_was_killed_in_is_made_up_for(setting: Path, tmp_path: Path) -> None:
    tar, out = labelled(tmp_path / "labelled.tar"), tmp_path / "run"
    evaluation = f"evaluation={{every_steps: 3, val: {tar}, train: {tar}, k: [1], px: 32, pca_images: 1}}"
    asked = ["--config", str(setting / "tiny.yaml"), "--shards", str(setting / "shards"), "--out", str(out), evaluation]
    assert main([*asked, "steps=6"]) == FINISHED
    file = out / "evaluations.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n")  # what a kill before the last line leaves
    (out / "report.html").unlink()
    assert main([*asked, "steps=6"]) == FINISHED
    assert json.loads(file.read_text().splitlines()[-1]) == json.loads(lines[-1])
