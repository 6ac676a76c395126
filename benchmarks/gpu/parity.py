"""Section C: the same numbers on this device as on a processor, for every operation, and for three whole steps.

An operation is computed from equal inputs in float64 on the processor, and on the device in float32 and under bfloat16
autocast. Errors are relative, in the Euclidean norm. Tolerances: float32 rounds by 6e-8, and its sums here have up to
a few thousand terms in some other order: 1e-5. bfloat16 rounds by 4e-3, and losses divide by temperatures of 0.1: 3e-2.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.measure import Setting, check, relative_error
from benchmarks.gpu.sizes import TINY
from benchmarks.gpu.steps import LARGE, step_config
from benchmarks.gpu.table import Figures, Part
from benchmarks.train_step import STEP, fixed_batch, our_phase
from pretrain.config import TrainConfig
from pretrain.data.photometric import Photometric, blend, blur, on_device, shift_hue
from pretrain.losses.centering import sinkhorn_knopp
from pretrain.losses.dino import dino_loss
from pretrain.losses.gram import gram_loss
from pretrain.losses.ibot import ibot_loss
from pretrain.losses.koleo import koleo_loss
from pretrain.losses.prototypes import Targets
from pretrain.models.architectures import build
from pretrain.models.layers.position import patch_positions
from pretrain.models.layers.rope import Rope, rotate, rotate_, tables
from pretrain.optim.clip import clip_by_module
from pretrain.optim.ema import update_ema
from pretrain.optim.param_groups import adamw, apply_schedule, param_groups
from pretrain.optim.schedules import OptimConfig, values_at

IMAGES, WIDTH, PROTOTYPES = 8, 64, 2048
TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}
WHOLE_STEPS = 3
# With layer scales of 1e-5 all CLS tokens are nearly one, and KoLeo's logarithms of their distances are noise.
_WHOLE = ("precision=float32", "model.layerscale=0.5")


@dataclass(frozen=True)
class Way:
    """Where and in which precision an operation is computed."""

    device: torch.device
    dtype: torch.dtype
    autocast: bool = False

    def tensors(self, seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Normal numbers, the same for every way, that ask for a gradient."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator) for shape in shapes]
        return [x.to(self.device, self.dtype).requires_grad_() for x in drawn]

    def with_gradients(self, compute: Callable[[], Tensor], *leaves: Tensor) -> dict[str, Tensor]:
        """The value and the gradients of its product with fixed numbers."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            value = compute()
        generator = torch.Generator().manual_seed(99)
        weights = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
        gradients = torch.autograd.grad(value, leaves, weights)
        return {"value": value, **{f"gradient {i}": g for i, g in enumerate(gradients)}}


REFERENCE = Way(torch.device("cpu"), torch.float64)
Operation = Callable[[Way], Mapping[str, Tensor]]


def parity(at: Setting) -> Iterator[Part]:
    for name, operation in OPERATIONS.items():
        yield name, partial(compare, operation, at)
    for name, operation in COLOURS.items():
        yield f"colours: {name}", partial(compare_colours, operation, at)
    # Parity is about numbers, not about sizes: the tiny model, whatever the device.
    config = step_config(Setting(at.device, TINY, at.end, at.work, ()), LARGE, IMAGES, *_WHOLE)
    yield f"{WHOLE_STEPS} whole steps", lambda: whole_steps(config, at)


def compare(operation: Operation, at: Setting) -> list[Figures]:
    """The worst of its results, in either precision."""
    reference = operation(REFERENCE)
    lines: list[Figures] = []
    for precision, tolerance in TOLERANCES.items():
        found = operation(Way(at.device, torch.float32, autocast=precision == "bfloat16"))
        errors = {name: relative_error(found[name], reference[name]) for name in reference}
        worst = max(errors, key=lambda name: errors[name])
        lines.append(check(errors[worst], tolerance, precision=precision, result=worst))
    return lines


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _targets(way: Way, rows: int) -> Targets:
    logits = _unit(way.tensors(1, (rows, WIDTH))[0]) @ _unit(way.tensors(2, (PROTOTYPES, WIDTH))[0]).T
    return sinkhorn_knopp([logits.detach()], 0.07)[0]


def _sinkhorn(way: Way) -> Mapping[str, Tensor]:
    return {"assignments": _targets(way, 64).rows(0, 64), "entropy": _targets(way, 64).entropy()}


