"""Section L: how many images a second frozen encoders embed, and the loader delivers with so many workers."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.measure import Setting, memory, milliseconds
from benchmarks.gpu.table import Figures, Part
from benchmarks.gpu.training import image_tar
from pretrain.data.crops import CropsConfig
from pretrain.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.loader import DataConfig, DatasetConfig, LoaderConfig, build_loader
from pretrain.data.masks import MaskConfig
from pretrain.downstream.backbone import ImageSettings
from pretrain.downstream.evals.frozen import Frozen
from pretrain.models.architectures import build

PX = 224
ENCODERS = {"S": ("dinov2_vits14", "vit_small_patch14_dinov2"), "L": ("dinov2_vitl14", "vit_large_patch14_dinov2")}
"""ours, and the same in timm"""
LOADED_S = 3.0


def throughput(at: Setting) -> Iterator[Part]:
    for size, (own, peer) in ENCODERS.items() if at.on_gpu else [("S", ENCODERS["S"])]:
        yield f"ViT-{size}/14, ours", lambda own=own: embedded(at, ours(at, own))
        yield f"ViT-{size}/14, timm", lambda peer=peer: embedded(at, timm(at, peer))
    yield "ViT-S/14, timm, as curation embeds", lambda: curated(at)
    for workers in at.sizes.workers:
        yield f"loader, {workers} workers", partial(loaded, at, workers)


def ours(at: Setting, name: str) -> Callable[[Tensor], Tensor]:
    model = build(name, device=at.device, position_grid=PX // 14).eval()
    frozen = Frozen(tokens=model, image=ImageSettings(px=PX), device=at.device, bfloat16=True)
    return lambda images: frozen.pool(images)[0]


def timm(at: Setting, name: str) -> Callable[[Tensor], Tensor]:
    import timm

    with at.device:
        model = timm.create_model(name, pretrained=False, num_classes=0, img_size=PX).eval()
    return lambda images: _forward(model, images)


@torch.inference_mode()
def _forward(model: nn.Module, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.autocast(images.device.type, torch.bfloat16):
        return model((images.float() / 255 - mean) / std)


def embedded(at: Setting, features: Callable[[Tensor], Tensor]) -> Figures:
    """Of a batch that lies on the device, uint8."""
    images = torch.randint(0, 256, (at.sizes.encoded_images, 3, PX, PX), dtype=torch.uint8, device=at.device)
    found = milliseconds(lambda: features(images), at, budget_s=1.0)
    return {"images_per_s": len(images) / found["ms"] * 1000, **found, **memory(at)}


def curated(at: Setting) -> Figures:
    """Views in the processor's memory to rows in the processor's memory, by `curation.encoders.load`."""
    import timm
    from safetensors.torch import save_file

    from curation.encoders.load import load_encoder

    name, weights = ENCODERS["S"][1], at.work / "timm.safetensors"
    model = timm.create_model(f"{name}.lvd142m", pretrained=False, num_classes=0, img_size=PX)
    with torch.no_grad():  # nothing may be as timm initialises it: that is taken for a tensor the file lacks
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    save_file(model.state_dict(), weights)
    encoder = load_encoder(f"timm:{name}.lvd142m@{weights}", device=at.device.type, image_px=PX)
    views = np.random.default_rng(0).integers(0, 256, (at.sizes.encoded_images, PX, PX, 3), dtype=np.uint8)
    found = milliseconds(lambda: encoder.embed(views), at, budget_s=1.0)
    return {"images_per_s": len(views) / found["ms"] * 1000, **found, **memory(at)}


def loaded(at: Setting, workers: int) -> Figures:
    """Whole batches, tar to crops, after the first; nothing is trained on them."""
    batch = min(at.sizes.resumed_batch, at.sizes.tar_images)
    loader = build_loader(
        DataConfig(datasets={"images": DatasetConfig(shards=str(image_tar(at)))}),
        CropsConfig(),
        MaskConfig(),
        patch_size=16,
        seed=0,
        phase=0,
        start_step=0,
        num_steps=10_000,
        global_batch_size=batch,
        rank=0,
        world_size=1,
        execution=LoaderConfig(num_workers=workers),
    )
    batches = iter(loader)
    for _ in range(max(workers, 1)):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < (LOADED_S if at.on_gpu else LOADED_S / 10):
        next(batches)
        count += 1
    return {"images_per_s": count * batch / (time.perf_counter() - start), "batches": count}
