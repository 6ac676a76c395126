"""Going on: changes on purpose, shards that lie elsewhere, teachers that moved, damaged checkpoints, finished runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pretrain.train import FINISHED, WRONG_INPUT
from tests.conftest import picture_tar
from tests.pretrain.tiny_train import losses, run, same_teacher


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run stopped in the middle: its last checkpoint, of step 4 of 6, is gone as if it had never been written."""
    from tests.pretrain.tiny_train import TINY

    folder = tmp_path_factory.mktemp("half")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    assert run(_yaml(folder), shards, folder / "run") == FINISHED
    shutil.copytree(folder / "run", folder / "whole")
    for name in ("step-00000006", "step-00000004"):
        shutil.rmtree(folder / "run" / "checkpoints" / name)
    shutil.rmtree(folder / "run" / "teacher")
    return folder


def _yaml(folder: Path) -> Path:
    (folder / "tiny.yaml").write_text((folder / "tiny.json").read_text())  # JSON is YAML
    return folder / "tiny.yaml"


@pytest.fixture
def out(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half / "run", tmp_path / "run"))


def changes(out: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]
    return [(line["step"], line["phase"], line["key"], line["from"], line["to"]) for line in lines]


@pytest.mark.parametrize(
    ("allowed", "override", "recorded"),
    [
        ("optim.base_lr", "optim.base_lr=0.001", (2, "pretrain", "optim.base_lr", 0.002, 0.001)),
        ("optim", "optim.base_lr=0.001", (2, "pretrain", "optim.base_lr", 0.002, 0.001)),
        ("phases.pretrain.loss", "loss.koleo_weight=0.2", (2, "pretrain", "loss.koleo_weight", 0.1, 0.2)),
        ("steps", "steps=8", (2, "pretrain", "steps", 6, 8)),
        ("global_batch_size", "global_batch_size=4", (2, "pretrain", "global_batch_size", 8, 4)),
    ],
)
def test_a_change_on_purpose_is_made_and_recorded(
    half: Path, out: Path, shards: Path, capsys: pytest.CaptureFixture[str], allowed: str, override: str, recorded: Any
) -> None:
    assert run(half / "tiny.yaml", shards, out, override) == WRONG_INPUT
    assert f"--allow-changed {recorded[2]}" in capsys.readouterr().err
    for _ in range(2):  # the same command again says nothing new
        assert run(half / "tiny.yaml", shards, out, override, "--allow-changed", allowed) == FINISHED
        assert changes(out) == [recorded]
    newest = max((out / "checkpoints").iterdir())
    assert len(json.loads((newest / "manifest.json").read_text())["meta"]["changes"]) == 1
    assert recorded[2] in (out / "report.html").read_text()
    before, after = losses(half / "whole"), losses(out)
    assert [after[step] for step in (1, 2)] == [before[step] for step in (1, 2)]
    assert after != before


@pytest.mark.parametrize(
    ("allowed", "override", "why"),
    [
        ("model", "model.depth=3", "the weights are what it made them"),
        ("heads", "heads.dino.num_prototypes=32", "the weights are what it made them"),
        ("loss", "loss.centering=softmax", "another kind of state"),
        ("steps", "steps=1", "are done already"),
        ("optim.lr", "optim.base_lr=1", "no setting or section has that name"),
    ],
)
def test_what_cannot_be_changed_says_why(
    half: Path, out: Path, shards: Path, capsys: pytest.CaptureFixture[str], allowed: str, override: str, why: str
) -> None:
    settings = (
        [override, "optim.warmup_steps=0", "optim.freeze_last_layer_steps=0"] if "steps" in override else [override]
    )
    extra = ["--allow-changed", "optim"] if "steps" in override else []
    assert run(half / "tiny.yaml", shards, out, *settings, "--allow-changed", allowed, *extra) == WRONG_INPUT
    assert why in capsys.readouterr().err


def test_a_finished_run_gets_more_steps(half: Path, shards: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(half / "whole", tmp_path / "run"))
    assert run(half / "tiny.yaml", shards, out, "steps=8") == WRONG_INPUT
    assert run(half / "tiny.yaml", shards, out, "steps=8", "--allow-changed", "steps") == FINISHED
    assert sorted(losses(out)) == list(range(1, 9))
    assert json.loads((out / "teacher" / "config.json").read_text())["step"] == 8
    assert changes(out) == [(6, "pretrain", "steps", 6, 8)]


@pytest.mark.parametrize("place", ["copied", "linked", "braces"])
def test_the_same_shards_elsewhere_are_the_same(
    half: Path, out: Path, shards: Path, tmp_path: Path, place: str
) -> None:
    moved = tmp_path / "elsewhere"
    if place == "linked":
        moved.symlink_to(shards)
    else:
        shutil.copytree(shards, moved)
    named = moved / "{a,b,c}.tar" if place == "braces" else moved
    assert run(half / "tiny.yaml", named, out) == FINISHED
    assert losses(out) == losses(half / "whole")
    assert same_teacher(out, half / "whole")
    assert changes(out) == [(2, "pretrain", "data.datasets.shards.shards", str(shards), str(named))]


