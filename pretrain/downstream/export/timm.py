"""A folder that timm loads, by `timm.create_model(NAME, checkpoint_path="FOLDER/model.safetensors")` or whole, by
`timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.distributed.tensor_files import save_tensors
from pretrain.downstream.backbone import Backbone, complete_settings
from pretrain.downstream.export.huggingface import WEIGHTS, check_stem, described, write_json
from pretrain.downstream.program_model import quiet
from pretrain.downstream.timm_model import TimmModel
from pretrain.weights import EXPORT_CONFIG

# timm's entries of the published architectures. Those with key biases held at zero are timm's "qkvb".
_PUBLISHED = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
    "dinov2_vitg14": "vit_giant_patch14_dinov2",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2",
    "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2",
    "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2",
    "dinov2_vitg14_reg": "vit_giant_patch14_reg4_dinov2",
    "dinov3_vits16": "vit_small_patch16_dinov3_qkvb",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    "dinov3_vitb16": "vit_base_patch16_dinov3_qkvb",
    "dinov3_vitl16": "vit_large_patch16_dinov3_qkvb",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
    "dinov3_vit7b16": "vit_7b_patch16_dinov3",
}
# What may differ from a published architecture and be computed by its entry all the same: values of the weights,
# and what acts in training alone.
_FREE = {"position_grid", "position_antialias", "position_offset", "rope_shift", "rope_jitter", "rope_rescale"}
_FREE |= {"rope_noise_per_block", "mask_key_bias", "layerscale", "drop_path", "untied_local_norm", "attention", "fp8"}
# For any other: entries whose numbers are replaced. What they fix are the classes of layers, which no JSON can name.
_LEARNED = {"mlp": "vit_small_patch14_dinov2", "swiglu": "vit_giant_patch14_dinov2"}
_ROPE = {"mlp": "vit_small_patch16_dinov3_qkvb", "swiglu": "vit_small_plus_patch16_dinov3_qkvb"}


def write_timm(backbone: Backbone, folder: Path) -> TimmModel:
    """config.json, model.safetensors and seedbed.json into an existing folder; the model, loaded from there by timm.

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
    write_json(folder / EXPORT_CONFIG, described(backbone, backbone.settings))
    save_tensors(timm_state(backbone), folder / WEIGHTS)
    try:
        with quiet():
            timm.create_model(f"local-dir:{folder}", pretrained=True)  # strict as well: names and shapes of all tensors
        return read_timm(backbone, folder)
    except RuntimeError as error:
        raise ValueError(f"timm's {name} does not take these weights: {' '.join(str(error).split())[:300]}") from None


def read_timm(backbone: Backbone, folder: Path) -> TimmModel:
    """The model from its file, as `create_line` says it; timm computes in float32 whatever the file is in."""
    import timm

    name, arguments = timm_entry(backbone.settings)
    with quiet():
        model = timm.create_model(name, checkpoint_path=str(folder / WEIGHTS), **arguments)
    return TimmModel(model.eval().requires_grad_(False), name)


def create_line(settings: dict[str, Any]) -> str:
    """Python that makes the model from its file, with what its entry of timm has otherwise."""
    name, arguments = timm_entry(settings)
    given = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f'timm.create_model("{name}", checkpoint_path="FOLDER/{WEIGHTS}"{given})'


def timm_entry(settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of timm's entry, and the arguments that make it this model.

    Args:
        settings: complete keyword arguments of VisionTransformer.

    Raises:
        ValueError: timm computes something else.
    """
    check_stem(settings, "timm")
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
    px = s["position_grid"] * s["patch_size"]
    # A CLS token is what ours answer with; timm's DINOv3 averages patches unless told.
    pooled = {"global_pool": "token"} if is_rope else {"dynamic_img_size": True}
    for name, entry in _PUBLISHED.items():
        published = complete_settings(name, {})
        if all(s[key] == value for key, value in published.items() if key not in _FREE):
            is_resized = not is_rope and s["position_grid"] != published["position_grid"]
            return entry, pooled | ({"img_size": px} if is_resized else {})
    gated = s["ffn"] == "swiglu"
    arguments = {
        "patch_size": s["patch_size"],
        "embed_dim": s["embed_dim"],
        "depth": s["depth"],
        "num_heads": s["num_heads"],
        "in_chans": s["in_channels"],
        "qkv_bias": s["qkv_bias"],
        "dynamic_img_size": True,
        "img_size": px,
        **pooled,
    }
    if is_rope:
        ratio = _gated_width(s) / s["embed_dim"] if gated else s["ffn_ratio"]
        rope = {"rope_temperature": s["rope_base"], "num_reg_tokens": s["num_registers"], "mlp_ratio": ratio}
        aligned = {"swiglu_align_to": s["ffn_align"]} if gated else {}
        return _ROPE[s["ffn"]], arguments | rope | aligned
    hidden = _gated_width(s) * 2 if gated else s["ffn_ratio"] * s["embed_dim"]
    learned = {"mlp_ratio": hidden / s["embed_dim"]}
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
    if not settings["layerscale"]:  # its entries have layer scales always
        scales = ("gamma_1", "gamma_2") if is_rope else ("ls1.gamma", "ls2.gamma")
        ones = torch.ones(settings["embed_dim"])
        found |= {f"blocks.{block}.{name}": ones.clone() for block in range(settings["depth"]) for name in scales}
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
