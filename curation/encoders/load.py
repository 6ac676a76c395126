"""Images to unit-norm vectors: one protocol for the offline descriptors, timm, Hugging Face and TorchScript models.

A view (CPU, in the decode worker) makes each image a fixed uint8 array; `embed` turns a batch of views into rows.
The two halves travel apart: `encoder_view(spec)` is a few numbers that pickle, and never loads weights or imports torch
beyond what reading the model's configuration needs.

Spec strings:
    descriptors                 copy detection offline, weight-free (curation.ops.descriptors); needs no torch
    descriptors-likeness        retrieval offline, likewise; with "descriptors" it shares the view
    copies                      copy detection offline, learned from drawings too (curation.ops.copies); the same view
    NAME or timm:NAME           pretrained timm model, from the Hugging Face cache or hub
    timm:NAME@/path/file        the same architecture with local weights (.safetensors, or a .pth read weights-only)
    sscd:/path/file.pt          TorchScript copy-detection model (SSCD, arXiv:2202.10261), 320 px skewed
    hf:/folder                  Dinov2, Dinov2WithRegisters or DINOv3ViT folder of transformers; exported teachers too
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from curation.encoders.encoder import Encoder, View, checked, digest
from curation.encoders.offline import DescriptorEncoder, descriptor_view
from curation.encoders.weights import (
    DESCRIPTOR_NAMES,
    OFFLINE_CHOICES,
    file_sha256,
    find_hub_weights,
    hf_weights,
    require_timm_name,
    require_weights_file,
)

if TYPE_CHECKING:
    import torch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# A pretraining resolution above this (518 for DINOv2) costs five times the FLOPs of the 224 at which the published
# retrieval features are computed.
MAX_DEFAULT_PX = 256
# Seed of the untrained model that loaded weights are told from; one that nobody's own tiny test model starts from.
_FRESH_SEED = 0x5EEDBED
_RESAMPLING = {name.lower(): value for name, value in Image.Resampling.__members__.items()}


def encoder_view(spec: str, image_px: int | None = None) -> View:
    """The view of `load_encoder(spec, image_px=image_px)`, without its weights: for decode workers."""
    kind, name, path = parse_spec(spec)
    if kind == "descriptors":
        return descriptor_view()
    if kind == "sscd":
        px = image_px or 320  # SSCD's own second protocol: the whole image skewed to 320 x 320
        return View(height=px, width=px, resample=int(Image.Resampling.BILINEAR))
    if kind == "hf":
        return _hf_view(Path(path), image_px)
    return _timm_view(name, image_px)


def load_encoder(
    spec: str, device: str | None = None, image_px: int | None = None, precision: str | None = None
) -> Encoder:
    """The encoder that a spec string names (module docstring); weights are found now and loaded at the first embed.

    The returned object pickles without its weights, so it may be made on the driver and sent to actors.

    Args:
        spec: see the module docstring.
        device: torch device; None takes a GPU where there is one.
        image_px: side of the square input; None takes the model's own, or 224 where that exceeds 256.
        precision: "bfloat16" (autocast) or "float32"; None takes bfloat16 where the device has it natively.

    Raises:
        ValueError: unknown name, missing or unsafe weights file, no network and nothing cached.
    """
    if precision not in (None, "bfloat16", "float32"):
        raise ValueError(f"precision={precision!r} is unknown; choose bfloat16, float32 or None (what the device has).")
    kind, name, path = parse_spec(spec)
    if kind == "descriptors":
        return DescriptorEncoder(name)
    _require_torch(spec)
    if kind == "timm":
        require_timm_name(name)
        path = path or find_hub_weights(name)
    elif kind == "hf":
        path = str(hf_weights(Path(path)))
    require_weights_file(path, (".pt", ".pth", ".bin") if kind != "hf" else ())
    view = encoder_view(spec, image_px)
    return TorchEncoder(spec=spec, view=view, weights=path, device=device, precision=precision)


def parse_spec(spec: str) -> tuple[str, str, str]:
    """(kind, model name, path) of a spec string; name or path is empty where the kind has none."""
    kind, _, rest = spec.partition(":")
    if spec in DESCRIPTOR_NAMES:
        return "descriptors", spec, ""
    if kind in ("sscd", "hf") and rest:
        return kind, "", os.path.expanduser(rest)
    if kind == "timm" and rest:
        name, _, path = rest.partition("@")
        return "timm", name, os.path.expanduser(path)
    if ":" not in spec and spec:
        return "timm", spec, ""
    raise ValueError(f"encoder {spec!r} is not a known kind; use a timm name, {OFFLINE_CHOICES}.")


class TorchEncoder:
    """A frozen torch model behind the protocol; the model is built once, at the first embed, and never pickled.

    Several threads may embed at once: an actor's concurrent calls share the one model on its device.

    A row depends on its batch's size through the choice of matrix kernels only: by about 1e-6 in float32 and 1e-2 in
    bfloat16 (cosine to itself 0.9999), below the steps of float16 storage in the first case. Whoever promises equal
    bytes for any number of workers keeps batches inside one part.
    """

    mirror: np.ndarray | None = None

    def __init__(self, *, spec: str, view: View, weights: str, device: str | None, precision: str | None) -> None:
        self.name = spec
        self.view = view
        self.weights = weights
        self.device = device
        self.precision = precision
        self._dim: int | None = None
        self._loaded: tuple[torch.nn.Module, torch.device, bool] | None = None
        self._loading = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_loaded", "_loading")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_loaded": None, "_loading": threading.Lock()}

    @property
    def dim(self) -> int:
        """Found by embedding one grey view, once: it loads the model."""
        dim = self._dim or self.embed(np.full((1, self.view.height, self.view.width, 3), 128, np.uint8)).shape[1]
        self._dim = dim
        return dim

    def fingerprint(self) -> str:
        """Device and precision are left out: they change the last digits, not the meaning."""
        kind, name, _ = parse_spec(self.name)
        return digest(
            {"kind": kind, "name": name, "view": asdict(self.view), "mean_std": self._mean_std()}
            | {"weights": file_sha256(self.weights)}
        )

    def embed(self, views: np.ndarray) -> np.ndarray:
        import torch

        views = checked(views, self.view)
        model, device, bfloat16 = self._model()
        mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in self._mean_std())
        pixels = torch.from_numpy(views).to(device, non_blocking=True).permute(0, 3, 1, 2).float()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            features = model((pixels / 255 - mean) / std)
            if not isinstance(features, torch.Tensor):  # transformers' output object
                features = features.last_hidden_state[:, 0]
        rows = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
        if not np.isfinite(rows).all():
            raise ValueError(f"encoder {self.name!r} gave non-finite values; its weights ({self.weights}) are damaged.")
        return rows

    def _model(self) -> tuple[torch.nn.Module, torch.device, bool]:
        """The model, its device, and whether it computes in bfloat16."""
        import torch

        with self._loading:  # or each of an actor's threads would build one, on one GPU
            if self._loaded is None:
                device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
                bfloat16 = self.precision == "bfloat16" or (self.precision is None and has_fast_bfloat16(device))
                self._loaded = _build(self.name, self.view, self.weights).eval().to(device), device, bfloat16
            return self._loaded

    def _mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        kind, name, path = parse_spec(self.name)
        if kind == "timm":
            config = _timm_config(name)
            return tuple(config["mean"]), tuple(config["std"])
        if kind == "hf":
            config = _hf_preprocessor(Path(path))
            return tuple(config.get("image_mean", IMAGENET_MEAN)), tuple(config.get("image_std", IMAGENET_STD))
        return IMAGENET_MEAN, IMAGENET_STD


def _build(spec: str, view: View, weights: str) -> torch.nn.Module:
    """The float32 model on the CPU: normalised pixels [B, 3, H, W] to features, or to transformers' output object."""
    try:
        return _read_model(spec, view, weights)
    except Exception as error:  # four libraries with a dozen types, which all mean that the file does not fit
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"encoder {spec!r}: {weights} does not load as its weights: {reason}") from error


