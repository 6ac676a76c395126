"""Soft assignments over prototypes, and the cross-entropy against them: streamed, or over whole logits (`is_streamed`).

Since a target row sums to one, CE(q, z / T) = logsumexp(z / T) - q . z / T, and its gradient by z is
(softmax(z / T) - q) / T. So loss and gradients come out of one streamed pass: a band of rows at a time (its logits
in the compute dtype), and inside the band a block of prototypes at a time (float32). What the published code keeps,
teacher assignments, student logits, their log-softmax, the product and a gradient, each tokens x prototypes, is never
there. The gradients by features and prototypes are complete when the forward ends; the backward scales them.

Whole, student logits and their gradient are held in the compute dtype, and nothing else of that size: one compiled
kernel reads logits of both sides for the loss, one for the gradient.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain import compiling

# Bytes of one float32 block of rows x prototypes, per kind of device. On a processor the passes over a block should
# stay in its caches; a GPU wants few large kernels. Larger bands read and write the prototypes less often.
BLOCK_BYTES = {"cpu": 1 << 20}
BLOCK_BYTES_ELSEWHERE = 256 << 20
# Bytes of the student logits of one band of rows (compute dtype).
BAND_BYTES = {"cpu": 16 << 20}
BAND_BYTES_ELSEWHERE = 256 << 20


STREAMED_PROTOTYPES = 1 << 18
"""From here on logits are streamed on GPUs too: whole, they and their gradient would be a step's largest tensors."""

# exp2 is several times as fast as exp on a processor, and no less exact: exponents are kept in base 2 inside.
LOG2_E = math.log2(math.e)


def block_bytes(device: torch.device) -> int:
    return BLOCK_BYTES.get(device.type, BLOCK_BYTES_ELSEWHERE)


def is_streamed(device: torch.device, num_prototypes: int, compiled: bool) -> bool:
    """Whether logits of so many prototypes are taken a block at a time, by the cross-entropy and by centring alike.

    Compiled for a GPU, a pass over whole logits reads each once, in the compute dtype; streamed, each operator is a
    pass of its own over float32 blocks (`benchmarks.bytes` counts both). Where nothing is compiled the two move about
    as many bytes, and blocks hold fewer; on a processor blocks stay in its caches.
    """
    return not compiled or device.type == "cpu" or num_prototypes >= STREAMED_PROTOTYPES


@functools.cache
def compiled_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """One pass over whole logits, as one or two kernels."""
    return compiling.compiled(function, any_rows=True)


