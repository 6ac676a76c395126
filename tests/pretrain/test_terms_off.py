"""Losses that are off leave nothing unused: two ranks train as one process, and nothing is said of a head at rest."""

import json
from pathlib import Path

import pytest
import torch

from pretrain import train
from pretrain.network_weights import load_teacher
from tests.conftest import picture_tar
from tests.pretrain.ranks import run_ranks
from tests.pretrain.tiny_train import TINY

SETTINGS: dict[str, list[str]] = {
    "no iBOT": ["loss.ibot_weight=0"],
    "no DINO": ["loss.dino_weight=0"],
    "no DINO, tied": ["loss.dino_weight=0", "heads.tied=true"],
    "no iBOT, tied": ["loss.ibot_weight=0", "heads.tied=true"],
    "KoLeo alone": ["loss.dino_weight=0", "loss.ibot_weight=0"],
    "no local crops": ["crops.num_local_crops=0"],
    "no masks": ["masks.probability=0"],
    "softmax without iBOT": ["loss.ibot_weight=0", "loss.centering=softmax"],
    "coding rate": ["loss.objective=coding_rate", "loss.koleo_weight=0"],
    "coding rate, tied": ["loss.objective=coding_rate", "heads.tied=true", "model.stem=convolutions"],
    "all patches": ["loss.ibot_patches=all"],
    "frozen": ["optim.freeze_backbone_steps=2"],
}
TERMS = ("dino", "ibot", "koleo", "gram", "coding_rate")
# KoLeo over the whole batch, and no stochastic depth: both otherwise depend on which images share a rank.
ALIKE = ["loss.koleo_group_size=8", "model.drop_path=0", "steps=3"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terms")
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    picture_tar(folder / "shards" / "a.tar", range(16))
    return folder


def run(folder: Path, out: Path, *overrides: str) -> int:
    asked = ["--config", str(folder / "tiny.yaml"), "--shards", str(folder / "shards"), "--out", str(out)]
    return train.main([*asked, *overrides])


def several(folder: Path, out: Path, overrides: dict[str, list[str]]) -> list[int]:
    """Several trainings in one process, inside the process group that it has."""
    torch.set_num_threads(1)
    statuses = []
    for name, settings in overrides.items():
        config = train.load_train_config(str(folder / "tiny.yaml"), settings, [str(folder / "shards")])
        with train.stop_signals() as stop:
            one = train.Run(config, out / name.replace(" ", "-"), torch.device("cpu"), stop)
            one.open(lambda: None)  # nobody else has the folder
            statuses.append(one.go())
    return statuses


def terms(out: Path) -> list[dict[str, float]]:
    """Every weighted term of the loss at each step, and its parts: their sum may all but vanish, alignment and coding
    rate being of opposite sign."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [{key: value for key, value in line.items() if key.startswith("loss/")} for line in lines]
    for line, parts in zip(lines, found, strict=True):
        total = [value for key, value in parts.items() if key.removeprefix("loss/") in TERMS]
        assert line["loss"] == pytest.approx(sum(total), abs=1e-5 * sum(map(abs, total)))
    return found


@pytest.fixture(scope="module")
def one_process(setting: Path) -> Path:
    asked = {name: [*ALIKE, *settings] for name, settings in SETTINGS.items()}
    assert several(setting, setting / "one", asked) == [0] * len(asked)
    return setting / "one"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_have_the_losses_of_one(mode: str, setting: Path, one_process: Path, tmp_path: Path) -> None:
    asked = {name: [*ALIKE, *settings, f"execution.parallel={mode}"] for name, settings in SETTINGS.items()}
    assert run_ranks(several, tmp_path / "ranks", setting, tmp_path / "two", asked) == [[0] * len(asked)] * 2
    for name in asked:
        one, two = (terms(folder / name.replace(" ", "-")) for folder in (one_process, tmp_path / "two"))
        assert len(one) == len(two) == 3
        for ours, theirs in zip(two, one, strict=True):
            # Sums over images in another order, in float32.
            assert ours == pytest.approx(theirs, rel=1e-5), name


@pytest.mark.parametrize("name", ["no iBOT", "no DINO", "KoLeo alone", "no masks"])
def test_a_head_at_rest_stays_as_it_is_and_is_not_spoken_of(name: str, setting: Path, tmp_path: Path) -> None:
    assert run(setting, tmp_path / "run", *SETTINGS[name], "optim.weight_decay=0.5", "steps=5") == 0
    assert run(setting, tmp_path / "start", "steps=1", "optim.base_lr=1e-12", "optim.warmup_steps=0") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    alarms = tmp_path / "run" / "alarms.jsonl"
    said = alarms.read_text() if alarms.exists() else ""
    resting = {"no iBOT": ["ibot"], "no DINO": ["dino"], "KoLeo alone": ["dino", "ibot"], "no masks": ["ibot"]}[name]
    end, start = load_teacher(tmp_path / "run").state_dict(), load_teacher(tmp_path / "start").state_dict()
    for head in ("dino", "ibot"):
        same = all(torch.allclose(t, start[n], atol=1e-6) for n, t in end.items() if n.startswith(f"{head}_head."))
        assert same == (head in resting)
        for figure in (f"teacher_entropy/{head}", f"prototype_use/{head}", f"loss/{head}", f"grad_norm/{head}_head"):
            assert all((figure in line) == (head not in resting) for line in lines), figure
        if head in resting:
            assert f"_{head}" not in said
