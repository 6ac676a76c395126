"""Phases as people write them: replaced, dropped, corrected; each with its own images; wrong ones named in time."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pretrain.checks import check_run
from pretrain.config import load_train_config
from pretrain.train import FINISHED, WRONG_INPUT, main
from tests.conftest import encoded, picture, picture_tar, write_tar
from tests.pretrain.tiny_train import TINY, losses, run

PHASES = "phases={a: {steps: 2}, b: {steps: 2}}"


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["phases={x: {steps: 9}}"], ["x"]),
        (["phases.high_resolution=null"], ["pretrain"]),
        (["phases.more={steps: 3}"], ["pretrain", "high_resolution", "more"]),
        (["phases={}"], ["pretrain"]),
        (["phases.high_resolution.steps=3", "phases.pretrain=null"], ["high_resolution"]),
    ],
)
def test_phases_of_a_file_are_replaced_dropped_and_added(overrides: list[str], names: list[str]) -> None:
    assert load_train_config("demo", overrides, ["x.tar"]).phase_names == names


def test_a_phase_written_whole_forgets_what_the_file_said_of_it() -> None:
    config = load_train_config("demo", ["phases.high_resolution={steps: 3}"], ["x.tar"])
    assert config.phase("high_resolution").crops == config.crops
    config = load_train_config("demo", ["phases.high_resolution.steps=3"], ["x.tar"])
    assert config.phase("high_resolution").crops.global_px == 96


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.high_resolutoin.steps=3", "Did you mean 'high_resolution'?"),
        ("phases.nothing=null", "it has pretrain, high_resolution"),
        ("phases=[1]", "phases is a mapping"),
        ("phases.pretrain=3", "phases.pretrain is a mapping"),
        ("phases.high_resolution.data.datasets={}", "must name its datasets"),
        ("phases.high_resolution.data.datasets={b: {weight: 2}}", "datasets.b.shards is missing"),
        ("phases.high_resolution.data.homogeneous=b", "phases.high_resolution: data.homogeneous"),
        ("phases.high_resolution.init_from=x", "starts from the one before it"),
        ("phases.pretrain.reset_optimizer=true", "the first phase has no optimizer"),
        ("phases.high_resolution.crops={sizes: [{global_px: 64}], local_px: 32}", "does nothing where crops.sizes"),
    ],
)
def test_what_makes_no_sense_in_phases_is_said(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_train_config("demo", [override], ["x.tar"])


def test_a_phase_draws_from_the_datasets_that_it_names() -> None:
    first = "data.datasets={a: {shards: A, weight: 2}, b: {shards: B}}"
    config = load_train_config(
        "demo", [first, "phases.high_resolution.data.datasets={c: {shards: C}, a: {weight: 3}}"], []
    )
    found = {name: (d.shards, d.weight) for name, d in config.phase("high_resolution").data.datasets.items()}
    assert found == {"c": ("C", 1.0), "a": ("A", 3.0)}
    assert list(config.phase("pretrain").data.datasets) == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize("known", [True, False])
def test_images_of_a_phase_are_read(config: Path, shards: Path, tmp_path: Path, known: bool) -> None:
    """By the losses, the checkpoint's fingerprints and the teacher's description."""
    other = picture_tar(tmp_path / "other.tar", range(50, 70))
    name = "shards" if known else "other"
    own = f"phases.b.data.datasets={{{name}: {{shards: '{other}'}}}}"
    assert run(config, shards, tmp_path / "one", PHASES) == FINISHED
    assert run(config, shards, tmp_path / "two", PHASES, own) == FINISHED
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [one[step] == two[step] for step in (1, 2, 3, 4)] == [True, True, False, False]
    meta = json.loads((tmp_path / "two/checkpoints/step-00000004/manifest.json").read_text())["meta"]
    assert list(meta["data"]) == ["a", "b"]
    assert meta["data"]["a"] != meta["data"]["b"]
    described = json.loads((tmp_path / "two/teacher/config.json").read_text())
    assert described["config"]["data"]["datasets"][name]["shards"] == str(other)


def test_shards_that_two_phases_share_are_listed_once(config: Path, shards: Path) -> None:
    asked = load_train_config(str(config), [PHASES], [str(shards)])
    first, second = check_run(asked, 1)
    assert first["shards"] is second["shards"]


ROPE = ["model.architecture=dinov3_tiny", "model.position_px=null"]


@pytest.mark.parametrize(
    ("differences", "message"),
    [
        ({"model": {"depth": 3}}, "phase b: model.depth=3 differs from 2"),
        ({"model": {"layerscale": 0.1}}, "phase b: model.layerscale=0.1 differs"),
        ({"heads": {"dino": {"num_prototypes": 32}}}, "phase b: heads.dino.num_prototypes=32 differs"),
        ({"heads": {"ibot": {"hidden_dim": 16}}}, "phase b: heads.ibot.hidden_dim=16 differs"),
        ({"heads": {"tied": True}}, "phase b: heads.tied=True differs"),
        ({"reset_optimizer": False, "model": {"position_px": 48}}, "phase b: reset_optimizer=false"),
        ({"reset_optimizer": False, "heads": {"dino": {"train_lengths": False}}}, "phase b: reset_optimizer=false"),
        ({"model": {"position_px": 30}}, "phase b: model.position_px=30 is not a multiple"),
        ({"model": {"rope_shift": 0.5}}, "phase b: model.rope_shift=0.5 does nothing"),
        ({"crops": {"global_px": 30}}, "phase b: crops.global_px=30 is not a multiple"),
        ({"optim": {"warmup_steps": 3}}, "phase b: optim.warmup_steps=3: longer than the phase, steps=2"),
        ({"optim": {"freeze_last_layer_steps": 3}}, "phase b: optim.freeze_last_layer_steps=3: longer than the phase"),
        ({"global_batch_size": 64}, "phase b: data.datasets.shards has 25 images"),
        (
            {"data": {"datasets": {"c": {"shards": "/nowhere"}}}},
            "phase b: data.datasets.c.shards: nothing found at '/nowhere'",
        ),
        ({"gram": {"weight": 1.0}}, "phase b: gram.weight=1.0 needs crops.gram_px"),
        ({"loss": {"ibot_weight": 0.0}, "reset_optimizer": False}, "phase b: reset_optimizer=false keeps the moments"),
        ({"gram": {"weight": 1.0, "teacher": "/nowhere"}, "crops": {"gram_px": 32}}, "phase b: gram.teacher: /nowhere"),
        ({"distill_from": "/nowhere"}, "phase b: distill_from: /nowhere does not exist"),
        ({"evaluation": {"every_steps": 1, "val": "/nowhere.tar"}}, "phase b: evaluation.val=/nowhere.tar"),
    ],
)
def test_a_later_phase_that_cannot_run_is_named_before_the_first_step(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], differences: dict, message: str
) -> None:
    phases = f"phases={json.dumps({'a': {'steps': 2}, 'b': {'steps': 2, **differences}})}"
    for extra in ((), ("--dry-run",)):
        assert run(config, shards, tmp_path / "run", phases, *extra) == WRONG_INPUT
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("step", "status"), [(2, FINISHED), (3, WRONG_INPUT), (6, WRONG_INPUT)])
def test_a_gram_teacher_may_be_a_checkpoint_that_the_run_will_have(
    config: Path, shards: Path, tmp_path: Path, step: int, status: int
) -> None:
    source = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
    gram = {"gram": {"weight": 1.0, "teacher": str(source)}, "crops": {"gram_px": 32}, "steps": 2}
    phases = f"phases={json.dumps({'a': {'steps': 4}, 'b': gram})}"
    assert run(config, shards, tmp_path / "run", phases, "checkpoint.keep_every_steps=2") == status


def test_shards_beside_a_phase_with_its_own_are_said(
    config: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = f"phases.b.data.datasets={{c: {{shards: '{picture_tar(tmp_path / 'c.tar', range(9))}'}}}}"
    with caplog.at_level("INFO"):
        load_train_config(str(config), [PHASES, own], [str(shards)])
    assert "phase b draws from its own data.datasets (c)" in caplog.text


@pytest.mark.parametrize(
    "later", ["{c: {steps: 2}}", "{b: {steps: 3, optim: {base_lr: 0.5}}}", "{b: {steps: 2}, c: {steps: 2}}", "{}"]
)
def test_phases_that_have_not_begun_may_be_corrected(config: Path, shards: Path, tmp_path: Path, later: str) -> None:
    assert run(config, shards, tmp_path / "run", "phases={a: {steps: 2}}") == FINISHED
    whole = "phases={a: {steps: 2}, " + later[1:]
    assert run(config, shards, tmp_path / "run", whole) == FINISHED


@pytest.mark.parametrize(
    "phases", ["{x: {steps: 2}}", "{a: {steps: 2, optim: {base_lr: 0.5}}}", "{b: {steps: 2}, a: {steps: 2}}"]
)
def test_phases_that_have_begun_may_not(config: Path, shards: Path, tmp_path: Path, phases: str) -> None:
    assert run(config, shards, tmp_path / "run", "phases={a: {steps: 2}}") == FINISHED
    assert run(config, shards, tmp_path / "run", f"phases={phases}") == WRONG_INPUT


def test_the_plan_counts_each_phase_s_own_images(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = f"phases.b.data.datasets={{c: {{shards: '{picture_tar(tmp_path / 'c.tar', range(8))}'}}}}"
    arguments: Sequence[str] = ["--config", str(config), "--shards", str(shards), "--dry-run", PHASES, own]
    assert main(arguments) == FINISHED
    assert "c 2" in capsys.readouterr().out  # 16 images drawn of 8
    assert TINY["global_batch_size"] == 8


def labelled(path: Path, seeds: range) -> Path:
    members = []
    for seed in seeds:
        members.append((f"{seed}.jpg", encoded(picture(seed))))
        members.append((f"{seed}.json", json.dumps({"label": "ab"[seed % 2]}).encode()))
    return write_tar(path, members)


@pytest.mark.parametrize("change", ["px: 48", "pca_images: 3", "val: 'OTHER', train: 'OTHER'"])
def test_a_phase_evaluates_in_its_own_way(config: Path, shards: Path, tmp_path: Path, change: str) -> None:
    """Baselines and pictures are those of its own sets."""
    sets, other = labelled(tmp_path / "sets.tar", range(6)), labelled(tmp_path / "other.tar", range(20, 24))
    settings = (
        f"evaluation={{every_steps: 2, train: '{sets}', val: '{sets}', px: 32, k: [1], pca_images: 2, pca_grid: 4}}"
    )
    own = f"phases.b.evaluation={{{change.replace('OTHER', str(other))}}}"
    assert run(config, shards, tmp_path / "run", PHASES, settings, own) == FINISHED
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    known = json.loads((tmp_path / "run" / "evaluation" / "baselines.json").read_text())
    assert len(known) == (1 if "pca" in change else 2)
    with np.load(tmp_path / "run" / "evaluation" / "step-00000004" / "pca.npz") as found:
        assert found["images"].shape[:2] == (3 if "pca" in change else 2, 48 if "px" in change else 32)
