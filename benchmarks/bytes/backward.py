"""Backward passes in Python, for fake CUDA tensors where there is no GPU, and PyTorch's own engine wants streams.

The engine in C++ asks the driver for the streams of a device before it runs a node. So nodes are called here, one by
one, in an order in which each one has all its gradients: what it does besides (hooks, several devices, anomalies)
nobody needs who only counts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Place = tuple[Node, int]
"""a node, and which of its inputs a gradient is for"""
_entering: list[Callable[[Node], None]] = []
"""called with every node before it runs"""


def _order(roots: Sequence[Node]) -> list[Node]:
    """Every node that is reached, each before those that wait for it."""
    done: set[Node] = set()
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(node, False) for node in roots]
    while stack:
        node, is_left = stack.pop()
        if is_left:
            order.append(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions if following is not None]
    return order[::-1]


@torch.no_grad()
def gradients(roots: Sequence[Tensor], of_roots: Sequence[Tensor | None], wanted: Sequence[Place]) -> list[Any]:
    """Gradients at the places that are wanted; those of other leaves are added to their `grad` where none is wanted."""
    found: dict[Place, Tensor] = {}

    def add(place: Place, gradient: Tensor) -> None:
        shape, dtype = place[0]._input_metadata[place[1]].shape, place[0]._input_metadata[place[1]].dtype
        if gradient.shape != tuple(shape):
            gradient = gradient.sum_to_size(tuple(shape))
        gradient = gradient.to(dtype)
        found[place] = found[place] + gradient if place in found else gradient

    starts = [get_gradient_edge(root) for root in roots]
    for edge, root, gradient in zip(starts, roots, of_roots, strict=True):
        add((edge.node, edge.output_nr), torch.ones_like(root) if gradient is None else gradient)
    kept: dict[Place, Tensor] = {}
    order = _order(list(dict.fromkeys(edge.node for edge in starts)))
    asked = {node for node, _ in wanted}
    needed: set[Node] = set()  # those from which a node that is wanted is reached
    for node in reversed(order):
        if any(following in needed or following in asked for following, _ in node.next_functions):
            needed.add(node)
    for node in order:
        places = [(node, i) for i in range(len(node._input_metadata))]
        kept |= {place: found[place] for place in places if place in found and place in wanted}
        arguments = [found.pop(place, None) for place in places]
        if all(argument is None for argument in arguments) or (wanted and node not in needed):
            continue
        for enter in _entering:
            enter(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            if not wanted:
                variable.grad = arguments[0] if variable.grad is None else variable.grad + arguments[0]
            continue
        results = (node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node)(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        # A Function's backward also answers for arguments that are no tensors; edges are of tensors only, or None.
        for (following, index), result in zip(node.next_functions, results, strict=False):
            if following is not None and result is not None:
                add((following, index), result)
    return [kept.get(place) for place in wanted]


def _list(x: Any) -> list[Any]:
    return [x] if isinstance(x, Tensor) or x is None else list(x)


def _backward(self: Tensor, gradient: Tensor | None = None, *_: Any, **__: Any) -> None:
    gradients([self], [gradient], [])


def _grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *_: Any, **__: Any) -> tuple[Tensor | None, ...]:
    roots, leaves = _list(outputs), _list(inputs)
    of_roots = [None] * len(roots) if grad_outputs is None else _list(grad_outputs)
    live = [(root, gradient) for root, gradient in zip(roots, of_roots, strict=True) if root.requires_grad]
    edges = [get_gradient_edge(leaf) for leaf in leaves]
    places = [(edge.node, edge.output_nr) for edge in edges]
    return tuple(gradients([root for root, _ in live], [gradient for _, gradient in live], places))


@contextmanager
def in_python(entering: Callable[[Node], None] = lambda node: None) -> Iterator[None]:
    """`Tensor.backward` and `torch.autograd.grad` by the engine above; `entering` is called before each node."""
    before = torch.Tensor.backward, torch.autograd.grad
    torch.Tensor.backward, torch.autograd.grad = _backward, _grad
    _entering.append(entering)
    try:
        yield
    finally:
        _entering.remove(entering)
        torch.Tensor.backward, torch.autograd.grad = before
