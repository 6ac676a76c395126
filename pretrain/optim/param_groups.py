"""Parameter groups as published, and the AdamW that runs them.

Source: the released DINOv2 and DINOv3 code. Layer-wise decay: BEiT, arXiv:2106.08254.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.distributed.names import plain_name
from pretrain.optim.schedules import OptimConfig, StepValues

EMBEDDINGS = ("pos_embed", "patch_embed", "cls_token", "mask_token", "register_tokens", "storage_tokens")
BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def lr_multiplier(name: str, depth: int, layerwise_decay: float, patch_embed_lr_multiplier: float) -> float:
    """Learning rate of a parameter relative to that of the heads, by its plain name.

    decay^(depth + 1 - id): id 0 for the embeddings and tokens, i + 1 for block i, depth + 1 for the final norms and the
    heads. The patch embedding is multiplied once more. DINOv2's public code forgets its registers, which so learn at
    the rate of the heads; DINOv3's counts its own among the tokens, and so do we for both.
    """
    if not name.startswith("backbone."):
        return 1.0
    block = BLOCK.search(name)
    if any(embedding in name for embedding in EMBEDDINGS):
        layer_id = 0
    elif block:
        layer_id = int(block.group(1)) + 1
    else:
        layer_id = depth + 1
    multiplier = layerwise_decay ** (depth + 1 - layer_id)
    return multiplier * patch_embed_lr_multiplier if "patch_embed" in name else multiplier


def wd_multiplier(name: str) -> float:
    """0 for biases, norms and layer scales, else 1: tokens and position embedding decay, as in the released runs."""
    return 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else 1.0


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    depth: int,
    layerwise_decay: float,
    patch_embed_lr_multiplier: float,
) -> list[dict[str, Any]]:
    """Parameters that need a gradient, one group for each (lr multiplier, wd multiplier, part).

    Args:
        named_parameters: of the student: `backbone.*` and the heads', wrapped or not.
        depth: blocks of the backbone.

    Returns:
        Groups for an optimizer with params, names (plain), lr_multiplier, wd_multiplier, and part (`backbone`,
        `last_layer` or `head`); few groups with many tensors each, so that fused kernels have something to fuse.
    """
    groups: dict[tuple[float, float, str], dict[str, Any]] = {}
    for wrapped_name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        name = plain_name(wrapped_name)
        key = (
            lr_multiplier(name, depth, layerwise_decay, patch_embed_lr_multiplier),
            wd_multiplier(name),
            "backbone" if name.startswith("backbone.") else "last_layer" if "last_layer" in name else "head",
        )
        new = {"lr_multiplier": key[0], "wd_multiplier": key[1], "part": key[2], "params": [], "names": []}
        group = groups.setdefault(key, new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW with its moments allocated now, so that a checkpoint always finds them and memory is known early.

    Fused on a CPU too: there it is the fastest, and it alone can skip a step on the device (`step_unless`).
    Rates are set by `apply_schedule` before each step.
    """
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), weight_decay=0.0, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
    return optimizer


def apply_schedule(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Set each group's learning rate and weight decay for the coming step; AdamW decays by their product.

    At a rate of 0 a group keeps still to the last bit, while its moments follow the gradients.
    """
    rates = {"backbone": values.backbone_lr, "last_layer": values.last_layer_lr, "head": values.lr}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["part"]] * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["wd_multiplier"]


def step_unless(optimizer: torch.optim.Optimizer, found: Tensor) -> None:
    """Take the step, unless `found` (float32 scalar on the device) is 1; the host does not wait to know.

    This is how a gradient scaler makes fused optimizers skip: weights, moments and step counts stay as they are.
    """
    optimizer.found_inf = found
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf
