"""One process, DDP and FSDP2 take the same steps."""

from typing import Any

import pytest
import torch
from torch import nn

from pretrain.distributed.fsdp import full_tensors, local_tensor, plain_module, wrap
from pretrain.models import architectures
from tests.pretrain.ranks import Run, make_networks, run_ranks


def train(mode: str, precision: str = "float32", micro_batches: int = 1, **options: int) -> dict[str, Any]:
    """Four steps; whole weights of both networks, the first step's gradients, losses and norms."""
    run = Run(mode, precision, micro_batches, **options)
    answers = [run.answer()]
    history = [run.step(0)]
    gradients = run.gradients
    history += [run.step(step) for step in range(1, 4)]
    answers.append(run.answer())
    return {
        "answers": answers,
        "student": dict(full_tensors(run.wrapped.student)),
        "teacher": dict(full_tensors(run.wrapped.teacher)),
        "gradients": gradients,
        "history": history,
        "elements": sum(local_tensor(p).numel() for p in run.wrapped.teacher.parameters()),
    }


def train_in_many_ways() -> dict[str, Any]:
    """In one pair of processes, for starting them takes longer than training."""
    return {
        "ddp": train("ddp"),
        "fsdp": train("fsdp"),
        "ddp accumulated": train("ddp", micro_batches=2),
        "fsdp accumulated": train("fsdp", micro_batches=2),
        "hybrid accumulated": train("hybrid", micro_batches=2, shard_ranks=1),
        "fsdp recomputed": train("fsdp", checkpoint_blocks=True),
        "ddp recomputed": train("ddp", checkpoint_blocks=True),
        "fsdp bfloat16": train("fsdp", precision="bfloat16"),
        "ddp bfloat16": train("ddp", precision="bfloat16"),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(train_in_many_ways, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return train("single")


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for part in ("gradients", "student", "teacher"):
        assert list(found[part]) == list(expected[part])
        for name, tensor in expected[part].items():
            torch.testing.assert_close(
                found[part][name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=f"{part} {name}": f"{n}: {m}"
            )
    for ours, theirs in zip(found["history"], expected["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    ["ddp", "fsdp", "ddp accumulated", "fsdp accumulated", "hybrid accumulated", "fsdp recomputed", "ddp recomputed"],
)
def test_two_ranks_take_the_steps_of_one(two_ranks: Any, one_process: Any, way: str) -> None:
    """Float32 sums in another order; AdamW divides small moments, which multiplies their rounding."""
    for rank in two_ranks:
        assert_close(rank[way], one_process, 2e-5)


@pytest.mark.slow
def test_answers_without_gradient_are_those_of_the_weights_now(two_ranks: Any, one_process: Any) -> None:
    """FSDP would go on using whole weights that no backward freed, and miss every update since."""
    for rank in two_ranks:
        for found, expected in zip(rank["fsdp"]["answers"], one_process["answers"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one_process["answers"][0], one_process["answers"][1], atol=0.05)


@pytest.mark.slow
def test_gradients_of_prototypes_are_there(one_process: Any, two_ranks: Any) -> None:
    """The loss uses a head's weights after the head has run; under FSDP that gradient must find its way back."""
    for name in ("dino_head.last_layer.weight", "ibot_head.last_layer.weight", "backbone.mask_token"):
        expected = one_process["gradients"][name]
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(two_ranks[0]["fsdp"]["gradients"][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_both_ranks_end_with_the_same_weights(two_ranks: Any) -> None:
    for way, result in two_ranks[0].items():
        for part in ("student", "teacher"):
            for name, tensor in result[part].items():
                assert torch.equal(tensor, two_ranks[1][way][part][name]), (way, name)


@pytest.mark.slow
def test_fsdp_holds_half_of_the_weights(two_ranks: Any, one_process: Any) -> None:
    assert sum(rank["fsdp"]["elements"] for rank in two_ranks) == one_process["elements"]
    assert two_ranks[0]["ddp"]["elements"] == one_process["elements"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp bfloat16", "fsdp bfloat16"])
def test_bfloat16_stays_near(two_ranks: Any, one_process: Any, way: str) -> None:
    """Products round to 2^-8; weights stay float32, or four steps of 1e-2 would be lost in rounding."""
    result = two_ranks[0][way]
    assert all(tensor.dtype == torch.float32 for part in ("student", "teacher") for tensor in result[part].values())
    for name, gradient in one_process["gradients"].items():
        if gradient.norm() > 1e-3:
            cosine = torch.cosine_similarity(result["gradients"][name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.99, name
    assert result["history"][0]["dino"] == pytest.approx(one_process["history"][0]["dino"], rel=0.02)


def test_recomputing_blocks_changes_no_bit(one_process: Any) -> None:
    recomputed = train("single", checkpoint_blocks=True)
    assert recomputed["history"] == one_process["history"]
    assert all(torch.equal(recomputed["student"][n], t) for n, t in one_process["student"].items())


def test_recomputing_blocks_with_stochastic_depth_changes_no_bit() -> None:
    """What a block leaves out is drawn before the first one, so the second forward leaves out the same."""
    found = []
    for checkpoint_blocks in (False, True):
        torch.manual_seed(0)
        student, teacher = (nn.Module() for _ in range(2))
        for network in (student, teacher):
            network.backbone = architectures.build("dinov3_tiny", depth=2, drop_path=0.5, layerscale=0.5)
        student.forward = lambda x, s=student: (
            s.backbone([x], generator=torch.Generator().manual_seed(1))[0].cls.square().sum()
        )
        wrapped = wrap(student, teacher, "single", "float32", checkpoint_blocks=checkpoint_blocks)
        side = 2 * student.backbone.patch_size
        wrapped.student(torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(2))).backward()
        found.append([p.grad for p in student.parameters()])
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*found, strict=True))
    assert len({tuple(gradient.flatten()[:2].tolist()) for gradient in found[0]}) > 10


def test_micro_batches_add_up(one_process: Any) -> None:
    assert_close(train("single", micro_batches=4), one_process, 2e-5)


def test_modes_are_chosen_and_refused() -> None:
    student, teacher = make_networks()
    assert wrap(student, teacher, "auto", "float32").mode == "single"
    with pytest.raises(ValueError, match="start with torchrun"):
        wrap(student, teacher, "fsdp", "float32")
    with pytest.raises(ValueError, match="one of auto, single, ddp, fsdp, hybrid"):
        wrap(student, teacher, "zero", "float32")
    with pytest.raises(ValueError, match="one of float32, bfloat16"):
        wrap(student, teacher, "single", "float16")
    assert not any(p.requires_grad for p in teacher.parameters())
    assert isinstance(plain_module(student), nn.Module)
