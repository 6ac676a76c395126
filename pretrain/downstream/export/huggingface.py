"""A backbone as a folder of Hugging Face transformers: Dinov2, Dinov2WithRegisters or DINOv3ViT.

Their classes cover what was published, ours more: whatever they cannot express is refused with the reason. Position
tables decide between the first two: Dinov2Model resizes them without antialiasing, Dinov2WithRegistersModel with it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.distributed.tensor_files import save_tensors
from pretrain.downstream.backbone import Backbone
from pretrain.downstream.program_model import Run
from pretrain.models.huggingface import huggingface_state
from pretrain.weights import EXPORT_CONFIG

WEIGHTS = "model.safetensors"
_ARCHITECTURES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}


def write_model(backbone: Backbone, folder: Path) -> None:
    """config.json, model.safetensors, preprocessor_config.json and seedbed.json into an existing folder.

    Raises:
        ValueError: a model that no class of transformers computes.
    """
    config = model_config(backbone)
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", processor_config(backbone))
    # The second norm is for local crops in training; no class has it.
    write_json(folder / EXPORT_CONFIG, described(backbone, backbone.settings | {"untied_local_norm": False}))
    state = huggingface_state(
        _explicit(backbone), config["model_type"], key_bias=config.get("key_bias", backbone.settings["qkv_bias"])
    )
    if config["model_type"] != "dinov2":  # these classes have the tensor even without registers
        state.setdefault("embeddings.register_tokens", torch.zeros(1, 0, backbone.model.embed_dim))
    save_tensors(state, folder / WEIGHTS)


def read_model(folder: Path, backbone: Backbone, dtype: torch.dtype) -> Run:
    """What runs a folder that transformers loads, computing in this precision.

    Raises:
        ValueError: a missing or unexpected tensor.
    """
    from transformers import AutoModel

    model, report = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise ValueError(f"transformers loads {folder} with {kind.replace('_', ' ')}: {sorted(report[kind])[:4]}.")
    model, first = model.eval(), 1 + backbone.settings["num_registers"]

    @torch.inference_mode()
    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = model(images.to(dtype)).last_hidden_state.float()
        return tokens[:, 0], tokens[:, 1:first], tokens[:, first:]

    return run


def round_model(backbone: Backbone, folder: Path) -> None:
    """Make the tensors of a written folder float16, in which transformers then computes unless told otherwise."""
    round_file(folder / WEIGHTS)
    write_json(folder / "config.json", model_config(backbone) | {"torch_dtype": "float16"})


def round_file(file: Path, start: str = "") -> None:
    """Rewrite a safetensors file with those of its tensors in float16 whose names begin with `start`."""
    tensors, rounded = load_file(file), file.with_suffix(".rounded")  # the file may be mapped
    save_tensors({name: t.half() if name.startswith(start) else t for name, t in tensors.items()}, rounded)
    rounded.replace(file)


def _explicit(backbone: Backbone) -> dict[str, Tensor]:
    """Our tensors, with what the classes always have: layer scales (ones where ours has none), effective key biases."""
    state, width = dict(backbone.model.state_dict()), backbone.model.embed_dim
    for block in range(backbone.settings["depth"]):
        for name in ("ls1.gamma", "ls2.gamma"):
            state.setdefault(f"blocks.{block}.{name}", torch.ones(width))
        bias = f"blocks.{block}.attn.qkv.bias"
        if backbone.settings["mask_key_bias"] and bias in state:
            q, k, v = state[bias].chunk(3)
            state[bias] = torch.cat([q, torch.zeros_like(k), v])
    return state


def model_config(backbone: Backbone) -> dict[str, Any]:
    """config.json of the class of transformers that computes this model.

    Raises:
        ValueError: there is none; the message names the setting.
    """
    s = backbone.settings
    check_stem(s, "transformers")
    model_type = _model_type(s)
    config = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "torch_dtype": "float32",
        "num_channels": s["in_channels"],
        "hidden_size": s["embed_dim"],
        "num_hidden_layers": s["depth"],
        "num_attention_heads": s["num_heads"],
        "patch_size": s["patch_size"],
        "layer_norm_eps": s["norm_eps"],
        "layerscale_value": s["layerscale"] or 1.0,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
    }
    if model_type != "dinov2":
        config["num_register_tokens"] = s["num_registers"]
    gated = s["ffn"] == "swiglu"
    if model_type == "dinov3_vit":
        return config | {
            "image_size": backbone.image.px,
            "hidden_act": "silu" if gated else "gelu",
            "intermediate_size": _hidden_dim(backbone),
            "use_gated_mlp": gated,
            "query_bias": s["qkv_bias"],
            "key_bias": s["qkv_bias"] and not s["mask_key_bias"],
            "value_bias": s["qkv_bias"],
            "proj_bias": True,
            "mlp_bias": True,
            "attention_dropout": 0.0,
            "rope_theta": float(s["rope_base"]),
            "pos_embed_shift": s["rope_shift"],
            "pos_embed_jitter": s["rope_jitter"],
            "pos_embed_rescale": s["rope_rescale"],
        }
    return config | {
        "image_size": s["position_grid"] * s["patch_size"],
        "hidden_act": "gelu",
        "mlp_ratio": _integer_ratio(backbone),
        "use_swiglu_ffn": gated,
        "qkv_bias": s["qkv_bias"],
        "use_mask_token": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def check_stem(settings: dict[str, Any], library: str) -> None:
    """Raise ValueError for a stem that no class of a library has."""
    if settings["stem"] != "patches":
        raise ValueError(
            f"no class of {library} has a stem of {settings['stem']} (model.stem): export it as onnx, torchscript, "
            "torch_export or safetensors."
        )


def processor_config(backbone: Backbone) -> dict[str, Any]:
    """preprocessor_config.json: shorter side, centre crop, mean and std, as this project evaluates."""
    px = backbone.image.px
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": backbone.image.resize_px},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": px, "width": px},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.image.mean),
        "image_std": list(backbone.image.std),
    }


def described(backbone: Backbone, settings: dict[str, Any]) -> dict[str, Any]:
    """What `load_backbone` needs to know, with all that is known of the training."""
    image = {"mean": list(backbone.image.mean), "std": list(backbone.image.std), "px": backbone.image.px}
    return backbone.description | {"architecture": backbone.architecture, "model": settings, "image": image}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _model_type(s: dict[str, Any]) -> str:
    if s["position"] == "rope":
        if s["rope_min_period"] is not None or s["rope_normalise"] != "separate":
            raise ValueError(
                "DINOv3ViT of transformers has RoPE with a base and separate axes only; this model has "
                f"rope_min_period={s['rope_min_period']} and rope_normalise={s['rope_normalise']}."
            )
        return "dinov3_vit"
    if s["position_offset"]:
        raise ValueError(
            f"position_offset={s['position_offset']} is an older way to resize positions, which transformers has not; "
            "export with position_offset=0: features then change at sizes other than that of the position table."
        )
    if s["position_antialias"]:
        return "dinov2_with_registers"
    if s["num_registers"]:
        raise ValueError(
            "transformers resizes the positions of a model with registers with antialiasing, this one goes without; "
            "export with position_antialias=true: features then change at sizes below that of the position table."
        )
    return "dinov2"


def _integer_ratio(backbone: Backbone) -> int:
    """mlp_ratio of the DINOv2 classes, which is an integer; their SwiGLU takes two thirds, rounded up to 8."""
    width, hidden, gated = backbone.model.embed_dim, _hidden_dim(backbone), backbone.settings["ffn"] == "swiglu"
    for ratio in range(1, 17):
        if hidden == ((int(width * ratio * 2 / 3) + 7) // 8 * 8 if gated else width * ratio):
            return ratio
    raise ValueError(
        f"feed-forward layers of {hidden} hidden units in a model {width} wide have no integer mlp_ratio, which the "
        "DINOv2 classes of transformers need."
    )


def _hidden_dim(backbone: Backbone) -> int:
    """Input width of the feed-forward layers' last projection."""
    last = "w3" if backbone.settings["ffn"] == "swiglu" else "fc2"
    return backbone.model.get_parameter(f"blocks.0.mlp.{last}.weight").shape[1]
