"""A training step on tensors without memory, as on a GPU: real operations, shapes and lifetimes, counted bytes.

PyTorch's autograd engine asks a driver for streams before it works on CUDA tensors, so the tensors say that they are on
a processor, and what our code does otherwise there is done as on a GPU.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.config import TrainConfig
from pretrain.data.photometric import Photometric, to_float
from pretrain.models.layers import rope
from pretrain.phase import Phase
from pretrain.student_teacher import Network, build_network, predicted_patches
from tests.pretrain.live_bytes import LiveBytes, random_batch


def _flash(q: Tensor, k: Tensor, v: Tensor, choose: bool = False) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def _undistorted(crops: Tensor, _: Photometric) -> Tensor:
    return to_float(crops)


def _mesh(*arguments: Any, **named: Any) -> DeviceMesh:
    with unset_fake_temporarily():  # it reads the numbers of the ranks from a tensor
        return init_device_mesh(*arguments, **named)


@contextmanager
def fake_device() -> Iterator[tuple[FakeTensorMode, LiveBytes]]:
    """All tensors made inside are on that device."""
    as_on_gpu: dict[str, Any] = {
        "pretrain.models.layers.attention.attend": _flash,
        "pretrain.losses.prototypes.BLOCK_BYTES": {},
        "pretrain.losses.prototypes.BAND_BYTES": {},
        "pretrain.data.collate._CACHED_PIXELS": 1 << 40,
        "pretrain.data.collate._copied": lambda tensor, _: tensor.clone(),
        # Which crops get which colours is known on the host; here it would not be known at all.
        "pretrain.data.collate.photometric": _undistorted,
        "pretrain.distributed.fsdp.init_device_mesh": _mesh,
        "pretrain.optim.clip.FiniteWatch.check": lambda *_, **__: None,
    }
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    rope._cached_tables.cache_clear()
    with ExitStack() as stack:
        for name, new in as_on_gpu.items():
            stack.enter_context(patch(name, new))
        stack.enter_context(mode)
        yield mode, stack.enter_context(LiveBytes())
    rope._cached_tables.cache_clear()


def empty_network(config: TrainConfig) -> Network:
    """Made on `meta`, where drawing weights takes no time."""
    with unset_fake_temporarily(), torch.device("meta"):
        network = build_network(config)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return network


@contextmanager
def fake_ranks(num_ranks: int) -> Iterator[None]:
    """This process is the first of so many, and nobody answers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def step_bytes(config: TrainConfig, num_images: int) -> tuple[int, int]:
    """Bytes that lie there before a step of one rank's images at the first crop sizes, and at its peak."""
    batch = random_batch(config, config.crops.all_sizes()[0], num_images)
    which = config.loss.ibot_patches
    num_predicted, parts = batch.num_predicted(which), batch.micro_batches(config.execution.accumulation_steps)
    masked = [predicted_patches(part.masks.flatten(0, 1), which) for part in parts if part.masks is not None]
    with fake_device() as (mode, live):
        phase = Phase(config, 0, empty_network(config), empty_network(config))
        if config.gram.weight:
            phase.start_gram(empty_network(config))
        # Where the masked patches are only a real mask tells.
        known = [tuple(map(mode.from_tensor, pair)) for pair in masked]
        of_a_step = [*known, *known] if len(known) > 1 else known
        found = patch("pretrain.student_teacher.predicted_patches", side_effect=[*of_a_step, *of_a_step])
        number = patch("pretrain.data.collate.Batch.num_predicted", return_value=num_predicted)
        with found, number:
            phase.step(batch._map_large(mode.from_tensor), 0, diagnose=False)
            before, live.most = live.now, live.now
            phase.step(batch._map_large(mode.from_tensor), 1, diagnose=False)
        return before, live.most