def test_a_dataset_of_another_name_is_the_same(half: Path, out: Path, shards: Path) -> None:
    assert run(half / "tiny.yaml", None, out, f"data.datasets.mine.shards={shards}") == FINISHED
    assert losses(out) == losses(half / "whole")


@pytest.mark.parametrize("kind", ["more", "fewer", "renamed", "other"])
def test_other_shards_are_refused_unless_they_are_meant(
    half: Path, out: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    if kind == "more":
        picture_tar(other / "d.tar", range(30, 40))
    elif kind == "fewer":
        (other / "c.tar").unlink()
    elif kind == "renamed":
        (other / "a.tar").rename(other / "aa.tar")
    else:
        picture_tar(other / "a.tar", range(60, 72))
    assert run(half / "tiny.yaml", other, out) == WRONG_INPUT
    assert "trained on other images: data.datasets.shards has changed" in capsys.readouterr().err
    assert run(half / "tiny.yaml", other, out, "--allow-changed", "data") == FINISHED
    assert "data.datasets.shards.shards" in {change[2] for change in changes(out)}


def test_shards_of_a_phase_that_is_over_may_be_gone(config: Path, shards: Path, tmp_path: Path) -> None:
    gone = picture_tar(tmp_path / "gone.tar", range(12))
    first = f"a: {{steps: 2, data: {{datasets: {{c: {{shards: '{gone}'}}}}}}}}"
    assert run(config, shards, tmp_path / "run", f"phases={{{first}}}") == FINISHED
    gone.unlink()
    assert run(config, shards, tmp_path / "run", f"phases={{{first}, b: {{steps: 2}}}}") == FINISHED
    assert run(config, None, tmp_path / "run", f"phases={{{first}}}") == WRONG_INPUT  # b has begun


@pytest.mark.parametrize("change", ["moved", "another", "same place"])
def test_a_teacher_to_distil_from_is_known_by_its_weights(
    half: Path, config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    teacher = Path(shutil.copytree(half / "whole" / "teacher", tmp_path / "teacher"))
    assert run(config, shards, tmp_path / "run", "steps=4", f"distill_from={teacher}") == FINISHED
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert run(config, shards, tmp_path / "another", "steps=2", "seed=5") == FINISHED
    now = teacher
    if change == "moved":
        now = Path(shutil.move(teacher, tmp_path / "moved"))
    elif change == "another":
        now = tmp_path / "another" / "teacher"
    else:
        shutil.copy(tmp_path / "another" / "teacher" / "teacher.safetensors", teacher)
    expected = FINISHED if change == "moved" else WRONG_INPUT
    assert run(config, shards, tmp_path / "run", "steps=4", f"distill_from={now}") == expected
    if change != "moved":
        assert "distill_from" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("key", ["init_from", "gram.teacher"])
def test_what_a_phase_started_from_may_be_gone(
    half: Path, config: Path, shards: Path, tmp_path: Path, key: str
) -> None:
    source = Path(shutil.copytree(half / "whole" / "teacher", tmp_path / "source"))
    settings = ["steps=4", f"{key}={source}"]
    if key == "gram.teacher":
        settings += ["gram.weight=1", "crops.gram_px=32"]
    assert run(config, shards, tmp_path / "whole", *settings) == FINISHED
    assert run(config, shards, tmp_path / "run", *settings) == FINISHED
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    shutil.rmtree(source)
    assert run(config, shards, tmp_path / "run", *settings) == FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flipped", "manifest", "no manifest", "gone"])
def test_deleting_damaged_checkpoints_continues_from_the_one_before(
    half: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Step by step: the newest two are damaged, and each message names what is to be deleted, and what then follows."""
    out = Path(shutil.copytree(half / "whole", tmp_path / "run"))
    shutil.rmtree(out / "teacher")
    folder = out / "checkpoints"
    for step in (4, 6):
        file = next((folder / f"step-{step:08d}").glob("rank-*"))
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        elif damage == "flipped":
            content = bytearray(file.read_bytes())
            for place in range(20_000, len(content), 4096):
                content[place] ^= 255
            file.write_bytes(content)
        elif damage == "manifest":
            (folder / f"step-{step:08d}" / "manifest.json").write_text("{")
        elif damage == "no manifest":
            (folder / f"step-{step:08d}" / "manifest.json").unlink()
        else:
            file.unlink()
    for step, before in ((6, 4), (4, 2)):
        assert run(half / "tiny.yaml", shards, out) == WRONG_INPUT
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"Delete {folder / f'step-{step:08d}'}, and the same command continues from" in message
        assert f"step-{before:08d}." in message
        shutil.rmtree(folder / f"step-{step:08d}")
    assert run(half / "tiny.yaml", shards, out) == FINISHED
    assert losses(out) == losses(half / "whole")
    assert same_teacher(out, half / "whole")


def test_a_finished_run_says_so(half: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(half / "tiny.yaml", shards, half / "whole") == FINISHED
    message = capsys.readouterr().err
    assert "this run is finished" in message
    assert str(half / "whole" / "teacher") in message
