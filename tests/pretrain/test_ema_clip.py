"""The moving average, gradient norms and clipping, and values that are not finite; over ranks in test_fsdp.py."""

import copy
import math

import pytest
import torch
from torch import nn

from pretrain.optim.clip import FiniteWatch, clip_by_module
from pretrain.optim.ema import copy_parameters, paired_parameters, update_ema
from tests.pretrain.ranks import make_networks


def test_the_average_is_that_of_the_formula() -> None:
    student, teacher = make_networks()
    expected = {name: p.detach().double() for name, p in teacher.named_parameters()}
    pairs = paired_parameters(teacher, student)
    for step in range(5):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        momentum = 0.9 + 0.02 * step
        update_ema(pairs, momentum)
        for name, p in student.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * p.detach().double()
    for name, p in teacher.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_momentum_near_one_still_moves() -> None:
    """1 - 0.99999 of a difference of 1: below bfloat16's spacing, not below float32's."""
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.zeros_(student.weight)
    nn.init.ones_(teacher.weight)
    for _ in range(100):
        update_ema(paired_parameters(teacher, student), 0.99999)
    torch.testing.assert_close(teacher.weight.detach(), torch.full((2, 2), 0.99999**100), rtol=1e-5, atol=0)


def test_momentum_one_and_copies_are_exact() -> None:
    student, teacher = make_networks()
    before = copy.deepcopy(teacher.state_dict())
    pairs = paired_parameters(teacher, student)
    update_ema(pairs, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    copy_parameters(pairs)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in teacher.state_dict().items())


def test_networks_of_another_build_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.bias for one; build them alike"):
        paired_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"weight is \[2, 3\] in the teacher and \[2, 2\] in the student"):
        paired_parameters(nn.Linear(3, 2), nn.Linear(2, 2))


def test_each_module_is_clipped_by_its_own_norm() -> None:
    """Against torch.nn.utils.clip_grad_norm_, one module at a time."""
    networks = make_networks()
    for network in networks:
        torch.manual_seed(1)
        for name, p in network.named_parameters():
            p.grad = torch.randn_like(p) * (10 if name.startswith("backbone") else 0.01)
        network.backbone.mask_token.grad = None
    ours, theirs = networks
    modules = {name: list(child.parameters()) for name, child in ours.named_children()}
    norms = clip_by_module(modules, 3.0)
    for name, child in theirs.named_children():
        norm = torch.nn.utils.clip_grad_norm_(child.parameters(), 3.0)
        torch.testing.assert_close(norms[name], norm)
        for p, q in zip(modules[name], child.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    assert norms["backbone"] > 3 > norms["dino_head"]


def test_no_clipping_still_gives_norms() -> None:
    layer = nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])
    assert clip_by_module({"all": list(layer.parameters())}, 0.0)["all"] == 13
    assert layer.weight.grad.tolist() == [[3, 4]]
    layer.weight.grad = layer.bias.grad = None
    assert clip_by_module({"all": list(layer.parameters())}, 1.0)["all"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_named(value: float) -> None:
    watch = FiniteWatch()
    assert watch.watch(6, {"dino": torch.tensor(1.0), "ibot": torch.tensor(2.0)}) == 0
    watch.check()
    assert watch.watch(7, {"dino": torch.tensor(1.0), "koleo": torch.tensor(value)}) == 1
    with pytest.raises(FloatingPointError, match=r"step 7: koleo not finite .* the optimizer did not step"):
        watch.check(wait=True)


def test_a_gradient_that_is_not_finite_shows_in_its_module_s_norm() -> None:
    student, _ = make_networks()
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    student.ibot_head.mlp.weight.grad[0, 0] = math.inf
    norms = clip_by_module({name: list(child.parameters()) for name, child in student.named_children()}, 3.0)
    watch = FiniteWatch()
    watch.watch(0, norms)
    with pytest.raises(FloatingPointError, match="step 0: ibot_head not finite"):
        watch.check()
