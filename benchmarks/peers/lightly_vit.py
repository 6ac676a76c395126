"""What lightly's DINO and DINOv2 share (lightly 1.6, examples/pytorch/dino.py and dinov2.py), with our numbers.

Theirs: heads, losses with softmax centring, DINOTransform, the schedules and update_momentum. From the config: every
size, probability, weight, rate and length. Where the examples have no such thing (warm-up of the learning rate,
clipping, layer-wise decay, prototypes that first keep still), lightly's own benchmarks (imagenet/vitb16) have it, and
it is done as there: one norm over all parameters is clipped, for instance.

The backbone starts from the weights that ours starts from, teacher equal to student.
"""

import io
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from lightly.models.utils import update_momentum
from lightly.transforms.dino_transform import DINOTransform
from lightly.utils.scheduler import cosine_schedule, cosine_warmup_schedule, linear_warmup_schedule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from pretrain.config import TrainConfig
from pretrain.data.loader import Steps
from pretrain.models.architectures import architecture
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.optim.param_groups import param_groups
from pretrain.optim.schedules import scaled_lr
from pretrain.phase import fresh_network
from pretrain.settings import HeadConfig


class OurEncoder(nn.Module):
    """Our backbone, called as lightly's MaskedVisionTransformer is."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """CLS and patches [B, 1 + N, D] of images [B, 3, H, W]; mask: bool [B, 1 + N], the first for CLS."""
        masks = None if mask is None else [mask[:, 1:]]
        found = self.vit([images], masks, generator=torch.default_generator)[0]
        return torch.cat([found.cls[:, None], found.patches], dim=1)


def our_encoder(config: TrainConfig) -> nn.Module:
    """Whatever backbone the config asks for, with the weights that it starts from."""
    return OurEncoder(fresh_network(config).backbone)


class LightlyVit(ABC):
    """Student, teacher, losses and optimizer of one of lightly's examples; `step` trains on one batch.

    Args:
        config: of one phase.
        encoder: makes the backbone: ours, or timm's as the examples have it.

    Raises:
        ValueError: heads that the example has no counterpart of.
    """

    def __init__(self, config: TrainConfig, encoder: Callable[[TrainConfig], nn.Module] = our_encoder) -> None:
        self.config = config
        seed_globals(config.seed)
        student, teacher = (self._network(encoder) for _ in range(2))
        teacher.load_state_dict(student.state_dict())
        self.student, self.teacher = student.train(), teacher.requires_grad_(False).eval()
        self.losses = self.build_losses()
        optim, depth = config.optim, architecture(config.model.architecture, **config.model.changes())["depth"]
        groups = param_groups(student.named_parameters(), depth, optim.layerwise_decay, optim.patch_embed_lr_multiplier)
        self.optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2))

    @abstractmethod
    def build_heads(self, in_dim: int) -> dict[str, nn.Module]:
        """By name; each takes tokens [N, in_dim]."""

    @abstractmethod
    def build_losses(self) -> nn.ModuleDict:
        """With the moving centres that they keep."""

    @abstractmethod
    def loss(self, views: Sequence[Tensor], block_mask: Tensor, temperature: float) -> Tensor:
        """Of normalised crops [B, 3, H, W], the two global ones first; the networks' part runs under autocast.

        Args:
            block_mask: bool [2 B, h, w] of the global crops.
            temperature: of the teacher.
        """

    def _network(self, encoder: Callable[[TrainConfig], nn.Module]) -> nn.ModuleDict:
        backbone = encoder(self.config)
        return nn.ModuleDict({"backbone": backbone, **self.build_heads(int(backbone.vit.embed_dim))})

    def step(self, views: Sequence[Tensor], block_mask: Tensor, step: int) -> float:
        """One optimizer step, after `step` others of the phase; returns the loss. Arguments as for `loss`."""
        config = self.config
        loss = self.loss(views, block_mask, self.teacher_temperature(step))
        loss.backward()
        self.schedule(step)
        if config.optim.clip_norm:
            nn.utils.clip_grad_norm_(self.student.parameters(), config.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        optim = config.optim
        momentum = cosine_schedule(step, config.steps, optim.teacher_momentum, optim.teacher_momentum_end)
        update_momentum(self.student, self.teacher, m=momentum)
        return loss.item()

    def autocast(self) -> torch.autocast:
        """The networks in the precision of the config; losses stay float32."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bfloat16")

    def teacher_temperature(self, step: int) -> float:
        optim = self.config.optim
        return linear_warmup_schedule(
            step, optim.teacher_temperature_warmup_steps, optim.teacher_temperature, optim.teacher_temperature_end
        )

    def schedule(self, step: int) -> None:
        """Learning rates and weight decay of this step."""
        optim = self.config.optim
        lr = cosine_warmup_schedule(
            step,
            self.config.steps,
            start_value=scaled_lr(optim.base_lr, self.config.global_batch_size, optim.lr_rule),
            end_value=optim.min_lr,
            warmup_steps=optim.warmup_steps,
            warmup_start_value=0.0,
        )
        decay = cosine_schedule(step, self.config.steps, optim.weight_decay, optim.weight_decay_end)
        for group in self.optimizer.param_groups:
            still = group["part"] == "last_layer" and step < optim.freeze_last_layer_steps
            group["lr"] = 0.0 if still else lr * group["lr_multiplier"]
            group["weight_decay"] = decay * group["wd_multiplier"]

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """CLS tokens [B, D] of the teacher, for normalised images [B, 3, H, W]."""
        return encode(self.teacher, images)[:, 0]

    def state(self) -> dict[str, Any]:
        """All that a later step depends on."""
        parts = {"student": self.student, "teacher": self.teacher, "losses": self.losses, "optimizer": self.optimizer}
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        for name in ("student", "teacher", "losses", "optimizer"):
            getattr(self, name).load_state_dict(state[name])


def encode(network: nn.ModuleDict, images: Tensor, mask: Tensor | None = None) -> Tensor:
    """CLS and patches [B, 1 + N, D], see `OurEncoder`."""
    encoder: Any = network["backbone"]  # pyright takes what a ModuleDict holds for plain modules
    return encoder.encode(images, mask=mask)


def check_head(config: HeadConfig, example: str) -> None:
    """Raises ValueError: a head unlike lightly's."""
    if config.num_layers != 3 or not config.weight_norm or not config.num_prototypes:
        raise ValueError(
            f"lightly's {example} head has three layers and weight-normed prototypes; set heads.* to that, found "
            f"{config}."
        )


def seed_globals(*numbers: int) -> None:
    """lightly draws from all three of the global generators."""
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.manual_seed(int(words[2]))


class Views(Dataset[list[Tensor]]):
    """step -> the images of our loader's batch of that step, through lightly's transform: 2 + L views [B, 3, H, W].

    Random numbers are those of (seed, step), so that any number of workers, and a later start, give the same views.
    """

    def __init__(self, config: TrainConfig, steps: Steps) -> None:
        self.seed, self.steps, self.distort = config.seed, steps, transform(config)

    def __getitem__(self, step: int) -> list[Tensor]:
        seed_globals(self.seed, step)
        datasets, rows = self.steps.order.batch(step)
        readers = self.steps.readers
        contents = [readers[d].read(row) for d, row in zip(datasets.tolist(), rows.tolist(), strict=True)]
        views = [self.distort(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents]
        return [torch.stack(crops) for crops in zip(*views, strict=True)]


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
