"""The card of an export says where its teacher comes from, how good it was, and under which licence."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml

from curation.engine.manifest import MANIFEST_NAME, File, Manifest
from pretrain.downstream.backbone import load_backbone
from pretrain.downstream.export.folder import export
from pretrain.models.architectures import build
from tests.conftest import encoded, picture, picture_tar, write_tar
from tests.pretrain.tiny_train import HIGH_RESOLUTION, TINY, run


def labelled_tar(path: Path, seeds: range) -> Path:
    members = []
    for seed in seeds:
        label = json.dumps({"label": f"kind {seed % 2}"}).encode()
        members += [(f"p{seed:04d}.jpg", encoded(picture(seed))), (f"p{seed:04d}.json", label)]
    return write_tar(path, members)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with curated shards, labelled sets and a run of two phases."""
    folder = tmp_path_factory.mktemp("card")
    tar = picture_tar(folder / "curated" / "shards" / "shard-000000.tar", range(12))
    content = tar.read_bytes()
    written = [File(path=tar.name, rows=12, bytes=len(content), sha256=sha256(content).hexdigest())]
    manifest = Manifest(stage="shard", version=3, key="0" * 32, settings={}, inputs={}, files=written)
    (tar.parent / MANIFEST_NAME).write_text(manifest.to_json())
    sets = {name: str(labelled_tar(folder / f"{name}.tar", range(8))) for name in ("train", "val")}
    evaluation = {"every_steps": 2, "px": 32, "k": [1, 3], "pca_images": 0, **sets}
    phases = {"first": {"steps": 4}, "second": HIGH_RESOLUTION}
    config = TINY | {"evaluation": evaluation, "phases": phases, "init_from": str(folder / "start.pth")}
    torch.save(build("dinov2_tiny", depth=2, position_grid=4).state_dict(), folder / "start.pth")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert run(folder / "tiny.yaml", folder / "curated" / "shards", folder / "run") == 0
    return folder


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_the_card_tells_images_recipe_and_figures(trained: Path, tmp_path: Path) -> None:
    export(trained / "run", tmp_path / "out", "huggingface", position_offset=0)
    card, shards = card_of(tmp_path / "out"), trained / "curated" / "shards"
    manifest = Manifest.from_json((shards / MANIFEST_NAME).read_text())
    assert f"images `shards` (first, second): `{shards}`" in card
    assert (
        f"shards: 1, images: 12, {manifest.files[0].bytes / 1e6:,.1f} MB, manifest sha256 `{manifest.hash()}`" in card
    )
    assert "phases: first (4 steps), second (2 steps)" in card
    assert "step 6, phase 'second'; all settings are in seedbed.json" in card
    assert "batches of 8 images, float32; crops 2 x 48 px and 2 x 24 px" in card
    assert f"started from `{trained / 'start.pth'}`, whose licence applies here too" in card
    assert "licence of the weights: not stated" in card
    last = [json.loads(line) for line in (trained / "run" / "evaluations.jsonl").read_text().splitlines()][-1]
    assert "## Evaluated at step 6" in card
    assert f"| k-NN, k = 3 | {last['knn/3']:.1%} |" in card
    assert f"| k-NN, k = 1, raw pixels | {last['knn_pixels']:.1%} |" in card
    assert f"| k-NN, k = 1, the same backbone untrained | {last['knn_random']:.1%} |" in card


def test_a_checkpoint_has_the_figures_of_its_own_step(trained: Path, tmp_path: Path) -> None:
    export(trained / "run" / "checkpoints" / "step-00000004", tmp_path / "out", "torchscript")
    card = card_of(tmp_path / "out")
    assert "## Evaluated at step 4" in card
    assert "phases: first (4 steps)\n" in card
    assert "images `shards` (first): " in card
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["image"]["px"] == 32
    assert {"patch_size", "embed_dim", "depth", "num_registers"} <= described["model"].keys()


def test_what_is_known_travels_from_export_to_export(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run" / "teacher", tmp_path / "alone")
    export(tmp_path / "alone", tmp_path / "poor", "safetensors")
    assert "images: not known here" in card_of(tmp_path / "poor")
    export(trained / "run", tmp_path / "one", "safetensors", licence="cc-by-4.0")
    export(tmp_path / "one", tmp_path / "two", "huggingface", position_offset=0)
    card = card_of(tmp_path / "two")
    assert "license: cc-by-4.0\n---" in card
    assert "licence of the weights: cc-by-4.0, as stated by who exported them" in card
    assert "manifest sha256" in card
    assert "## Evaluated at step 6" in card
    assert load_backbone(tmp_path / "two").description["licence"] == "cc-by-4.0"


@pytest.mark.parametrize(
    ("name", "licence", "told"),
    [("dinov2_vits14_reg", "apache-2.0", "DINOv2"), ("dinov3_vits16", "dinov3-license", "DINOv3")],
)
def test_released_weights_have_the_licence_of_their_release(name: str, licence: str, told: str, tmp_path: Path) -> None:
    torch.save(build(name).state_dict(), tmp_path / "released.pth")
    export(tmp_path / "released.pth", tmp_path / "out", "safetensors", name)
    card = card_of(tmp_path / "out")
    front = yaml.safe_load(card.split("---")[1])
    assert licence in (front["license"], front.get("license_name"))
    assert f"licence of the weights: {licence}; they were read from files as {told} was released in" in card
    assert "Trained by Seedbed" not in card
