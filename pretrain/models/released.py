"""Load the released DINOv2 and DINOv3 checkpoints as they are."""

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from pretrain.models.layers.position import resize_pos_embed
from pretrain.models.layers.rope import periods
from pretrain.models.vision_transformer import VisionTransformer

T = TypeVar("T")
# DINOv2 training checkpoints number the chunk of blocks before the block: blocks.1.13.norm1 is block 13.
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+\.)")
_HEADS = ("dino_head.", "ibot_head.")
_WRAPPERS = ("teacher", "model")
# Constants that released files hold beside the parameters.
_BIAS_MASK, _PERIODS = ".attn.qkv.bias_mask", "rope_embed.periods"


def load_released(
    model: VisionTransformer,
    source: Mapping[str, Tensor],
    *,
    resize_position: bool = False,
) -> None:
    """Copy released weights into a model of the same architecture; arguments and errors as of `fitting_state`."""
    model.load_state_dict(fitting_state(model, source, resize_position=resize_position), strict=True)


def fitting_state(
    model: VisionTransformer,
    source: Mapping[str, Tensor],
    *,
    resize_position: bool = False,
) -> dict[str, Tensor]:
    """Released weights as a model of the same architecture has them; nothing may be missing or left over.

    Takes the hub files, and the teacher checkpoints that the DINOv2 trainer writes (`teacher` around everything, names
    with `backbone.` and block chunks, heads beside them, which are left out).

    Args:
        source: the state dict of a released file. All but those that `is_looked_at` may lie on `meta`, as the model.
        resize_position: resize a learned position table of another size, as the model would interpolate it.

    Raises:
        ValueError: names or shapes that are not this architecture's, or another RoPE base.
    """
    state = released_names(source)
    _check_constants(model, state)
    own = model.state_dict()
    table = state.get("pos_embed")
    if resize_position and table is not None and "pos_embed" in own and table.shape[1] != own["pos_embed"].shape[1]:
        side = round((own["pos_embed"].shape[1] - 1) ** 0.5)
        state["pos_embed"] = resize_pos_embed(
            table, side, antialias=model.position_antialias, offset=model.position_offset
        )
    problems = [f"missing {name}" for name in own.keys() - state.keys()]
    problems += [f"unknown {name}" for name in state.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)}, here {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if problems:
        raise ValueError(
            f"the checkpoint is not of this architecture ({len(problems)} differences: "
            f"{'; '.join(sorted(problems)[:4])})."
        )
    return state


def is_looked_at(name: str) -> bool:
    """Whether `fitting_state` needs the values of a tensor, and not its shape only."""
    return name in ("pos_embed", _PERIODS) or name.endswith(_BIAS_MASK)


def released_names(state: Mapping[str, T]) -> dict[str, T]:
    """A state dict with the names of the hub files: unwrapped, without heads, block chunks folded."""
    for wrapper in _WRAPPERS:
        inner = state.get(wrapper)
        if isinstance(inner, Mapping):
            state = inner
    result = {}
    for name, value in state.items():
        name = name.removeprefix("module.").removeprefix("backbone.")
        if not name.startswith(_HEADS):
            result[_CHUNKED.sub(r"blocks.\1", name)] = value
    return result


def _check_constants(model: VisionTransformer, state: dict[str, Tensor]) -> None:
    """Take out the buffers that this model computes instead, once they are seen to agree with it."""
    for name in [name for name in state if name.endswith(_BIAS_MASK)]:
        mask = state.pop(name)
        width = model.embed_dim
        expected = torch.ones(3 * width)
        expected[width : 2 * width] = 0
        if not torch.equal(mask.float().cpu(), expected):
            raise ValueError(f"{name} masks more than the key bias; this model cannot.")
    stored = state.pop(_PERIODS, None)
    if stored is None:
        return
    if model.rope is None:
        raise ValueError("the checkpoint has RoPE periods, the model position=learned.")
    own = periods(model.rope)
    # Some releases store them in bfloat16, with 8 bits of precision.
    if stored.shape != own.shape or not torch.allclose(stored.float().cpu(), own, rtol=2**-7):
        raise ValueError(
            f"the checkpoint has RoPE periods from {stored.min():.3g} to {stored.max():.3g}, "
            f"the model from {own.min():.3g} to {own.max():.3g}; set rope_base or rope_min_period and rope_max_period."
        )
