"""How many floating point operations training needs, and what share of the device's peak that is (MFU).

The model, with 2 operations per multiply-add, and matrix products only (norms, softmax, GELU, RoPE are left out, as is
usual):

- Forward of a ViT on an image of N patches and T = N + prefix tokens: 2 N P for the patch embedding of P multiply-adds
  a patch, 2 T W for the W weights of the blocks' linear layers, and 4 T^2 D for attention in each of the blocks.
- A head of W weights, prototypes among them: 2 W for a row.
- A training step, for one image: the teacher's forward on V global crops (x 1); the student's forward and backward
  (x 3) on V global and L local crops, its blocks times (1 - drop path), since stochastic depth over the batch leaves
  those samples out; heads on every CLS token and every patch that iBOT predicts, x 1 for the teacher and x 3 for the
  student; the Gram teacher's forward on V crops where there is one.

These are operations that the method needs. What an implementation repeats (activation checkpointing, streamed
prototypes) or saves (a packed attention kernel) does not count, so that MFU compares implementations.

Sources: the accounting of PaLM, arXiv:2204.02311, appendix B, with the encoder's full (not causal) attention.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn

from pretrain.models.vision_transformer import VisionTransformer

# Dense bfloat16 peaks with float32 sums, in TFLOP/s, from the vendor's data sheets (which print twice as much, for
# sparse matrices); by the words of torch.cuda.get_device_name that tell the card.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "H100": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H800": 989.4,
    "H800 PCIe": 756.0,
    "H20": 148.0,
    "A100": 311.8,
    "A800": 311.8,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


@dataclass(frozen=True, kw_only=True)
class BackboneCost:
    """What the number of operations of a ViT depends on."""

    embedding_products: int
    """multiply-adds of the patch embedding for a patch: its weights, or those of each convolution at its resolution"""
    block_weights: int
    """of the linear layers of all blocks; each multiplies every token"""
    depth: int
    embed_dim: int
    patch_size: int
    num_prefix_tokens: int
    """CLS and registers"""


def backbone_cost(backbone: VisionTransformer) -> BackboneCost:
    """Read it off a model; weights may be on `meta`, or sharded."""
    return BackboneCost(
        embedding_products=backbone.patch_embed.products(),
        block_weights=sum(matrix_weights(block) for block in backbone.blocks),
        depth=len(backbone.blocks),
        embed_dim=backbone.embed_dim,
        patch_size=backbone.patch_size,
        num_prefix_tokens=backbone.num_prefix_tokens,
    )


def matrix_weights(module: nn.Module) -> int:
    """Number of weights in linear and convolution layers: parameters of two dimensions or more."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() >= 2)


def forward_flops(cost: BackboneCost, height_px: int, width_px: int, drop_path: float = 0.0) -> float:
    """Operations of one image's forward.

    Args:
        drop_path: share of the blocks' work that stochastic depth leaves out, from 0 to 1.
    """
    patches = (height_px // cost.patch_size) * (width_px // cost.patch_size)
    tokens = patches + cost.num_prefix_tokens
    attention = 4 * tokens**2 * cost.embed_dim * cost.depth
    blocks = (2 * tokens * cost.block_weights + attention) * (1 - drop_path)
    return 2 * patches * cost.embedding_products + blocks


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One training step of one image, in crops and heads."""

    student: BackboneCost
    teacher: BackboneCost
    """the same as the student's, but in distillation"""
    drop_path: float
    """of the student, from 0 to 1"""
    num_global_crops: int
    num_local_crops: int
    student_dino_head: int
    """weights of its linear layers and prototypes (matrix_weights); 0 for none"""
    student_ibot_head: int
    teacher_dino_head: int
    teacher_ibot_head: int
    predicted_share: float
    """of all global patches, the share that iBOT predicts: probability x mean ratio of the mask, 0.15 as published"""
    gram: BackboneCost | None = None


def step_flops(cost: StepCost, global_px: int, local_px: int, gram_px: int = 0) -> float:
    """Operations that training on one image needs, with crops of these sides in pixels."""
    teacher = cost.num_global_crops * forward_flops(cost.teacher, global_px, global_px)
    student = cost.num_global_crops * forward_flops(cost.student, global_px, global_px, cost.drop_path)
    if cost.num_local_crops:
        student += cost.num_local_crops * forward_flops(cost.student, local_px, local_px, cost.drop_path)
    predicted = cost.num_global_crops * (global_px // cost.student.patch_size) ** 2 * cost.predicted_share
    student_rows = cost.num_global_crops + cost.num_local_crops
    student += 2 * (student_rows * cost.student_dino_head + predicted * cost.student_ibot_head)
    teacher += 2 * (cost.num_global_crops * cost.teacher_dino_head + predicted * cost.teacher_ibot_head)
    gram = cost.num_global_crops * forward_flops(cost.gram, gram_px, gram_px) if cost.gram and gram_px else 0.0
    return teacher + 3 * student + gram


def peak_flops(device: torch.device) -> float:
    """Dense bfloat16 peak of one device from the table, in FLOP/s; 0 where it is not known (every CPU)."""
    if device.type != "cuda":
        return 0.0
    return named_peak_flops(torch.cuda.get_device_name(device))


def named_peak_flops(name: str) -> float:
    """The same for a card's name; the most words that fit decide, for an H100 PCIe is no H100."""
    fitting = [card for card in PEAK_TFLOPS if re.search(rf"\b{re.escape(card)}\b", name)]
    return PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else 0.0
