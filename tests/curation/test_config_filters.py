"""The filters that configs/curation offers, those in comments too: they exist, load, and do what they say."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from configs.loader import load_config
from curation.config import CurationConfig
from curation.encoders.classifier import Classifier
from curation.reading.filters import _KINDS, build_filters
from curation.run import main
from tests.conftest import REPOSITORY, encoded, picture_tar, write_tar
from tests.conftest import picture as smooth

CONFIGS = sorted((REPOSITORY / "configs" / "curation").glob("*.yaml"))


def in_comments(path: Path) -> list[dict]:
    """The `filters:` that a config offers to be uncommented; empty where there are none."""
    match = re.search(r"^# filters:\n(#  .*\n)+", path.read_text(), re.MULTILINE)
    return yaml.safe_load(re.sub("^# ", "", match[0], flags=re.MULTILINE))["filters"] if match else []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_kind_that_a_config_names_exists(path: Path) -> None:
    config = load_config(CurationConfig, "curation", path.stem, [])
    for entries in (config.filters, in_comments(path)):
        for rule in build_filters(entries):
            if hasattr(rule, "function"):
                assert callable(rule.function())
    named = re.findall(r"kinds? `(\w+)`|kind: (\w+)", path.read_text())
    assert {ticked or written for ticked, written in named} <= set(_KINDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_dry_run_with_the_filters_offered_says_what_is_missing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As on a machine that has fetched nothing: the plan is printed, and what a filter lacks is named with a remedy."""
    pool, seed = (picture_tar(tmp_path / f"{name}.tar", range(2)) for name in ("pool", "seed"))
    offered = in_comments(path)
    config = tmp_path / path.name
    config.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **({"filters": offered} if offered else {})}))
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(config), "--seed", str(seed), "--pool", str(pool), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    models = [entry["options"]["folder"] for entry in offered if entry["kind"] == "pixels"]
    for folder in models:
        assert f"filters: {folder} has no preprocessor_config.json" in told
        assert f"`hf download NAME --local-dir {folder}`. The run will stop there." in told
    assert told.count("filters: ") == len(models)
    assert bool(models) == (path.stem == "lvd142m")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model in the form of the one that lvd142m.yaml names."""
    torch = pytest.importorskip("torch")
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("nsfw")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1}, initializer_range=0.3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    says = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(says))
    return folder


def reference(folder: Path, images: list[Image.Image]) -> np.ndarray:
    """Probabilities of `nsfw`, one image at a time, by transformers alone."""
    import torch
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(folder).eval()
    found = []
    for image in images:
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=3.0))
        batch = (torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        with torch.no_grad():
            found.append(model(pixel_values=batch).logits.softmax(-1)[0, 1].item())
    return np.array(found)


def test_a_classifier_gives_what_its_model_gives(classifier: Path) -> None:
    options = {"folder": str(classifier), "label": "nsfw"}
    images = [smooth(seed) for seed in range(5)]
    view, model = Classifier.view(**options), Classifier("cpu", **options)
    tolerance = 1e-2 if model.bfloat16 else 1e-5
    views = np.stack([view(image) for image in images])
    np.testing.assert_allclose(model.probabilities(views), reference(classifier, images), atol=tolerance)


def test_the_filters_of_lvd142m_uncommented(
    classifier: Path, tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small pool: what the model gives a high probability is rejected in the embedding actors, nothing else."""
    pool = picture_tar(tmp_path / "a.tar", range(12))
    with_content = [Image.open(io.BytesIO(encoded(smooth(seed), quality=90))) for seed in range(12)]
    probability = reference(classifier, [image.convert("RGB") for image in with_content])
    order = np.sort(probability)
    gap = int(np.argmax(np.diff(order[3:9]))) + 3
    filters = in_comments(REPOSITORY / "configs" / "curation" / "lvd142m.yaml")
    (entry,) = (entry for entry in filters if entry["kind"] == "pixels")
    entry["options"] |= {"folder": str(classifier), "min_probability": float(order[gap : gap + 2].mean())}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"embed": {"encoder": "descriptors"}, "filters": filters}))
    arguments = ["--pool", str(pool), "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "balance.num_images=3", "--dry-run"]) == 0
    assert "rejects by size, aspect, blank, pixels" in capsys.readouterr().out
    assert main([*arguments, "balance.num_images=3", "--until", "filter"]) == 0
    (index,) = (tmp_path / "run" / "embed" / "pool" / "index").iterdir()
    reasons = pq.read_table(index, partitioning=None)["reason"].to_pylist()
    expected = probability >= entry["options"]["min_probability"]
    assert 3 <= expected.sum() <= 9
    assert reasons == ["classified_nsfw" if bad else None for bad in expected]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "blurred"}, "has no label 'blurred'; it has normal, nsfw"),
        ({"folder": "/nowhere"}, "/nowhere has no preprocessor_config.json"),
        ({"min_probability": 0}, "min_probability=0 must lie in"),
        ({"lable": "nsfw"}, "does not take options"),
    ],
)
def test_wrong_options_are_told_before_anything_is_read(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, words: str
) -> None:
    options = {"folder": str(classifier), "label": "nsfw", **change}
    entry = {"kind": "pixels", "path": "curation.encoders.classifier:Classifier", "options": options}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"embed": {"encoder": "descriptors"}, "filters": [entry]}))
    pool = write_tar(tmp_path / "a.tar", [("a.jpg", encoded(smooth(1)))])
    arguments = ["--pool", str(pool), "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "balance.num_images=3"]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "embed").exists()
