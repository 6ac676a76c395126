"""The training loop from shards to a teacher, in one process: phases, stopping, resuming, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import teacher_state
from pretrain.downstream.backbone import load_backbone
from pretrain.train import FINISHED, NOT_FINITE, STOPPED, WRONG_INPUT
from tests.conftest import REPOSITORY, picture_tar, write_tar
from tests.pretrain.tiny_train import HIGH_RESOLUTION, losses, run, same_teacher, wait_for_step


def test_two_phases_end_with_a_teacher_and_a_report(config: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    phases = f"phases={json.dumps({'pretrain': {}, 'high_resolution': HIGH_RESOLUTION})}"
    assert run(config, shards, out, phases) == FINISHED
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["pretrain"] * 6 + ["high_resolution"] * 2
    assert all(line["loss"] > 0 and line["teacher_entropy/dino"] > 0 for line in lines)
    backbone = load_backbone(out)
    assert backbone.model.pos_embed.shape[1] == 1 + 6 * 6, "the table grew with the phase"
    assert backbone.features(torch.zeros(1, 3, 48, 32)).grid == (6, 4)
    assert (out / "report.html").stat().st_size > 1000
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert skipped
    assert {line["image"].split(":")[-1] for line in skipped} == {"broken.jpg"}


def test_a_finished_run_has_nothing_left_to_do(config: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(config, shards, out, "steps=2") == FINISHED
    before = (out / "teacher" / "teacher.safetensors").stat().st_mtime_ns
    assert run(config, shards, out, "steps=2") == FINISHED
    assert (out / "teacher" / "teacher.safetensors").stat().st_mtime_ns == before
    # Killed between its last checkpoint and the teacher's folder, a run still gets both.
    weights = load_file(out / "teacher" / "teacher.safetensors")
    shutil.rmtree(out / "teacher")
    (out / "report.html").unlink()
    assert run(config, shards, out, "steps=2") == FINISHED
    again = load_file(out / "teacher" / "teacher.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert (out / "report.html").exists()


@pytest.mark.slow
def test_a_run_stopped_by_a_signal_continues_with_the_same_losses(config: Path, shards: Path, tmp_path: Path) -> None:
    assert run(config, shards, tmp_path / "whole", "model.drop_path=0.3") == FINISHED
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "pretrain.train", "--config", str(config), "--shards", str(shards)]
    command += ["--out", str(out), "model.drop_path=0.3"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_step(out, 1, process)
        process.send_signal(signal.SIGTERM)
        _, messages = process.communicate(timeout=60)
    finally:
        process.kill()
    # It may have been at its last step already when the signal came.
    assert process.returncode in (STOPPED, FINISHED), messages
    assert run(config, shards, out, "model.drop_path=0.3") == FINISHED
    assert losses(out) == losses(tmp_path / "whole")
    assert same_teacher(out, tmp_path / "whole")


@pytest.mark.slow
def test_kill_at_any_step_leaves_no_trace(config: Path, shards: Path, tmp_path: Path) -> None:
    """SIGKILL at five steps of one run; losses and teacher then equal those of an undisturbed run, to the last bit."""
    settings = [
        "steps=12",
        "model.drop_path=0.3",
        "execution.loader.num_workers=1",
        f"phases={json.dumps({'a': {}, 'b': HIGH_RESOLUTION})}",
    ]
    assert run(config, shards, tmp_path / "whole", *settings) == FINISHED
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "pretrain.train", "--config", str(config), "--shards", str(shards)]
    command += ["--out", str(out), *settings]
    seed = int.from_bytes(os.urandom(4), "big")
    steps = sorted((torch.randperm(13, generator=torch.Generator().manual_seed(seed))[:5] + 1).tolist())
    for step in steps:
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        wait_for_step(out, step, process)
        process.kill()
        process.wait(timeout=30)
    assert run(config, shards, out, *settings) == FINISHED
    assert losses(out) == losses(tmp_path / "whole"), f"killed at {steps} (seed {seed})"
    assert same_teacher(out, tmp_path / "whole"), f"killed at {steps} (seed {seed})"


def test_accumulation_changes_nothing(config: Path, shards: Path, tmp_path: Path) -> None:
    # KoLeo's neighbours are those of the micro-batch, so it is left out.
    settings = ["loss.koleo_weight=0", "steps=4"]
    assert run(config, shards, tmp_path / "one", *settings) == FINISHED
    assert run(config, shards, tmp_path / "two", *settings, "execution.accumulation_steps=2") == FINISHED
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    # Float32 sums in another order, after AdamW has divided by its second moments.
    assert two == pytest.approx(one, rel=1e-5)


def test_softmax_centring_tied_heads_and_checkpointing_train(config: Path, shards: Path, tmp_path: Path) -> None:
    settings = ["loss.centering=softmax", "heads.tied=true", "precision=bfloat16", "steps=3"]
    assert run(config, shards, tmp_path / "run", *settings, "execution.activation_checkpointing=true") == FINISHED
    assert not any(n.startswith("ibot") for n in load_file(tmp_path / "run" / "teacher" / "teacher.safetensors"))
    assert run(config, shards, tmp_path / "plain", *settings) == FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "plain"), "recomputing the blocks is exact"


def test_the_moving_centre_goes_on_in_the_next_phase(config: Path, shards: Path, tmp_path: Path) -> None:
    out, phases = tmp_path / "run", json.dumps({"pretrain": {"steps": 4}, "next": {"steps": 2}})
    assert run(config, shards, out, f"phases={phases}", "loss.centering=softmax") == FINISHED
    first, last = (teacher_state(out / "checkpoints" / f"step-0000000{n}", "centering.") for n in (4, 6))
    # A tenth is new at each step: a centre that started again would be half as long.
    assert last["dino.center"].norm() > 0.8 * first["dino.center"].norm()


def test_gram_anchoring_with_a_larger_view(config: Path, shards: Path, tmp_path: Path) -> None:
    gram = {"gram": {"weight": 2.0, "refresh_every_steps": 1, "max_refreshes": 1}, "crops": {"gram_px": 64}, "steps": 3}
    settings = [f"phases={json.dumps({'pretrain': {}, 'gram': gram})}", "steps=3", "model.architecture=dinov3_tiny"]
    settings += ["model.position_px=null", "model.rope_rescale=2.0", "masks.probability=0"]
    assert run(config, shards, tmp_path / "run", *settings) == FINISHED
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["loss/gram" in line for line in lines] == [False] * 3 + [True] * 3
    assert all(line["loss/gram"] > 0 for line in lines[3:])


def test_distillation_from_a_larger_frozen_teacher(config: Path, shards: Path, tmp_path: Path) -> None:
    assert run(config, shards, tmp_path / "large", "model.depth=3", "steps=2") == FINISHED
    frozen = (tmp_path / "large" / "teacher" / "teacher.safetensors").read_bytes()
    settings = ["model.depth=1", f"distill_from={tmp_path / 'large'}", "steps=40", "optim.teacher_momentum=0.5"]
    assert run(config, shards, tmp_path / "small", *settings, "loss.same_crop_pairs=true") == FINISHED
    by_step = losses(tmp_path / "small")
    assert sum(by_step[s] for s in range(36, 41)) < sum(by_step[s] for s in range(1, 6)), "the student comes nearer"
    assert len(load_backbone(tmp_path / "small").model.blocks) == 1
    assert (tmp_path / "large" / "teacher" / "teacher.safetensors").read_bytes() == frozen
    assert run(config, shards, tmp_path / "wrong", *settings, "heads.dino.num_prototypes=32") == WRONG_INPUT


def test_a_run_starts_from_another_teacher(config: Path, shards: Path, tmp_path: Path) -> None:
    assert run(config, shards, tmp_path / "first", "steps=2") == FINISHED
    still = [f"init_from={tmp_path / 'first'}", "optim.base_lr=1e-12", "model.position_px=48", "crops.global_px=48"]
    still += ["optim.warmup_steps=0", "optim.freeze_last_layer_steps=0"]
    assert run(config, shards, tmp_path / "second", "steps=1", *still) == FINISHED
    first, second = load_backbone(tmp_path / "first").model, load_backbone(tmp_path / "second").model
    assert second.pos_embed.shape[1] == 37
    torch.testing.assert_close(second.blocks[0].mlp.fc1.weight, first.blocks[0].mlp.fc1.weight)


def test_what_is_not_finite_stops_the_run_and_is_named(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["optim.base_lr=1e30", "optim.warmup_steps=0", "optim.clip_norm=0"]
    assert run(config, shards, tmp_path / "run", *settings) == NOT_FINITE
    message = capsys.readouterr().err
    assert "step 1" in message
    assert "loss/dino" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["global_batch_size=64"], "25 images, fewer than global_batch_size=64"),
        (["crops.global_px=30"], "crops.global_px=30 is not a multiple of the patch size 8"),
        (["crops.local_px=15"], "crops.local_px=15 is not a multiple of the patch size 8"),
        (["model.architecture=vit"], "model.architecture='vit' is unknown"),
        (["optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
        (["phases={pretrain: {optim: {lr: 1}}}"], "phases.pretrain: unknown key 'optim.lr'"),
        (["global_batch_size=9", "execution.accumulation_steps=2"], "the nearest that do are 8 and 10"),
        (["global_batch_size=8", "execution.accumulation_steps=8"], "KoLeo needs two images"),
        (["gram.weight=1"], "needs crops.gram_px"),
        (["init_from=/nowhere"], "/nowhere does not exist"),
        (["loss.centering=mean"], "choose one of sinkhorn, softmax"),
        (["heads.tied=true", "heads.ibot.num_prototypes=7"], "one head for both"),
        (["execution.device=cuda"], "no GPU") if not torch.cuda.is_available() else (["steps=0"], "at least 1"),
    ],
)
def test_wrong_settings_are_one_clear_sentence(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert run(config, shards, tmp_path / "run", *overrides) == WRONG_INPUT
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_wrong_shards_are_named(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "text.tar", [("a.txt", b"no image")])
    for shards in (tmp_path / "missing", tmp_path / "empty", tmp_path / "text.tar"):
        assert run(config, shards, tmp_path / "run") == WRONG_INPUT
        assert str(shards) in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_model_or_other_images_do_not_continue_a_run(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(config, shards, out, "steps=2") == FINISHED
    assert run(config, shards, out, "steps=2", "model.depth=3") == WRONG_INPUT
    assert "model.depth=2, and now model.depth=3" in capsys.readouterr().err
    picture_tar(tmp_path / "other" / "a.tar", range(24))
    assert run(config, tmp_path / "other", out, "steps=2") == WRONG_INPUT
    assert "data.datasets" in capsys.readouterr().err
    wide = ["heads.dino.hidden_dim=16", "steps=2", f"init_from={out}"]
    assert run(config, shards, tmp_path / "new", *wide) == WRONG_INPUT
    assert "another dino_head" in capsys.readouterr().err
