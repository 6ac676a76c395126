"""What an encoder is, and what it is shown."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class View:
    """Image to uint8 array: resize, then a centre crop. Small, picklable, and all that a decode worker needs."""

    height: int
    width: int
    # Short side in pixels before the centre crop; None squashes the whole image to height x width.
    resize_short_px: int | None = None
    resample: int = int(Image.Resampling.BICUBIC)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """[height, width, 3] uint8 of an RGB image; ValueError for any other mode."""
        if image.mode != "RGB":
            raise ValueError(
                f"an encoder's view needs an RGB image, got mode {image.mode!r}; convert it when decoding."
            )
        size = (self.width, self.height)
        box = None
        if self.resize_short_px is not None:
            scale = self.resize_short_px / min(image.size)
            width, height = (max(round(side * scale), self.resize_short_px) for side in image.size)
            left, top = round((width - self.width) / 2), round((height - self.height) / 2)
            image = image.resize((width, height), Image.Resampling(self.resample), reducing_gap=3.0)
            box = (left, top, left + self.width, top + self.height)
            return np.asarray(image.crop(box))
        return np.asarray(image.resize(size, Image.Resampling(self.resample), box=box, reducing_gap=3.0))


class Encoder(Protocol):
    """uint8 views to unit-norm float32 rows."""

    name: str
    view: View
    # Signs [dim] with embed(flip(view)) == embed(view) * mirror, exactly; None where no such signs exist.
    mirror: np.ndarray | None

    @property
    def dim(self) -> int:
        """Width of a row."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of everything that decides the numbers: weights, view, arithmetic. Part of a stage's cache key."""
        ...

    def embed(self, views: np.ndarray) -> np.ndarray:
        """[B, H, W, 3] uint8 to [B, dim] float32, unit norm."""
        ...


def checked(views: np.ndarray, view: View) -> np.ndarray:
    expected = (view.height, view.width, 3)
    if views.dtype != np.uint8 or views.ndim != 4 or views.shape[1:] != expected:
        raise ValueError(
            f"views must be uint8 [B, {view.height}, {view.width}, 3], got {views.dtype} {list(views.shape)}."
        )
    return np.ascontiguousarray(views)


def digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
