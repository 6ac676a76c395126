"""The offline descriptors: closed forms, a slow reference, invariances, and a floor on the copies that they find."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from curation.ops import descriptors
from curation.ops.randomness import hash_uint64

PX = descriptors.VIEW_PX


def _image(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """Hard-edged tiles of random colours under a smooth random shade: edges and ramps, as pictures have."""
    tiles = hash_uint64(seed, np.arange(7 * 9 * 3)).astype(np.uint8).reshape(7, 9, 3)
    shade = hash_uint64(seed + 1000, np.arange(4 * 4 * 3)).astype(np.uint8).reshape(4, 4, 3)
    sharp = Image.fromarray(tiles).resize(size, Image.Resampling.NEAREST)
    return Image.blend(sharp, Image.fromarray(shade).resize(size, Image.Resampling.BICUBIC), 0.5)


def _view(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((PX, PX), Image.Resampling.BILINEAR))


def _slow_histograms(level: np.ndarray, cells: int) -> np.ndarray:
    """The definition: each pixel into each cell by its spline weight, linearly between the two nearest orientations."""
    side, bins = len(level), descriptors.NUM_BINS
    padded = np.pad(level.astype(np.float64), 1, mode="edge")
    gx, gy = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    position = np.arctan2(gy, gx) % (2 * np.pi) * bins / (2 * np.pi)
    distance = np.abs((np.arange(side)[:, None] + 0.5) * cells / side - 0.5 - np.arange(cells))
    inner, outer = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clip(0) ** 3 / 6
    weights = np.where(distance < 1, inner, outer)
    weights /= weights.sum(axis=0)
    out = np.zeros((cells, cells, bins))
    for k in range(bins):
        apart = np.abs(position - k)
        share = (1 - np.minimum(apart, bins - apart)).clip(0)
        out[..., k] = weights.T @ (np.hypot(gx, gy) * share) @ weights
    return out


@pytest.mark.parametrize(("side", "cells"), [(32, 8), (16, 4), (128, 8)])
def test_orientation_histograms_equal_the_definition(side: int, cells: int):
    level = hash_uint64(1, np.arange(side * side)).astype(np.uint8).reshape(side, side).astype(np.float32)
    got = descriptors._orientation_histograms(level, *descriptors._cell_weights(side, cells))
    expected = _slow_histograms(level, cells)
    # The polynomial arc tangent is within 0.003 bins, so 0.3% of the mass may lie one bin off.
    np.testing.assert_allclose(got, expected, atol=0.004 * expected.sum(axis=2).max())


def test_a_ramp_has_one_orientation():
    ramp = np.tile(np.arange(32, dtype=np.float32) * 4, (32, 1))
    for level, bin_ in ((ramp, 0), (ramp.T, 3), (ramp[:, ::-1], 6), (ramp.T[::-1], 9)):
        level = np.ascontiguousarray(level)
        histograms = descriptors._orientation_histograms(level, *descriptors._cell_weights(32, 4))
        assert (histograms.argmax(axis=2) == bin_).all()
        assert histograms.sum() == pytest.approx(histograms[..., bin_].sum())
        assert histograms[1:3, 1:3, bin_] == pytest.approx(8, rel=0.05)  # two pixels apart, four levels each


def test_a_flat_view_gives_finite_unit_rows():
    views = np.stack([np.full((PX, PX, 3), value, np.uint8) for value in (0, 128, 255)])
    for embed in (descriptors.embed_copies, descriptors.embed_likeness):
        np.testing.assert_allclose(np.linalg.norm(embed(views), axis=1), 1, atol=1e-5)


def test_mirroring_permutes_the_raw_descriptor_and_signs_the_rows():
    views = np.stack([_view(_image(seed)) for seed in range(4)])
    mirrored = np.ascontiguousarray(views[:, :, ::-1])
    permutation = descriptors.mirror_permutation()
    np.testing.assert_array_equal(permutation[permutation], np.arange(descriptors.RAW_DIM))
    raw = descriptors.raw_descriptors(views)
    np.testing.assert_allclose(descriptors.raw_descriptors(mirrored), raw[:, permutation], atol=1e-5)
    rows, signs = descriptors.embed_copies(views), descriptors.mirror_signs()
    assert set(signs.tolist()) == {-1.0, 1.0}
    np.testing.assert_allclose(descriptors.embed_copies(mirrored), rows * signs, atol=1e-5)


@pytest.mark.parametrize("embed", [descriptors.embed_copies, descriptors.embed_likeness])
def test_rows_are_unit_and_do_not_depend_on_the_batch(embed):  # type: ignore[no-untyped-def]
    views = np.stack([_view(_image(seed)) for seed in range(6)])
    rows = embed(views)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate([embed(view[None]) for view in views]), rows)
    np.testing.assert_array_equal(embed(views[::-1]), rows[::-1])
    assert embed(views[:0]).shape == (0, rows.shape[1])
    stored = rows.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(stored @ stored.T, rows @ rows.T, atol=1e-3)


def test_blocks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch):
    views = np.stack([_view(_image(seed)) for seed in range(5)])
    rows = descriptors.embed_likeness(views)
    monkeypatch.setattr(descriptors, "_ROWS_PER_BLOCK", 2)
    np.testing.assert_array_equal(descriptors.embed_likeness(views), rows)


def test_edited_copies_are_nearer_than_other_images():
    originals = [_image(seed) for seed in range(40)]
    edits = {
        "crop": lambda image: image.crop((20, 12, 225, 168)),
        "rotate": lambda image: image.rotate(6, Image.Resampling.BICUBIC),
        "dark": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
        "gray": lambda image: image.convert("L").convert("RGB"),
        "stretch": lambda image: image.resize((240, 130)),
        "small": lambda image: image.resize((60, 45)),
    }
    rows = descriptors.embed_copies(np.stack([_view(image) for image in originals]))
    for name, edit in edits.items():
        cosine = descriptors.embed_copies(np.stack([_view(edit(image)) for image in originals])) @ rows.T
        assert (cosine.argmax(axis=1) == np.arange(40)).all(), name
        assert np.diag(cosine).mean() > 0.5 + cosine[~np.eye(40, dtype=bool)].mean(), name


def test_raw_descriptors_refuse_another_size():
    with pytest.raises(ValueError, match="128"):
        descriptors.raw_descriptors(np.zeros((1, 64, 64, 3), np.uint8))


def test_the_fit_separates_even_from_odd_and_images_from_their_edits():
    from benchmarks.fit_descriptors import fit_projection

    base = np.random.default_rng(0).normal(size=(300, 1, descriptors.RAW_DIM)).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=(300, 4, descriptors.RAW_DIM)).astype(np.float32)
    mirror = descriptors.mirror_permutation()
    is_signal = np.isin(np.arange(descriptors.RAW_DIM), [np.arange(10), mirror[:10]])
    # Images differ in ten entries and their mirrored ones, edits in the rest: only directions of the first are of use.
    base[..., ~is_signal] *= 0.01
    noise[..., is_signal] *= 0.01
    state = fit_projection(base + noise, 8)
    left = np.flatnonzero(np.arange(descriptors.RAW_DIM) < mirror)
    weight = np.abs(state["half_projection"].astype(np.float32))
    assert weight[:, is_signal[left]].mean() > 10 * weight[:, ~is_signal[left]].mean()
    assert set(state["mirror"].tolist()) == {-1, 1}


@pytest.mark.slow
def test_copies_found_among_real_images(real_data):  # type: ignore[no-untyped-def]
    """The floor that the offline encoder must beat, at the default threshold, on a third of the real pool's groups."""
    from benchmarks.descriptors import CopyTruth, near_pairs, read_part

    part = read_part(real_data, "pool/pool-*.tar")
    truth = CopyTruth(real_data / "pool/pool_truth.csv", part["keys"])
    kept = hash_uint64(2, truth.cluster) % np.uint64(3) == 0
    rows = descriptors.embed_copies(part["views"])
    rows[~kept] = 0
    i, j, _ = near_pairs(rows, rows * descriptors.mirror_signs(), 0.74)
    assert truth.found(i, j)[truth.is_copy & kept].mean() >= 0.95
    assert truth.precision(i, j) >= 0.98
