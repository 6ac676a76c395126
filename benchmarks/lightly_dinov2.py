"""The peer: DINOv2 as lightly's example trains it (lightly 1.6, examples/pytorch/dinov2.py), with our config's numbers.

Theirs: networks (timm's ViT in MaskedVisionTransformerTIMM, DINOv2ProjectionHead), the three losses with softmax
centring, block masks, DINOTransform, the schedules and update_momentum. From the config: every size, probability,
weight, rate and length. Where the example has no such thing (warm-up of the learning rate, clipping, layer-wise decay,
prototypes that first keep still), lightly's ImageNet benchmark (benchmarks/imagenet/vitb16/dinov2.py) has it, and it
is done as there: one norm over all parameters is clipped, for instance.

The networks start from the weights that ours start from, teacher equal to student. `example=True` does what else the
example does: one head for both losses, a teacher's head drawn apart from the student's, Xavier weights, drop path 0.1.
"""

from collections.abc import Sequence
from importlib.metadata import version

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import random_block_mask, update_drop_path_rate, update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.utils.scheduler import cosine_schedule, cosine_warmup_schedule, linear_warmup_schedule
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pretrain.config import HeadConfig, TrainConfig
from pretrain.models.architectures import architecture
from pretrain.optim.param_groups import param_groups
from pretrain.optim.schedules import scaled_lr
from pretrain.phase import fresh_network

EXAMPLE_DROP_PATH = 0.1


