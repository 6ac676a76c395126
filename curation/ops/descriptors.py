"""The offline encoder's arithmetic (first version)."""

import functools
import hashlib
from pathlib import Path

import cv2
import numpy as np

VIEW_PX = 128
_STATE_PATH = Path(__file__).with_name("descriptors.npz")
_CELLS = 8
_BINS = 9


def _raw_one(view: np.ndarray) -> np.ndarray:
    gray = cv2.resize(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    gx, gy = cv2.Sobel(gray, cv2.CV_32F, 1, 0, ksize=1), cv2.Sobel(gray, cv2.CV_32F, 0, 1, ksize=1)
    position = (np.arctan2(gy, gx) % np.pi) * (_BINS / np.pi)
    lower = np.floor(position).astype(int)
    weight, magnitude = position - lower, np.sqrt(gx * gx + gy * gy)
    maps = np.zeros((64, 64, _BINS), np.float32)
    yy, xx = np.mgrid[:64, :64]
    maps[yy, xx, lower % _BINS] += magnitude * (1 - weight)
    maps[yy, xx, (lower + 1) % _BINS] += magnitude * weight
    cells = cv2.resize(maps, (_CELLS, _CELLS), interpolation=cv2.INTER_AREA)
    blocks = np.stack([cells[:-1, :-1], cells[1:, :-1], cells[:-1, 1:], cells[1:, 1:]], -2)
    blocks = np.minimum(blocks / np.sqrt((blocks**2).sum((-1, -2), keepdims=True) + 0.08), 0.2)
    return (blocks / np.sqrt((blocks**2).sum((-1, -2), keepdims=True) + 1e-3)).ravel()


def raw_descriptors(views: np.ndarray) -> np.ndarray:
    return np.stack([_raw_one(view) for view in views]).astype(np.float32)


def mirror_permutation() -> np.ndarray:
    n = _CELLS - 1
    index = np.arange(n * n * 4 * _BINS).reshape(n, n, 2, 2, _BINS)  # y, x, block x, block y, bin
    return index[:, ::-1, ::-1, :, -np.arange(_BINS) % _BINS].ravel()


@functools.cache
def _state() -> dict[str, np.ndarray]:
    with np.load(_STATE_PATH) as file:
        return {key: file[key].astype(np.float32) for key in file.files}


def mirror_signs() -> np.ndarray:
    return _state()["mirror"]


def fingerprint() -> str:
    return hashlib.sha256(_STATE_PATH.read_bytes()).hexdigest()


def embed(views: np.ndarray) -> np.ndarray:
    state = _state()
    if not len(views):
        return np.zeros((0, len(state["mirror"])), np.float32)
    rows = np.stack([state["projection"] @ (raw - state["mean"]) for raw in raw_descriptors(views)])
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
