"""The Hugging Face classes of the released models: their parameter names, both ways, and their config.json.

Ours are those of the released DINOv2 and DINOv3 checkpoints. Theirs are written as transformers 4 names them on disk:
transformers 5 renames modules in memory only, so both majors load such a file.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
# The final norm of local crops in training; no class of transformers has it.
_TRAINING_ONLY = "local_cls_norm."
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_LAYER = {"dinov2": "encoder.layer", "dinov3_vit": "layer"}
_FIXED = {
    "dinov2": {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "register_tokens": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    },
    "dinov3_vit": {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "storage_tokens": "embeddings.register_tokens",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    },
}
_SHARED_BLOCK = {"norm1": "norm1", "norm2": "norm2", "ls1.gamma": "layer_scale1.lambda1"}
_SHARED_BLOCK["ls2.gamma"] = "layer_scale2.lambda1"
_IN_BLOCK = {
    "dinov2": _SHARED_BLOCK
    | {
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.weights_out",
    },
    "dinov3_vit": _SHARED_BLOCK
    | {
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w2": "mlp.up_proj",
        "mlp.w3": "mlp.down_proj",
    },
}
_QKV = {
    "dinov2": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "dinov3_vit": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
}


def huggingface_state(state: Mapping[str, Tensor], model_type: str, *, key_bias: bool = True) -> dict[str, Tensor]:
    """Our backbone's tensors under the names and shapes of a Hugging Face class.

    Args:
        state: of either family; a `dinov2` backbone may well have RoPE, and the reverse.
        model_type: one of MODEL_TYPES.
        key_bias: false leaves the key biases out, which DINOv3 holds at zero.

    Raises:
        ValueError: a tensor that the class has no place for.
    """
    family, exported = _family(model_type), {}
    for name, tensor in _renamed(state, family).items():
        block = _BLOCK.match(name)
        if name in _FIXED[family]:
            is_mask = name == "mask_token"
            shape = (1, 1, -1) if is_mask and family == "dinov3_vit" else (1, -1) if is_mask else tensor.shape
            exported[_FIXED[family][name]] = tensor.reshape(shape)
        elif block and block[2].startswith("attn.qkv."):
            kind = block[2].removeprefix("attn.qkv.")
            for part, target, value in zip("qkv", _QKV[family], tensor.chunk(3), strict=True):
                if part != "k" or kind == "weight" or key_bias:
                    exported[f"{_LAYER[family]}.{block[1]}.{target}.{kind}"] = value
        elif block and _in_block(block[2], family):
            exported[f"{_LAYER[family]}.{block[1]}.{_in_block(block[2], family)}"] = tensor
        else:
            raise ValueError(f"parameter {name} has no place in a {model_type} model of transformers.")
    return {name: tensor.contiguous() for name, tensor in exported.items()}


def backbone_state(exported: Mapping[str, Tensor], model_type: str, *, family: str, gated: bool) -> dict[str, Tensor]:
    """The inverse of `huggingface_state`; a key bias that was left out is zero.

    Args:
        family: "dinov2" or "dinov3": whose names the backbone has.
        gated: its feed-forward layers are SwiGLU; `up_proj` of DINOv3ViT then is w2, otherwise fc1.

    Raises:
        ValueError: a tensor that the class does not have.
    """
    theirs, state = _family(model_type), {}
    fixed = {name: ours for ours, name in _FIXED[theirs].items()}
    in_block = {
        name: ours for ours, name in _IN_BLOCK[theirs].items() if not ours.startswith("mlp.") or _gated(ours) == gated
    }
    layer = re.compile(rf"^{re.escape(_LAYER[theirs])}\.(\d+)\.(.+)$")
    for name, tensor in exported.items():
        block = layer.match(name)
        if name in fixed:
            if tensor.numel():  # the classes hold an empty tensor where there are no registers
                state[fixed[name]] = tensor.reshape(1, -1) if fixed[name] == "mask_token" else tensor
            continue
        number, (inner, _, kind) = (block[1], block[2].rpartition(".")) if block else ("", ("", "", ""))
        if block and inner in _QKV[theirs]:
            parts = [exported.get(f"{_LAYER[theirs]}.{number}.{part}.{kind}") for part in _QKV[theirs]]
            whole = [torch.zeros_like(tensor) if part is None else part for part in parts]
            state[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(whole)
        elif block and block[2] in in_block:  # layer scales have no weight or bias
            state[f"blocks.{number}.{in_block[block[2]]}"] = tensor
        elif block and inner in in_block:
            state[f"blocks.{number}.{in_block[inner]}.{kind}"] = tensor
        else:
            raise ValueError(f"tensor {name} is not of a {model_type} model as transformers 4 names them.")
    return _renamed(state, "dinov3_vit" if family == "dinov3" else "dinov2")


def _renamed(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """The same tensors as the other family names them: registers, and SwiGLU's first two matrices as one or as two."""
    renamed: dict[str, Tensor] = {}
    registers = "register_tokens" if family == "dinov2" else "storage_tokens"
    for name, tensor in state.items():
        start, fused, kind = name.partition("mlp.w12.")
        if name.startswith(_TRAINING_ONLY):
            continue
        if name in ("register_tokens", "storage_tokens"):
            renamed[registers] = tensor
        elif fused and family == "dinov3_vit":
            renamed[f"{start}mlp.w1.{kind}"], renamed[f"{start}mlp.w2.{kind}"] = tensor.chunk(2)
        elif "mlp.w1." in name and family == "dinov2":
            renamed[name.replace("mlp.w1.", "mlp.w12.")] = torch.cat(
                [tensor, state[name.replace("mlp.w1.", "mlp.w2.")]]
            )
        elif "mlp.w2." not in name or family == "dinov3_vit":
            renamed[name] = tensor
    return renamed


