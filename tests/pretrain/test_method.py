"""docs/method.md beside the trainer: from the same weights and batch equal targets, losses, gradients and steps."""

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.loader import merge_config
from pretrain.config import TrainConfig
from pretrain.data.collate import Batch
from pretrain.data.loader import read_tables
from pretrain.losses.centering import sinkhorn_knopp
from pretrain.models.architectures import build
from pretrain.optim.schedules import values_at
from pretrain.phase import Phase, fresh_network, phase_loader
from pretrain.settings import HeadConfig, HeadsConfig, ModelConfig
from pretrain.student_teacher import Crops, Network, TeacherTargets, student_losses, teacher_outputs
from tests.conftest import REPOSITORY, picture
from tests.pretrain.randomised import randomise
from tests.pretrain.tiny_train import TINY

PAGE = REPOSITORY / "docs" / "method.md"
CPU, TEMPERATURE, STEPS = torch.device("cpu"), 0.05, 200
# The released short recipe over so many steps, the lengths of its beginnings as the shares that the page has.
RECIPE = {
    "warmup_steps": STEPS // 10,
    "freeze_last_layer_steps": STEPS // 100,
    "teacher_temperature_warmup_steps": 3 * STEPS // 10,
}
# Half of the crops masked, tables of the global crops' size; tables of neither's; other numbers.
SETTINGS = {
    "local crops resized": {},
    "all crops resized": {"model": {"position_px": 56}, "crops": {"global_px": 48, "local_px": 24}},
    "other numbers": {"crops": {"num_local_crops": 3}, "masks": {"probability": 0.75, "ratio": [0.3, 0.8]}},
}


def source() -> str:
    return "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))


def program(text: str) -> ModuleType:
    module = ModuleType("method")
    exec(compile(text, str(PAGE), "exec"), module.__dict__)
    return module


def settings(shards: Path, name: str) -> TrainConfig:
    tiny = merge_config(TrainConfig(), {k: v for k, v in TINY.items() if k != "optim"}, "the tests' settings")
    asked = {"steps": STEPS, "optim": RECIPE, "data": {"datasets": {"pictures": {"shards": str(shards)}}}}
    return merge_config(merge_config(tiny, asked, "the page's recipe"), SETTINGS[name], name)


def networks(config: TrainConfig) -> tuple[Network, Network]:
    """A student and a teacher that differ, every parameter random."""
    student, teacher = fresh_network(config), fresh_network(config)
    randomise(student, seed=1)
    randomise(teacher, seed=2)
    return student, teacher


def copied(page: ModuleType, network: Network, config: TrainConfig) -> Any:
    """The page's network with the same weights under the same names."""
    head, backbone = config.heads.dino, network.backbone
    grid = math.isqrt(backbone.pos_embed.shape[1])
    vit = page.VisionTransformer(backbone.embed_dim, backbone.depth, backbone.patch_size, grid)
    copy = page.Network(vit, head.hidden_dim, head.bottleneck_dim, head.num_prototypes)
    copy.load_state_dict(network.state_dict(), strict=True)
    return copy.to(backbone.cls_token.dtype)


def first_batch(config: TrainConfig) -> tuple[Batch, Crops, tuple[Tensor, Tensor, Tensor]]:
    """The trainer's batch, what it makes of it, and what the page takes."""
    batch = next(iter(phase_loader(config, 0, 0, read_tables(config.data))))
    crops = Crops.from_batch(batch, CPU)
    assert crops.local_crops is not None
    assert crops.masks is not None
    assert crops.masks.any(dim=1).float().mean() == config.masks.probability
    return batch, crops, (crops.global_crops, crops.local_crops, crops.masks)


def check_near(found: Tensor, expected: Tensor, what: str, allowed: float) -> None:
    """Within a length."""
    assert found.shape == expected.shape, what
    difference = (found - expected).norm().item()
    assert difference <= allowed, f"{what}: off by {difference} of {expected.norm().item()}, and {allowed} is allowed"


def check_same(found: Tensor, expected: Tensor, what: str) -> None:
    """In float64, but for what the trainer has in float32: what a pair, a patch, a point of a resized table weigh."""
    check_near(found, expected, what, 1e-6 * expected.norm().item())