def _read_model(spec: str, view: View, weights: str) -> torch.nn.Module:
    import torch

    kind, name, path = parse_spec(spec)
    if kind == "sscd":
        return torch.jit.load(weights, map_location="cpu")
    if kind == "timm":
        import timm

        # timm resizes the position embedding while loading, where the architecture takes an image size. Without a
        # classifier it also takes a file that lacks tensors, or is another model's: what stayed random shows that.
        options = {"num_classes": 0} | _timm_size(name, view)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_FRESH_SEED)
            random = timm.create_model(name, pretrained=False, **options).state_dict()
            torch.manual_seed(_FRESH_SEED)
            model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": weights}, **options)
        lacking = [
            key
            for key, value in model.state_dict().items()
            if torch.equal(value, random[key]) and value.float().flatten().ne(value.flatten()[:1]).any()
        ]
        if lacking:
            raise ValueError(f"the file lacks {', '.join(lacking[:4])}")
        return model
    from transformers import AutoModel

    model, lacking = read_transformers(AutoModel, path)
    if lacking:
        raise ValueError(f"the file lacks {', '.join(lacking[:4])}")
    return model


def read_transformers(auto: Any, folder: str) -> tuple[Any, list[str]]:
    """A model of `transformers` in float32 from its folder alone, and the weights that the folder lacks, sorted: it
    would fill them with random numbers and a warning."""
    import torch

    model, report = auto.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        output_loading_info=True,
    )
    return model, sorted(report["missing_keys"])


