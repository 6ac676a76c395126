"""The published architectures by name, and tiny ones for tests and small data."""

from collections.abc import Mapping
from typing import Any

import torch

from pretrain.models.vision_transformer import VisionTransformer

_SIZES: dict[str, dict[str, Any]] = {
    "mini": {"embed_dim": 128, "depth": 4, "num_heads": 2},
    "tiny": {"embed_dim": 192, "depth": 4, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 20},
    "giant": {"embed_dim": 1536, "depth": 40, "num_heads": 24},
    "7b": {"embed_dim": 4096, "depth": 40, "num_heads": 32},
}
# The released tables have 37 x 37 positions: 518 px of patches of 14.
_DINOV2: dict[str, Any] = {"family": "dinov2", "patch_size": 14, "position": "learned", "position_grid": 37}
_REGISTERS: dict[str, Any] = {"num_registers": 4, "position_antialias": True}
_DINOV3: dict[str, Any] = {
    "family": "dinov3",
    "patch_size": 16,
    "position": "rope",
    "num_registers": 4,
    "norm_eps": 1e-5,
    "mask_key_bias": True,
}
_SWIGLU_6: dict[str, Any] = {"ffn": "swiglu", "ffn_ratio": 6.0}
# Small enough that the position table of 37 x 37 would be most of the model.
_TINY: dict[str, Any] = {"patch_size": 8, "position_grid": 8}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dinov2_vits14": {**_DINOV2, **_SIZES["small"]},
    "dinov2_vitb14": {**_DINOV2, **_SIZES["base"]},
    "dinov2_vitl14": {**_DINOV2, **_SIZES["large"]},
    "dinov2_vitg14": {**_DINOV2, **_SIZES["giant"], "ffn": "swiglu"},
    "dinov2_vits14_reg": {**_DINOV2, **_SIZES["small"], **_REGISTERS},
    "dinov2_vitb14_reg": {**_DINOV2, **_SIZES["base"], **_REGISTERS},
    "dinov2_vitl14_reg": {**_DINOV2, **_SIZES["large"], **_REGISTERS},
    "dinov2_vitg14_reg": {**_DINOV2, **_SIZES["giant"], **_REGISTERS, "ffn": "swiglu"},
    "dinov3_vits16": {**_DINOV3, **_SIZES["small"]},
    "dinov3_vits16plus": {**_DINOV3, **_SIZES["small"], **_SWIGLU_6},
    "dinov3_vitb16": {**_DINOV3, **_SIZES["base"]},
    "dinov3_vitl16": {**_DINOV3, **_SIZES["large"]},
    "dinov3_vitl16plus": {**_DINOV3, **_SIZES["large"], **_SWIGLU_6},
    "dinov3_vith16plus": {**_DINOV3, **_SIZES["huge"], **_SWIGLU_6},
    "dinov3_vit7b16": {
        **_DINOV3,
        **_SIZES["7b"],
        "ffn": "swiglu",
        "ffn_ratio": 3.0,
        "ffn_align": 64,
        "qkv_bias": False,
        "untied_local_norm": True,
    },
    "dinov2_mini": {**_DINOV2, **_SIZES["mini"], **_TINY},
    "dinov2_tiny": {**_DINOV2, **_SIZES["tiny"], **_TINY},
    "dinov3_tiny": {**_DINOV3, **_SIZES["tiny"], "patch_size": 8},
}


def architecture(name: str, **changes: Any) -> dict[str, Any]:
    """The keyword arguments of `VisionTransformer` for a name, changed. Raises ValueError: an unknown name."""
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r}; known: {', '.join(ARCHITECTURES)}.")
    return {**ARCHITECTURES[name], **changes}


def nearest(settings: Mapping[str, Any]) -> str:
    """The architecture that differs in the fewest of these settings; of equal ones, the first."""

    def differences(name: str) -> int:
        return sum(ARCHITECTURES[name].get(key, value) != value for key, value in settings.items())

    return min(ARCHITECTURES, key=differences)


def build(
    name: str,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    **changes: Any,
) -> VisionTransformer:
    """An initialised model; on device "meta", one without storage.

    Raises ValueError: an unknown name. TypeError: a change that `VisionTransformer` has no argument for.
    """
    with torch.device("meta"):
        model = VisionTransformer(**architecture(name, **changes))
    if torch.device(device).type != "meta":
        model.to_empty(device=device)
        model.init_weights(generator)
    return model
