"""README.md of an export: what the model is and comes from, how good it is, how to use it, what was checked."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pretrain.downstream.backbone import Backbone
from pretrain.downstream.export.provenance import settings_of_training
from pretrain.downstream.export.timm import create_line
from pretrain.program_files import PROGRAM_FILES

_FRONT_MATTER = """---
library_name: {library}
pipeline_tag: image-feature-extraction
tags: [seedbed, self-supervised, vision-transformer]
{licence}---
"""
_DINOV3 = """license: other
license_name: dinov3-license
license_link: https://ai.meta.com/resources/models-and-libraries/dinov3-license/
"""
_USE_TRANSFORMERS = """```python
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("FOLDER"), AutoModel.from_pretrained("FOLDER").eval()
tokens = model(**processor(images=image, return_tensors="pt")).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, {prefix}:]
```

To embed a pool of images for curation: `embed.encoder=hf:FOLDER`.
"""
_USE_TIMM = """```python
model = {create}.eval()
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # the same, and it knows its images
tokens = model.forward_features(images)
cls, patches = tokens[:, 0], tokens[:, {prefix}:]
```
"""
_USE_PROGRAMS = {
    "onnx": """```python
session = onnxruntime.InferenceSession("FOLDER/model.onnx")
cls, registers, patches = session.run(None, {"images": images})
```
""",
    "torch_export": """```python
cls, registers, patches = torch.export.load("FOLDER/model.pt2").module()(images)
```
""",
    "torchscript": """```python
cls, registers, patches = torch.jit.load("FOLDER/model.ts")(images)
```
""",
}
_IMAGES = "`images` are float32 [B, 3, H, W], normalised with mean and std above; sides are multiples of the patch.\n"
_USE_OURS = """In this project, with registers and heads named:

