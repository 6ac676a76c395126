"""The encoder learned from drawings: definition, mirror, batches, and fewer false pairs than the descriptors have."""

import numpy as np
import pytest

from curation.encoders.load import load_encoder
from curation.ops import copies, descriptors
from curation.ops.randomness import hash_uint64

PX = descriptors.VIEW_PX


def _views(count: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, uint8 [count, 128, 128, 3]."""
    tiles = hash_uint64(seed, np.arange(count * 8 * 8 * 3)).astype(np.uint8).reshape(count, 8, 8, 3)
    return np.repeat(np.repeat(tiles, PX // 8, axis=1), PX // 8, axis=2)


def test_rows_are_the_signed_roots_of_a_projection() -> None:
    views = _views(5)
    with np.load(copies.STATE_PATH) as file:
        mean, half, mirror = file["mean"], file["half_projection"].astype(np.float64), file["mirror"]
    permutation = descriptors.mirror_permutation()
    left = np.flatnonzero(np.arange(len(permutation)) < permutation)
    raw = descriptors.raw_descriptors(views).astype(np.float64) - mean
    expected = raw[:, left] @ half.T + (raw[:, permutation[left]] @ half.T) * mirror
    expected = np.sign(expected) * np.sqrt(np.abs(expected))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    # A root makes much of what lies near 0: float32 sums of 2,688 terms are within 1e-5, whose root is 3e-3.
    np.testing.assert_allclose(copies.embed(views), expected, atol=3e-3)


def test_a_mirrored_view_has_the_row_times_signs() -> None:
    views, signs = _views(4, seed=1), copies.mirror_signs()
    assert set(signs.tolist()) == {-1.0, 1.0}
    mirrored = copies.embed(np.ascontiguousarray(views[:, :, ::-1]))
    np.testing.assert_allclose((mirrored * copies.embed(views) * signs).sum(axis=1), 1, atol=1e-4)


def test_rows_are_unit_and_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    views = _views(6, seed=2)
    rows = copies.embed(views)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(np.concatenate([copies.embed(view[None]) for view in views]), rows)
    monkeypatch.setattr(descriptors, "_ROWS_PER_BLOCK", 4)
    np.testing.assert_array_equal(copies.embed(views), rows)
    assert copies.embed(views[:0]).shape == (0, copies.DIM)
    grey = np.full((1, PX, PX, 3), 128, np.uint8)
    np.testing.assert_allclose(np.linalg.norm(copies.embed(grey), axis=1), 1, atol=1e-5)


def test_the_encoder_by_its_name() -> None:
    encoder, other = load_encoder("copies"), load_encoder("descriptors")
    views = _views(3, seed=3)
    np.testing.assert_array_equal(encoder.embed(views), copies.embed(views))
    assert encoder.view == other.view  # both in one run decode once
    assert encoder.dim == copies.DIM
    assert encoder.fingerprint() != other.fingerprint()
    np.testing.assert_array_equal(encoder.mirror, copies.mirror_signs())
    with pytest.raises(ValueError, match="128"):
        encoder.embed(np.zeros((1, 64, 64, 3), np.uint8))


def test_drawings_are_told_apart_better_than_by_the_descriptors() -> None:
    """Drawings that neither has seen: the share of other drawings above what nine in ten light edits reach."""
    pytest.importorskip("torch")
    from benchmarks.copies_fit import NUM_LIGHT, picture_and_edits

    views = np.array([picture_and_edits("flat", 2_000_000 + number) for number in range(150)])
    above = {}
    for name, embed in (("copies", copies.embed), ("descriptors", descriptors.embed_copies)):
        rows = embed(views[:, : 1 + NUM_LIGHT].reshape(-1, PX, PX, 3)).reshape(len(views), 1 + NUM_LIGHT, -1)
        own = np.einsum("nd,ned->ne", rows[:, 0], rows[:, 1:])
        others = (rows[:, 0] @ rows[:, 0].T)[~np.eye(len(views), dtype=bool)]
        above[name] = (others >= np.quantile(own, 0.1)).mean()
    assert above["copies"] < above["descriptors"] / 2


@pytest.mark.slow
def test_the_lines_on_real_images(real_data) -> None:
    """What the design's table quotes, as floors: at equal recall, fewer false pairs and more strong edits found."""
    from benchmarks.copies import Pool

    pool = Pool(real_data)
    lines = {}
    for name in ("descriptors", "copies"):
        encoder = load_encoder(name)
        line = pool.lines(name, 0.0, [encoder.embed(part) for part in pool.views], encoder.mirror)[1]
        natural, cartoon = (float(cell.partition("(")[2].rstrip(")")) for cell in line[4:6])
        lines[name] = float(line[3]), natural, cartoon, int(line[6].partition("/")[0])
    recall, natural, cartoon, strong = lines["copies"]
    assert recall >= 0.97
    assert natural >= 0.995
    assert cartoon >= 0.84
    assert strong >= lines["descriptors"][3] + 6
    assert cartoon >= lines["descriptors"][2] + 0.05
