"""Every key that a phase may have acts in it, every other is refused by its name: a walk through all of TrainConfig."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import pretrain.evaluating
from pretrain.config import TrainConfig
from pretrain.resume import flat
from pretrain.train import FINISHED, WRONG_INPUT
from tests.conftest import encoded, picture, picture_tar, write_tar
from tests.pretrain.tiny_train import TINY, run

# Refused in a phase after the first, by name.
REFUSED = {
    "seed": "1",
    "init_from": "x",
    "model.architecture": "dinov3_tiny",
    "model.patch_size": "4",
    "model.stem": "convolutions",
    "model.num_registers": "2",
    "model.ffn": "swiglu",
    "model.depth": "1",
    "model.norm_eps": "0.001",
    "model.mask_key_bias": "true",
    "model.layerscale": "0.1",
    "model.untied_local_norm": "true",
    "heads.dino.num_prototypes": "32",
    "heads.dino.hidden_dim": "16",
    "heads.dino.bottleneck_dim": "8",
    "heads.dino.num_layers": "2",
    "heads.dino.weight_norm": "false",
    "heads.ibot.num_prototypes": "32",
    "heads.ibot.hidden_dim": "16",
    "heads.ibot.bottleneck_dim": "8",
    "heads.ibot.num_layers": "2",
    "heads.ibot.weight_norm": "false",
    "heads.tied": "true",
    "loss.objective": "coding_rate",
    "phases": "{}",
}
OF_THE_RUN = ("checkpoint.", "watch.", "execution.")
# What changes nothing where it is sound: that it is read shows in what is said of an unsound value.
READ = {
    "loss.koleo_group_size": ("3", "loss.koleo_group_size=3"),
    "data.limits.max_file_bytes": ("10", "without a usable image"),
    "data.limits.max_pixels": ("10", "are all damaged"),
    "optim.max_skipped_steps": ("-1", "optim.max_skipped_steps=-1"),
    "model.attention": ("none", "attention"),
    "model.fp8": ("true", "fp8=true"),
    "crops.drop_local_remainder": ("perhaps", "crops.drop_local_remainder"),
}
TWO_SETS = "data.datasets={shards: {}, other: {shards: OTHER}}"
# Key -> its other value, and what else makes it matter.
ACTS: dict[str, tuple[str, ...]] = {
    "global_batch_size": ("4",),
    "steps": ("3",),
    "precision": ("bfloat16",),
    "optim.freeze_backbone_steps": ("1",),
    "reset_optimizer": ("false",),
    "start_from": ("teacher",),
    "distill_from": ("FIRST", "gram.weight=0"),
    "model.position_px": ("48",),
    "model.position_offset": ("0.5", "model.position_px=48"),
    "model.rope_shift": ("0.3",),
    "model.rope_jitter": ("1.5",),
    "model.rope_rescale": ("2",),
    "model.drop_path": ("0.5",),
    "heads.dino.train_lengths": ("false",),
    "heads.ibot.train_lengths": ("false",),
    "loss.dino_weight": ("0.5",),
    "loss.dino_local_weight": ("0.5",),
    "loss.dino_local_ramp_steps": ("2", "loss.dino_local_weight=0.5"),
    "loss.same_crop_pairs": ("true",),
    "loss.coding_rate_weight": ("0.5",),
    "loss.coding_rate_eps": ("0.5",),
    "loss.ibot_weight": ("0.5",),
    "loss.ibot_patches": ("all",),
    "loss.koleo_weight": ("0.5",),
    "loss.koleo_crops": ("first",),
    "loss.student_temperature": ("0.2",),
    "loss.centering": ("softmax",),
    "loss.sinkhorn_iterations": ("1",),
    "loss.center_momentum": ("0.5", "loss.centering=softmax"),
    "gram.weight": ("2",),
    "gram.ramp_steps": ("2",),
    "gram.teacher": ("FIRST",),
    "gram.refresh_every_steps": ("1",),
    "gram.max_refreshes": ("0", "gram.refresh_every_steps=1"),
    "gram.negatives": ("remove",),
    "data.datasets": (TWO_SETS.partition("=")[2],),
    "data.homogeneous": ("other", TWO_SETS, "data.homogeneous=shards", "data.homogeneous_share=1"),
    "data.homogeneous_share": ("1", TWO_SETS, "data.homogeneous=shards", "data.homogeneous_share=0.01"),
    "data.shuffle_shards": ("1",),
    "crops.global_px": ("40",),
    "crops.local_px": ("24",),
    "crops.gram_px": ("48",),
    "crops.sizes": ("[{global_px: 40, local_px: 16}]", "gram.weight=0", "crops={}"),
    "crops.num_local_crops": ("1",),
    "crops.global_scale": ("[0.5, 0.6]",),
    "crops.local_scale": ("[0.1, 0.2]",),
    "crops.aspect": ("[1.0, 1.0]",),
    "crops.interpolation": ("bilinear",),
    "crops.flip_probability": ("0",),
    "crops.jitter_probability": ("0",),
    "crops.brightness": ("0",),
    "crops.contrast": ("0",),
    "crops.saturation": ("0",),
    "crops.hue": ("0",),
    "crops.gray_probability": ("1",),
    "crops.blur": ("as_intended",),
    "crops.global_blur_probability": ("[0.5, 0.9]",),
    "crops.local_blur_probability": ("0.1",),
    "crops.blur_sigma": ("[1.0, 1.5]",),
    "crops.global_solarize_probability": ("[1.0, 1.0]",),
    "crops.edits": ("3",),
    "masks.probability": ("0",),
    "masks.ratio": ("[0.6, 0.7]",),
    "masks.min_patches": ("1",),
    "masks.max_share": ("0.1", "masks.ratio=[0.6, 0.7]", "masks.min_patches=1"),
    "masks.aspect": ("0.9",),
    "masks.exact": ("false", "masks.min_patches=9", "masks.ratio=[0.3,0.6]"),
    "optim.base_lr": ("0.003",),
    "optim.lr_rule": ("linear_256",),
    "optim.min_lr": ("0.001",),
    "optim.warmup_steps": ("1",),
    "optim.warmup": ("cosine", "optim.warmup_steps=2"),
    "optim.schedule": ("constant",),
    "optim.weight_decay": ("0.1",),
    "optim.weight_decay_end": ("0.1",),
    "optim.beta1": ("0.5",),
    "optim.beta2": ("0.5",),
    "optim.clip_norm": ("0.01",),
    "optim.layerwise_decay": ("0.5",),
    "optim.patch_embed_lr_multiplier": ("0.9",),
    "optim.freeze_last_layer_steps": ("1",),
    "optim.teacher_momentum": ("0.5",),
    "optim.teacher_momentum_end": ("0.5",),
    "optim.teacher_temperature": ("0.06",),
    "optim.teacher_temperature_end": ("0.05",),
    "optim.teacher_temperature_warmup_steps": ("0",),
    "evaluation.every_steps": ("2",),
    "evaluation.names": ("[logistic]",),
    "evaluation.sets": ("SETS",),
    "evaluation.train": ("OTHER_LABELLED",),
    "evaluation.val": ("OTHER_LABELLED",),
    "evaluation.train_labels": ("LABELS",),
    "evaluation.val_labels": ("LABELS",),
    "evaluation.px": ("40",),
    "evaluation.resize_px": ("48",),
    "evaluation.k": ("[2]",),
    "evaluation.temperature": ("1.0",),
    "evaluation.max_train_images": ("3",),
    "evaluation.max_val_images": ("3",),
    "evaluation.batch_size": ("2",),
    "evaluation.bfloat16": ("true",),
    "evaluation.pca_images": ("1",),
    "evaluation.pca_grid": ("6",),
}
# Keys that act on one kind of run alone, by that kind; all others are tried on "learned".
KINDS = dict.fromkeys(("model.rope_shift", "model.rope_jitter", "model.rope_rescale"), "rope")
KINDS |= dict.fromkeys(("loss.coding_rate_weight", "loss.coding_rate_eps"), "coding_rate")
BASE = {
    "optim": {"warmup_steps": 0, "freeze_last_layer_steps": 0},
    "steps": 2,
    "gram": {"weight": 1.0},
    "crops": {"gram_px": 32},
}
_TIMES = ("images_per_second", "mfu", "data_wait", "memory_mib", "seconds")


class Runs:
    """Runs of phase b after one phase a, by their overrides; what each showed."""

    def __init__(self, folder: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.shards, self.monkeypatch = folder, shards, monkeypatch
        self.shown: dict[tuple[str, ...], Any] = {}
        labelled = [(f"{i}.{kind}", content) for i in range(6) for kind, content in _sample(i)]
        write_tar(folder / "labelled.tar", labelled)
        write_tar(folder / "other_labelled.tar", labelled[:8])
        (folder / "labels.csv").write_text("key,label\n" + "".join(f"{i},{'bab'[i % 3]}\n" for i in range(6)))
        picture_tar(folder / "other.tar", range(30, 44))
        (folder / "sets.yaml").write_text("more: {kind: labelled, train: labelled.tar, val: labelled.tar}")
        self.places = {
            "OTHER_LABELLED": f"{folder / 'other_labelled.tar'}",
            "LABELS": f"{folder / 'labels.csv'}",
            "SETS": f"{folder / 'sets.yaml'}",
            "OTHER": f"{folder / 'other.tar'}",
            "FIRST": f"{folder / 'first' / 'teacher'}",
        }
        for kind in ("learned", "rope", "coding_rate"):
            config = json.loads(json.dumps(TINY))
            if kind == "coding_rate":
                config["loss"] = {"objective": "coding_rate"}
            if kind == "rope":
                config["model"] = {"architecture": "dinov3_tiny", "depth": 2, "layerscale": 0.5}
            sets = {"train": str(folder / "labelled.tar"), "val": str(folder / "labelled.tar")}
            config["evaluation"] = {"every_steps": 3, **sets, "px": 32, "k": [1], "pca_images": 2, "pca_grid": 4}
            self.path(kind).write_text(yaml.safe_dump(config))
            settings = ["phases={a: {steps: 2}}", "evaluation.every_steps=0"]
            assert run(self.path(kind), shards, folder / kind, *settings) == FINISHED
        assert run(self.path("learned"), shards, folder / "first", *settings, "seed=7") == FINISHED

    def path(self, kind: str) -> Path:
        return self.folder / f"{kind}.yaml"

    def after(self, key: str, *overrides: str) -> tuple[int, Any]:
        """Status, and what phase b showed: its figures, evaluations and the weights at the end."""
        kind = KINDS.get(key, "learned")
        settings = (kind, *(self._placed(override) for override in overrides))
        if settings not in self.shown:
            out = self.folder / f"run-{len(self.shown)}"
            shutil.copytree(self.folder / kind, out)
            evaluated: list[dict[str, Any]] = []
            real = pretrain.evaluating.run_evaluation

            def watched(backbone: Any, untrained: Any, settings: Any, *others: Any) -> dict[str, float]:
                evaluated.append(asdict(settings))
                return real(backbone, untrained, settings, *others)

            with self.monkeypatch.context() as patched:
                patched.setattr(pretrain.evaluating, "run_evaluation", watched)
                phases = f"phases={json.dumps({'a': {'steps': 2}, 'b': BASE})}"
                status = run(self.path(kind), self.shards, out, phases, *(f"phases.b.{o}" for o in settings[1:]))
            self.shown[settings] = status, list(_shown(out, evaluated)) if status == FINISHED else None
            shutil.rmtree(out)
        return self.shown[settings]

    def _placed(self, override: str) -> str:
        for name, path in self.places.items():
            key, _, value = override.partition("=")
            override = f"{key}={value.replace(name, path) if name in value.split() or f'{name}}}' in value else value}"
        return override


def _sample(index: int) -> Iterator[tuple[str, bytes]]:
    yield "jpg", encoded(picture(index), quality=90)
    yield "json", json.dumps({"label": "ab"[index % 2]}).encode()


def _shown(out: Path, evaluated: list[dict[str, Any]]) -> Iterator[Any]:
    for line in (out / "metrics.jsonl").read_text().splitlines():
        yield {key: value for key, value in json.loads(line).items() if key not in _TIMES}
    if (out / "evaluations.jsonl").exists():
        yield (out / "evaluations.jsonl").read_text()
    yield evaluated
    yield {name: tensor.sum().item() for name, tensor in load_file(out / "teacher" / "teacher.safetensors").items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runs(tmp_path_factory.mktemp("runs"), shards, monkeypatch)


KEYS = ["phases", "data.datasets", *flat(asdict(TrainConfig()))]


def test_every_key_is_known_here() -> None:
    of_phases = {key for key in KEYS if not key.startswith(OF_THE_RUN)}
    assert of_phases == REFUSED.keys() | READ.keys() | ACTS.keys()
    assert not REFUSED.keys() & ACTS.keys()


@pytest.mark.parametrize("key", [*REFUSED, *(key for key in KEYS if key.startswith(OF_THE_RUN))])
def test_a_key_that_would_do_nothing_is_refused_by_name(
    key: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _ = runs.after(key, f"{key}={REFUSED.get(key, '1')}")
    assert status == WRONG_INPUT
    message = capsys.readouterr().err.strip().splitlines()[-1]
    name = key.partition(".")[0] if key.startswith(OF_THE_RUN) else key
    assert f"phases.b.{name}" in message or (message.startswith("error: phase b: ") and name in message)


@pytest.mark.parametrize("key", READ)
def test_a_key_whose_sound_values_change_nothing_is_read(
    key: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    value, message = READ[key]
    assert runs.after(key, f"{key}={value}")[0] == WRONG_INPUT
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("key", ACTS)
def test_every_other_key_acts(key: str, runs: Runs) -> None:
    value, *context = ACTS[key]
    before, after = runs.after(key, *context), runs.after(key, *context, f"{key}={value}")
    assert before[0] == after[0] == FINISHED
    assert before[1] != after[1]
