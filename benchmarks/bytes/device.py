"""A GPU that is described, not there: what PyTorch asks a driver while it traces, schedules and fuses for CUDA."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import pretrain.compiling

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65_536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
)
"""As published. It decides how Inductor splits reductions; not how many bytes are counted for an operator."""


def _flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What PyTorch takes on a GPU of this generation for bfloat16 without a mask; to know, it asks the driver."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@contextmanager
def described(gpu: Any = H100) -> Iterator[None]:
    """Fake CUDA tensors may be computed with, autocast and compiled, on a machine without a driver."""
    import torch._inductor.scheduler
    from torch._inductor.runtime.hints import DeviceProperties

    properties = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=gpu.multi_processor_count,
        cc=10 * gpu.major + gpu.minor,
        major=gpu.major,
        regs_per_multiprocessor=gpu.regs_per_multiprocessor,
        max_threads_per_multi_processor=gpu.max_threads_per_multi_processor,
        max_threads_per_block=gpu.max_threads_per_block,
        warp_size=gpu.warp_size,
    )
    answers = {
        (torch.cuda, "device_count"): lambda: 1,
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "get_device_properties"): lambda *_: gpu,
        (torch.cuda, "get_device_capability"): lambda *_: (gpu.major, gpu.minor),
        (torch.cuda, "is_bf16_supported"): lambda *_, **__: True,
        (torch.cuda, "synchronize"): lambda *_: None,
        (torch.cuda, "get_rng_state"): lambda *_: torch.zeros(1),
        (torch.cuda, "set_rng_state"): lambda *_: None,
        (torch.cuda.amp.common, "amp_definitely_not_available"): lambda: False,
        (pretrain.compiling, "open_rows"): lambda *_: None,  # sizes are numbers here, or they could not be counted
        (torch._inductor.scheduler, "has_triton"): lambda *_: True,
        (torch.nn.functional, "scaled_dot_product_attention"): _flash,
        (DeviceProperties, "create"): classmethod(lambda *_: properties),
    }
    with ExitStack() as stack:
        # Sizes are numbers here: teacher and student each get code of their own.
        stack.enter_context(torch._dynamo.config.patch(automatic_dynamic_shapes=False))
        # It would make constants on the device itself; they are as many bytes where they are made later.
        stack.enter_context(torch._inductor.config.patch(joint_graph_constant_folding=False))
        for (owner, name), answer in answers.items():
            stack.enter_context(patch.object(owner, name, answer))
        yield
