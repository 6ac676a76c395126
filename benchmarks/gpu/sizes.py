"""The one table of sizes: `FULL` for a GPU, `TINY` for a processor, where everything runs to its end in a minute."""

from dataclasses import dataclass

_TINY_HEAD = "{num_prototypes: 512, hidden_dim: 128, bottleneck_dim: 64}"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    copied_bytes: int = 4 << 30
    product_rows: int = 44_160
    """tokens of 64 images: 128 crops of 197 and 512 of 37"""
    square: int = 8192
    models: tuple[str, ...] = ()
    """settings on top of the configs of all models"""
    large_images: tuple[int, ...] = (64, 96, 128)
    """of a step of ViT-L; the first is the one of all comparisons"""
    timed_steps: int = 30
    """at most, after those that warm up"""
    base_images: int = 128
    small_images: int = 256
    attention_images: int = 64
    loss_images: int = 64
    prototypes: int = 65_536
    rank_images: int = 64
    tar_images: int = 512
    resumed_batch: int = 64
    resumed_steps: int = 40
    learned_images: int = 2400
    """drawn where the user names no tar"""
    learning_batch: int = 256
    learning_trial_steps: int = 120
    """more than the loader has ready, so that its rate shows"""
    learning_steps: int = 20_000
    """at most"""
    vectors: int = 1_000_000
    vector_dim: int = 256
    centroids: int = 4096
    checked_vectors: int = 100_000
    """of them, also on the processor"""
    encoded_images: int = 256
    workers: tuple[int, ...] = (4, 8, 14)


FULL = Sizes()
TINY = Sizes(
    copied_bytes=8 << 20,
    product_rows=256,
    square=256,
    models=(
        "model.architecture=dinov2_tiny",
        "model.patch_size=16",
        "model.position_px=64",
        "model.depth=2",
        "crops.global_px=64",
        "crops.local_px=32",
        "crops.num_local_crops=2",
        f"heads.dino={_TINY_HEAD}",
        f"heads.ibot={_TINY_HEAD}",
    ),
    large_images=(4, 6),
    timed_steps=2,
    base_images=4,
    small_images=4,
    attention_images=1,
    loss_images=4,
    prototypes=512,
    rank_images=4,
    tar_images=16,
    resumed_batch=4,
    resumed_steps=8,
    learned_images=60,
    learning_batch=8,
    learning_trial_steps=3,
    learning_steps=6,
    vectors=4000,
    vector_dim=32,
    centroids=64,
    checked_vectors=1000,
    encoded_images=2,
    workers=(0, 1),
)