def blocks(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(length); none if it is empty."""
    for start in range(0, length, max(size, 1)):
        yield slice(start, min(start + max(size, 1), length))


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Teacher assignments q = exp(logits / temperature + log_prototype + log_sample), formed only where asked for."""

    logits: Tensor
    # [T, K], in the dtype that they were computed in
    temperature: float
    # of the teacher, > 0
    log_prototype: Tensor
    # [K] float32: what centring adds to a prototype
    log_sample: Tensor
    # [T] float32: what makes a row sum to one

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, start: int, stop: int) -> Tensor:
        """Assignments of rows start..stop, [n, K] float32; each row sums to one."""
        rows = slice(start, stop)
        return self._assign(self.logits[rows], self.log_prototype, self.log_sample[rows, None])

    def entropy(self) -> Tensor:
        """Entropy of each row, in nats, [T] float32; streamed, for the metrics."""
        entropy = torch.zeros_like(self.log_sample)
        for rows in blocks(len(self), block_bytes(self.logits.device) // (4 * max(self.logits.shape[1], 1))):
            log2_q = self._log2_assign(self.logits[rows], self.log_prototype, self.log_sample[rows, None])
            entropy[rows] = (log2_q.exp2() * log2_q).sum(dim=1) / -LOG2_E
        return entropy

    def views(self, num_views: int, rows: slice, prototypes: slice) -> Tensor:
        """Assignments of one block, [V, n, k] float32, where the T rows are V views of T / V images, view-major."""
        logits = self.logits.unflatten(0, (num_views, len(self) // num_views))[:, rows, prototypes]
        log_sample = self.log_sample.unflatten(0, (num_views, len(self) // num_views))[:, rows, None]
        return self._assign(logits, self.log_prototype[prototypes], log_sample)

    def _log2_assign(self, logits: Tensor, log_prototype: Tensor, log_sample: Tensor) -> Tensor:
        exponents = torch.add(log_prototype * LOG2_E, logits.to(log_sample.dtype), alpha=LOG2_E / self.temperature)
        return exponents.add_(log_sample * LOG2_E)

    def _assign(self, logits: Tensor, log_prototype: Tensor, log_sample: Tensor) -> Tensor:
        return self._log2_assign(logits, log_prototype, log_sample).exp2_()


def log2_sum_exp2(exponents: Tensor) -> Tensor:
    """log2 of the sum over the last dimension of 2 ** exponents; that dimension stays, with length 1."""
    largest = exponents.amax(dim=-1, keepdim=True)
    return largest + (exponents - largest).exp2_().sum(dim=-1, keepdim=True).log2_()


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    targets: Targets,
    weights: Tensor,
    temperature: float,
    pairing: Tensor | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over student rows of the cross-entropy to teacher assignments, in nats.

    Student logits are features @ prototypes.T / temperature, computed in the autocast dtype if autocast is on, else in
    the dtype of the two; all else is float32 (float64 for float64 inputs).

    Args:
        features: [N, d]; N = G * R, G views of R images, view-major.
        prototypes: [K, d].
        targets: V * R rows, V views of the same R images, view-major; no gradient flows there.
        weights: [N], float32; no gradient.
        temperature: of the student, > 0.
        pairing: [G, V], rows sum to one: the target of student view g is the sum over v of pairing[g, v] * q[v] (a mean
            of cross-entropies is the cross-entropy to the mean). None: row i is the target of row i (G = V = 1).
        compiled: code may be compiled; with the device and K it decides whether logits are streamed (`is_streamed`).

    Returns: sum_i weights[i] * CE_i, a scalar with gradients by features and prototypes; and CE [N], without.

    Memory beyond inputs and gradients: BAND_BYTES and a few BLOCK_BYTES, streamed; else twice the logits.
    """
    num_student, num_teacher = (1, 1) if pairing is None else pairing.shape
    assert len(features) * num_teacher == len(targets) * num_student, (
        features.shape,
        len(targets),
        num_student,
        num_teacher,
    )
    assert len(weights) == len(features), (features.shape, weights.shape)
    assert targets.logits.shape[1] == len(prototypes), (targets.logits.shape, prototypes.shape)
    kind = features.device.type
    if torch.is_autocast_enabled(kind):
        compute_dtype = torch.get_autocast_dtype(kind)
        # Autocast leaves float64 alone.
        compute_dtype = torch.float64 if features.dtype == torch.float64 else compute_dtype
    else:
        compute_dtype = torch.promote_types(features.dtype, prototypes.dtype)
    with torch.autocast(kind, enabled=False):
        if len(features) and not is_streamed(features.device, len(prototypes), compiled):
            logits = features.to(compute_dtype) @ prototypes.to(compute_dtype).T
            return whole_cross_entropy(logits, targets, weights, temperature, pairing, compiled=True)
        return _PrototypeCrossEntropy.apply(
            features, prototypes, targets, weights, temperature, pairing, compute_dtype, torch.is_grad_enabled()
        )  # type: ignore[return-value]  # apply is untyped


def whole_cross_entropy(
    logits: Tensor, targets: Targets, weights: Tensor, temperature: float, pairing: Tensor | None, *, compiled: bool
) -> tuple[Tensor, Tensor]:
    """`prototype_cross_entropy` from student logits [N, K], not yet divided by the temperature, N above 0."""
    num_student, num_teacher = (1, 1) if pairing is None else pairing.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    pairing = logits.new_ones(1, 1, dtype=dtype) if pairing is None else pairing.to(dtype)
    return _WholeCrossEntropy.apply(
        logits.unflatten(0, (num_student, -1)),
        targets.logits.unflatten(0, (num_teacher, -1)),
        targets.log_prototype,
        targets.log_sample.unflatten(0, (num_teacher, -1)),
        weights,
        pairing,
        temperature,
        targets.temperature,
        compiled,
    )  # type: ignore[return-value]  # as above


class _WholeCrossEntropy(torch.autograd.Function):
    """Keeps the logits of both sides and a number a row; the gradient of the logits is made from them."""

    @staticmethod
    def forward(  # type: ignore[override]  # torch says *args
        ctx, logits, teacher, log_prototype, log_sample, weights, pairing, temperature, teacher_temperature, compiled
    ) -> tuple[Tensor, Tensor]:
        inputs = (logits.detach(), teacher, log_prototype, log_sample, pairing)
        ctx.temperatures, ctx.compiled = (temperature, teacher_temperature), compiled
        cross_entropies, log_sums = whole_pass(_cross_entropies, compiled, *inputs, *ctx.temperatures)
        cross_entropies = cross_entropies.flatten()
        ctx.save_for_backward(*inputs, log_sums, weights)
        ctx.mark_non_differentiable(cross_entropies)
        return (weights * cross_entropies).sum(), cross_entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[override]  # torch says *gradients
        *inputs, log_sums, weights = ctx.saved_tensors
        scale = (weights * grad_loss).view_as(log_sums) / ctx.temperatures[0]
        gradient = whole_pass(_logit_gradients, ctx.compiled, *inputs, *ctx.temperatures, log_sums, scale)
        return gradient, None, None, None, None, None, None, None, None


def whole_pass(function: Callable[..., Any], compiled: bool, *arguments: Any) -> Any:
    """One pass over logits [views, rows, K], the first argument; compiled once for all numbers of rows."""
    if not compiled:
        return function(*arguments)
    num_rows = arguments[0].shape[1]
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.ndim > 1 and argument.shape[1] == num_rows:
            compiling.open_rows(argument, 1)
    return compiled_pass(function)(*arguments)


def _assigned(
    teacher: Tensor, log_prototype: Tensor, log_sample: Tensor, pairing: Tensor, temperature: float
) -> Tensor:
    """What each student view is to predict, [G, R, K]: assignments [V, R, K] averaged as the pairing [G, V] says."""
    q = torch.exp(teacher.to(log_sample.dtype) / temperature + log_prototype + log_sample[..., None])
    return sum(pairing[:, v, None, None] * q[v] for v in range(len(q)))  # type: ignore[return-value]  # sum starts at the int 0


def _cross_entropies(
    logits: Tensor,
    teacher: Tensor,
    log_prototype: Tensor,
    log_sample: Tensor,
    pairing: Tensor,
    temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies and log-sums of exponentials [G, R], from logits [G, R, K] and [V, R, K]."""
    z = logits.to(pairing.dtype) / temperature
    log_sums = torch.logsumexp(z, dim=-1)
    q = _assigned(teacher, log_prototype, log_sample, pairing, teacher_temperature)
    return log_sums - (z * q).sum(dim=-1), log_sums


def _logit_gradients(
    logits: Tensor,
    teacher: Tensor,
    log_prototype: Tensor,
    log_sample: Tensor,
    pairing: Tensor,
    temperature: float,
    teacher_temperature: float,
    log_sums: Tensor,
    scale: Tensor,
) -> Tensor:
    """The gradient by logits [G, R, K], in their dtype; `scale` [G, R] multiplies each row."""
    z = logits.to(pairing.dtype) / temperature
    q = _assigned(teacher, log_prototype, log_sample, pairing, teacher_temperature)
    return ((torch.exp(z - log_sums[..., None]) - q) * scale[..., None]).to(logits.dtype)


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]  # torch says *args
        ctx, features, prototypes, targets, weights, temperature, pairing, compute_dtype, with_gradients
    ) -> tuple[Tensor, Tensor]:
        cross_entropies, features_gradient, prototypes_gradient = _stream(
            features,
            prototypes,
            targets,
            weights,
            temperature,
            pairing,
            compute_dtype,
            with_gradients and ctx.needs_input_grad[0],
            with_gradients and ctx.needs_input_grad[1],
        )
        ctx.save_for_backward(features_gradient, prototypes_gradient)
        ctx.mark_non_differentiable(cross_entropies)
        return (weights * cross_entropies).sum(), cross_entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):  # type: ignore[override]  # torch says *gradients
        scaled = [None if gradient is None else gradient * grad_loss for gradient in ctx.saved_tensors]
        return *scaled, None, None, None, None, None, None


def _stream(
    features: Tensor,
    prototypes: Tensor,
    targets: Targets,
    weights: Tensor,
    temperature: float,
    pairing: Tensor | None,
    compute_dtype: torch.dtype,
    wants_features: bool,
    wants_prototypes: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cross-entropies [N], and the gradients of their weighted sum by features and by prototypes where wanted."""
    num_student, num_teacher = pairing.shape if pairing is not None else (1, 1)
    num_prototypes, width = prototypes.shape
    num_images = len(features) // num_student
    dtype = torch.promote_types(compute_dtype, torch.float32)
    pairing = pairing.to(dtype) if pairing is not None else None
    cross_entropies = features.new_empty(num_student, num_images, dtype=dtype)
    features_gradient = features.new_zeros(num_student, num_images, width, dtype=dtype) if wants_features else None
    prototypes_gradient = prototypes.new_zeros(prototypes.shape, dtype=dtype) if wants_prototypes else None
    features = features.reshape(num_student, num_images, width)
    weights = weights.reshape(num_student, num_images)

    band_bytes = BAND_BYTES.get(features.device.type, BAND_BYTES_ELSEWHERE)
    for images in blocks(num_images, band_bytes // (num_student * num_prototypes * compute_dtype.itemsize)):
        num_rows = num_student * (images.stop - images.start)
        band = features[:, images].reshape(num_rows, width)
        # Student logits come out of the matrix product as exponents of two.
        scaled_band = (band.to(dtype) * (LOG2_E / temperature)).to(compute_dtype)
        gradient_scale = weights[:, images].reshape(num_rows, 1).to(dtype) / temperature
        weighted_band = (band.to(dtype) * gradient_scale).to(compute_dtype)
        # Multiples of 64 columns: matrix products are slow on ragged ones.
        num_columns = block_bytes(features.device) // (num_rows * dtype.itemsize) // 64 * 64
        columns = list(blocks(num_prototypes, max(num_columns, 64)))
        logits, log2_sum = [], features.new_full((num_rows, 1), -torch.inf, dtype=dtype)
        for k in columns:
            logits.append(scaled_band @ prototypes[k].to(compute_dtype).T)
            log2_sum = torch.logaddexp2(log2_sum, log2_sum_exp2(logits[-1].to(dtype)))
        band_gradient = features.new_zeros(num_rows, width, dtype=dtype) if wants_features else None
        expected = torch.zeros_like(log2_sum)
        for index, k in enumerate(columns):
            exponents, logits[index] = logits[index].to(dtype), None
            target = targets.views(num_teacher, images, k)
            if pairing is not None:
                target = pairing @ target.flatten(1)
            target = target.view(num_rows, -1)
            expected += (exponents * target).sum(dim=1, keepdim=True)
            gradient = exponents.sub_(log2_sum).exp2_().sub_(target).to(compute_dtype)
            if band_gradient is not None:
                _add_product(band_gradient, gradient, prototypes[k].to(compute_dtype))
            if prototypes_gradient is not None:
                _add_product(prototypes_gradient[k], gradient.T, weighted_band)
        cross_entropies[:, images] = (log2_sum - expected).div_(LOG2_E).view(num_student, -1)
        if features_gradient is not None and band_gradient is not None:
            features_gradient[:, images] = band_gradient.mul_(gradient_scale).view(num_student, -1, width)
    if features_gradient is not None:
        features_gradient = features_gradient.flatten(0, 1).to(features.dtype)
    if prototypes_gradient is not None:
        prototypes_gradient = prototypes_gradient.to(prototypes.dtype)
    return cross_entropies.flatten(), features_gradient, prototypes_gradient


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where total may be of a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
