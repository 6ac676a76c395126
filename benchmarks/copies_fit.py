"""Makes curation/ops/copies.npz, the projection of the encoder `copies`: python -m benchmarks.copies_fit

No photograph and no label: pictures of benchmarks/copies_pictures.py, half of them drawings on a ground, seven edits of
each, four light ones (benchmarks/fit_descriptors.py) and three as strong as `crops.edits` of the trainer, and the same
discriminant analysis as fit_descriptors. About 3 minutes on two cores and 3 GiB. The result is committed, because
LAPACK libraries differ in the last digits and an encoder must not.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from benchmarks.copies_pictures import SETS, SIDE_PX, draw
from benchmarks.fit_descriptors import edit_image, fit_projection
from curation.ops import copies, descriptors
from pretrain.data.crops import draw_boxes
from pretrain.data.edits import edit

NUM_IMAGES = 3000  # of each set; no picture that copies_pictures writes for training
FIRST = 1_000_000
NUM_LIGHT, NUM_STRONG = 4, 3
SEED = 5


def strong_edit(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Half of them cut to 25 to 100% of the area, more than half with other colours, and up to two edits."""
    if rng.random() < 0.5:
        top, left, height, width = draw_boxes(SIDE_PX, SIDE_PX, np.array([[0.25, 1.0]]), [3 / 4, 4 / 3], rng)[0]
        image = cv2.resize(image[top : top + height, left : left + width], (SIDE_PX, SIDE_PX))
    if rng.random() < 0.6:
        image = _recolour(rng, image)
    return edit(image, 2, rng)


def _recolour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    bright, contrast = np.exp(rng.normal(0, 0.2, 2))
    saturation = 0.0 if rng.random() < 0.15 else rng.uniform(0.2, 1.6)
    pixels = image.astype(np.float32)
    gray = (pixels @ np.float32([0.299, 0.587, 0.114]))[..., None]
    pixels = (gray + (pixels - gray) * saturation) * bright
    image = ((pixels - 128) * contrast + 128).clip(0, 255).astype(np.uint8)
    if rng.random() < 0.15:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(0, 180)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image


def picture_and_edits(of: str, number: int) -> np.ndarray:
    """Views uint8 [1 + 4 + 3, 128, 128, 3] of a picture of a set and of its edits, the light ones first."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng((SEED, list(SETS).index(of), number))
    original = np.asarray(draw(of, number))
    versions = [original]
    for _ in range(NUM_LIGHT):
        edited = edit_image(rng, original)
        versions.append(edit_image(rng, edited) if rng.random() < 0.25 else edited)
    versions += [strong_edit(rng, original) for _ in range(NUM_STRONG)]
    return np.array([cv2.resize(version, (descriptors.VIEW_PX,) * 2) for version in versions])


def raw_rows(of: str, numbers: range) -> np.ndarray:
    """Raw descriptors float16 [len(numbers), 1 + 4 + 3, RAW_DIM]."""
    return np.array(
        [descriptors.raw_descriptors(picture_and_edits(of, number)).astype(np.float16) for number in numbers]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=copies.STATE_PATH)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    chunks = [(of, range(first, first + 100)) for of in SETS for first in range(FIRST, FIRST + NUM_IMAGES, 100)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        raw = np.concatenate(list(pool.map(raw_rows, *zip(*chunks, strict=True))))
    np.savez(arguments.out, **fit_projection(raw.astype(np.float32), copies.DIM))
    print(f"wrote {arguments.out}: {arguments.out.stat().st_size / 2**10:.0f} KiB from {len(raw)} drawn pictures")


if __name__ == "__main__":
    main()
