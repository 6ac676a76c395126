"""Two gloo ranks against one, through torchrun: losses, teacher, and a checkpoint that changes hands."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, encoded, picture, picture_tar, write_tar
from tests.pretrain.tiny_train import TINY, losses, same_teacher

# KoLeo over the whole batch, and stochastic depth off: both otherwise depend on which images share a rank.
SETTINGS = ["loss.koleo_group_size=8", "model.drop_path=0", "steps=20", "checkpoint.every_steps=10"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    picture_tar(folder / "shards" / "a.tar", range(24))
    return folder / "tiny.yaml", folder / "shards"


@pytest.fixture(scope="module")
def one_rank(setting: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    train(1, setting, out, *SETTINGS)
    return out


def train(num_ranks: int, setting: tuple[Path, Path], out: Path, *overrides: str) -> None:
    config, shards = setting
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(torchrun if num_ranks > 1 else []), "-m", "pretrain.train", "--config", str(config)]
    command += ["--shards", str(shards), "--out", str(out), *overrides]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_have_the_losses_of_one(
    mode: str, setting: tuple[Path, Path], one_rank: Path, tmp_path: Path
) -> None:
    train(2, setting, tmp_path / "two", *SETTINGS, f"execution.parallel={mode}")
    one, two = losses(one_rank), losses(tmp_path / "two")
    assert len(one) == 20
    # Sums over images in another order, in float32.
    assert two == pytest.approx(one, rel=1e-5)
    # The terms, too, where a sum could hide a difference.
    for a, b in zip(read(one_rank), read(tmp_path / "two"), strict=True):
        terms = [name for name in a if name.startswith("loss/")]
        assert {n: b[n] for n in terms} == pytest.approx({n: a[n] for n in terms}, rel=2e-5)


@pytest.mark.slow
def test_a_checkpoint_of_two_sharded_ranks_goes_on_in_one_process(
    setting: tuple[Path, Path], one_rank: Path, tmp_path: Path
) -> None:
    train(2, setting, tmp_path / "two", *SETTINGS, "execution.parallel=fsdp")
    out = tmp_path / "one"
    shutil.copytree(tmp_path / "two" / "checkpoints" / "step-00000010", out / "checkpoints" / "step-00000010")
    train(1, setting, out, *SETTINGS)
    late = {step: loss for step, loss in losses(one_rank).items() if step > 10}
    assert losses(out) == pytest.approx(late, rel=1e-5)


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_repeat_themselves_to_the_bit(setting: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(2, setting, tmp_path / name, "steps=5", "model.drop_path=0.3", "execution.parallel=fsdp")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert same_teacher(tmp_path / "a", tmp_path / "b")
    teacher = load_file(tmp_path / "a" / "teacher" / "teacher.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in teacher.values())


@pytest.mark.slow
def test_an_evaluation_that_fails_is_an_alarm_and_all_ranks_go_on(setting: tuple[Path, Path], tmp_path: Path) -> None:
    members = [(f"k{n}.png", encoded(picture(n, (32, 32)), "PNG")) for n in range(6)]
    members += [(f"k{n}.json", json.dumps({"label": "ab"[n % 2]}).encode()) for n in range(6)]
    write_tar(tmp_path / "set.tar", sorted(members))
    sets = {"train": str(tmp_path / "set.tar"), "val": str(tmp_path / "set.tar"), "px": 32, "resize_px": 32, "k": [7]}
    phases = {"a": {"steps": 1}, "b": {"steps": 2, "evaluation": {"every_steps": 2, "pca_images": 0, **sets}}}
    train(2, setting, tmp_path / "run", f"phases={json.dumps(phases)}", "execution.parallel=hybrid")
    assert len(losses(tmp_path / "run")) == 3
    failed = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in failed] == [2, 3]
    assert all(line["failed"].startswith("k=7 neighbours asked for, but the training set has 6") for line in failed)
