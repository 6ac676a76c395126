"""A backbone as one function of pixels with nothing but array operations: what ONNX and torch.export can hold.

The same arithmetic as the model in evaluation, for any batch, height and width that the patch divides. What the model
decides in Python by the size of its input (resized positions, RoPE tables) is computed in the graph.
"""

import copy
import math

import torch
from torch import Tensor, nn

from pretrain.models.layers.block import Block
from pretrain.models.layers.norm import LayerScale
from pretrain.models.layers.patch_embed import ConvolutionalStem
from pretrain.models.layers.rope import coordinates, rotate, tables_from
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.program_files import INPUT


class Graph(nn.Module):
    """Normalised images [B, 3, H, W] -> CLS [B, D], registers [B, R, D], patches [B, h * w, D]; float32 all of them.

    Args:
        model: left as it is.
        dtype: of the weights and of the arithmetic in between.
    """

    def __init__(self, model: VisionTransformer, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
        self.dtype = dtype

    def example(self) -> Tensor:
        """A batch to trace with: of a size that nothing else has, so that no number in the graph is taken for it."""
        p = self.model.patch_size
        return torch.zeros(2, self.model.patch_embed.in_channels, 3 * p, 5 * p)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.dtype == torch.float32:
            return self._tokens(images)
        cls, registers, patches = self._tokens(images.to(self.dtype))
        return cls.float(), registers.float(), patches.float()

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, p = self.model, self.model.patch_size
        batch, (h, w) = images.shape[0], (images.shape[2] // p, images.shape[3] // p)
        if isinstance(model.patch_embed, ConvolutionalStem):
            patches = model.patch_embed.tokens(images)
        else:
            pixels = images.reshape(batch, -1, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w, -1)
            embed = model.patch_embed.proj
            patches = nn.functional.linear(pixels, embed.weight.flatten(1), embed.bias)
        cls = model.cls_token
        if model.rope is None:
            table = model.pos_embed
            cls, patches = cls + table[:, :1], patches + self._positions(table[0, 1:], h, w)
        prefix = [cls, *([model.get_parameter(model.registers_name)] if model.num_registers else [])]
        head = torch.cat(prefix, dim=1).expand(batch, -1, -1)
        tokens = torch.cat([head, patches], dim=1)
        rope = None
        if model.rope is not None:
            places = coordinates(h, w, model.rope.normalise, images.device)
            rope = tables_from(places, model.rope, model.num_prefix_tokens)
        for block in model.blocks:
            assert isinstance(block, Block)
            tokens = tokens + _attention(block, tokens, rope)
            tokens = tokens + block.ffn_branch(tokens)
        normed = model.norm(tokens)
        first = model.num_prefix_tokens
        return normed[:, 0], normed[:, 1:first], normed[:, first:]

    def _positions(self, table: Tensor, h: int, w: int) -> Tensor:
        """[n * n, D] -> [h * w, D], resized as the model resizes it."""
        model, side = self.model, math.isqrt(table.shape[0])
        make = _antialiased if model.position_antialias else _interpolated
        heights, widths = (torch.scalar_tensor(n, device=table.device) for n in (h, w))
        is_trained_size = (heights == side) & (widths == side)  # there the model resizes nothing
        offset = torch.where(is_trained_size, 0.0, model.position_offset)
        rows, columns = (make(n, side, offset) for n in (h, w))
        square = table.reshape(side, side, -1).float()
        resized = torch.einsum("hi,ijd->hjd", rows, square)
        return torch.einsum("wj,hjd->hwd", columns, resized).reshape(h * w, -1).to(table.dtype)


def _attention(block: Block, tokens: Tensor, rope: Tensor | None) -> Tensor:
    """The attention branch of a block on [B, T, D]."""
    attn = block.attn
    qkv = attn.project(block.norm1(tokens)).unflatten(2, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return block.ls1.after(attn.proj, mixed) if isinstance(block.ls1, LayerScale) else attn.proj(mixed)


def _interpolated(target: int, source: int, offset: Tensor) -> Tensor:
    """The matrix [target, source] of a bicubic resize along one axis; the cubic of F.interpolate, a = -0.75."""
    device = offset.device
    places = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * (source / (target + offset)) - 0.5
    first = places.floor()
    distance = places - first
    matrix = torch.zeros(1, source, device=device)
    columns = torch.arange(source, device=device, dtype=torch.float32)
    for tap in (-1, 0, 1, 2):
        weight = _cubic((distance - tap).abs(), -0.75)
        column = (first + tap).clamp(0, source - 1)
        matrix = matrix + (column[:, None] == columns) * weight[:, None]
    return matrix


def _antialiased(target: int, source: int, offset: Tensor) -> Tensor:
    """The same with the low pass of F.interpolate(antialias=True): a = -0.5, as wide as the step where it shrinks."""
    device = offset.device
    scale = source / (target + offset)
    centres = (torch.arange(target, device=device, dtype=torch.float32) + 0.5) * scale
    width = scale.clamp(min=1.0)
    columns = torch.arange(source, device=device, dtype=torch.float32) + 0.5
    distance = (columns - centres[:, None]) / width
    weights = _cubic(distance.abs(), -0.5)
    return weights / weights.sum(dim=1, keepdim=True)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution at distances x >= 0; 0 from 2 on."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def exported(graph: Graph) -> torch.export.ExportedProgram:
    """The graph with a dynamic batch, and a height and width that are any multiples of the patch.

    Registers without rows are an output all the same, so that every export has the same three.
    """
    p = graph.model.patch_size
    height, width = (torch.export.Dim(name, min=1, max=65_536 // p) for name in ("h", "w"))
    batch = torch.export.Dim("batch", min=1, max=65_536)
    shapes = {INPUT: {0: batch, 2: p * height, 3: p * width}}
    return torch.export.export(graph, (graph.example(),), dynamic_shapes=shapes)