def _dino(way: Way) -> Mapping[str, Tensor]:
    globals_, locals_, prototypes = way.tensors(3, (2, IMAGES, WIDTH), (4, IMAGES, WIDTH), (PROTOTYPES, WIDTH))
    targets = _targets(way, 2 * IMAGES)
    leaves = (globals_, locals_, prototypes)

    def loss() -> Tensor:
        return dino_loss(_unit(globals_), _unit(locals_), _unit(prototypes), targets, local_weight=0.5).total

    return way.with_gradients(loss, *leaves)


def _ibot(way: Way) -> Mapping[str, Tensor]:
    features, prototypes = way.tensors(4, (100, WIDTH), (PROTOTYPES, WIDTH))
    weights = torch.linspace(0.01, 0.1, 100).to(way.device, way.dtype)
    targets = _targets(way, 100)
    return way.with_gradients(
        lambda: ibot_loss(_unit(features), _unit(prototypes), targets, weights, 16), features, prototypes
    )


def _koleo(way: Way) -> Mapping[str, Tensor]:
    (x,) = way.tensors(5, (64, WIDTH))
    return way.with_gradients(lambda: koleo_loss(x, 16), x)


def _gram(way: Way) -> Mapping[str, Tensor]:
    student, teacher = way.tensors(6, (4, 49, WIDTH), (4, 49, WIDTH))
    return way.with_gradients(lambda: gram_loss(student, teacher.detach(), "remove_teacher"), student)


def _rope(way: Way) -> Mapping[str, Tensor]:
    (x,) = way.tensors(7, (2, 4, 5 + 14 * 14, 64))
    table = tables(Rope(64), (14, 14), 5, way.device).to(torch.promote_types(way.dtype, torch.float32))
    turned = x.detach().clone()
    rotate_(turned, table)
    return {**way.with_gradients(lambda: rotate(x, table), x), "in place": turned}


def _position(way: Way) -> Mapping[str, Tensor]:
    (table,) = way.tensors(8, (1, 1 + 14 * 14, WIDTH))
    return way.with_gradients(lambda: patch_positions(table, (6, 6), antialias=True)[1], table)


def _parameters(way: Way, seed: int) -> list[nn.Parameter]:
    drawn = way.tensors(seed, (300, WIDTH), (WIDTH,), (1, 1, WIDTH))
    parameters = [nn.Parameter(x.detach()) for x in drawn]
    for parameter, gradient in zip(parameters, way.tensors(seed + 1, *(x.shape for x in drawn)), strict=True):
        parameter.grad = gradient.detach()
    return parameters


def _clip(way: Way) -> Mapping[str, Tensor]:
    parameters = _parameters(way, 9)
    norms = clip_by_module({"small": parameters[1:], "large": parameters[:1]}, 3.0)
    return {**{f"norm {k}": v for k, v in norms.items()}, **_numbered("gradient", [p.grad for p in parameters])}


def _ema(way: Way) -> Mapping[str, Tensor]:
    teacher, student = (way.tensors(seed, (300, WIDTH), (WIDTH,)) for seed in (11, 12))
    update_ema(([x.detach() for x in teacher], [x.detach() for x in student]), 0.994)
    return _numbered("teacher", teacher)


def _adamw(way: Way) -> Mapping[str, Tensor]:
    names = ("backbone.blocks.0.mlp.fc1.weight", "backbone.norm.bias", "backbone.cls_token")
    parameters = _parameters(way, 13)
    for parameter in parameters:
        parameter.data.mul_(0.02)  # as large as weights are
    before = [p.detach().clone() for p in parameters]
    config = OptimConfig()
    optimizer = adamw(param_groups(zip(names, parameters, strict=True), 1, 0.9, 0.2), config)
    for step in range(2):
        apply_schedule(optimizer, values_at(config, STEP + step, 125_000, 2048))
        optimizer.step()
    return _numbered("change", [p.detach().double() - b.double() for p, b in zip(parameters, before, strict=True)])