def check_losses(page: ModuleType, config: TrainConfig) -> None:
    """Targets, terms and the gradient of every parameter, in float64."""
    student, teacher = (network.double() for network in networks(config))
    our_student, our_teacher = (copied(page, network, config) for network in (student, teacher))
    _, crops, (global_crops, local_crops, masks) = first_batch(config)
    crops = replace(crops, global_crops=global_crops.double(), local_crops=local_crops.double())
    with torch.no_grad():
        answers = teacher_outputs(teacher, crops)
        cls, patches = our_teacher.backbone(global_crops.double())
        rows = our_teacher.dino_head(cls), our_teacher.ibot_head(patches[masks])
    assert answers.dino is not None
    assert answers.ibot is not None
    targets = sinkhorn_knopp([answers.dino, answers.ibot], TEMPERATURE)
    for name, ours, theirs in zip(("dino", "ibot"), rows, targets, strict=True):
        expected = theirs.rows(0, len(theirs))
        check_same(page.sinkhorn_knopp(ours, TEMPERATURE), expected, f"targets of {name}")

    terms, _ = student_losses(student.train(), crops, TeacherTargets(*targets), config, generator=torch.Generator())
    torch.stack(list(terms.values())).sum().backward()
    ours = page.losses(our_student, our_teacher, global_crops.double(), local_crops.double(), masks, TEMPERATURE)
    sum(ours.values()).backward()
    assert ours.keys() == terms.keys()
    for name, term in terms.items():
        check_same(ours[name], term, f"loss {name}")
    gradients = {name: parameter.grad for name, parameter in our_student.named_parameters()}
    for name, parameter in student.named_parameters():
        expected, found = parameter.grad, gradients[name]
        assert expected is not None and expected.norm() > 0, name  # noqa: PT018  # one claim: it has a gradient
        assert found is not None, name
        check_same(found, expected, f"gradient of {name}")
    assert all(parameter.grad is None for parameter in our_teacher.parameters()), "the teacher has no gradient"


def check_steps(page: ModuleType, config: TrainConfig) -> None:
    """Student and teacher after a step with still prototypes and after one at nearly the full rate, in float32."""
    student, teacher = networks(config)
    our_student, our_teacher = (copied(page, network, config) for network in (student, teacher))
    starts = [{n: p.detach().clone() for n, p in network.named_parameters()} for network in (student, teacher)]
    phase, optimizer = Phase(config, 0, student, teacher), page.adamw(our_student)
    batch, _, seen = first_batch(config)
    for step in (RECIPE["freeze_last_layer_steps"] - 1, RECIPE["teacher_temperature_warmup_steps"]):
        watched = phase.step(batch, step, diagnose=False)
        assert all(watched[f"grad_norm/{name}"] > config.optim.clip_norm for name in phase.modules), "all are clipped"
        terms = page.train_step(our_student, our_teacher, optimizer, seen, step, STEPS)
        for name, term in terms.items():
            assert term.item() == pytest.approx(watched[f"loss/{name}"].item(), rel=1e-5), name
        for ours, theirs, start in zip((our_student, our_teacher), (student, teacher), starts, strict=True):
            weights = dict(ours.named_parameters())
            for name, expected in theirs.named_parameters():
                after, moved = informed(name, expected), informed(name, expected - start[name])
                # The weight's own rounding, and a share of the way that it went: AdamW divides by small gradients.
                allowed = 1e-7 * after.norm().item() + 2e-4 * moved.norm().item()
                check_near(informed(name, weights[name]), after, f"{name} after step {step}", allowed)


def informed(name: str, values: Tensor) -> Tensor:
    """Without the bias of keys: no softmax over keys depends on it, and AdamW makes whole steps of its rounding."""
    if not name.endswith("qkv.bias"):
        return values.detach()
    query, _, value = values.detach().chunk(3)
    return torch.cat([query, value])


@pytest.mark.parametrize("name", SETTINGS)
def test_targets_losses_and_gradients_are_the_trainers(name: str, shards: Path) -> None:
    check_losses(program(source()), settings(shards, name))


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_the_trainers(name: str, shards: Path) -> None:
    check_steps(program(source()), settings(shards, name))


