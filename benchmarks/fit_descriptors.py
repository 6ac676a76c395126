"""Makes curation/ops/descriptors.npz, the offline encoder's fixed projection: python -m benchmarks.fit_descriptors

No photograph and no label: procedural images (dead leaves with 1/f texture, A. Lee, D. Mumford, J. Huang, IJCV 2001),
six random edits of each, and linear discriminant analysis of their raw descriptors. About 2 minutes on two cores and
2 GiB. The result is committed, because LAPACK libraries differ in the last digits and an encoder must not.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import scipy.linalg

from curation.ops import descriptors

NUM_IMAGES = 4000
NUM_EDITS = 6
SEED = 7
DIM = 256
# Share of the mean within-image variance added to every direction: four thousand images leave the smallest ones noisy.
SHRINKAGE = 0.1
_SIDE_PX = 192
_TEXTURE_PX = 256


def textures(count: int = 64) -> np.ndarray:
    """Gaussian fields [count, 256, 256] float32 of unit variance, spectra 1/f^0.7 to 1/f^1.6, stretched and turned."""
    rng = np.random.default_rng(SEED)
    fy, fx = np.fft.fftfreq(_TEXTURE_PX)[:, None], np.fft.rfftfreq(_TEXTURE_PX)[None]
    fields = []
    for _ in range(count):
        exponent, stretch, turn = rng.uniform(0.7, 1.6), np.exp(rng.normal(0, 0.35)), rng.uniform(0, np.pi)
        u = (fx * np.cos(turn) + fy * np.sin(turn)) * stretch
        v = (fy * np.cos(turn) - fx * np.sin(turn)) / stretch
        frequency = np.hypot(u, v)
        frequency[0, 0] = 1
        spectrum = rng.normal(size=(2, *frequency.shape)) / frequency**exponent
        field = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], s=(_TEXTURE_PX, _TEXTURE_PX))
        fields.append((field - field.mean()) / field.std())
    return np.array(fields, np.float32)


def draw_image(rng: np.random.Generator, bank: np.ndarray) -> np.ndarray:
    """One procedural image, uint8 [192, 192, 3]: a shaded ground and 3 to 120 shaded, textured leaves over it."""
    side = _SIDE_PX
    yy, xx = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
    light = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(light) * xx + np.sin(light) * yy)[..., None]
    ramp = (slope + 0.5).clip(0, 1) if rng.random() < 0.6 else np.zeros_like(slope)
    image = _colour(rng) * (1 - ramp) + _colour(rng) * ramp
    image += _patch(rng, bank, side, side)[..., None] * rng.exponential(14)
    count = int(np.exp(rng.uniform(np.log(3), np.log(120))))
    smallest, largest = rng.uniform(3, 10), rng.uniform(30, 110)
    # Radii of density r^-3: the law under which a picture looks the same at any magnification.
    radii = (smallest**-2 + (largest**-2 - smallest**-2) * rng.random(count)) ** -0.5
    if rng.random() < 0.5:
        radii = np.sort(radii)[::-1]
    is_centred, centre, kind = rng.random() < 0.5, rng.uniform(0.35, 0.65, 2) * side, rng.integers(4)
    for radius in radii:
        x, y = rng.normal(centre, side * 0.22) if is_centred else rng.uniform(-0.1, 1.1, 2) * side
        mask = _leaf(rng, kind if kind < 3 else rng.integers(3), x, y, radius)
        left, top, width, height = cv2.boundingRect(mask)
        if not width:
            continue
        box = np.s_[top : top + height, left : left + width]
        cover = mask[box][..., None].astype(np.float32) / 255
        texture = _patch(rng, bank, height, width)[..., None] * rng.exponential(12)
        image[box] = image[box] * (1 - cover) + cover * (_colour(rng) + texture + slope[box] * rng.normal(0, 80))
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 2))
    return image.clip(0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A colour of any luma and modest chroma, float32 [3]; it may leave 0..255."""
    luma, (cb, cr) = rng.uniform(20, 235), rng.normal(0, 22, 2)
    return np.array([luma + 1.4 * cr, luma - 0.35 * cb - 0.7 * cr, luma + 1.77 * cb], np.float32)


