"""Bytes and launches of operators that run on fake CUDA tensors, by the part of the step that they belong to.

An operator that is run by itself is one kernel: it reads its inputs and writes its outputs once. Views cost nothing; a
gather reads the rows that it takes; an operator on a list is as many launches as its chunks of 65,536 values fill.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution", "convolution_backward")
REGIONS = (
    ("pretrain/losses/centering.py", "Sinkhorn"),
    ("pretrain/losses/prototypes.py", "cross-entropies"),
    ("pretrain/losses/", "cross-entropies"),
    ("pretrain/optim/", "optimizer"),
    ("pretrain/data/", "colours, transfers"),
    ("pretrain/models/layers/patch_embed.py", "rest"),
    ("pretrain/models/layers/position.py", "rest"),
    ("pretrain/models/layers/", "blocks"),
    ("pretrain/models/projection_head.py", "rest"),
    ("pretrain/models/vision_transformer.py", "rest"),
)
"""The innermost frame whose file is one of these says what an operator is for."""
# What reads no more of its first tensor than it gives.
_GATHERS = ("index_select", "index", "gather", "embedding")
# What adds rows to its first tensor, or to a copy of it.
_SCATTERS = ("index_add", "index_put", "scatter_add", "index_copy", "scatter")
# What does not read its first tensor.
_UNREAD = ("copy_", "fill_", "zero_", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
_FREE = ("detach", "_unsafe_view", "_reshape_alias", "alias", "empty", "empty_like", "empty_strided", "new_empty")
_CHUNK, _BLOCKS = 65_536, 320


@dataclass
class Traffic:
    bytes: int = 0
    launches: int = 0


class Counter(TorchDispatchMode):
    """Counts what happens on the device; what happens on the processor is really done there.

    Attributes:
        traffic: (region, kind) -> bytes and launches; kinds are products, attention, elementwise.
        saved: bytes that autograd keeps for the backward pass, parameters not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[tuple[str, str], Traffic] = defaultdict(Traffic)
        self.by_operator: dict[tuple[str, str], Traffic] = defaultdict(Traffic)
        self._of_node: dict[int, str] = {}
        self._backward: str | None = None
        self._on = True
        self._saved: dict[int, int] = {}
        self._left_out: set[int] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @property
    def saved(self) -> int:
        return sum(self._saved.values())

    def enter_node(self, node: Node) -> None:
        """The backward pass begins with a node of an operator whose forward has been seen."""
        self._backward = self._of_node.get(node._sequence_nr(), "rest")

    def leave_out(self, parameters: Iterable[Tensor]) -> None:
        """These are no activations, whoever keeps them."""
        self._left_out |= {parameter.untyped_storage()._cdata for parameter in parameters}

    @contextmanager
    def silent(self) -> Iterator[None]:
        """What happens here is counted by somebody else."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def region(self) -> str:
        """What the code that runs now is for; of a forward it is remembered for the backward."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if "/pretrain/" in name:
                for part, region in REGIONS:
                    if part in name:
                        self._of_node.setdefault(torch.autograd._get_sequence_nr() - 1, region)
                        return region
            frame = frame.f_back
        return self._backward or "rest"

    def add(self, region: str, kind: str, operator: str, num_bytes: int, launches: int = 1) -> None:
        for traffic in (self.traffic[region, kind], self.by_operator[region, operator]):
            traffic.bytes += num_bytes
            traffic.launches += launches

    def pack(self, tensor: Tensor) -> Tensor:
        """Hook of saved tensors: remembers the storage."""
        if tensor.device.type == "cuda":
            storage = tensor.untyped_storage()
            if storage._cdata not in self._left_out:
                self._saved[storage._cdata] = storage.nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(isinstance(x, FakeTensor) for x in given) and torch.device(kwargs.get("device") or "cpu").type in (
            "cpu",
            "meta",
        ):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        # The latter has no form without a device; it gives nothing back.
        out = func(*args, **kwargs) if func is not aten._fused_sgd_.default else None
        if self._on:
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            if any(x.device.type == "cuda" for x in (*given, *made)):
                self._count(func, args, kwargs, given, made)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        region, name = self.region(), func._schema.name.split("::")[1]
        if func.is_view or name in (
            "detach",
            "_unsafe_view",
            "_reshape_alias",
            "empty",
            "empty_like",
            "empty_strided",
            "new_empty",
            "alias",
        ):
            return
        written = [
            x
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_leaves(value)
            if isinstance(x, Tensor)
        ]
        if name.startswith("_fused") and kwargs.get("grad_scale") is None:
            written = [x for x in written if not any(x is gradient for gradient in args[1])]  # they could be scaled
        written += [kwargs["out"]] if "out" in kwargs else []
        fresh = [x for x in made if not any(x is other for other in given)]
        if name.startswith("_scaled_dot_product") or name.startswith(("_flash_attention", "_efficient_attention")):
            kind = "attention"
        else:
            kind = "products" if name in PRODUCTS else "elementwise"
        given = given[1:] if name in _UNREAD else given
        read = _distinct(given)
        num_bytes = sum(size(x) for x in read) + sum(size(x) for x in _distinct((*written, *fresh)))
        if name in _GATHERS:
            num_bytes += size(fresh[0]) - size(args[0])
        elif name.rstrip("_") in _SCATTERS:
            source = max((x for x in given if x is not args[0]), key=size)
            num_bytes = 3 * size(source) + (0 if name.endswith("_") else 2 * size(args[0]))
        if name.startswith(("_foreach", "_fused")):
            first = args[0]
            chunks = sum(math.ceil(x.numel() / _CHUNK) for x in first)
            launches = max(math.ceil(chunks / _BLOCKS), math.ceil(len(first) / 36))
            if name == "_foreach_lerp_" and isinstance(args[2], list):
                launches = len(first)  # weights that are no tensors of the same shape: one after another
        else:
            launches = 2 if name in _SCATTERS else 1
        self.add(region, kind, name, num_bytes, launches)


def size(x: Tensor) -> int:
    """Bytes of the values of a tensor; those that it repeats count once."""
    numbers = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0]
    return math.prod(int(n) for n in numbers) * x.dtype.itemsize


def _distinct(tensors: Any) -> list[Tensor]:
    return list({id(x): x for x in tensors}.values())
