"""Bytes that one rank of a training holds on its device, reckoned from shapes; nothing is started.

Checked against the tensors of real steps (tests/pretrain/test_memory.py). What a GPU needs on top cannot be seen from
there: kernels' workspaces, fragmentation, NCCL's buffers, half a gigabyte of the driver.
"""

from torch import nn

from pretrain.config import TrainConfig, micro_batch_size
from pretrain.data.crops import NUM_GLOBAL_CROPS, CropSizes
from pretrain.distributed.fsdp import SHARDED, ranks_of_a_copy
from pretrain.losses.prototypes import BAND_BYTES_ELSEWHERE, BLOCK_BYTES_ELSEWHERE
from pretrain.models.layers.block import num_kept
from pretrain.models.layers.patch_embed import ConvolutionalStem
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.student_teacher import Network


def count(module: nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def shards(config: TrainConfig, world_size: int, mode: str) -> int:
    """Ranks that hold one copy of the weights together."""
    return ranks_of_a_copy(mode, config.execution.shard_ranks, world_size)


def start_memory(config: TrainConfig, network: Network, frozen: Network, num_shards: int) -> float:
    """Bytes before the first step: float32 weights of student, teacher and Gram teacher, AdamW's moments, all divided
    by the ranks that share them; a teacher to distil from in the compute precision."""
    return sum(_standing(config, network, frozen, num_shards).values())


def rank_memory(config: TrainConfig, network: Network, frozen: Network, world_size: int, mode: str) -> dict[str, float]:
    """Bytes that one rank holds at the peak of a step, at the largest crop sizes, by what they are for.

    The peak is where the student's losses are done, where its backward begins, or where it ends: then activations are
    gone and gradients there. Parameters, gradients, moments and EMA teacher are float32, divided by the ranks of a
    copy, which gather what they compute with. Crops of one micro-batch are float32, and wait as bytes on the host.
    """
    num_shards = shards(config, world_size, mode)
    width = 2 if config.precision == "bfloat16" else 4
    images, accumulated = micro_batch_size(config, world_size), config.execution.accumulation_steps
    backbone = network.backbone
    sizes = max(config.crops.all_sizes(), key=lambda s: sum(_tokens(config, backbone, s, 1)))
    standing = _standing(config, network, frozen, num_shards)
    standing["teacher answers"] = width * images * accumulated * _answers(config, backbone, sizes)
    standing["crops"] = 4 * images * _pixels(config, sizes)
    gradients = 4 * _trained(network) / num_shards
    # DDP's buckets are always there, and so are the sums of micro-batches before.
    early = gradients if mode == "ddp" or accumulated > 1 else 0.0
    activations = activation_bytes(config, network, sizes, images)
    again = 0.0
    if config.execution.activation_checkpointing:
        again = sum(_kept_tokens(config, backbone, sizes, images)) * _token_bytes(config, backbone)
    residual = 8 * backbone.embed_dim * sum(_tokens(config, backbone, sizes, images))  # and its gradient
    heads = [count(head) for head in (network.dino_head, network.ibot_head) if head is not None]
    largest, block, blocks = max(heads), count(backbone.blocks[0]), sum(count(block) for block in backbone.blocks)
    rest = count(network) - blocks
    moments = [
        {
            "gradients": early,
            "whole weights": width * rest,
            "activations": activations,
            "losses": loss_bytes(config, network, sizes, images),
        },
        {
            "gradients": early,
            # Of two blocks, and of what has not been reduced; the largest head is being reduced, in float32.
            "whole weights": width * (rest - largest + 2 * block) + 4 * largest,
            "activations": activations + again + residual,
        },
        {"gradients": gradients, "whole weights": width * (rest - sum(heads) + block) + 4 * block},
    ]
    if mode not in SHARDED:
        for moment, share in zip(moments, (1, 1, 0), strict=True):
            del moment["whole weights"]
            moment["bfloat16 copy"] = 2 * share * _cast_weights(config, network) if width == 2 else 0.0
    return standing | max(moments, key=lambda moment: sum(moment.values()))


def activation_bytes(config: TrainConfig, network: Network, sizes: CropSizes, images: int) -> float:
    """What the student keeps for the backward of one micro-batch.

    Per token and block: the inputs of both norms, and with stochastic depth what is added to the residual stream, in
    float32; in the compute precision the inputs of the four matrix products, queries, keys and values, attention's
    result, and what GELU or SwiGLU take. Stochastic depth leaves its share of images out. With activation
    checkpointing: the inputs of all blocks. Beside the blocks: pixels, the final norm, the heads' rows.
    """
    width = 2 if config.precision == "bfloat16" else 4
    backbone = network.backbone
    dim, depth, tokens = backbone.embed_dim, len(backbone.blocks), sum(_tokens(config, backbone, sizes, images))
    blocks = sum(_kept_tokens(config, backbone, sizes, images)) * _token_bytes(config, backbone) * depth
    if config.execution.activation_checkpointing:
        blocks = tokens * 4 * dim * depth
    pixels = width * images * _pixels(config, sizes, gram=False)
    predicted = images * _predicted(config, backbone, sizes)
    cls = images * (NUM_GLOBAL_CROPS + config.crops.num_local_crops) if config.uses_dino else 0
    heads = cls * _head_row(network.dino_head, width) + predicted * _head_row(
        network.ibot_head or network.dino_head, width
    )
    return blocks + _stem(config, backbone, sizes, images) + 8 * dim * tokens + pixels + heads + 4 * dim * predicted


def loss_bytes(config: TrainConfig, network: Network, sizes: CropSizes, images: int) -> float:
    """The gradients of the prototypes, complete when the losses are, and blocks of rows and prototypes."""
    heads = [network.dino_head] if config.uses_dino else []
    heads += [network.ibot_head or network.dino_head] if config.uses_ibot else []
    if not heads:
        return 0.0
    if not config.has_prototypes:  # the covariance of each view, its factor, and the gradients of both
        return 16.0 * NUM_GLOBAL_CROPS * config.heads.dino.bottleneck_dim**2
    cls = images * (NUM_GLOBAL_CROPS + config.crops.num_local_crops) if config.uses_dino else 0
    rows = max(cls, images * _predicted(config, network.backbone, sizes))
    ends = [head.last_layer for head in heads if head.last_layer is not None]
    logits = rows * max(end.num_prototypes for end in ends)
    weights = sum((8 if end.weight_norm else 4) * end.dim * end.num_prototypes for end in ends)
    # In a band of rows three blocks are alive; the next band begins while those of the last are still there.
    width = 2 if config.precision == "bfloat16" else 4
    return weights + (4.5 if width * logits > BAND_BYTES_ELSEWHERE else 3) * min(BLOCK_BYTES_ELSEWHERE, 4 * logits)


def _stem(config: TrainConfig, backbone: VisionTransformer, sizes: CropSizes, images: int) -> float:
    """What a stem of convolutions keeps: results of each convolution, its norm and GELU, in the compute precision."""
    stem = backbone.patch_embed
    if not isinstance(stem, ConvolutionalStem):
        return 0.0
    patches = sum(
        crops * images * (tokens - backbone.num_prefix_tokens)
        for crops, tokens in _crop_groups(config, backbone, sizes)
    )
    channels = [weight.shape[0] for weight in stem.convolutions.parameters() if weight.ndim == 4]
    width = 2 if config.precision == "bfloat16" else 4
    return 3 * width * patches * sum(n * places for n, places in zip(channels, stem.places(), strict=True))


def _token_bytes(config: TrainConfig, backbone: VisionTransformer) -> int:
    """What a block keeps of a token."""
    width = 2 if config.precision == "bfloat16" else 4
    dim, hidden, gated = _ffn(backbone)
    return 8 * dim + width * (7 * dim + (4 if gated else 2) * hidden)


def _standing(config: TrainConfig, network: Network, frozen: Network, num_shards: int) -> dict[str, float]:
    parameters = count(network) / num_shards
    memory = {"weights": 4 * parameters, "AdamW": 8 * _trained(network) / num_shards, "EMA teacher": 4 * parameters}
    if config.gram.weight:
        memory["Gram teacher"] = 4 * parameters
    if config.distill_from:
        memory["frozen teacher"] = (2 if config.precision == "bfloat16" else 4) * count(frozen) / num_shards
    return memory


def _trained(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _cast_weights(config: TrainConfig, network: Network) -> int:
    """Of which autocast keeps copies until the losses are there: all, but where blocks are computed again those
    in which LayerScale has no share."""
    if not config.execution.activation_checkpointing:
        return count(network)
    recast = ("attn.proj.weight", "mlp.fc2.weight", "mlp.w3.weight")
    return sum(p.numel() for name, p in network.named_parameters() if not name.endswith(recast))


def _ffn(backbone: VisionTransformer) -> tuple[int, int, bool]:
    """Width of the tokens, width inside the feed-forward layer, and whether that is gated."""
    weights = dict(backbone.blocks[0].named_parameters())
    gated = "mlp.w3.weight" in weights
    dim, hidden = weights["mlp.w3.weight" if gated else "mlp.fc2.weight"].shape
    return dim, hidden, gated


def _head_row(head: nn.Module, width: int) -> float:
    """What a row of a head keeps: the inputs of its linear layers and of GELU, and its unit-norm output twice."""
    matrices = [p for name, p in head.named_parameters() if name.startswith("mlp.") and p.ndim == 2]
    inputs = [p.shape[1] for p in matrices]
    return width * (inputs[0] + 2 * sum(inputs[1:])) + 8 * matrices[-1].shape[0]


def _crop_groups(config: TrainConfig, backbone: VisionTransformer, sizes: CropSizes) -> list[tuple[int, int]]:
    """(crops of an image, tokens of each, CLS and registers included) of the crops that the student sees."""
    num_local = config.crops.num_local_crops if config.uses_dino else 0  # no other term looks at them
    sides = ((NUM_GLOBAL_CROPS, sizes.global_px), (num_local, sizes.local_px))
    return [(n, (px // backbone.patch_size) ** 2 + backbone.num_prefix_tokens) for n, px in sides if n]


def _tokens(config: TrainConfig, backbone: VisionTransformer, sizes: CropSizes, images: int) -> list[int]:
    return [crops * images * tokens for crops, tokens in _crop_groups(config, backbone, sizes)]


def _kept_tokens(config: TrainConfig, backbone: VisionTransformer, sizes: CropSizes, images: int) -> list[int]:
    """Those that a branch of a block runs on."""
    groups = _crop_groups(config, backbone, sizes)
    return [num_kept(crops * images, config.model.drop_path) * tokens for crops, tokens in groups]


def _predicted(config: TrainConfig, backbone: VisionTransformer, sizes: CropSizes) -> float:
    """Patches of one image's global crops that iBOT predicts."""
    return NUM_GLOBAL_CROPS * (sizes.global_px // backbone.patch_size) ** 2 * config.predicted_share


def _answers(config: TrainConfig, backbone: VisionTransformer, sizes: CropSizes) -> float:
    """Values of the teacher's answers for one image, its global crops and their predicted patches: logits, in the
    compute precision; without prototypes float32 rows, which count as two such values in bfloat16."""
    kind = "num_prototypes" if config.has_prototypes else "bottleneck_dim"
    width = 1 if config.has_prototypes or config.precision != "bfloat16" else 2
    heads = config.heads
    dino = NUM_GLOBAL_CROPS * getattr(heads.dino, kind) if config.uses_dino else 0
    return width * (dino + _predicted(config, backbone, sizes) * getattr(heads.ibot, kind))


def _pixels(config: TrainConfig, sizes: CropSizes, gram: bool = True) -> int:
    """Values of one image's crops."""
    large = sizes.global_px**2 + (sizes.gram_px**2 if gram else 0)
    return 3 * (NUM_GLOBAL_CROPS * large + config.crops.num_local_crops * sizes.local_px**2)
