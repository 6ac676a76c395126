"""The vision transformer of DINOv2 (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104), with their parameter names."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.models.initial import LINEAR, NORM, Initial, initialise, prefixed
from pretrain.models.layers.attention import Attention, Layout, make_layout
from pretrain.models.layers.block import Block, draw_kept, num_kept
from pretrain.models.layers.ffn import build_ffn
from pretrain.models.layers.fp8 import LEAST_WIDTH, use_fp8
from pretrain.models.layers.norm import LayerNorm, LayerScale
from pretrain.models.layers.patch_embed import STEMS, ConvolutionalStem, PatchEmbed, build_stem, patch_grid
from pretrain.models.layers.position import patch_positions
from pretrain.models.layers.rope import Rope, RopeNoise, noisy_tables, tables
from pretrain.models.layers.rows import Kept

FAMILIES = ("dinov2", "dinov3")
POSITIONS = ("learned", "rope")


@dataclass(frozen=True)
class Features:
    """Tokens of one group of images; the only way to them, so that no one counts prefix tokens by hand."""

    cls: Tensor
    """[B, D]"""
    registers: Tensor
    """[B, R, D]"""
    patches: Tensor
    """[B, h * w, D], row-major"""
    grid: tuple[int, int]
    """patches (h, w)"""


class VisionTransformer(nn.Module):
    """A ViT that takes groups of crops of any sizes and runs them through each block together.

    Args:
        family: "dinov2" or "dinov3": whose released parameter names and token initialisation to use.
        stem: "patches" (one linear map of each) or "convolutions", see `layers.patch_embed`.
        ffn, ffn_ratio, ffn_align: "mlp" is `ffn_ratio * embed_dim` wide; "swiglu" two thirds of that, rounded up to
            `ffn_align`.
        position: "learned" (a square table of `position_grid` patches a side, resized to other grids as
            `position_antialias` and `position_offset` say) or "rope".
        rope_*: see `layers.rope`; shift, jitter and rescale are noise in training, drawn for every block and group
            as published, or once a forward and group (`rope_noise_per_block=False`).
        layerscale: initial factor of the residual branches; 0 builds none.
        drop_path: share of a group's images that each residual branch skips in training.
        untied_local_norm: in training, CLS and registers of local crops have a final norm of their own.
        attention: kernel, see `layers.attention`.
        fp8: 8-bit products in the blocks' linear layers that are large enough, see `layers.fp8`.

    Raises:
        ValueError: an unknown choice, or a width that the heads do not divide.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        in_channels: int = 3,
        stem: str = "patches",
        family: str = "dinov2",
        ffn: str = "mlp",
        ffn_ratio: float = 4.0,
        ffn_align: int = 8,
        num_registers: int = 0,
        position: str = "learned",
        position_grid: int = 16,
        position_antialias: bool = False,
        position_offset: float = 0.0,
        rope_base: float = 100.0,
        rope_min_period: float | None = None,
        rope_max_period: float | None = None,
        rope_normalise: str = "separate",
        rope_shift: float | None = None,
        rope_jitter: float | None = None,
        rope_rescale: float | None = None,
        rope_noise_per_block: bool = True,
        qkv_bias: bool = True,
        mask_key_bias: bool = False,
        layerscale: float = 1e-5,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        untied_local_norm: bool = False,
        attention: str = "sdpa",
        fp8: bool = False,
    ) -> None:
        super().__init__()
        if family not in FAMILIES:
            raise ValueError(f"family={family!r}; known: {', '.join(FAMILIES)}.")
        if position not in POSITIONS:
            raise ValueError(f"position={position!r}; known: {', '.join(POSITIONS)}.")
        if stem not in STEMS:
            raise ValueError(f"stem={stem!r}; known: {', '.join(STEMS)}.")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} does not split over num_heads={num_heads}.")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path}: a share of the images, from 0 to below 1.")
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.num_registers = num_registers
        self.num_prefix_tokens = 1 + num_registers
        self.family = family
        self.drop_path = drop_path
        self.attention = attention
        self.position_antialias = position_antialias
        self.position_offset = position_offset
        self.rope: Rope | None = None
        if position == "rope":
            self.rope = Rope(embed_dim // num_heads, rope_base, rope_min_period, rope_max_period, rope_normalise)
        self.rope_noise = RopeNoise(rope_shift, rope_jitter, rope_rescale)
        self.rope_noise_per_block = rope_noise_per_block

        self.patch_embed = build_stem(stem, patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        if num_registers:
            self.register_parameter(self.registers_name, nn.Parameter(torch.empty(1, num_registers, embed_dim)))
        if self.rope is None:
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + position_grid**2, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                Attention(embed_dim, num_heads, qkv_bias=qkv_bias, mask_key_bias=mask_key_bias, backend=attention),
                build_ffn(ffn, family, embed_dim, ffn_ratio, ffn_align),
                norm_eps=norm_eps,
                layerscale=layerscale,
            )
            for _ in range(depth)
        )
        if fp8 and not use_fp8(self.blocks):
            raise ValueError(f"fp8=true, and no layer is wide enough: embed_dim={embed_dim}, least {LEAST_WIDTH}.")
        self.norm = LayerNorm(embed_dim, eps=norm_eps)
        self.local_cls_norm = LayerNorm(embed_dim, eps=norm_eps) if untied_local_norm else None
        self.init_weights()

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def registers_name(self) -> str:
        """The released name of the register tokens."""
        return "register_tokens" if self.family == "dinov2" else "storage_tokens"

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter anew, also one that `to_empty` left undefined."""
        initialise(self, self.initials(), generator)

    def initials(self) -> dict[str, Initial]:
        """What each parameter starts from, by its name; distributions as released."""
        token = Initial("normal", 1e-6 if self.family == "dinov2" else 0.02)
        found = {"cls_token": token, self.registers_name: token, "pos_embed": Initial("normal", 0.02)}
        found["mask_token"] = Initial("constant", 0.0)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                found |= prefixed(name, LINEAR)
            elif isinstance(module, LayerNorm):
                found |= prefixed(name, NORM)
            elif isinstance(module, LayerScale | PatchEmbed | ConvolutionalStem):
                found |= prefixed(name, module.initials())
        return found

    def forward(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        local: Sequence[bool] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Features]:
        """Features after the final norm, for each group of equal crops.

        Args:
            crops: normalised pixels [B_g, C, H_g, W_g].
            masks: bool [B_g, N_g] where the mask token replaces the patch, or None for a group without.
            local: which groups are local crops; matters with `untied_local_norm`, in training.
            generator: on the CPU; draws stochastic depth and RoPE noise, in training. Equal state, equal result.

        Raises:
            ValueError: a crop that the patch does not divide; noise to draw and no generator.
        """
        tokens, grids = self.embed(crops, masks)
        groups = [
            (images, self.num_prefix_tokens + h * w) for images, (h, w) in zip(map(len, crops), grids, strict=True)
        ]
        if self.training and generator is None and (self.drop_path or (self.rope and self.rope_noise.on)):
            raise ValueError("stochastic depth and RoPE noise need a generator in training: forward(..., generator=g).")
        layout = make_layout(groups, self.attention, tokens.device)
        tables_of = self.rope_tables(grids, tokens.device, generator if self.training else None)
        kept = self.draw_depth(layout, tokens.device, generator) if self.training and self.drop_path else None
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, layout, tables_of[i], kept[i] if kept else None)
        return self.features(tokens, layout, grids, local if self.training else None)

    def layers(self, image: Tensor, indices: Sequence[int], norm: bool = True) -> list[Features]:
        """Features [B, ...] of images [B, C, H, W] after the blocks `indices` (from 0; negative from the end).

        Always as in evaluation: no stochastic depth, no noise. `norm` applies the final norm to each.
        Raises ValueError: an index that the model does not have.
        """
        depth = len(self.blocks)
        unknown = [i for i in indices if not -depth <= i < depth]
        if unknown:
            raise ValueError(f"block indices {unknown} of a model with {depth} blocks; known: {-depth} to {depth - 1}.")
        wanted = [i % depth for i in indices]
        tokens, grids = self.embed([image], None)
        layout = make_layout([(len(image), len(tokens) // len(image))], self.attention, tokens.device)
        tables_of = self.rope_tables(grids, tokens.device, None)
        found: dict[int, Features] = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            tokens = block(tokens, layout, tables_of[i])
            if i in wanted:
                found[i] = self.features(tokens, layout, grids, None, norm=norm)[0]
        return [found[i] for i in wanted]

    def embed(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """All crops as one token matrix [T, D], each image CLS, registers, patches; and the groups' grids."""
        grids = [patch_grid(group, self.patch_embed.in_channels, self.patch_size) for group in crops]
        # The residual stream stays float32 under autocast; in a model cast as a whole it has the model's precision.
        autocast = torch.is_autocast_enabled(crops[0].device.type)
        dtype = torch.float32 if autocast else self.cls_token.dtype
        mask_token = self.mask_token.to(dtype)
        prefix = self.cls_token.to(dtype)
        if masks is None or all(mask is None for mask in masks):
            # DDP waits for a gradient of every parameter, and this one has none without masks.
            masks = [None] * len(crops)
            prefix = prefix + 0 * mask_token
        registers = [self.get_parameter(self.registers_name).to(dtype)] if self.num_registers else []
        rows = []
        for patches, mask, grid in zip(self.patch_embed(crops, masks), masks, grids, strict=True):
            patches = patches.to(dtype)
            if mask is not None:
                patches = torch.where(mask[..., None], mask_token, patches)
            cls = prefix
            if self.rope is None:
                cls_position, positions = patch_positions(
                    self.pos_embed, grid, antialias=self.position_antialias, offset=self.position_offset
                )
                cls, patches = cls + cls_position.to(dtype), patches + positions.to(dtype)
            head = torch.cat([cls, *registers], dim=1).expand(len(patches), -1, -1)
            rows.append(torch.cat([head, patches], dim=1).flatten(0, 1))
        return (torch.cat(rows) if len(rows) > 1 else rows[0]), grids

    def rope_tables(
        self, grids: Sequence[tuple[int, int]], device: torch.device, generator: torch.Generator | None
    ) -> list[list[Tensor | None]]:
        """The table of every block and group; with noise when a generator is given."""
        depth = len(self.blocks)
        if self.rope is None:
            return [[None] * len(grids)] * depth
        if generator is None or not self.rope_noise.on:
            return [[tables(self.rope, grid, self.num_prefix_tokens, device) for grid in grids]] * depth
        draws = depth if self.rope_noise_per_block else 1
        drawn = [
            noisy_tables(self.rope, grid, self.num_prefix_tokens, device, self.rope_noise, draws, generator).unbind(0)
            for grid in grids
        ]
        return [[group[i % draws] for group in drawn] for i in range(depth)]

    def draw_depth(
        self, layout: Layout, device: torch.device, generator: torch.Generator | None
    ) -> list[tuple[Kept, Kept]]:
        """The images that each block's two branches run on, a subset of its own in every group."""
        assert generator is not None
        depth = len(self.blocks)
        rows, scales, start = [], [], 0
        for images, tokens in layout.groups:
            chosen = draw_kept(images, self.drop_path, 2 * depth, generator).to(device, non_blocking=True)
            inside = torch.arange(start, start + tokens, device=device)
            rows.append((chosen[..., None] * tokens + inside).flatten(1))
            scales.append(torch.full((rows[-1].shape[1], 1), images / chosen.shape[1], device=device))
            start += images * tokens
        groups = [(num_kept(images, self.drop_path), tokens) for images, tokens in layout.groups]
        smaller = make_layout(groups, self.attention, device)
        scale = torch.cat(scales)
        drawn = torch.cat(rows, dim=1)  # [2 * depth, T']
        places = torch.full((len(drawn), start), -1, device=device)
        places.scatter_(1, drawn, torch.arange(drawn.shape[1], device=device).expand_as(drawn))
        kept = [Kept(*both, scale, smaller) for both in zip(drawn.unbind(0), places.unbind(0), strict=True)]
        return list(zip(kept[0::2], kept[1::2], strict=True))

    def features(
        self,
        tokens: Tensor,
        layout: Layout,
        grids: Sequence[tuple[int, int]],
        local: Sequence[bool] | None,
        norm: bool = True,
    ) -> list[Features]:
        """Split a token matrix [T, D] by group and kind of token, after the final norm."""
        prefix = self.num_prefix_tokens
        normed = (self.norm(tokens) if norm else tokens).split(layout.rows)
        result = []
        for i, (rows, raw, (images, n), grid) in enumerate(
            zip(normed, tokens.split(layout.rows), layout.groups, grids, strict=True)
        ):
            first, patches = rows.unflatten(0, (images, n)).split([prefix, n - prefix], dim=1)
            if self.local_cls_norm is not None and local is not None and local[i]:
                first = self.local_cls_norm(raw.unflatten(0, (images, n))[:, :prefix])
            result.append(Features(first[:, 0], first[:, 1:], patches, grid))
        return result