def _patch(rng: np.random.Generator, bank: np.ndarray, height: int, width: int) -> np.ndarray:
    field = bank[rng.integers(len(bank))]
    top, left = rng.integers(0, _TEXTURE_PX - height + 1), rng.integers(0, _TEXTURE_PX - width + 1)
    return field[top : top + height, left : left + width][:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]


def _leaf(rng: np.random.Generator, kind: int, x: float, y: float, radius: float) -> np.ndarray:
    """Coverage mask uint8 of an ellipse (0), a polygon (1) or a box near the axes, as made things are (2)."""
    mask = np.zeros((_SIDE_PX, _SIDE_PX), np.uint8)
    if kind == 0:
        axes = (2 * radius, 2 * radius * rng.uniform(0.3, 1))
        cv2.ellipse(mask, ((x, y), axes, rng.uniform(0, 180)), 255, -1, cv2.LINE_AA)
        return mask
    if kind == 1:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
        lengths = radius * rng.uniform(0.5, 1.3, len(angles))
        corners = np.stack([x + lengths * np.cos(angles), y + lengths * np.sin(angles)], axis=1)
    else:
        sides = (2 * radius, 2 * radius * np.exp(rng.normal(-0.5, 0.7)))
        corners = cv2.boxPoints(((x, y), sides, rng.normal(0, 6) + rng.choice((0, 90))))
    cv2.fillPoly(mask, [corners.astype(np.int32)], 255, cv2.LINE_AA)
    return mask


def edit_image(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """One random edit such as web copies show; crops keep 45 to 95% of the area, turns stay within 14 degrees."""
    side = image.shape[0]
    kind = rng.choice(["crop", "rotate", "border", "colour", "gray", "blur", "noise", "text", "jpeg"])
    if kind == "crop":
        share, aspect = np.sqrt(rng.uniform(0.45, 0.95)), np.exp(rng.normal(0, 0.06))
        height, width = int(side * min(share * aspect, 1)), int(side * min(share / aspect, 1))
        top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
        return cv2.resize(image[top : top + height, left : left + width], (side, side), interpolation=cv2.INTER_AREA)
    if kind == "rotate":
        degrees = rng.uniform(-14, 14)
        # Half of them zoomed until no corner shows.
        zoom = rng.choice((1.0, abs(np.cos(np.radians(degrees))) + abs(np.sin(np.radians(degrees)))))
        matrix = cv2.getRotationMatrix2D((side / 2, side / 2), degrees, zoom)
        mode = cv2.BORDER_CONSTANT if rng.random() < 0.6 else cv2.BORDER_REFLECT
        return cv2.warpAffine(image, matrix, (side, side), borderMode=mode, borderValue=[int(rng.choice((0, 255)))] * 3)
    if kind == "border":
        y, x = ((side * rng.uniform(0.02, 0.2, 2)) * ((1, 1), (1, 0), (0, 1), (1, 1))[rng.integers(4)]).astype(int)
        value = ([0] * 3, [255] * 3, rng.integers(0, 256, 3).tolist())[rng.integers(3)]
        framed = cv2.copyMakeBorder(image, y, y, x, x, cv2.BORDER_CONSTANT, value=value)
        return cv2.resize(framed, (side, side), interpolation=cv2.INTER_AREA)
    if kind == "colour":
        bright, contrast = rng.uniform(0.7, 1.3, 2)
        shifted = (image.astype(np.float32) * bright - 128) * contrast + 128 + rng.normal(0, 8, 3)
        return shifted.clip(0, 255).astype(np.uint8)
    if kind == "gray":
        return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if kind == "blur":
        return cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 3))
    if kind == "noise":
        return (image + rng.normal(0, rng.uniform(5, 18), image.shape)).clip(0, 255).astype(np.uint8)
    if kind == "text":
        text = "".join(map(chr, rng.integers(65, 123, rng.integers(4, 12))))
        origin = (int(rng.uniform(0, 0.4) * side), int(rng.uniform(0.1, 0.98) * side))
        ink, size, weight = [int(rng.choice((0, 255)))] * 3, rng.uniform(0.5, 1.5), int(rng.integers(1, 3))
        return cv2.putText(image.copy(), text, origin, cv2.FONT_HERSHEY_SIMPLEX, size, ink, weight, cv2.LINE_AA)
    small = int(side * rng.uniform(0.25, 1))
    shrunk = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
    code = cv2.imencode(".jpg", shrunk, [cv2.IMWRITE_JPEG_QUALITY, int(rng.uniform(25, 90))])[1]
    return cv2.resize(cv2.imdecode(code, cv2.IMREAD_COLOR), (side, side), interpolation=cv2.INTER_LINEAR)