class LightlyDinov2:
    """Student, teacher, losses and optimizer; `step` trains on one batch.

    Raises:
        ValueError: an architecture that the example's ViT has no counterpart of.
    """

    def __init__(self, config: TrainConfig, example: bool = False) -> None:
        self.config = config
        model = architecture(config.model.architecture, **config.model.changes())
        differing = [f"ffn={model['ffn']}"] if model.get("ffn", "mlp") != "mlp" else []
        differing += [f"position={model['position']}"] if model["position"] != "learned" else []
        differing += ["registers"] if model.get("num_registers", 0) else []
        if differing:
            raise ValueError(f"lightly's example has a plain DINOv2 ViT, and model has {', '.join(differing)}.")
        tied = example or config.heads.tied
        student, teacher = network(config, tied, own_weights=example), network(config, tied, own_weights=example)
        if example:
            self.backbone(teacher).load_state_dict(self.backbone(student).state_dict())
        else:
            teacher.load_state_dict(student.state_dict())
        self.student, self.teacher = student.train(), teacher.requires_grad_(False).eval()
        drop_path = EXAMPLE_DROP_PATH if example else config.model.drop_path
        if drop_path:
            update_drop_path_rate(self.backbone(student).vit, drop_path, mode="uniform")
        momentum = config.loss.center_momentum
        ibot_prototypes = (config.heads.dino if tied else config.heads.ibot).num_prototypes
        self.dino = DINOLoss(config.heads.dino.num_prototypes, center_momentum=momentum)
        self.ibot = IBOTPatchLoss(ibot_prototypes, center_momentum=momentum)
        self.koleo = KoLeoLoss()
        self.ibot_head = "dino_head" if tied else "ibot_head"
        optim = config.optim
        groups = param_groups(
            student.named_parameters(), model["depth"], optim.layerwise_decay, optim.patch_embed_lr_multiplier
        )
        self.optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2))

    @staticmethod
    def backbone(network: nn.ModuleDict) -> MaskedVisionTransformerTIMM:
        module = network["backbone"]
        assert isinstance(module, MaskedVisionTransformerTIMM)
        return module

    def step(
        self, views: Sequence[Tensor], block_mask: Tensor, step: int, num_steps: int, autocast: bool = False
    ) -> float:
        """One optimizer step; returns the loss.

        Args:
            views: normalised crops [B, 3, H, W], the two global ones first.
            block_mask: bool [2 B, h, w] of the global crops.
            step: steps done before, of num_steps.
            autocast: bfloat16 for the networks; the losses stay float32.
        """
        config, temperature = self.config, self.teacher_temperature(step)
        global_views = torch.cat(list(views[:2]))
        mask = torch.cat([block_mask.new_zeros(len(block_mask), 1), block_mask.flatten(1)], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                features = self.backbone(self.teacher).encode(global_views)
                teacher_cls = self.teacher["dino_head"](features[:, 0])
                teacher_patches = self.teacher[self.ibot_head](features[mask])
            features = self.backbone(self.student).encode(global_views, mask=mask)
            global_cls = features[:, 0]
            student_patches = self.student[self.ibot_head](features[mask])
            student_cls = self.student["dino_head"](global_cls)
            if len(views) > 2:
                local_cls = self.backbone(self.student).encode(torch.cat(list(views[2:])))[:, 0]
                student_cls = torch.cat([student_cls, self.student["dino_head"](local_cls)])
        loss = config.loss.dino_weight * self.dino(
            teacher_out=teacher_cls.float().chunk(2),
            student_out=student_cls.float().chunk(len(views)),
            teacher_temp=temperature,
        )
        loss = loss + config.loss.ibot_weight * self.ibot(
            teacher_out=teacher_patches.float(),
            student_out=student_patches.float(),
            mask=block_mask,
            teacher_temp=temperature,
        )
        loss = loss + config.loss.koleo_weight * torch.stack([self.koleo(x.float()) for x in global_cls.chunk(2)]).sum()
        loss.backward()
        self.schedule(step, num_steps)
        if config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self.student.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        momentum = cosine_schedule(step, num_steps, config.optim.teacher_momentum, config.optim.teacher_momentum_end)
        update_momentum(self.student, self.teacher, m=momentum)
        return loss.item()

    def teacher_temperature(self, step: int) -> float:
        optim = self.config.optim
        return linear_warmup_schedule(
            step, optim.teacher_temperature_warmup_steps, optim.teacher_temperature, optim.teacher_temperature_end
        )

    def schedule(self, step: int, num_steps: int) -> None:
        """Learning rates and weight decay of this step."""
        optim = self.config.optim
        lr = cosine_warmup_schedule(
            step,
            num_steps,
            start_value=scaled_lr(optim.base_lr, self.config.global_batch_size, optim.lr_rule),
            end_value=optim.min_lr,
            warmup_steps=optim.warmup_steps,
            warmup_start_value=0.0,
        )
        decay = cosine_schedule(step, num_steps, optim.weight_decay, optim.weight_decay_end)
        for group in self.optimizer.param_groups:
            still = group["part"] == "last_layer" and step < optim.freeze_last_layer_steps
            group["lr"] = 0.0 if still else lr * group["lr_multiplier"]
            group["weight_decay"] = decay * group["wd_multiplier"]

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """CLS tokens [B, D] of the teacher, for normalised images [B, 3, H, W]."""
        return self.backbone(self.teacher).encode(images)[:, 0]


def network(config: TrainConfig, tied: bool, own_weights: bool) -> nn.ModuleDict:
    modules = nn.ModuleDict({"backbone": backbone(config, own_weights)})
    dim = modules["backbone"].vit.embed_dim
    modules["dino_head"] = head(dim, config.heads.dino)
    if not tied:
        modules["ibot_head"] = head(dim, config.heads.ibot)
    return modules


def backbone(config: TrainConfig, own_weights: bool) -> MaskedVisionTransformerTIMM:
    """timm's ViT of the config's sizes, with the weights that ours starts from (DINOv2's names are timm's)."""
    model = architecture(config.model.architecture, **config.model.changes())
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
    if not own_weights:
        state = fresh_network(config).backbone.state_dict()
        mask_token = state.pop("mask_token")
        vit.load_state_dict(state)
        masked.mask_token.data.copy_(mask_token)
    return masked


def head(in_dim: int, config: HeadConfig) -> DINOv2ProjectionHead:
    if config.num_layers != 3 or not config.weight_norm:
        raise ValueError("lightly's DINOv2 head has three layers and weight-normed prototypes; set heads.* to that.")
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


def transform(config: TrainConfig) -> DINOTransform:
    """A Pillow image -> list of 2 + L normalised crops [3, H, W], by torchvision on Pillow images."""
    crops = config.crops
    probabilities = crops.blur_probabilities()
    local_blur = float(probabilities[2]) if crops.num_local_crops else 0.0
    # The second global crop takes no cj_strength: it keeps the default 0.5, so all get that and twice the ranges.
    return DINOTransform(
        global_crop_size=crops.global_px,
        global_crop_scale=(crops.global_scale[0], crops.global_scale[1]),
        local_crop_size=crops.local_px,
        local_crop_scale=(crops.local_scale[0], crops.local_scale[1]),
        n_local_views=crops.num_local_crops,
        hf_prob=crops.flip_probability,
        cj_prob=crops.jitter_probability,
        cj_strength=0.5,
        cj_bright=2 * crops.brightness,
        cj_contrast=2 * crops.contrast,
        cj_sat=2 * crops.saturation,
        cj_hue=2 * crops.hue,
        random_gray_scale=crops.gray_probability,
        gaussian_blur=(float(probabilities[0]), float(probabilities[1]), local_blur),
        sigmas=(crops.blur_sigma[0], crops.blur_sigma[1]),
        solarization_prob=crops.global_solarize_probability[1],
    )


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("lightly", "timm", "torch"))