```python
from pretrain.downstream.backbone import load_backbone

backbone = load_backbone("FOLDER")
features = backbone.features(backbone.image.normalise(uint8_images))  # cls, registers, patches, grid
```
"""
_LIBRARIES = {"huggingface": "transformers", "timm": "timm"}
_DESCRIPTIONS = {"huggingface": "seedbed.json", "timm": "seedbed.json"}
_NO_FIGURES = ("step", "knn", "pca_explained")
"""of an evaluation: where it was, the first of its k once more, what its pictures show"""
_BASELINES = {"knn_pixels": "raw pixels", "knn_random": "the same backbone untrained"}


def model_card(
    backbone: Backbone, heads: Mapping[str, Any], format_: str, dtype: str, licence: str, compared: Sequence[str]
) -> str:
    """Markdown with front matter as the Hugging Face hub reads it.

    Args:
        heads: their tensors by name, of those that lie beside the backbone.
        dtype: of the weights, and of the arithmetic of programs.
        licence: of the weights, or empty.
        compared: a line for each thing that was checked.
    """
    told = _DINOV3 if licence == "dinov3-license" else f"license: {licence}\n" if licence else ""
    trained = list(_trained(backbone.description, _DESCRIPTIONS.get(format_, "config.json")))
    lines = [
        _FRONT_MATTER.format(library=_LIBRARIES.get(format_, "seedbed"), licence=told),
        f"# {backbone.architecture}\n",
        "A vision backbone trained without labels by a student and its moving average "
        "(DINOv2, arXiv:2304.07193; DINOv3, arXiv:2508.10104).\n",
        *(f"- {fact}" for fact in _facts(backbone, heads, format_, dtype, licence)),
        *(["\n## Trained by Seedbed\n", *(f"- {line}" for line in trained)] if trained else []),
        *_measured(backbone.description),
        "\n## Use\n",
        _use(backbone, format_),
        "## Checked when it was written\n",
        "Largest difference from the backbone in float32, relative to the root mean square of its features.\n",
        *(f"- {line}" for line in compared),
    ]
    return "\n".join(lines) + "\n"


def _facts(backbone: Backbone, heads: Mapping[str, Any], format_: str, dtype: str, licence: str) -> Iterator[str]:
    s, image = backbone.settings, backbone.image
    parameters = sum(p.numel() for p in backbone.model.parameters())
    position = "axial RoPE" if s["position"] == "rope" else f"a {s['position_grid']} x {s['position_grid']} table"
    yield (
        f"{parameters / 1e6:,.1f} M parameters, {dtype}; width {s['embed_dim']}, {s['depth']} blocks, {s['num_heads']} "
        f"heads, patch {s['patch_size']}, {s['num_registers']} registers, {s['ffn']}, positions: {position}"
    )
    yield (
        f"images: RGB, shorter side {image.resize_px} px, centre crop {image.px} px, mean {list(image.mean)}, std "
        f"{list(image.std)}; any size that the patch divides works"
    )
    if heads:
        names = sorted({name.partition(".")[0] for name in heads})
        file = "heads.safetensors" if format_ == "huggingface" else "teacher.safetensors"
        yield f"projection heads for further training: {', '.join(names)}, in {file}"
    if not licence:
        yield "licence of the weights: not stated"
    elif backbone.released:
        family = {"dinov2": "DINOv2", "dinov3": "DINOv3"}[s["family"]]
        yield f"licence of the weights: {licence}; they were read from files as {family} was released in, see its terms"
    else:
        yield f"licence of the weights: {licence}, as stated by who exported them"


def _trained(known: Mapping[str, Any], file: str) -> Iterator[str]:
    """Step, phases, settings and images, as far as they are known."""
    if "step" not in known:
        return
    yield f"step {known['step']:,}, phase {known.get('phase')!r}; all settings are in {file}"
    if phases := known.get("phases"):
        yield "phases: " + ", ".join(f"{name} ({steps:,} steps)" for name, steps in phases.items())
    yield from settings_of_training(known)
    for found in known.get("data", ()):
        line = f"images `{found['name']}` ({', '.join(found['phases'])}): `{found['shards']}`"
        if manifest := found["manifest"]:
            line += (
                f", curated; shards: {manifest['shards']:,}, images: {manifest['images']:,}, "
                f"{manifest['bytes'] / 1e6:,.1f} MB, manifest sha256 `{manifest['sha256']}`"
            )
        else:
            line += ", where no manifest of curation was found"
        yield f"{line}; fingerprint of names, places and sizes `{found['fingerprint']}`"
    if "data" not in known:
        yield "images: not known here, for the run folder was not there when this was written"


def _measured(known: Mapping[str, Any]) -> Iterator[str]:
    """A table of the run's last evaluation."""
    if not (found := known.get("evaluation")):
        return
    settings = known.get("config", {}).get("evaluation", {})
    yield f"\n## Evaluated at step {found['step']:,}\n"
    yield f"`{settings.get('train')}` against `{settings.get('val')}`, {settings.get('px')} px.\n"
    yield "| | |"
    yield "|---|---|"
    for name, value in found.items():
        if name.startswith("knn/"):
            yield f"| k-NN, k = {name.removeprefix('knn/')} | {value:.1%} |"
        elif name in _BASELINES and value is not None:
            yield f"| k-NN, k = {settings.get('k', ['?'])[0]}, {_BASELINES[name]} | {value:.1%} |"
        elif name not in _NO_FIGURES and isinstance(value, float):
            yield f"| {name} | {value:.4g} |"


def _use(backbone: Backbone, format_: str) -> str:
    prefix = 1 + backbone.settings["num_registers"]
    if format_ == "huggingface":
        return _USE_TRANSFORMERS.format(prefix=prefix) + "\n" + _USE_OURS
    if format_ == "timm":
        return (
            _USE_TIMM.format(create=create_line(backbone.settings), prefix=prefix) + "\n" + _IMAGES + "\n" + _USE_OURS
        )
    if format_ in PROGRAM_FILES:
        return _USE_PROGRAMS[format_] + "\n" + _IMAGES + "\n" + _USE_OURS
    return _USE_OURS
