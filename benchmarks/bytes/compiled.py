"""Bytes and launches of what `torch.compile` makes of a function: Inductor's own passes, fusions and buffers.

The graph goes through Inductor up to its scheduler, which decides what becomes one kernel; a kernel reads and writes
each of its buffers once, as the scheduler itself reckons. No code is made, and the graph then runs on fake tensors.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import MagicMock

import torch
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import FallbackKernel, MultiOutput
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.virtualized import V

from benchmarks.bytes.count import PRODUCTS, Counter

Kernel = tuple[str, str, int]
"""kind, name, bytes"""


def backend(counter: Counter) -> Callable[..., Any]:
    """For `torch.compile(backend=...)`: the compiled function counts its kernels whenever it is called."""

    def inner(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        with counter.silent():
            kernels = scheduled(graph, inputs, options)

        def call(*arguments: Any) -> Any:
            if len(arguments) == 1 and isinstance(arguments[0], list):
                arguments = tuple(arguments[0])
            region = counter.region()
            for kind, name, num_bytes in kernels:
                counter.add(region, kind, name, num_bytes)
            with counter.silent():
                return graph(*arguments)

        call._boxed_call = True  # type: ignore[attr-defined]  # arguments come as one list, as Inductor's code has them
        return call

    return lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=inner)


def scheduled(graph: torch.fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> list[Kernel]:
    """The kernels that Inductor would make of a graph after autograd."""
    mode = detect_fake_mode(inputs)  # Dynamo's own
    is_inference = bool(options.get("is_inference"))
    graph = copy.deepcopy(graph)
    compile_fx._recursive_record_original_output_strides(graph)
    compile_fx.view_to_reshape(graph)
    with V.set_fake_mode(mode):
        compile_fx._recursive_post_grad_passes(graph, is_inference=is_inference)
    lowered = GraphLowering(
        graph, example_inputs=inputs, is_inference=is_inference, is_backward=bool(options.get("is_backward"))
    )
    with V.set_graph_handler(lowered), V.set_debug_handler(MagicMock()), V.set_fake_mode(mode):
        lowered.run(*inputs)
        lowered._update_scheduler()
        return [
            (*_name(node), int(node.get_read_write_buffers_sizes())) for node in lowered.scheduler.nodes if _runs(node)
        ]


def _runs(node: Any) -> bool:
    """Whether a node is a kernel, and not a name for a part of what another one gave."""
    return not isinstance(node, NopKernelSchedulerNode) and not isinstance(getattr(node, "node", None), MultiOutput)


def _name(node: Any) -> tuple[str, str]:
    if not node.is_extern():
        return "elementwise", "fused"
    kernel = getattr(node, "node", None)
    name = str(getattr(kernel, "op_overload", None) or getattr(kernel, "python_kernel_name", None) or kernel)
    short = name.removeprefix("extern_kernels.").removeprefix("aten.").split(".")[0]
    if "attention" in short:
        return "attention", short
    if short in PRODUCTS or not isinstance(kernel, FallbackKernel):
        return "products", short
    return "elementwise", short
