"""Steps whose values are not finite: skipped without a trace, counted, repeated; and advice that can be followed."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from pretrain import replay
from pretrain.checkpoint import teacher_state
from pretrain.config import TrainConfig, load_train_config
from pretrain.data.collate import Batch
from pretrain.data.loader import read_tables
from pretrain.optim.clip import FiniteWatch
from pretrain.optim.ema import update_ema
from pretrain.phase import Phase, fresh_network, phase_loader
from pretrain.train import FINISHED, NOT_FINITE, WRONG_INPUT
from tests.pretrain.tiny_train import TINY, losses, run


@pytest.fixture
def phase(config: Path, shards: Path) -> tuple[Phase, list[Batch]]:
    asked = load_train_config(str(config), ["loss.centering=softmax"], [str(shards)])
    student, teacher = fresh_network(asked), fresh_network(asked)
    batches = list(phase_loader(asked, 0, 0, read_tables(asked.data)))
    return Phase(asked.phase("pretrain"), 0, student, teacher), batches


def snapshot(phase: Phase) -> list[torch.Tensor]:
    tensors = [*phase.student.state_dict().values(), *phase.teacher.state_dict().values(), *phase.centering.buffers()]
    tensors += [value for state in phase.optimizer.state.values() for value in state.values()]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("poison", ["loss", "gradient", "teacher"])
def test_a_skipped_step_leaves_everything_as_it_was(phase: tuple[Phase, list[Batch]], poison: str) -> None:
    trained, batches = phase
    trained.step(batches[0], 0, diagnose=False)
    before = snapshot(trained)
    hooks = []
    if poison == "loss":
        hooks.append(trained.student.backbone.register_forward_hook(lambda *_: _nan(_[-1])))
    elif poison == "gradient":
        hooks.append(trained.student.dino_head.mlp[0].weight.register_hook(lambda gradient: gradient * math.nan))
    else:
        hooks.append(trained.teacher.dino_head.mlp[0].register_forward_hook(lambda *_: _[-1] * math.nan))
    watched = trained.step(batches[1], 1, diagnose=True)
    assert any(not value.isfinite().all() for value in watched.values())
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(trained), strict=True))
    (skipped,) = trained.finite.take()
    assert skipped.step == 1
    trained.step(batches[2], 2, diagnose=False)
    assert trained.finite.in_a_row == 0
    assert not all(torch.equal(a, b) for a, b in zip(before, snapshot(trained), strict=True))


def _nan(features: list) -> list:
    from dataclasses import replace

    return [replace(f, cls=f.cls * math.nan) for f in features]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_so_many_in_a_row_are_let_pass(most: int) -> None:
    watch = FiniteWatch(most)
    for step in range(most):
        watch.watch(step, {"dino": torch.tensor(math.nan)})
        watch.check()
    watch.watch(most, {"dino": torch.tensor(1.0)})
    watch.check()
    for step in range(most + 1, 2 * most + 1):
        watch.watch(step, {"dino": torch.tensor(math.inf)})
        watch.check()
    watch.watch(2 * most + 1, {"dino": torch.tensor(math.inf)})
    with pytest.raises(FloatingPointError, match=f"step {2 * most + 1}: dino not finite"):
        watch.check()
    assert len(watch.take()) == 2 * most + 1


@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 4)])
def test_an_update_that_is_not_skipped_is_the_same_to_the_last_bit(shape: tuple[int, ...]) -> None:
    teacher, student = torch.randn(shape), torch.randn(shape)
    plain, flagged, skipped = teacher.clone(), teacher.clone(), teacher.clone()
    update_ema(([plain], [student]), 0.992)
    update_ema(([flagged], [student]), 0.992, torch.zeros(()))
    update_ema(([skipped], [student]), 0.992, torch.ones(()))
    assert torch.equal(plain, flagged)
    assert not torch.equal(plain, teacher)
    assert torch.equal(skipped, teacher)


@pytest.mark.slow
def test_the_end_of_a_run_that_diverges_and_its_advice(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two good steps; then a rate that breaks it, on purpose; then what the message says, word by word."""
    out = tmp_path / "run"
    assert run(config, shards, out, "phases={a: {steps: 2}}") == FINISHED
    two = "phases={a: {steps: 2}, b: {steps: 12, optim: {warmup_steps: 0, base_lr: 1e30, clip_norm: 0}}}"
    capsys.readouterr()
    assert run(config, shards, out, two, "checkpoint.every_steps=3") == NOT_FINITE
    message = capsys.readouterr().err
    error = message.strip().splitlines()[-1]
    assert "as in the 3 step(s) before" in error
    assert "loss/dino" in error
    alarms = [json.loads(line) for line in (out / "alarms.jsonl").read_text().splitlines()]
    assert [alarm["name"] for alarm in alarms].count("skipped_step") == 4
    records = sorted((out / "nonfinite").iterdir())
    assert len(records) == 4
    named = re.search(r"step (\d+): ", error)
    assert named
    assert records[-1].name == f"step-{int(named[1]):08d}.json"
    advised = re.search(r"give the same command with (.*?); if", error)
    assert advised
    settings = shlex.split(advised.group(1))
    assert settings[:2] == ["--allow-changed", "phases.b.optim.base_lr"]
    lower = [setting if "=" not in setting else f"{setting.partition('=')[0]}=0.001" for setting in settings]
    # The step that broke the weights was finite itself; its checkpoint, if there is one, is deleted as is said.
    repeated = re.search(r"python -m pretrain.replay (\S+?)\.? *$", error)
    assert repeated
    assert replay.main([repeated.group(1), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "loss/dino: nan" in printed
    assert "images give features that are not finite" in printed
    for name in sorted((out / "checkpoints").iterdir())[::-1]:
        if run(config, shards, out, two, *lower) == FINISHED:
            break
        shutil.rmtree(name)
    assert sorted(losses(out)) == list(range(1, 15))
    assert all(value is not None for value in losses(out).values())


def test_a_checkpoint_never_holds_weights_that_are_not_finite(config: Path, shards: Path, tmp_path: Path) -> None:
    settings = ["optim.base_lr=3e38", "optim.warmup_steps=0", "optim.clip_norm=0", "checkpoint.every_steps=1"]
    assert run(config, shards, tmp_path / "run", *settings) == NOT_FINITE
    for folder in (tmp_path / "run" / "checkpoints").glob("step-*"):
        assert all(tensor.isfinite().all() for tensor in teacher_state(folder).values())


def test_skipped_steps_are_counted_and_leave_no_hole_in_the_figures(
    config: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One poisoned batch among good ones: the run goes on to its end, in lines of three steps."""
    real = Phase._student_losses

    def poisoned(self: Phase, crops, targets, step: int, part: int):  # type: ignore[no-untyped-def]
        terms, details = real(self, crops, targets, step, part)
        return ({name: term * math.nan for name, term in terms.items()} if step == 1 else terms), details

    monkeypatch.setattr(Phase, "_student_losses", poisoned)
    assert run(config, shards, tmp_path / "run", "watch.every_steps=3") == FINISHED
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [1, 0]
    assert all(line["loss"] > 0 for line in lines)
    record = json.loads((tmp_path / "run" / "nonfinite" / "step-00000002.json").read_text())
    assert (record["step"], record["phase_step"], len(record["images"])) == (2, 1, TINY["global_batch_size"])


@pytest.mark.parametrize("content", [None, "", "[1"])
def test_what_is_no_record_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    path = tmp_path / "nonfinite" / "step-00000002.json"
    path.parent.mkdir()
    if content is not None:
        path.write_text(content)
    assert replay.main([str(path), "--device", "cpu"]) == WRONG_INPUT
    assert "is not a record of a skipped step" in capsys.readouterr().err


def test_any_step_of_a_run_is_repeated_by_its_number(config: Path, shards: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert run(config, shards, out, "phases={a: {steps: 3}, b: {steps: 5}}", "checkpoint.every_steps=4") == FINISHED
    for step in (2, 6):
        capsys.readouterr()
        assert replay.main([str(out), "--step", str(step), "--device", "cpu"]) == 0
        printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if line.startswith("loss"))
        assert float(printed["loss"]) == pytest.approx(losses(out)[step], rel=1e-5)
    for step, message in (("9", "the run has steps from 1 to 8"), ("0", "the run has steps from 1 to 8")):
        assert replay.main([str(out), "--step", step, "--device", "cpu"]) == WRONG_INPUT
        assert message in capsys.readouterr().err
    assert replay.main([str(out), "--device", "cpu"]) == WRONG_INPUT
    assert "or a step with --step" in capsys.readouterr().err
    assert replay.main([str(tmp_path), "--step", "1", "--device", "cpu"]) == WRONG_INPUT
    assert "is no run folder" in capsys.readouterr().err


def test_the_setting_has_a_range(config: Path) -> None:
    with pytest.raises(ValueError, match=r"optim.max_skipped_steps=-1 must be 0 or more"):
        load_train_config(str(config), ["optim.max_skipped_steps=-1"], [])
    assert yaml.safe_load(config.read_text())["steps"] == TINY["steps"]
    assert TrainConfig().optim.max_skipped_steps == 3