def _timm_config(name: str) -> dict[str, Any]:
    import timm
    from timm.data.config import resolve_data_config

    config = timm.get_pretrained_cfg(name)
    return resolve_data_config(pretrained_cfg=config.to_dict() if config else {})


def _timm_view(name: str, image_px: int | None) -> View:
    _require_torch(name)
    require_timm_name(name)
    config = _timm_config(name)
    px = image_px or min(config["input_size"][1], config["input_size"][2])
    if image_px is None and px > MAX_DEFAULT_PX:
        px = 224
    short_px = int(np.floor(px / config["crop_pct"]))
    resample = _RESAMPLING.get(config["interpolation"], Image.Resampling.BICUBIC)
    return View(height=px, width=px, resize_short_px=short_px, resample=int(resample))


def _timm_size(name: str, view: View) -> dict[str, int]:
    """{"img_size": px} for architectures with a fixed input size, which would refuse another; {} for the rest."""
    import timm

    return {"img_size": view.height} if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False) else {}


def _hf_preprocessor(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "preprocessor_config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"hf:{folder} has no readable preprocessor_config.json (image size, mean and std): {error}"
        ) from error


def _hf_view(folder: Path, image_px: int | None) -> View:
    config = _hf_preprocessor(folder)
    size, crop = config.get("size") or {}, config.get("crop_size") or {}
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    short_px = size.get("shortest_edge")
    own = (crop if config.get("do_center_crop", bool(crop)) else None) or size
    height = own.get("height") or own.get("shortest_edge") or 224
    width = own.get("width") or height
    if image_px is not None:
        short_px = short_px and round(image_px * short_px / min(height, width))
        height = width = image_px
    resample = config.get("resample", int(Image.Resampling.BICUBIC))
    return View(height=height, width=width, resize_short_px=short_px, resample=resample)


def _require_torch(spec: str) -> None:
    try:
        import timm  # noqa: F401  asked for, not used
        import torch  # noqa: F401  as well
    except ImportError as error:
        raise ValueError(
            f"encoder {spec!r} needs torch and timm ({error}); install seedbed[encoders], or use 'descriptors'."
        ) from error


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 natively; then models run in it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Without these instructions bfloat16 on a CPU is emulated, and slower than float32.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)
