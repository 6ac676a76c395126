"""An experiment at a tiny size: every kind of variant leaves its record, once, and a killed run goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.study.record import LINES, thinned
from benchmarks.study.run import Places, one_phase
from pretrain.config import load_train_config
from pretrain.phase import fresh_network
from tests.conftest import REPOSITORY
from tests.pretrain.tiny_experiment import EXPERIMENT, record_of, run, words, write_experiment
from tests.pretrain.tiny_train import HIGH_RESOLUTION, losses, wait_for_step

# lightly's heads use the old weight_norm.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
KINDS = [name for name in EXPERIMENT["variants"] if name != "no_local"]


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def with_lightly(name: str) -> None:
    if name.startswith("lightly"):
        pytest.importorskip("lightly", reason="lightly is a peer, not a dependency")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_leaves_a_record(tmp_path: Path, name: str) -> None:
    with_lightly(name)
    path = write_experiment(tmp_path)
    assert run(path, "--variant", name, "--seed", "3") == 0
    folder = record_of(path, f"{name}-seed{0 if name == 'pixels' else 3}")
    facts, results = read(folder, "record.json"), read(folder, "result.json")
    learns = name not in ("untrained", "pixels")
    assert facts["images_seen"] == (48 if learns else 0)
    assert facts["kind"] == EXPERIMENT["variants"][name].get("kind", "trained")
    assert (facts["minutes"]["training"] > 0) == learns
    assert facts["peak_memory_mib"] > 50
    assert {"cpu", "cores", "threads", "torch", "memory_gib"} <= facts["machine"].keys()
    for figure in ("knn", "linear"):
        assert 0 <= results[figure]["value"] <= 1
        assert results[figure]["images"] == {"train": 32, "val": 20}
    assert ("own" in results) == (name == "supervised")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [line["images"] for line in lines if "evaluation" in line]
    assert points == ([0, 24, 48] if learns else [])
    assert len([line for line in lines if "loss" in line]) == (6 if learns else 0)
    text = "".join(file.read_text() for file in folder.iterdir())
    assert len(text) < 30_000
    assert str(tmp_path / "data") not in text
    assert str(tmp_path / "work") not in text
    shards = yaml.safe_load((folder / "config.yaml").read_text())["data"]["datasets"]["shards"]["shards"]
    assert shards == "$SEEDBED_DATA/train/*.tar"


def test_labels_teach_colours(tmp_path: Path) -> None:
    path = write_experiment(tmp_path, set=["steps=40", "crops.gray_probability=0", "crops.jitter_probability=0"])
    assert run(path, "--variant", "supervised", "--seed", "0") == 0
    assert read(record_of(path, "supervised-seed0"), "result.json")["own"]["value"] >= 0.9


def test_a_recorded_run_is_not_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_experiment(tmp_path)
    assert run(path, "--variant", "untrained", "--seed", "0") == 0
    folder = record_of(path, "untrained-seed0")
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    path.write_text(path.read_text().replace("Does anything", "Does nothing"))
    assert run(path, "--variant", "untrained", "--seed", "0", "1") == 0
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert record_of(path, "untrained-seed1").is_dir()
    assert "other settings" not in caplog.text
    # The same variant, described otherwise since: the record stays, and it is said.
    path.write_text(path.read_text().replace("untrained:\n", "untrained:\n    set: [optim.base_lr=0.5]\n"))
    assert run(path, "--variant", "untrained", "--seed", "0") == 0
    assert "optim.base_lr" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_experiment(tmp_path)
    assert run(path, "--dry-run", "--seed", "0", "1") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Does anything happen?"
    assert "tiny: recipe, seed 1: would be trained: 6 steps, 48 images" in said
    assert [line for line in said if "pixels" in line] == ["tiny: pixels, seed 0: would be evaluated"]
    assert not (tmp_path / "work").exists()
    assert not record_of(path, "").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipe", "supervised", "lightly_dinov2"])
def test_a_killed_run_goes_on(tmp_path: Path, name: str) -> None:
    with_lightly(name)
    path = write_experiment(tmp_path, set=["steps=24"])
    out = tmp_path / "work" / "tiny" / f"{name}-seed0" / "run"
    command = [sys.executable, "-m", "benchmarks.experiment", *words(path, "--variant", name, "--seed", "0")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    wait_for_step(out, 7, process)
    assert process.poll() is None, "the run was over before it could be killed"
    process.kill()
    process.wait()
    assert not record_of(path, f"{name}-seed0").exists()
    assert run(path, "--variant", name, "--seed", "0") == 0
    whole = write_experiment(tmp_path / "whole", set=["steps=24"])
    assert run(whole, "--variant", name, "--seed", "0") == 0
    found, expected = (read(record_of(each, f"{name}-seed0"), "result.json") for each in (path, whole))
    for each in (*found.values(), *expected.values()):
        each.pop("seconds", None)
    assert found == expected
    unkilled = losses(tmp_path / "whole" / "work" / "tiny" / f"{name}-seed0" / "run")
    assert losses(out) == unkilled
    assert len(unkilled) == 24
    facts = read(record_of(path, f"{name}-seed0"), "record.json")
    assert facts["sessions"] == 2
    assert read(record_of(whole, f"{name}-seed0"), "record.json")["sessions"] == 1


@pytest.mark.slow
def test_commands_side_by_side_leave_each_other_alone(tmp_path: Path) -> None:
    path = write_experiment(tmp_path)
    asked = words(path, "--variant", "untrained", "recipe", "--seed", "0", "1")
    command = [sys.executable, "-m", "benchmarks.experiment", *asked]
    both = [subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for name in ("untrained", "recipe"):
        for seed in (0, 1):
            assert read(record_of(path, f"{name}-seed{seed}"), "record.json")["sessions"] == 1


def test_a_changed_run_does_not_go_on_from_another_ones_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_experiment(tmp_path)
    assert run(path, "--variant", "supervised", "--seed", "0") == 0
    for file in record_of(path, "supervised-seed0").iterdir():
        file.unlink()
    path.write_text(path.read_text().replace("question:", "set: [optim.base_lr=0.5]\nquestion:"))
    assert run(path, "--variant", "supervised", "--seed", "0") == 2
    assert "begun with another optim.base_lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reference": "recip"}, "reference=recip names none of recipe"),
        ({"variants": {"a": {"kind": "trainde"}}}, "kind='trainde' is unknown"),
        ({"variants": {"a": {"kind": "supervised"}}}, "labels"),
        (
            {"evaluations": {"knn": {"eval": "knn", "set": "colour"}}},
            "evaluations.knn.set=colour names none of colours",
        ),
        ({"evaluations": {"knn": {"eval": "depth", "set": "colours"}}}, "depth takes a DepthSet"),
        ({"set": ["optim.rate=1"]}, "variants.recipe: 'optim.rate=1': unknown key"),
        ({"set": ["optim.warmup_steps=7"]}, "optim.warmup_steps=7: longer than the phase"),
        ({"questions": "?"}, "unknown key 'questions'"),
    ],
)
def test_what_is_wrong_with_a_description_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, said: str
) -> None:
    if "variants" in changes or "evaluations" in changes:
        changes = {"reference": "", "claims": [], **changes}
    path = write_experiment(tmp_path, **changes)
    assert run(path, "--dry-run") == 2
    assert said in capsys.readouterr().err


def test_lightlys_networks_start_as_ours() -> None:
    pytest.importorskip("lightly", reason="lightly is a peer, not a dependency")
    from benchmarks.peers.lightly_dinov2 import LightlyDinov2, timm_encoder
    from benchmarks.peers.lightly_vit import encode

    small = {"num_prototypes": 64, "hidden_dim": 32, "bottleneck_dim": 16, "train_lengths": False}
    heads = [f"heads.{name}.{key}={value}" for name in ("dino", "ibot") for key, value in small.items()]
    model = ["model.architecture=dinov2_tiny", "model.patch_size=8", "model.position_px=32", "model.layerscale=0.5"]
    crops = ["crops.global_px=32", "crops.local_px=16", "precision=float32"]
    config = load_train_config("vits16_one_gpu", [*model, *heads, *crops], [])
    ours, timms = LightlyDinov2(config), LightlyDinov2(config, timm_encoder)
    plain = fresh_network(config).backbone.eval()
    torch.manual_seed(0)
    for side in (config.crops.global_px, config.crops.local_px):
        images = torch.randn(2, 3, side, side)
        mask = torch.rand(2, 1 + (side // 8) ** 2) < 0.5
        mask[:, 0] = False
        with torch.inference_mode():
            expected = plain([images])[0].cls
            for peer in (ours, timms):
                torch.testing.assert_close(peer.features(images), expected, atol=1e-5, rtol=1e-5)
            for peer in (ours, timms):
                peer.student.eval()
            torch.testing.assert_close(
                encode(ours.student, images, mask), encode(timms.student, images, mask), atol=1e-5, rtol=1e-5
            )
    counts = {sum(p.numel() for p in peer.student.parameters()) for peer in (ours, timms)}
    assert counts == {sum(p.numel() for p in fresh_network(config).parameters())}


def test_records_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    places = Places(tmp_path / "data", tmp_path / "data-work")
    assert places.found("a/*.tar, $WORK/b") == f"{tmp_path}/data/a/*.tar,{tmp_path}/data-work/b"
    told = places.told(f"x: {tmp_path}/data/a,{tmp_path}/data-work/b\ny: '{tmp_path}/data'\nz: {tmp_path}/datas")
    assert told == f"x: $SEEDBED_DATA/a,$WORK/b\ny: '$SEEDBED_DATA'\nz: {tmp_path}/datas"


def test_peers_have_one_phase_of_as_many_images(tmp_path: Path) -> None:
    phases = {"low": {"steps": 30}, "pretrain": {"steps": 100}, "high": HIGH_RESOLUTION}
    path = write_experiment(tmp_path)
    tiny = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny | {"phases": phases}))
    alone = one_phase(load_train_config(str(path.parents[2] / "tiny.yaml"), [], []))
    assert alone.steps == 132
    assert alone.phase_names == ["pretrain"]
    assert alone.phase("pretrain").crops.global_px == 32


def test_thinned_lines_are_means() -> None:
    lines = [
        {"step": n, "images": 8 * n, "phase": "a", "loss": float(n), "seconds": 2.0, "weight_decay": 1.0}
        for n in range(1, 601)
    ]
    found = thinned(lines, LINES)
    assert len(found) == LINES
    assert found[0] == {"step": 10, "images": 80, "phase": "a", "loss": 5.5, "seconds": 20.0}
    assert sum(line["seconds"] for line in found) == 1200
    assert thinned([], LINES) == []
