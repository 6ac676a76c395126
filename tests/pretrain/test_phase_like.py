"""Phases that differ from the phase before them, weights that ramp, and what the first step of such a phase is."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.loader import find_config
from pretrain.checks import check_numbers, idle_settings
from pretrain.config import GROUP, TrainConfig, load_train_config
from pretrain.plan import describe
from pretrain.train import FINISHED, WRONG_INPUT
from tests.pretrain.tiny_train import losses, run

THREE = "phases={a: {steps: 2}, b: {steps: 3, optim: {min_lr: 0.0001}, loss: {ibot_weight: 0.5}}, c: {like: b}}"


def load(*overrides: str) -> TrainConfig:
    return load_train_config("demo", list(overrides), ["x.tar"])


def test_a_phase_is_like_the_file_or_like_the_phase_that_it_names() -> None:
    config = load(THREE, "phases.c.loss={dino_local_weight: 0.25}")
    b, c = config.phase("b"), config.phase("c")
    assert (b.loss.ibot_weight, c.loss.ibot_weight, c.loss.dino_local_weight) == (0.5, 0.5, 0.25)
    assert (c.steps, c.optim.min_lr) == (3, 0.0001)
    assert config.phase("a").loss.ibot_weight == load().loss.ibot_weight == 0.3
    # Through two, with what lies between; and freed of it on the command line.
    chain = load(THREE, "phases.c.steps=4", "phases.d={like: c}")
    assert (chain.phase("d").steps, chain.phase("d").loss.ibot_weight) == (4, 0.5)
    assert load(THREE, "phases.c.like=null", "phases.c.steps=9").phase("c").loss.ibot_weight == 0.3
    assert load(THREE, "phases.c={like: a}").phase("c").steps == 2
    # A setting of the file reaches both, one of the phase that is named reaches who is like it.
    assert load(THREE, "loss.koleo_weight=0.7").phase("c").loss.koleo_weight == 0.7
    assert load(THREE, "phases.b.loss.koleo_weight=0.7").phase("c").loss.koleo_weight == 0.7


def test_datasets_are_those_of_the_phase_that_is_named() -> None:
    config = load(THREE, "phases.b.data.datasets={own: {shards: B, weight: 2}}")
    assert list(config.phase("a").data.datasets) == ["shards"]
    assert config.phase("c").data.datasets == config.phase("b").data.datasets
    lent = load(
        THREE, "phases.b.data.datasets={own: {shards: B, weight: 2}}", "phases.c.data.datasets={own: {weight: 3}}"
    )
    assert {name: (d.shards, d.weight) for name, d in lent.phase("c").data.datasets.items()} == {"own": ("B", 3.0)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.c.like=d", "phases.c.like=d names no phase before this one (a, b)"),
        ("phases.b.like=c", "phases.b.like=c names no phase before this one (a)"),
        ("phases.c.like=c", "phases.c.like=c names no phase before this one (a, b)"),
        ("phases.a.like=b", "phases.a.like=b names no phase before this one (it is the first)"),
        ("phases.b=null", "phases.c.like=b names no phase before this one (a); phases.c.like=null starts from"),
        ("phases.a.start_from=teacher", "phases.a.start_from: the first phase has none before it"),
        ("phases.c.start_from=ema", "start_from='ema'"),
    ],
)
def test_a_phase_that_is_not_there_before_is_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(THREE, override)


def test_ramps_go_along_a_cosine_and_stay() -> None:
    config = load("loss={dino_local_weight: 0.5, dino_local_ramp_steps: 4}", "gram={weight: 2, ramp_steps: 4}")
    config = config.phase("pretrain")
    found = [(at.loss.dino_local_weight, at.gram.weight) for at in map(config.at_step, range(6))]
    assert found[0] == (1.0, 0.0)
    assert found[2] == pytest.approx((0.75, 1.0))
    assert found[4] == found[5] == (0.5, 2.0)
    assert config.at_step(4) is config
    # One may ramp without the other.
    alone = load("loss={dino_local_weight: 0.5}", "gram={weight: 2, ramp_steps: 4}").phase("pretrain").at_step(0)
    assert (alone.loss.dino_local_weight, alone.gram.weight) == (0.5, 0.0)


def test_a_ramp_that_never_ends_or_does_nothing_is_said() -> None:
    with pytest.raises(ValueError, match=r"phase high_resolution: gram.ramp_steps=41: longer than the phase, steps=40"):
        check_numbers(load("phases.high_resolution.gram.ramp_steps=41"), 1)
    lines = idle_settings(load("loss.dino_local_ramp_steps=3", "phases.high_resolution.gram.ramp_steps=3"))
    assert lines[-2].startswith("phase high_resolution: gram.ramp_steps does nothing")
    assert lines[-1].startswith("phase high_resolution: loss.dino_local_ramp_steps does nothing")


@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_koleo_s_group_is_part_of_a_micro_batch_or_spans_some(group: int) -> None:
    check_numbers(load("global_batch_size=128", f"loss.koleo_group_size={group}"), 4)


@pytest.mark.parametrize("group", [1, 3, 48, 256])
def test_koleo_s_group_that_cuts_micro_batches_is_refused(group: int) -> None:
    with pytest.raises(
        ValueError, match=f"loss.koleo_group_size={group} must be 2 or more and either divide the 32 images"
    ):
        check_numbers(load("global_batch_size=128", f"loss.koleo_group_size={group}"), 4)


def test_the_student_may_start_from_the_teacher(config: Path, shards: Path, tmp_path: Path) -> None:
    """With a rate of nothing, the student of the second phase stays what it started as."""
    still = {
        "optim": {"base_lr": 1e-30, "min_lr": 0.0, "warmup_steps": 0, "weight_decay": 0.0, "weight_decay_end": 0.0}
    }
    phases = f"phases={json.dumps({'a': {'steps': 2}, 'b': {'steps': 2, 'start_from': 'teacher', **still}})}"
    assert run(config, shards, tmp_path / "run", phases) == FINISHED
    first, last = (
        load_file(next((tmp_path / "run" / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")))
        for step in (2, 4)
    )
    name = next(key for key in first if key.startswith("student.") and key.endswith("mlp.fc1.weight"))
    of_teacher = name.replace("student.", "teacher.", 1)
    assert not torch.equal(first[name], first[of_teacher])
    torch.testing.assert_close(last[name], first[of_teacher])


@pytest.mark.slow
@pytest.mark.parametrize(("step", "status"), [(2, FINISHED), (3, WRONG_INPUT), (6, WRONG_INPUT)])
def test_a_gram_teacher_may_be_named_by_its_step(
    config: Path, shards: Path, tmp_path: Path, step: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    gram = {"gram": {"weight": 1.0, "teacher": f"step-{step}"}, "crops": {"gram_px": 32}, "steps": 2}
    settings = [f"phases={json.dumps({'a': {'steps': 4}, 'b': gram})}", "checkpoint.keep_every_steps=2"]
    assert run(config, shards, tmp_path / "run", *settings, "--dry-run") == status
    assert run(config, shards, tmp_path / "run", *settings) == status
    if status == WRONG_INPUT:
        assert f"step-{step:08d} will not be there when the phase starts" in capsys.readouterr().err
        return
    path = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert run(config, shards, tmp_path / "again", settings[0].replace("step-2", str(path)), settings[1]) == FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "again")


SCALED_DOWN = [
    *("global_batch_size=8", "steps=4", "model.architecture=dinov3_tiny", "model.depth=1", "model.patch_size=16"),
    *(f"heads.{head}={{num_prototypes: 32, hidden_dim: 16, bottleneck_dim: 8}}" for head in ("dino", "ibot")),
    *("crops.global_px=32", "crops.local_px=16", "crops.num_local_crops=2", "loss.koleo_group_size=4"),
    *("optim.warmup_steps=1", "optim.freeze_last_layer_steps=1", "optim.teacher_temperature_warmup_steps=1"),
    *("phases.gram.steps=4", "phases.gram.loss.dino_local_ramp_steps=2", "phases.gram.gram.ramp_steps=2"),
    *("phases.gram.gram.teacher=step-2", "phases.gram.gram.refresh_every_steps=2", "phases.gram.crops.gram_px=64"),
    *("phases.high_resolution.steps=3", "phases.high_resolution.global_batch_size=8"),
    "phases.high_resolution.crops.sizes=[{global_px: 48, local_px: 21, gram_px: 64}]",
    "phases.high_resolution.optim.warmup_steps=2",
    *("checkpoint.every_steps=2", "checkpoint.keep_every_steps=2", "watch.every_steps=1"),
    *("execution={compile: false, threads: 1}", "execution.loader.num_workers=0"),
]


@pytest.mark.slow
def test_the_phases_of_dinov3_run_one_after_another(shards: Path, tmp_path: Path) -> None:
    """The shipped config, scaled down: which terms there are, in which phase, and what they weigh."""
    config = find_config(GROUP, "dinov3_vits16")
    assert run(config, shards, tmp_path / "run", *SCALED_DOWN) == FINISHED
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["pretrain"] * 4 + ["gram"] * 4 + ["high_resolution"] * 3
    gram = [line.get("loss/gram") for line in lines]
    assert gram[:5] == [None] * 4 + [0.0]  # it rises from nothing
    assert all(value > 0 for value in gram[5:])
    asked = load_train_config("dinov3_vits16", SCALED_DOWN, [str(shards)])
    for line in lines[4:]:
        first = {"gram": 5, "high_resolution": 9}[line["phase"]]
        local = asked.phase(line["phase"]).at_step(line["step"] - first).loss.dino_local_weight
        # 2 pairs of global crops, 4 of a local and a global one.
        share = (2 * line["loss/dino_global"] + 4 * local * line["loss/dino_local"]) / 6
        assert line["loss/dino"] == pytest.approx(share, rel=1e-2)
        assert local == (1.0 if line["step"] == 5 else 0.75 if line["step"] == 6 else 0.5)


def test_a_plan_says_what_a_phase_is_like() -> None:
    text = describe(load_train_config("dinov3_vits16", [], []), 8)
    assert "high_resolution, like gram: learning rate" in text
