"""The peer: DINOv2 as lightly's example trains it (examples/pytorch/dinov2.py): three losses, softmax centring, block
masks. What it takes from our config is said in lightly_vit.py; `timm_encoder` makes the example's own backbone."""

from collections.abc import Sequence

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import random_block_mask, update_drop_path_rate
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.peers.lightly_vit import LightlyVit, check_head, encode
from pretrain.config import TrainConfig
from pretrain.models.architectures import architecture
from pretrain.phase import fresh_network
from pretrain.settings import HeadConfig


class LightlyDinov2(LightlyVit):
    """See `LightlyVit`."""

    def build_heads(self, in_dim: int) -> dict[str, nn.Module]:
        heads: dict[str, nn.Module] = {"dino_head": head(in_dim, self.config.heads.dino)}
        if not self.config.heads.tied:
            heads["ibot_head"] = head(in_dim, self.config.heads.ibot)
        return heads

    def build_losses(self) -> nn.ModuleDict:
        heads, momentum = self.config.heads, self.config.loss.center_momentum
        dino = DINOLoss(heads.dino.num_prototypes, center_momentum=momentum)
        ibot = IBOTPatchLoss((heads.dino if heads.tied else heads.ibot).num_prototypes, center_momentum=momentum)
        return nn.ModuleDict({"dino": dino, "ibot": ibot, "koleo": KoLeoLoss()})

    def loss(self, views: Sequence[Tensor], block_mask: Tensor, temperature: float) -> Tensor:
        student, teacher, losses, weights = self.student, self.teacher, self.losses, self.config.loss
        ibot_head = "dino_head" if self.config.heads.tied else "ibot_head"
        global_views = torch.cat(list(views[:2]))
        mask = torch.cat([block_mask.new_zeros(len(block_mask), 1), block_mask.flatten(1)], dim=1)
        with self.autocast():
            with torch.no_grad():
                features = encode(teacher, global_views)
                teacher_cls = teacher["dino_head"](features[:, 0])
                teacher_patches = teacher[ibot_head](features[mask])
            features = encode(student, global_views, mask=mask)
            global_cls = features[:, 0]
            student_patches = student[ibot_head](features[mask])
            student_cls = student["dino_head"](global_cls)
            if len(views) > 2:
                local_cls = encode(student, torch.cat(list(views[2:])))[:, 0]
                student_cls = torch.cat([student_cls, student["dino_head"](local_cls)])
        total = weights.dino_weight * losses["dino"](
            teacher_out=teacher_cls.float().chunk(2),
            student_out=student_cls.float().chunk(len(views)),
            teacher_temp=temperature,
        )
        if weights.ibot_weight:
            total = total + weights.ibot_weight * losses["ibot"](
                teacher_out=teacher_patches.float(),
                student_out=student_patches.float(),
                mask=block_mask,
                teacher_temp=temperature,
            )
        koleo = torch.stack([losses["koleo"](x.float()) for x in global_cls.chunk(2)]).sum()
        return total + weights.koleo_weight * koleo


def timm_encoder(config: TrainConfig) -> nn.Module:
    """timm's ViT of the config's sizes, with the weights that ours starts from (DINOv2's names are timm's).

    Raises:
        ValueError: an architecture that the example's ViT has no counterpart of.
    """
    model = architecture(config.model.architecture, **config.model.changes())
    plain = {"ffn": "mlp", "position": "learned", "stem": "patches", "num_registers": 0}
    if differing := [f"{name}={model[name]}" for name, value in plain.items() if model.get(name, value) != value]:
        raise ValueError(f"lightly's example has a plain DINOv2 ViT, and model has {', '.join(differing)}.")
    vit = VisionTransformer(
        img_size=model["position_grid"] * model["patch_size"],
        patch_size=model["patch_size"],
        embed_dim=model["embed_dim"],
        depth=model["depth"],
        num_heads=model["num_heads"],
        mlp_ratio=model.get("ffn_ratio", 4.0),
        num_classes=0,
        init_values=model.get("layerscale", 1e-5),
        pos_embed="learn",
        dynamic_img_size=True,
    )
    # The example has antialias=False and keeps timm's own positions.
    masked = MaskedVisionTransformerTIMM(vit, antialias=False, pos_embed_initialization="skip")
    state = fresh_network(config).backbone.state_dict()
    mask_token = state.pop("mask_token")
    vit.load_state_dict(state)
    masked.mask_token.data.copy_(mask_token)
    if config.model.drop_path:
        update_drop_path_rate(vit, config.model.drop_path, mode="uniform")
    return masked


def head(in_dim: int, config: HeadConfig) -> DINOv2ProjectionHead:
    check_head(config, "DINOv2")
    return DINOv2ProjectionHead(in_dim, config.hidden_dim, config.bottleneck_dim, config.num_prototypes)


def draw_masks(config: TrainConfig, num_crops: int) -> Tensor:
    """Block masks, bool [num_crops, h, w], from Python's global random numbers.

    The size of a block has a bound of its own, as in ours: without it lightly refuses grids as small as 4 x 4.
    """
    masks, side = config.masks, config.crops.global_px // config.patch_size
    least, most = masks.ratio
    return random_block_mask(
        size=(num_crops, side, side),
        batch_mask_ratio=masks.probability,
        min_image_mask_ratio=least,
        max_image_mask_ratio=most,
        min_num_masks_per_block=masks.min_patches,
        max_num_masks_per_block=max(masks.min_patches, int(masks.max_share * side * side)),
        min_block_aspect_ratio=masks.aspect,
    )