def image_and_edits(indices: range) -> np.ndarray:
    """Raw descriptors [len(indices), 1 + NUM_EDITS, RAW_DIM] of procedural images and of one or two edits of each."""
    cv2.setNumThreads(1)
    bank, rows = textures(), []
    for index in indices:
        rng = np.random.default_rng((SEED, index))
        original = draw_image(rng, bank)
        versions = [original]
        for _ in range(NUM_EDITS):
            edited = edit_image(rng, original)
            versions.append(edit_image(rng, edited) if rng.random() < 0.25 else edited)
        size = (descriptors.VIEW_PX, descriptors.VIEW_PX)
        views = np.array([cv2.resize(version, size, interpolation=cv2.INTER_AREA) for version in versions])
        rows.append(descriptors.raw_descriptors(views))
    return np.array(rows)


def fit_projection(raw: np.ndarray, dim: int) -> dict[str, np.ndarray]:
    """The `dim` directions of largest between-image to within-image variance, each even or odd under mirroring.

    Mirroring exchanges the raw entries in pairs, none stays: sums and differences of pairs span the even and the odd
    subspace, which are analysed apart. Half of each row therefore says it all, and only that half is stored.
    """
    mirror = descriptors.mirror_permutation()
    left = np.flatnonzero(np.arange(len(mirror)) < mirror)
    mean = raw.mean(axis=(0, 1))
    mean = (mean + mean[mirror]) / 2
    found = []
    for sign in (1, -1):
        part = (raw[..., left] - mean[left] + sign * (raw[..., mirror[left]] - mean[mirror[left]])) / np.sqrt(2)
        centres = part.mean(axis=1, keepdims=True)
        inner = (part - centres).reshape(-1, len(left))
        within = (inner.T @ inner).astype(np.float64) / (len(inner) * (1 - 1 / part.shape[1]))
        between = (centres[:, 0].T @ centres[:, 0]).astype(np.float64) / len(centres)
        within += SHRINKAGE * np.trace(within) / len(within) * np.eye(len(within))
        ratios, directions = scipy.linalg.eigh(between, within, subset_by_index=[len(left) - dim, len(left) - 1])
        # Unit within-image variance, less weight where images hardly differ.
        scaled = directions * np.sqrt(ratios / (ratios + 1)) / np.sqrt(2)
        found += [(ratio, sign, row) for ratio, row in zip(ratios, scaled.T, strict=True)]
    found = sorted(found, key=lambda entry: -entry[0])[:dim]
    return {
        "mean": mean.astype(np.float32),
        "half_projection": np.array([row for _, _, row in found], np.float16),
        "mirror": np.array([sign for _, sign, _ in found], np.int8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=descriptors.STATE_PATH)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    chunks = [range(start, start + 100) for start in range(0, NUM_IMAGES, 100)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        raw = np.concatenate(list(pool.map(image_and_edits, chunks)))
    np.savez(arguments.out, **fit_projection(raw, DIM))
    print(f"wrote {arguments.out}: {arguments.out.stat().st_size / 2**10:.0f} KiB from {len(raw)} procedural images")


if __name__ == "__main__":
    main()
