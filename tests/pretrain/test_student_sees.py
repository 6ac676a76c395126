"""What the student of a step sees: whole crops where it is distilled, whole patches where crops have a remainder."""

from dataclasses import replace

import pytest
import torch

from configs.loader import merge_config
from pretrain.checks import check_numbers
from pretrain.config import TrainConfig
from pretrain.losses.centering import sinkhorn_knopp
from pretrain.phase import fresh_network
from pretrain.student_teacher import Crops, Network, TeacherTargets, student_losses, teacher_outputs
from tests.pretrain.tiny_train import TINY

IMAGES, GLOBAL_PX = 4, 32


def config(**changes) -> TrainConfig:
    tiny = merge_config(TrainConfig(), TINY, "the tests' settings")
    rope = {"model": {"architecture": "dinov3_tiny", "depth": 2, "position_px": None}}
    return merge_config(merge_config(tiny, rope, "rope"), changes, "changes")


def crops(local_px: int) -> Crops:
    generator = torch.Generator().manual_seed(1)
    patches = (GLOBAL_PX // 8) ** 2
    masks = torch.zeros(2 * IMAGES, patches, dtype=torch.bool)
    masks[::2, :6] = True
    masked = masks.flatten().nonzero().squeeze(1)
    return Crops(
        global_crops=torch.randn(2 * IMAGES, 3, GLOBAL_PX, GLOBAL_PX, generator=generator),
        local_crops=torch.randn(2 * IMAGES, 3, local_px, local_px, generator=generator),
        gram_crops=None,
        masks=masks,
        predicted=masked,
        patch_weights=torch.full((len(masked),), 1 / 6),
        num_global=2,
        num_images=IMAGES,
    )


def losses(asked: TrainConfig, student: Network, seen: Crops) -> dict[str, float]:
    teacher = fresh_network(asked).eval()
    answers = teacher_outputs(teacher, seen)
    assert answers.dino is not None
    assert answers.ibot is not None
    dino, ibot = sinkhorn_knopp([answers.dino.detach(), answers.ibot.detach()], 0.07)
    targets, generator = TeacherTargets(dino, ibot), torch.Generator().manual_seed(0)
    terms, _ = student_losses(student.train(), seen, targets, asked, generator=generator)
    return {name: term.item() for name, term in terms.items()}


@pytest.mark.parametrize("distilled", [False, True])
def test_a_distilled_student_is_not_masked(distilled: bool) -> None:
    """The mask token does nothing there, and iBOT still compares the patches that the masks choose."""
    asked = config(distill_from="a teacher" if distilled else "")
    student, seen = fresh_network(asked), crops(16)
    before = losses(asked, student, seen)
    with torch.no_grad():
        student.backbone.mask_token.add_(3.0)
    assert (losses(asked, student, seen) == before) == distilled
    fewer = replace(seen, predicted=seen.predicted[:6], patch_weights=seen.patch_weights[:6])
    assert losses(asked, student, fewer)["ibot"] != before["ibot"]


def test_what_is_over_of_a_local_crop_is_not_seen() -> None:
    asked = config(crops={"local_px": 20, "drop_local_remainder": True})
    check_numbers(asked, 1)
    student, seen = fresh_network(asked), crops(20)
    whole = replace(seen, local_crops=seen.local_crops[..., :16, :16])  # pyright: ignore[reportOptionalSubscript]
    assert losses(asked, student, seen) == losses(asked, student, whole)
    with pytest.raises(ValueError, match=r"phase pretrain: crops\.local_px=20 is not a multiple of the patch size 8"):
        check_numbers(config(crops={"local_px": 20}), 1)
    with pytest.raises(ValueError, match=r"crops\.local_px=4 is less than a patch of 8"):
        check_numbers(config(crops={"local_px": 4, "drop_local_remainder": True}), 1)


def test_norms_and_key_biases_are_those_of_the_config() -> None:
    """DINOv3's ImageNet recipe has neither the eps nor the masked key bias of its other models."""
    usual, other = config(), config(model={"norm_eps": 1e-6, "mask_key_bias": False})
    networks = [fresh_network(asked) for asked in (usual, other)]
    assert [network.backbone.norm.eps for network in networks] == [1e-5, 1e-6]
    assert [network.backbone.blocks[0].attn.mask_key_bias for network in networks] == [True, False]  # pyright: ignore