def _backbone(way: Way, name: str) -> Mapping[str, Tensor]:
    """Every parameter at random, so that nothing hides behind a layer scale of 1e-5."""
    generator = torch.Generator().manual_seed(15)
    model = build(name, depth=2, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model = model.to(way.device, way.dtype).eval()
    images, small = way.tensors(16, (2, 3, 48, 48), (4, 3, 24, 24))
    weights = [model.blocks[0].attn.qkv.weight, model.patch_embed.proj.weight]

    def tokens() -> Tensor:
        return torch.cat([part for f in model([images, small]) for part in (f.cls.flatten(), f.patches.flatten())])

    return way.with_gradients(tokens, images, *weights)


def _numbered(what: str, tensors: list[Tensor | None]) -> dict[str, Tensor]:
    return {f"{what} {i}": x for i, x in enumerate(tensors) if x is not None}


OPERATIONS: dict[str, Operation] = {
    "Sinkhorn-Knopp": _sinkhorn,
    "DINO loss": _dino,
    "iBOT loss": _ibot,
    "KoLeo": _koleo,
    "Gram": _gram,
    "RoPE": _rope,
    "position table, resized": _position,
    "clip": _clip,
    "EMA": _ema,
    "AdamW": _adamw,
    "ViT of DINOv2": partial(_backbone, name="dinov2_tiny"),
    "ViT of DINOv3": partial(_backbone, name="dinov3_tiny"),
}


# Colours: float32 always, and steps in them (hue, solarisation) turn a last digit into a jump.


def _colour_inputs(device: torch.device) -> tuple[Tensor, Photometric]:
    generator = torch.Generator().manual_seed(17)
    n = 16
    crops = torch.randint(0, 256, (n, 3, 48, 48), dtype=torch.uint8, generator=generator)
    factors = torch.rand(n, 4, generator=generator) * 0.8 + 0.6
    factors[:, 3] = torch.rand(n, generator=generator) * 0.2 - 0.1
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(n)]).to(torch.uint8)
    gray, solarize = (torch.rand(2, n, generator=generator) < 0.3).unbind(0)
    sigma = torch.rand(n, generator=generator) * 1.9 + 0.1
    return crops.to(device), Photometric(factors, order, gray, sigma, solarize)


def _unit_range(device: torch.device) -> Tensor:
    return torch.rand(16, 3, 48, 48, generator=torch.Generator().manual_seed(18)).to(device)


COLOURS: dict[str, Callable[[torch.device], Tensor]] = {
    "blend": lambda device: blend(_unit_range(device), *torch.linspace(0.2, 1, 48).view(3, 16)),
    "hue": lambda device: shift_hue(_unit_range(device), torch.linspace(-0.1, 0.1, 16)),
    "blur": lambda device: blur(_unit_range(device), torch.linspace(0.1, 2, 16)),
    "all": lambda device: on_device(*_colour_inputs(device)),
}


def compare_colours(operation: Callable[[torch.device], Tensor], at: Setting) -> Figures:
    """What all but a thousandth of the values are off by at most; a step of 8 bits is 4e-3."""
    difference = (operation(at.device).cpu() - operation(torch.device("cpu"))).abs()
    return check(torch.quantile(difference.flatten()[:: max(difference.numel() // 10**6, 1)], 0.999).item(), 1e-5)


# Whole steps


def whole_steps(config: TrainConfig, at: Setting) -> list[Figures]:
    """Losses and gradient norms of each step, the first gradient, and how far the teacher got.

    float32 is held to 1e-4: AdamW divides by moments of a step or two, which lets rounding grow. bfloat16 may be off by
    three times what the processor's own bfloat16 is off by.
    """
    cpu = torch.device("cpu")
    reference = take_steps(config, cpu)
    rounded = take_steps(replace(config, precision="bfloat16"), cpu)
    lines: list[Figures] = []
    for precision in TOLERANCES:
        found = take_steps(replace(config, precision="bfloat16") if precision == "bfloat16" else config, at.device)
        for name, expected in reference.items():
            error = relative_error(found[name], expected)
            tolerance = 1e-4 if precision == "float32" else 3 * relative_error(rounded[name], expected) + 1e-3
            lines.append(check(error, tolerance, precision=precision, result=name))
    return lines


def take_steps(config: TrainConfig, device: torch.device) -> dict[str, Tensor]:
    phase, batch = our_phase(config, device), fixed_batch(config)
    start = copy.deepcopy(list(phase.teacher.parameters()))
    found: dict[str, Tensor] = {}
    for step in range(WHOLE_STEPS):
        watched = phase.step(batch, STEP, diagnose=False)
        for kind in ("loss", "grad_norm"):
            names = sorted(name for name in watched if name.startswith(kind))
            found[f"{kind} of step {step + 1}"] = torch.stack([watched[name].double() for name in names])
        if step == 0:
            # The first moment after one step is the clipped gradient times 1 - beta1.
            moments = [state["exp_avg"].flatten() for state in phase.optimizer.state.values()]
            found["gradient of step 1"] = torch.cat(moments)
    moved = [(end - begin).flatten() for end, begin in zip(phase.teacher.parameters(), start, strict=True)]
    found["way of the teacher"] = torch.cat(moved)
    return found