# What is wrong, what stands on the page, what would stand there.
WRONG_LOSSES = {
    "no KoLeo": ("0.1 * koleo", "0.0 * koleo"),
    "KoLeo of both crops at once": (
        "koleo_loss(crop) for crop in cls.split(num_images)",
        "koleo_loss(c) for c in [cls]",
    ),
    "student's temperature": ("temperature=0.1", "temperature=0.11"),
    "two iterations": ("num_iterations=3", "num_iterations=2"),
    "rows before prototypes": ("log_softmax(dim=0).log_softmax(dim=1)", "log_softmax(dim=1).log_softmax(dim=0)"),
    "no mask token": ("torch.where(masks[..., None], self.mask_token, x)", "x"),
    "no position for the masked": (
        "x = torch.cat([cls, x + positions",
        "x = torch.cat([cls, x + (x != self.mask_token) * positions",
    ),
    "teacher with gradient": ("with torch.no_grad():\n        cls", "with torch.enable_grad():\n        cls"),
    "teacher sees masks": ("teacher.backbone(global_crops)", "teacher.backbone(global_crops, masks)"),
    "a crop paired with itself": (" if s != t]", "]"),
    "weights of the pairs": ("/ len(pairs)", "/ (len(pairs) - 1)"),
    "patches of all crops alike": (
        "/ masked_patches).sum() / len(masks)",
        "* len(masks) / masks.sum()).sum() / len(masks)",
    ),
    "bilinear positions": ("bicubic", "bilinear"),
    "one head": ("student.ibot_head(", "student.dino_head("),
}
WRONG_STEPS = {
    "no clipping": ("clip_grad_norm_(module.parameters(), 3.0)", "clip_grad_norm_(module.parameters(), 3000.0)"),
    "clipped together": ("in student.children()", "in [student]"),
    "gradients add up": ("optimizer.zero_grad()", "pass"),
    "prototypes move": ("step < num_steps // 100", "False"),
    "everything decays": ('* group["decays"]', ""),
    "weight decay": ("cosine(step, 0.04, 0.4", "cosine(step, 0.04, 0.2"),
    "teacher's temperature": ("linear(step, 0.04, 0.07", "linear(step, 0.04, 0.06"),
    "no decay over layers": ("0.9 **", "1.0 **"),
    "patch embedding": ("(0.2 if", "(1 if"),
    "momentum": ("0.992, 1.0", "0.99, 1.0"),
}


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
def test_a_wrong_loss_is_seen(wrong: str, shards: Path) -> None:
    right, changed = WRONG_LOSSES[wrong]
    assert source().count(right) == 1, right
    with pytest.raises(AssertionError, match=r"(targets of|loss|gradient of) .*: off by|the teacher has no gradient"):
        check_losses(program(source().replace(right, changed)), settings(shards, "other numbers"))


@pytest.mark.parametrize("wrong", WRONG_STEPS)
def test_a_wrong_step_is_seen(wrong: str, shards: Path) -> None:
    right, changed = WRONG_STEPS[wrong]
    assert source().count(right) == 1, right
    with pytest.raises(AssertionError, match=r"after step \d+: off by|dino"):
        check_steps(program(source().replace(right, changed)), settings(shards, "other numbers"))


def test_schedules_are_those_of_the_recipe(shards: Path) -> None:
    page, config = program(source()), settings(shards, "other numbers")
    for step in range(STEPS):
        values = values_at(config.optim, step, STEPS, 512)
        assert page.learning_rate(step, STEPS, 512) == pytest.approx(values.lr, rel=1e-12)


def test_sizes_and_first_values_are_the_trainers() -> None:
    """Also of the sizes that the text names: the parameters of released backbones, and as published."""
    page, text = program(source()), PAGE.read_text()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = page.Network(page.VisionTransformer())
    assert shapes(ours.backbone) == shapes(build("dinov2_tiny", device="meta"))
    for name, words in (("small", "dim=384, depth=12, patch_size=14"), ("large", "dim=1024, depth=24, patch_size=14")):
        assert words in text
        with torch.device("meta"):
            vit = page.VisionTransformer(**{k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", words)}, position_grid=37)
        assert shapes(vit) == shapes(build(f"dinov2_vit{name[0]}14", device="meta"))
    head = HeadConfig()
    published = f"hidden={head.hidden_dim}, bottleneck={head.bottleneck_dim}, num_prototypes={head.num_prototypes}"
    assert published in text

    head = replace(head, hidden_dim=512, bottleneck_dim=128, num_prototypes=1024)
    heads = HeadsConfig(dino=head, ibot=head)
    theirs = fresh_network(TrainConfig(model=ModelConfig(architecture="dinov2_tiny"), heads=heads))
    weights = dict(theirs.named_parameters())
    assert weights.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        for figure in (Tensor.std, lambda x: x.abs().max()):
            # Two draws of 192 numbers or more: their deviations differ by a tenth, the largest of them by a third.
            expected = figure(weights[name]).item()
            assert figure(parameter).item() == pytest.approx(expected, rel=0.35, abs=1e-12), name


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_the_program_is_of_150_lines() -> None:
    lines = [line for line in source().splitlines() if line.strip()]
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100


def test_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    """By its own two commands, in a folder that has nothing of the project but the page."""
    for seed in range(8):
        (tmp_path / "pictures" / str(seed % 2)).mkdir(parents=True, exist_ok=True)
        picture(seed).save(tmp_path / "pictures" / str(seed % 2) / f"{seed}.jpg")
    (tmp_path / "docs").mkdir()
    shutil.copy(PAGE, tmp_path / "docs")
    [commands] = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    asked = commands.replace("python method.py FOLDER", f"{sys.executable} -W error method.py pictures 3 8")
    assert asked != commands
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        ["sh", "-ec", asked], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    figures = re.findall(r"^(\d+) \{'dino': (\S+), 'ibot': (\S+), 'koleo': (\S+)\}$", run.stdout, re.MULTILINE)
    assert [int(step) for step, *_ in figures] == [0, 1, 2]
    assert all(math.isfinite(float(figure)) for _, *terms in figures for figure in terms)
    weights = torch.load(tmp_path / "teacher.pth", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values())
