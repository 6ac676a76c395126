"""A folder that timm loads: `timm.create_model("local-dir:FOLDER", pretrained=True)`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.distributed.tensor_files import save_tensors
from pretrain.downstream.backbone import Backbone
from pretrain.downstream.export.huggingface import write_json
from pretrain.downstream.timm_model import TimmModel

# timm's entries whose other numbers are replaced: what they fix are the classes of layers, which no JSON can name.
_LEARNED = {"mlp": "vit_small_patch14_dinov2", "swiglu": "vit_giant_patch14_dinov2"}
_ROPE = {"mlp": "vit_small_patch16_dinov3_qkvb", "swiglu": "vit_small_plus_patch16_dinov3_qkvb"}


def write_timm(backbone: Backbone, folder: Path) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """config.json and model.safetensors into an existing folder; what runs them, loaded from there by timm.

    Raises:
        ValueError: a model that no class of timm computes.
    """
    import timm

    name, arguments = timm_entry(backbone.settings)
    image = backbone.image
    known = {
        "input_size": [backbone.settings["in_channels"], image.px, image.px],
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": "bicubic",
        "crop_pct": image.px / image.resize_px,
        "num_classes": 0,
    }
    config = {"architecture": name, "num_classes": 0, "num_features": backbone.settings["embed_dim"]}
    write_json(folder / "config.json", config | {"model_args": arguments, "pretrained_cfg": known})
    save_tensors(timm_state(backbone), folder / "model.safetensors")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except RuntimeError as error:
        raise ValueError(f"timm's {name} does not take these weights: {' '.join(str(error).split())[:300]}") from None
    wrapped = TimmModel(model.eval(), name)

    @torch.inference_mode()
    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = wrapped([images])[0]
        return features.cls, features.registers, features.patches

    return run


def timm_entry(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of timm's entry, and the arguments that make it this model.

    Args:
        settings: complete keyword arguments of VisionTransformer.

    Raises:
        ValueError: timm computes something else.
    """
    s, is_rope = settings, settings["position"] == "rope"
    fixed: dict[str, Any] = {"norm_eps": 1e-5 if is_rope else 1e-6}
    if is_rope:
        fixed |= {"rope_min_period": None, "rope_normalise": "separate"}
    else:
        fixed |= {"position_antialias": True, "position_offset": 0}
    for key, value in fixed.items():
        if s[key] != value:
            advice = f"; export it with {key}={value}, as timm runs it" if key.startswith("position") else ""
            raise ValueError(f"timm computes this kind of model with {key}={value}, and this one has {s[key]}{advice}.")
    gated = s["ffn"] == "swiglu"
    arguments = {
        "patch_size": s["patch_size"],
        "embed_dim": s["embed_dim"],
        "depth": s["depth"],
        "num_heads": s["num_heads"],
        "in_chans": s["in_channels"],
        "qkv_bias": s["qkv_bias"],
        "init_values": s["layerscale"] or None,
        "dynamic_img_size": True,
    }
    if is_rope:
        ratio = _gated_width(s) / s["embed_dim"] if gated else s["ffn_ratio"]
        rope = {"rope_temperature": s["rope_base"], "num_reg_tokens": s["num_registers"], "mlp_ratio": ratio}
        rope |= {"img_size": s["position_grid"] * s["patch_size"]}
        aligned = {"swiglu_align_to": s["ffn_align"]} if gated else {}
        return _ROPE[s["ffn"]], arguments | rope | aligned
    hidden = _gated_width(s) * 2 if gated else s["ffn_ratio"] * s["embed_dim"]
    learned = {"img_size": s["position_grid"] * s["patch_size"], "mlp_ratio": hidden / s["embed_dim"]}
    registers = {"reg_tokens": s["num_registers"], "no_embed_class": True} if s["num_registers"] else {}
    return _LEARNED[s["ffn"]], arguments | learned | registers


def _gated_width(settings: dict[str, Any]) -> int:
    wide = int(int(settings["ffn_ratio"] * settings["embed_dim"]) * 2 / 3)
    return wide + -wide % settings["ffn_align"]


def timm_state(backbone: Backbone) -> dict[str, Tensor]:
    """Our tensors under timm's names.

    Raises:
        ValueError: key biases, which timm's class with RoPE does not have.
    """
    settings, state = backbone.settings, dict(backbone.model.state_dict())
    is_rope, found = settings["position"] == "rope", {}
    for name, tensor in state.items():
        block, _, rest = name.partition(".attn.qkv.")
        if name == "mask_token" or name.startswith("local_cls_norm."):  # of training
            continue
        if name in ("register_tokens", "storage_tokens"):
            found["reg_token"] = tensor
        elif is_rope and rest == "bias":
            q, k, v = tensor.chunk(3)
            if k.any() and not settings["mask_key_bias"]:
                raise ValueError(f"{name} has key biases, and timm's ViT with RoPE has none.")
            found |= {f"{block}.attn.q_bias": q, f"{block}.attn.v_bias": v}
        elif rest == "bias" and settings["mask_key_bias"]:
            q, k, v = tensor.chunk(3)
            found[name] = torch.cat([q, torch.zeros_like(k), v])
        elif ".mlp.w" in name:
            found |= _gated(name, tensor, state, is_rope)
        else:
            found[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2") if is_rope else name] = tensor
    if not is_rope and settings["num_registers"]:  # there timm has positions of patches alone
        found["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        found["pos_embed"] = state["pos_embed"][:, 1:]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _gated(name: str, tensor: Tensor, state: dict[str, Tensor], is_rope: bool) -> dict[str, Tensor]:
    """SwiGLU: two first matrices with RoPE, one packed of both else; ours has either, by its family."""
    block, _, rest = name.partition(".mlp.")
    part, _, kind = rest.partition(".")
    if part == "w3":
        return {f"{block}.mlp.fc2.{kind}": tensor}
    if is_rope:
        gate, value = tensor.chunk(2) if part == "w12" else (tensor, tensor)
        names = {"w1": ["fc1_g"], "w2": ["fc1_x"], "w12": ["fc1_g", "fc1_x"]}[part]
        return {f"{block}.mlp.{one}.{kind}": gate if one == "fc1_g" else value for one in names}
    if part == "w2":
        return {}
    packed = tensor if part == "w12" else torch.cat([tensor, state[f"{block}.mlp.w2.{kind}"]])
    return {f"{block}.mlp.fc1.{kind}": packed}
