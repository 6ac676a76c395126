"""Sections D and E: attention and losses alone, at the shapes of a step, in every form that there is of them."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.measure import Setting, memory, milliseconds, relative_error
from benchmarks.gpu.table import Absent, Figures, Part
from pretrain.losses.centering import sinkhorn_knopp
from pretrain.losses.prototypes import Targets, prototype_cross_entropy, whole_cross_entropy
from pretrain.models.layers.attention import Attention, check_backend, make_layout
from pretrain.models.layers.rope import Rope, tables

HEAD_DIM = 64
MODELS = {"S": 6, "L": 16}
"""heads"""
GRIDS, PREFIX_TOKENS = ((14, 14), (6, 6)), 5
"""of 224 and 96 px crops; CLS and four registers"""
CROPS = (2, 8)
Kinds = tuple[int, ...]
"""which of the two sizes of crops take part"""
FORMS: dict[str, tuple[str, SDPBackend | None]] = {
    "sdpa, torch's choice": ("sdpa", None),
    "auto": ("auto", None),
    "sdpa, flash": ("sdpa", SDPBackend.FLASH_ATTENTION),
    "sdpa, cuDNN": ("sdpa", SDPBackend.CUDNN_ATTENTION),
    "sdpa, efficient": ("sdpa", SDPBackend.EFFICIENT_ATTENTION),
    "varlen": ("varlen", None),
    "xformers": ("xformers", None),
}
"""model.attention, and which kernel it is held to"""
_CUDA_ONLY = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def attention(at: Setting) -> Iterator[Part]:
    for model in MODELS if at.on_gpu else ("S",):
        for form in FORMS:
            yield f"ViT-{model}, {form}", partial(one_attention, at, MODELS[model], *FORMS[form])
    model = "L" if at.on_gpu else "S"
    for kind, (h, w) in enumerate(GRIDS):  # what `attention.SHORT` is to be set by
        for form in [name for name in FORMS if name.startswith("sdpa")]:
            what = f"ViT-{model}, {PREFIX_TOKENS + h * w} tokens alone, {form}"
            yield what, partial(one_attention, at, MODELS[model], *FORMS[form], (kind,))


def one_attention(at: Setting, heads: int, backend: str, kernel: SDPBackend | None, kinds: Kinds = (0, 1)) -> Figures:
    """Queries, keys and values of all crops [T, 3 D], rotated, attended, and back: bfloat16 against float64."""
    try:
        check_backend(backend)
    except ValueError as error:
        raise Absent(str(error)) from None
    if not at.on_gpu and (kernel in _CUDA_ONLY or backend == "xformers"):
        raise Absent("a kernel for GPUs only")
    held = nullcontext() if kernel is None else sdpa_kernel(kernel)
    images, width = at.sizes.attention_images, heads * HEAD_DIM
    with held:
        forward_ms, both_ms = _attention_times(at, images, heads, backend, kinds)
        found = _attended(1, heads, backend, at.device, torch.bfloat16, kinds)
    reference = _attended(1, heads, "sdpa", torch.device("cpu"), torch.float64, kinds)
    tokens = [PREFIX_TOKENS + h * w for h, w in GRIDS]
    flops = sum(12 * images * CROPS[kind] * tokens[kind] ** 2 * width for kind in kinds)
    return {
        "forward_ms": forward_ms,
        "forward_backward_ms": both_ms,
        "tflops": flops / both_ms / 1e9,
        "error": relative_error(found[0], reference[0]),
        "gradient_error": relative_error(found[1], reference[1]),
        **memory(at),
    }


def _attention(
    images: int, heads: int, backend: str, device: torch.device, kinds: Kinds
) -> tuple[Callable[[Tensor], Tensor], int]:
    """The project's attention without its two linear layers, for the crops of so many images; and their tokens."""
    layer = Attention(heads * HEAD_DIM, heads, qkv_bias=False, mask_key_bias=False, backend=backend)
    layer.qkv = nn.Identity()  # type: ignore[assignment]  # in place of a Linear
    groups = [(images * CROPS[kind], PREFIX_TOKENS + GRIDS[kind][0] * GRIDS[kind][1]) for kind in kinds]
    layout = make_layout(groups, backend, device)
    turns = [tables(Rope(HEAD_DIM), GRIDS[kind], PREFIX_TOKENS, device) for kind in kinds]
    return lambda qkv: layer.mix(qkv, layout, turns), sum(layout.rows)


def _attention_times(at: Setting, images: int, heads: int, backend: str, kinds: Kinds) -> tuple[float, float]:
    attend, rows = _attention(images, heads, backend, at.device, kinds)
    qkv = torch.randn(rows, 3 * heads * HEAD_DIM, device=at.device).bfloat16().requires_grad_()
    gradient = torch.randn(rows, heads * HEAD_DIM, device=at.device).bfloat16()

    def both() -> None:
        torch.autograd.grad(attend(qkv), qkv, gradient)

    with torch.no_grad():
        forward_ms = milliseconds(lambda: attend(qkv), at, budget_s=0.2)["ms"]
    return forward_ms, milliseconds(both, at, budget_s=0.3)["ms"]


