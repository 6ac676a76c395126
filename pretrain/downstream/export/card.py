"""README.md of an export: what the model is, how to use it, what was checked."""

from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.downstream.backbone import Backbone

_FRONT_MATTER = """---
library_name: {library}
pipeline_tag: image-feature-extraction
tags: [seedbed, self-supervised, vision-transformer]
---
"""
_USE_TRANSFORMERS = """```python
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained(FOLDER), AutoModel.from_pretrained(FOLDER).eval()
tokens = model(**processor(images=image, return_tensors="pt")).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, {prefix}:]
```

To embed a pool of images for curation: `embed.encoder=hf:FOLDER`. In this project, with registers and heads named:
"""
_USE_OURS = """```python
from pretrain.downstream.backbone import load_backbone

backbone = load_backbone(FOLDER)
features = backbone.features(backbone.image.normalise(uint8_images))  # cls, registers, patches, grid
```
"""
_LIBRARIES = {"huggingface": "transformers", "timm": "timm"}
_USE_OTHERS = {
    "timm": """```python
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
tokens = model.forward_features(images)
```
""",
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


def model_card(backbone: Backbone, heads: Mapping[str, Any], format_: str, compared: Sequence[str]) -> str:
    """Markdown with front matter as the Hugging Face hub reads it."""
    known, s = backbone.description, backbone.settings
    parameters = sum(p.numel() for p in backbone.model.parameters())
    position = "axial RoPE" if s["position"] == "rope" else f"a {s['position_grid']} x {s['position_grid']} table"
    facts = [
        f"{parameters / 1e6:,.1f} M parameters; width {s['embed_dim']}, {s['depth']} blocks, {s['num_heads']} heads, "
        f"patch {s['patch_size']}, {s['num_registers']} registers, {s['ffn']}, positions: {position}",
        f"images: RGB, shorter side {backbone.image.resize_px} px, centre crop {backbone.image.px} px, mean "
        f"{list(backbone.image.mean)}, std {list(backbone.image.std)}; any size that the patch divides works",
    ]
    if "step" in known:
        file = {"huggingface": "seedbed.json", "safetensors": "config.json"}.get(format_, "")
        settings = f"; all settings are in {file}" if file else ""
        facts.append(f"trained by Seedbed: step {known['step']:,}, phase {known['phase']!r}{settings}")
    if heads:
        names = sorted({name.partition(".")[0] for name in heads})
        file = "heads.safetensors" if format_ == "huggingface" else "teacher.safetensors"
        facts.append(f"projection heads for further training: {', '.join(names)}, in {file}")
    use = _USE_OURS
    if format_ == "huggingface":
        use = _USE_TRANSFORMERS.format(prefix=1 + s["num_registers"]) + "\n" + _USE_OURS
    if format_ in _USE_OTHERS:
        use = _USE_OTHERS[format_] + "\n" + _IMAGES
    lines = [
        _FRONT_MATTER.format(library=_LIBRARIES.get(format_, "seedbed")),
        f"# {backbone.architecture}\n",
        "A vision backbone trained without labels by a student and its moving average "
        "(DINOv2, arXiv:2304.07193; DINOv3, arXiv:2508.10104).\n",
        *(f"- {fact}" for fact in facts),
        "\n## Use\n",
        use,
        "## Checked when it was written\n",
        *(f"- {line}" for line in compared),
    ]
    return "\n".join(lines) + "\n"
