"""One way to trained weights: every container gives the same tensors, and what is none is one sentence everywhere."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from pretrain.checkpoint import write_teacher
from pretrain.config import load_train_config
from pretrain.downstream.backbone import load_backbone, load_heads
from pretrain.downstream.evals import __main__ as evaluations
from pretrain.downstream.export.__main__ import main as export
from pretrain.models.architectures import build
from pretrain.models.huggingface import huggingface_state
from pretrain.network_weights import load_network, load_teacher
from pretrain.phase import fresh_network
from pretrain.train import WRONG_INPUT, main
from pretrain.weights import find_weights
from tests.conftest import picture_tar
from tests.pretrain.randomised import randomise
from tests.pretrain.tiny_train import TINY

NAME = "dinov2_tiny"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Every parameter of a tiny backbone, random, as the hub files name them."""
    return {name: t.clone() for name, t in randomise(build(NAME)).state_dict().items()}


def chunked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks in chunks of two, as DINOv2's trainer numbers them."""
    result = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // 2))
        result[".".join(parts)] = value
    return result


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def noise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in state.items()}


CONTAINERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda s: s,
    "teacher": lambda s: {"teacher": s},
    "model": lambda s: {"model": s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": prefixed("module.", s), "optimizer": {"state": {0: torch.ones(2)}}},
    "backbone": lambda s: prefixed("backbone.", s),
    "encoder": lambda s: prefixed("encoder.", s) | {"decoder.weight": torch.ones(3)},
    "module.backbone in teacher": lambda s: {"teacher": prefixed("module.backbone.", s)},
    "student beside teacher": lambda s: {
        "student": prefixed("backbone.", noise(s)),
        "teacher": prefixed("backbone.", s),
    },
    "student. beside teacher.": lambda s: prefixed("student.backbone.", noise(s)) | prefixed("teacher.backbone.", s),
    "student alone": lambda s: prefixed("student.", s),
    "chunks and heads": lambda s: {"teacher": prefixed("backbone.", chunked(s)) | {"dino_head.x": torch.ones(2)}},
    "Hugging Face names": lambda s: huggingface_state(s, "dinov2"),
    "Hugging Face, with a classifier": lambda s: (
        prefixed("dinov2.", huggingface_state(s, "dinov2")) | {"classifier.weight": torch.ones(3)}
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_tensors(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(CONTAINERS[name](state), tmp_path / "file.pth")
    loaded = load_backbone(tmp_path / "file.pth", architecture=NAME)
    assert all(torch.equal(value, state[key]) for key, value in loaded.model.state_dict().items())
    assert loaded.settings["position_offset"] == 0.1


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "ckpt", "safetensors", ""])
def test_the_kind_of_a_file_is_told_by_its_content(suffix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / f"file.{suffix}"
    save_file(state, path)
    assert find_weights(path).read(("backbone.",)).keys() == prefixed("backbone.", state).keys()
    torch.save(state, path, _use_new_zipfile_serialization=suffix != "pt")  # the old format, too
    assert find_weights(path).read(("backbone.",)).keys() == prefixed("backbone.", state).keys()


def huggingface_folder(folder: Path, model_type: str, **changes: Any) -> Any:
    """A released model as transformers writes it, every parameter random."""
    transformers = pytest.importorskip("transformers")
    classes = {
        "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model),
        "dinov2_with_registers": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel),
        "dinov3_vit": (transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel),
    }
    config, model = classes[model_type]
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
    if model_type == "dinov3_vit":
        small |= {"intermediate_size": 96, "num_register_tokens": 4}
    theirs = randomise(model(config(**small | changes))).eval()
    theirs.save_pretrained(folder)
    return theirs


HUGGINGFACE = {
    "dinov2": ("dinov2", {}),
    "dinov2 swiglu": ("dinov2", {"use_swiglu_ffn": True, "patch_size": 7}),
    "registers": ("dinov2_with_registers", {"num_register_tokens": 3}),
    "dinov3": ("dinov3_vit", {}),
    "dinov3 gated": ("dinov3_vit", {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 104}),
}


@pytest.mark.parametrize("kind", HUGGINGFACE)
def test_a_hugging_face_folder_has_the_features_of_transformers(kind: str, tmp_path: Path) -> None:
    model_type, changes = HUGGINGFACE[kind]
    theirs = huggingface_folder(tmp_path, model_type, **changes)
    ours = load_backbone(tmp_path, position_offset=0)
    for height, width in ((4, 4), (3, 6), (6, 5)):
        patch = ours.model.patch_size
        images = torch.randn(2, 3, height * patch, width * patch, generator=torch.Generator().manual_seed(height))
        with torch.inference_mode():
            tokens = theirs(images).last_hidden_state
        features = ours.features(images)
        # Float32 in another order.
        torch.testing.assert_close(features.cls, tokens[:, 0], rtol=0, atol=2e-5)
        torch.testing.assert_close(features.patches, tokens[:, -height * width :], rtol=0, atol=2e-5)
    offset = load_backbone(tmp_path).settings["position_offset"]
    assert offset == (0.1 if model_type == "dinov2" else 0.0)


@pytest.mark.parametrize("layout", ["sharded", "bin", "file", "bin file"])
def test_other_layouts_of_a_hugging_face_folder(layout: str, tmp_path: Path) -> None:
    theirs = huggingface_folder(tmp_path, "dinov3_vit")
    expected = load_backbone(tmp_path).model.state_dict()
    weights, path = tmp_path / "model.safetensors", tmp_path
    if layout == "sharded":
        weights.unlink()
        theirs.save_pretrained(tmp_path, max_shard_size="100KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
    elif layout.startswith("bin"):
        from safetensors.torch import load_file

        torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
        weights.unlink()
        path = tmp_path / "pytorch_model.bin" if layout == "bin file" else tmp_path
    else:
        path = weights
    found = load_backbone(path).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "what", ["code", "text", "empty", "cut pth", "cut safetensors", "zip", "resnet", "json", "list"]
)
@pytest.mark.parametrize("command", ["init_from", "distill_from", "gram.teacher", "export", "knn"])
def test_what_is_no_backbone_is_one_sentence_everywhere(
    what: str, command: str, state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = foreign(what, state, tmp_path)
    assert run(command, path, tmp_path) in (1, 2)
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1
    assert str(path) in said[0]
    assert not (tmp_path / "executed").exists()


class Hostile:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def foreign(what: str, state: dict[str, Tensor], folder: Path) -> Path:
    path = folder / f"{what}.{'safetensors' if 'safetensors' in what else 'pth'}"
    if what == "code":
        path.write_bytes(pickle.dumps({"teacher": Hostile(str(folder / "executed"))}))
    elif what == "text":
        path.write_text("these are no weights\n")
    elif what == "empty":
        path.touch()
    elif what == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "nothing")
    elif what == "resnet":
        torch.save({"conv1.weight": torch.ones(2), "layer1.0.bn1.weight": torch.ones(2)}, path)
    elif what == "json":
        path.write_text(json.dumps({"model_type": "dinov2"}))
    elif what == "list":
        torch.save([1, 2], path)
    else:
        save_file(state, path) if "safetensors" in what else torch.save(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def run(command: str, path: Path, folder: Path) -> int:
    if command == "export":
        return export([str(path), str(folder / "out"), "--architecture", NAME])
    if command == "knn":
        picture_tar(folder / "x.tar", range(2))
        data = [f"train={folder}/x.tar", f"val={folder}/x.tar"]
        return evaluations.main(["knn", str(path), "--architecture", NAME, "--data", *data])
    picture_tar(folder / "shards" / "a.tar", range(8))
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    gram = ["gram.weight=1", "crops.gram_px=32"] if command == "gram.teacher" else []
    settings = [f"{command}={path}", *gram, "steps=1"]
    arguments = ["--config", str(folder / "tiny.yaml"), "--shards", str(folder / "shards")]
    status = main([*arguments, "--out", str(folder / "run"), *settings])
    assert status == WRONG_INPUT
    return status


@pytest.mark.parametrize(
    "kind", ["nothing", "empty", "text", "config", "other model", "no weights", "torn description"]
)
def test_folders_without_weights_are_one_sentence(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if kind != "nothing":
        folder.mkdir()
    content = {
        "text": {"notes.txt": "nothing"},
        "config": {"config.json": "[1]"},
        "other model": {"config.json": '{"model_type": "resnet"}'},
        "no weights": {"config.json": json.dumps({"model_type": "dinov2", **_CONFIG})},
        "torn description": {"seedbed.json": '{"architecture": "dinov2_t'},
    }
    for name, text in content.get(kind, {}).items():
        (folder / name).write_text(text)
    for load in (load_backbone, load_heads, load_teacher):
        with pytest.raises(ValueError, match=r"^(?!.*\n)") as error:
            load(folder)
        assert str(folder) in str(error.value)


_CONFIG = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 14, "image_size": 56}


def test_an_untied_norm_that_the_source_lacks_starts_as_its_norm(tmp_path: Path) -> None:
    """transformers has none, of the 7B neither; training with it goes on from such a folder all the same."""
    source = build("dinov3_tiny", depth=1)
    randomise(source)
    description = {"architecture": "dinov3_tiny", "model": {"depth": 1}}
    description["image"] = {"mean": [0.5] * 3, "std": [0.25] * 3, "px": 32}
    write_teacher(tmp_path / "t", {f"backbone.{k}": v for k, v in source.state_dict().items()}, description)
    settings = ["model.architecture=dinov3_tiny", "model.depth=1", "model.untied_local_norm=true"]
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    network = fresh_network(load_train_config(str(tmp_path / "tiny.yaml"), settings, [str(tmp_path)]))
    load_network(network, tmp_path / "t")
    assert torch.equal(network.backbone.local_cls_norm.weight, source.norm.weight)
    assert torch.equal(network.backbone.local_cls_norm.bias, source.norm.bias)


def test_released_code_resizes_positions_with_its_offset_and_a_run_remembers_it(
    state: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The formula of the released code: scale factors of (size + 0.1) / side; then through training and back."""
    torch.save(state, tmp_path / "released.pth")
    square = state["pos_embed"][:, 1:].view(1, 8, 8, 192).permute(0, 3, 1, 2)
    expected = F.interpolate(square, scale_factor=(4.1 / 8, 4.1 / 8), mode="bicubic").flatten(2).transpose(1, 2)
    loaded = load_backbone(tmp_path / "released.pth", architecture=NAME)
    with torch.no_grad():
        tokens, _ = loaded.model.embed([torch.zeros(1, 3, 32, 32)], None)
    bias = state["patch_embed.proj.bias"]
    torch.testing.assert_close(tokens.view(1, -1, 192)[:, -16:], expected + bias)

    picture_tar(tmp_path / "shards" / "a.tar", range(8))
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY | {"model": {"architecture": NAME}}))
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--shards", str(tmp_path / "shards")]
    with caplog.at_level("INFO"):
        out, init = tmp_path / "run", [f"init_from={tmp_path / 'released.pth'}", "steps=2"]
        assert main([*arguments, "--out", str(out), *init, "phases={a: {steps: 1}, b: {steps: 2}}"]) == 0
    assert "position_offset=0.1" in caplog.text
    for where in (out, out / "teacher", out / "checkpoints" / "step-00000003"):
        assert load_backbone(where).settings["position_offset"] == 0.1
    assert main([*arguments, "--out", str(tmp_path / "plain"), *init, "model.position_offset=0"]) == 0
    assert load_backbone(tmp_path / "plain").settings["position_offset"] == 0.0
    assert export([str(out), str(tmp_path / "export"), "--format", "safetensors"]) == 0
    assert load_backbone(tmp_path / "export").settings["position_offset"] == 0.1
    # From an export, too, training goes on.
    again = [f"init_from={tmp_path / 'export'}", "steps=1"]
    assert main([*arguments, "--out", str(tmp_path / "again"), *again]) == 0
    assert load_backbone(tmp_path / "again").settings["position_offset"] == 0.1


@pytest.mark.parametrize("source", ["run", "checkpoint", "teacher", "huggingface", "safetensors"])
def test_a_network_starts_from_any_of_ours(source: str, ours: Path) -> None:
    tiny = load_train_config(str(ours / "tiny.yaml"), [], [])
    expected = load_teacher(ours / "run" / "teacher").state_dict()
    path = ours / {"run": "run", "checkpoint": "run/checkpoints/step-00000002", "teacher": "run/teacher"}.get(
        source, source
    )
    network = fresh_network(tiny)
    load_network(network, path)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in expected.items())
    assert all(torch.equal(load_teacher(path).state_dict()[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and its exports."""
    folder = tmp_path_factory.mktemp("ours")
    picture_tar(folder / "shards" / "a.tar", range(8))
    (folder / "tiny.yaml").write_text(json.dumps(TINY))
    arguments = ["--config", str(folder / "tiny.yaml"), "--shards", str(folder / "shards")]
    assert main([*arguments, "--out", str(folder / "run"), "steps=2"]) == 0
    for format_ in ("huggingface", "safetensors"):
        assert export([str(folder / "run"), str(folder / format_), "--format", format_, "--heads"]) == 0
    return folder


@pytest.mark.parametrize("steps", [1, 3])
def test_the_backbone_keeps_still_while_the_heads_learn(steps: int, ours: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(ours / "tiny.yaml"), "--shards", str(ours / "shards"), "--out", str(tmp_path / "run")]
    settings = [f"init_from={ours / 'run'}", f"optim.freeze_backbone_steps={steps}", "steps=4"]
    settings += ["checkpoint.every_steps=1", "checkpoint.keep_last=9", "optim.weight_decay=0.4"]
    assert main([*arguments, *settings, "optim.freeze_last_layer_steps=0"]) == 0
    start = load_teacher(ours / "run").state_dict()
    for step in range(1, 5):
        for part in ("student", "teacher"):
            found = find_weights(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", part).read(
                ("backbone.", "dino_head.")
            )
            still = all(torch.equal(t, start[n]) for n, t in found.items() if n.startswith("backbone."))
            assert still == (step <= steps), (step, part)
            if part == "student" and step > 1:  # the warm-up's first rate is 0
                assert not torch.equal(found["dino_head.mlp.0.weight"], start["dino_head.mlp.0.weight"])
