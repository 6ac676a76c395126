"""The encoders that need neither weights nor torch."""

from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
from PIL import Image

from curation.encoders.encoder import View, checked, digest
from curation.ops import copies, descriptors


class _Offline(NamedTuple):
    """An offline encoder's arithmetic."""

    embed: Callable[[np.ndarray], np.ndarray]
    dim: int
    mirror: np.ndarray | None
    fingerprint: Callable[[], str]


def _offline(name: str) -> _Offline:
    """Of one of DESCRIPTOR_NAMES."""
    if name == "copies":
        return _Offline(copies.embed, copies.DIM, copies.mirror_signs(), copies.fingerprint)
    if name == "descriptors":
        signs = descriptors.mirror_signs()
        return _Offline(descriptors.embed_copies, descriptors.COPY_DIM, signs, descriptors.fingerprint)
    return _Offline(descriptors.embed_likeness, descriptors.LIKENESS_DIM, None, descriptors.fingerprint)


class DescriptorEncoder:
    """The offline encoders (DESCRIPTOR_NAMES) behind the protocol. Batch size never changes a bit."""

    def __init__(self, name: str) -> None:
        self.name, self.view = name, descriptor_view()
        self._ops = _offline(name)
        self.dim, self.mirror = self._ops.dim, self._ops.mirror

    def fingerprint(self) -> str:
        return digest({"encoder": self.name, "view": asdict(self.view), "state": self._ops.fingerprint()})

    def embed(self, views: np.ndarray) -> np.ndarray:
        return self._ops.embed(checked(views, self.view))


def descriptor_view() -> View:
    px = descriptors.VIEW_PX
    return View(height=px, width=px, resample=int(Image.Resampling.BILINEAR))
