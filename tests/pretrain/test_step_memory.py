"""What a step holds: one micro-batch, and the teacher logits of all, whatever their number."""

import copy
from typing import Any

import pytest

from configs.loader import merge_config
from pretrain.config import TrainConfig
from pretrain.phase import Phase, fresh_network
from tests.pretrain.live_bytes import LiveBytes, random_batch

IMAGES = 4  # of a micro-batch


def accumulating(parts: int, gram: bool = False) -> TrainConfig:
    """Crops outweigh everything else that a micro-batch needs."""
    asked: dict[str, Any] = {
        "global_batch_size": parts * IMAGES,
        "precision": "float32",
        "model": {"architecture": "dinov3_tiny", "depth": 1},
        "heads": {name: {"num_prototypes": 64, "hidden_dim": 16, "bottleneck_dim": 8} for name in ("dino", "ibot")},
        "crops": {"global_px": 128, "local_px": 32, "num_local_crops": 2, "gram_px": 256 if gram else 0},
        "gram": {"weight": 1.0 if gram else 0.0},
        "optim": {"warmup_steps": 1},
        "execution": {"accumulation_steps": parts},
    }
    return merge_config(TrainConfig(), asked, "test")


def most_bytes(config: TrainConfig) -> tuple[int, int]:
    """The peak of a step beyond what was there before, and the teacher logits of the step."""
    student = fresh_network(config)
    phase = Phase(config, 0, student, copy.deepcopy(student))
    if config.gram.weight:
        phase.start_gram(fresh_network(config))
    sizes = config.crops.all_sizes()[0]
    batch = random_batch(config, sizes, config.global_batch_size)
    phase.step(batch, 0, diagnose=False)  # what is made once
    with LiveBytes() as live:
        phase.step(batch, 1, diagnose=True)
    assert batch.masks is not None
    return live.most, 4 * 64 * (2 * config.global_batch_size + int(batch.masks.sum()))


@pytest.mark.slow
@pytest.mark.parametrize("gram", [False, True])
def test_memory_of_more_micro_batches_is_that_of_one_and_the_logits(gram: bool) -> None:
    one, logits_of_one = most_bytes(accumulating(1, gram))
    eight, logits = most_bytes(accumulating(8, gram))
    floats = 4 * 3 * IMAGES * 2 * 128**2  # global crops of one micro-batch
    assert one > floats
    # Gradients lie beside the activations from the second micro-batch on, and the centring looks at more rows.
    network = sum(p.numel() for p in fresh_network(accumulating(1)).parameters())
    assert eight < one + 3 * (logits - logits_of_one) + 4 * network + 0.1 * floats