def _attended(
    images: int, heads: int, backend: str, device: torch.device, dtype: torch.dtype, kinds: Kinds
) -> tuple[Tensor, Tensor]:
    """Result and gradient for fixed inputs that bfloat16 holds exactly."""
    attend, rows = _attention(images, heads, backend, device, kinds)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, n * heads * HEAD_DIM, generator=generator).bfloat16() for n in (3, 1)]
    qkv, gradient = (x.to(device, dtype) for x in inputs)
    out = attend(qkv.requires_grad_())
    return out.detach(), torch.autograd.grad(out, qkv, gradient)[0]


# Losses

BOTTLENECK, MASKED_SHARE = 256, 0.15
TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.07, 0.1


def losses(at: Setting) -> Iterator[Part]:
    """The iBOT head's: a row for each masked patch of two crops an image."""
    rows = max(int(at.sizes.loss_images * 2 * 196 * MASKED_SHARE), 8)
    generator = torch.Generator(at.device).manual_seed(0)

    def unit(count: int) -> Tensor:
        x = torch.randn(count, BOTTLENECK, device=at.device, generator=generator)
        return F.normalize(x, dim=-1)

    features, prototypes = unit(rows).requires_grad_(), unit(at.sizes.prototypes).requires_grad_()
    logits = unit(rows).bfloat16() @ unit(at.sizes.prototypes).bfloat16().T
    [targets] = sinkhorn_knopp([logits], TEACHER_TEMPERATURE)
    weights = torch.full((rows,), 1 / rows, device=at.device)

    def streamed() -> Tensor:
        return prototype_cross_entropy(features, prototypes, targets, weights, STUDENT_TEMPERATURE)[0]

    def plain() -> Tensor:
        return plain_cross_entropy(features, prototypes, targets, weights)

    def whole(compiled: bool) -> Tensor:
        dtype = torch.bfloat16 if torch.is_autocast_enabled(at.device.type) else torch.float32
        student = features.to(dtype) @ prototypes.to(dtype).T
        return whole_cross_entropy(student, targets, weights, STUDENT_TEMPERATURE, None, compiled=compiled)[0]

    # Exact in all but the order of sums: what the others are measured against.
    exact = _gradients(lambda: plain_cross_entropy(features.float(), prototypes.float(), targets, weights), features)
    forms: dict[str, Callable[[], Tensor]] = {
        "streamed": streamed,
        "plain": plain,
        "whole": lambda: whole(compiled=False),
        "whole, compiled": lambda: whole(compiled=True),
    }
    what = f"cross-entropy {rows} x {at.sizes.prototypes}"
    for name, loss in forms.items():
        for dtype in ("bfloat16", "float32"):
            yield f"{what}, {name}, {dtype}", partial(_timed_loss, at, loss, dtype, (features, prototypes), exact)
    # On a processor both are streamed; on a GPU what is compiled goes over whole logits.
    for name, centring in (("streamed", sinkhorn_knopp), ("compiled", partial(sinkhorn_knopp, compiled=True))):
        what = f"Sinkhorn-Knopp {rows} x {at.sizes.prototypes}, {name}"
        yield what, partial(_timed_centring, at, centring, logits, targets)


def plain_cross_entropy(features: Tensor, prototypes: Tensor, targets: Targets, weights: Tensor) -> Tensor:
    """`prototype_cross_entropy` as one would write it: all logits at once, in the dtype of autocast."""
    logits = features @ prototypes.T
    log_probabilities = F.log_softmax(logits.float() / STUDENT_TEMPERATURE, dim=-1)
    return -(weights * (targets.rows(0, len(weights)) * log_probabilities).sum(dim=-1)).sum()


def _gradients(loss: Callable[[], Tensor], features: Tensor) -> Tensor:
    return torch.autograd.grad(loss(), features)[0]


def _timed_loss(
    at: Setting, loss: Callable[[], Tensor], dtype: str, leaves: tuple[Tensor, Tensor], exact: Tensor
) -> Figures:
    def both() -> None:
        with torch.autocast(at.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss()
        torch.autograd.grad(value, leaves)

    found = milliseconds(both, at)
    with torch.autocast(at.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        gradient = _gradients(loss, leaves[0])
    return {**found, **memory(at), "gradient_error": relative_error(gradient, exact)}


def _timed_centring(at: Setting, centring: Callable[..., list[Targets]], logits: Tensor, expected: Targets) -> Figures:
    found = milliseconds(lambda: centring([logits], TEACHER_TEMPERATURE), at)
    [targets] = centring([logits], TEACHER_TEMPERATURE)
    return {**found, **memory(at), "error": relative_error(targets.rows(0, 64), expected.rows(0, 64))}