def _family(model_type: str) -> str:
    assert model_type in MODEL_TYPES, model_type
    return "dinov2" if model_type == "dinov2_with_registers" else model_type


def _in_block(name: str, family: str) -> str:
    """The name inside a block, or "" where the class has none."""
    module, _, kind = name.rpartition(".")
    if name in _IN_BLOCK[family]:
        return _IN_BLOCK[family][name]
    return f"{_IN_BLOCK[family][module]}.{kind}" if module in _IN_BLOCK[family] else ""


def _gated(ours: str) -> bool:
    return ours.startswith("mlp.w")


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of VisionTransformer for the config.json of one of these classes.

    Raises:
        ValueError: another model, or one that we cannot compute.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type={model_type!r} is none of {', '.join(MODEL_TYPES)}.")
    try:
        return _settings_dinov3(config) if model_type == "dinov3_vit" else _settings_dinov2(config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"its config is not complete: {error}.") from None


def _settings_dinov2(config: Mapping[str, Any]) -> dict[str, Any]:
    with_registers = config["model_type"] == "dinov2_with_registers"
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act={config['hidden_act']!r} is not gelu.")
    return {
        **_shared(config),
        "family": "dinov2",
        "num_registers": config.get("num_register_tokens", 4) if with_registers else 0,
        "ffn": "swiglu" if config.get("use_swiglu_ffn") else "mlp",
        "ffn_ratio": float(config.get("mlp_ratio", 4)),
        "position": "learned",
        "position_grid": config.get("image_size", 224) // config["patch_size"],
        "position_antialias": with_registers,
        "qkv_bias": config.get("qkv_bias", True),
        "norm_eps": config.get("layer_norm_eps", 1e-6),
    }


def _settings_dinov3(config: Mapping[str, Any]) -> dict[str, Any]:
    gated, query_bias = bool(config.get("use_gated_mlp")), config.get("query_bias", True)
    for name, wanted in (("hidden_act", "silu" if gated else "gelu"), ("value_bias", query_bias)):
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{name}={config[name]!r} is not {wanted!r}.")
    if not config.get("mlp_bias", True) or not config.get("proj_bias", True):
        raise ValueError("its mlp_bias or proj_bias is false, and ours always have them.")
    rope = config.get("rope_parameters") or {}
    return {
        **_shared(config),
        "family": "dinov3",
        "num_registers": config.get("num_register_tokens", 0),
        "ffn": "swiglu" if gated else "mlp",
        # Ours say two thirds of the ratio, rounded up to 8.
        "ffn_ratio": config["intermediate_size"] / config["hidden_size"] * (1.5 if gated else 1),
        "position": "rope",
        "rope_base": float(config.get("rope_theta") or rope.get("rope_theta") or 100.0),
        "qkv_bias": query_bias,
        "mask_key_bias": query_bias and not config.get("key_bias", False),
        "untied_local_norm": False,  # of training; the class has none, of the 7B model neither
        "norm_eps": config.get("layer_norm_eps", 1e-5),
    }


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "patch_size": config["patch_size"],
        "in_channels": config.get("num_channels", 3),
        "layerscale": config.get("layerscale_value", 1.0),
    }
