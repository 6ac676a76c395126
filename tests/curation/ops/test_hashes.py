"""Perceptual hashes and their near pairs, against brute force."""

import numpy as np
import pytest
from PIL import Image

from curation.ops import hashes
from curation.ops.randomness import hash_uint64


def _image(seed: int, size: tuple[int, int] = (300, 200)) -> Image.Image:
    small = hash_uint64(seed, np.arange(12 * 16 * 3)).astype(np.uint8).reshape(12, 16, 3)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.bitwise_count(a ^ b).sum(axis=-1).astype(np.int64)


def _hashes_with_near_pairs(num: int, seed: int) -> np.ndarray:
    """Random hashes; each later third is the first with 0 to 40 bits flipped."""
    base = np.stack([hash_uint64(seed + k, np.arange(num // 3)) for k in range(4)], axis=1).view(np.uint8)
    parts = [base]
    for copy in (1, 2):
        bits = np.unpackbits(base, axis=1)
        scores = np.stack([hash_uint64(seed + 10 * copy, np.arange(256) + 256 * row) for row in range(len(base))])
        num_flips = (hash_uint64(seed + copy, np.arange(len(base))) % np.uint64(41)).astype(int)
        flip = scores.argsort(axis=1).argsort(axis=1) < num_flips[:, None]
        parts.append(np.packbits(bits ^ flip, axis=1))
    return np.concatenate(parts)


def test_hash_of_an_edited_image_is_near_and_that_of_another_is_far():
    image = _image(1)
    code, quality, mirrored = (
        np.frombuffer(x, np.uint8) if isinstance(x, bytes) else x for x in hashes.perceptual_hash(image)
    )
    assert quality >= hashes.MIN_QUALITY
    resized = np.frombuffer(hashes.perceptual_hash(image.resize((151, 99)))[0], np.uint8)
    other = np.frombuffer(hashes.perceptual_hash(_image(2))[0], np.uint8)
    assert _distance(code, resized) <= 16
    assert _distance(code, other) > 80
    assert _distance(code, mirrored) > 80


def test_mirrored_hash_is_the_hash_of_the_mirrored_pixels():
    pixels = np.asarray(_image(3, (128, 128)))
    code, _, mirrored = hashes.hash_pixels(pixels)
    flipped_code, _, flipped_mirrored = hashes.hash_pixels(pixels[:, ::-1])
    assert (flipped_code, flipped_mirrored) == (mirrored, code)


def test_a_flat_image_has_no_quality():
    assert hashes.perceptual_hash(Image.new("RGB", (64, 48), (200, 10, 10)))[1] < hashes.MIN_QUALITY


def test_equal_groups_labels_with_the_first_row():
    digests = np.array([[3, 1], [0, 0], [3, 1], [0, 1], [0, 0], [3, 1]], np.uint8)
    assert hashes.equal_groups(digests).tolist() == [0, 1, 0, 3, 1, 0]
    assert hashes.equal_groups(np.zeros((0, 32), np.uint8)).tolist() == []


def test_equal_groups_compares_every_byte():
    digests = np.zeros((65, 32), np.uint8)
    digests[np.arange(32), np.arange(32)] = 1
    digests[32 + np.arange(32), np.arange(32)] = 1
    assert hashes.equal_groups(digests).tolist() == [*range(32), *range(32), 64]


@pytest.mark.parametrize("max_distance", [0, 7, 15, 16, 31])
@pytest.mark.parametrize("with_mirror", [False, True])
def test_pairs_equal_brute_force(max_distance: int, with_mirror: bool):
    codes = _hashes_with_near_pairs(600, seed=5)
    # Mirrored hashes that link other rows than the hashes do.
    mirrored = np.roll(codes, 7, axis=0) if with_mirror else None
    quality = (hash_uint64(9, np.arange(len(codes))) % np.uint64(101)).astype(int)
    got = set(zip(*(a.tolist() for a in hashes.hash_pairs(codes, quality, max_distance, mirrored)), strict=True))

    i, j = np.triu_indices(len(codes), 1)
    distance = _distance(codes[i], codes[j])
    if mirrored is not None:
        distance = np.minimum(distance, _distance(codes[i], mirrored[j]))
        distance = np.minimum(distance, _distance(mirrored[i], codes[j]))
    near = (distance <= max_distance) & (quality[i] >= 50) & (quality[j] >= 50)
    expected = set(zip(i[near].tolist(), j[near].tolist(), distance[near].tolist(), strict=True))
    assert got == expected
    assert expected or max_distance < 7


def test_equal_hashes_give_a_star_and_not_a_clique():
    codes = np.concatenate([np.repeat(_hashes_with_near_pairs(3, 1)[:1], 5000, axis=0), _hashes_with_near_pairs(30, 2)])
    i, j, distance = hashes.hash_pairs(codes, np.full(len(codes), 100), 0)
    star = (i == 0) & (j < 5000)
    assert star.sum() == 4999
    assert (distance[star] == 0).all()


def test_pairs_outgrow_the_buffer(monkeypatch: pytest.MonkeyPatch):
    codes = _hashes_with_near_pairs(600, seed=3)
    full = hashes.hash_pairs(codes, np.full(len(codes), 100), 31)
    monkeypatch.setattr(hashes, "_BUFFER_ROWS", 1)
    small = hashes.hash_pairs(codes, np.full(len(codes), 100), 31)
    assert all((a == b).all() for a, b in zip(full, small, strict=True))


@pytest.mark.parametrize("max_distance", [-1, 32])
def test_a_distance_that_would_not_be_exact_is_refused(max_distance: int):
    with pytest.raises(ValueError, match="max_distance"):
        hashes.hash_pairs(np.zeros((2, 32), np.uint8), np.full(2, 100), max_distance)


@pytest.mark.parametrize("max_distance", [7, 31])
def test_matches_of_two_sets_equal_brute_force(max_distance: int):
    codes = _hashes_with_near_pairs(600, seed=7)
    queries, rows = codes[:250], codes[150:]  # a hundred rows are in both sets
    mirrored = np.roll(queries, 3, axis=0)
    quality = (hash_uint64(11, np.arange(len(codes))) % np.uint64(101)).astype(int)
    query_quality, row_quality = quality[:250], quality[150:]
    found = hashes.hash_matches(queries, query_quality, rows, row_quality, max_distance, mirrored)
    got = set(zip(*(column.tolist() for column in found), strict=True))

    distance = _distance(queries[:, None], rows[None])
    distance = np.minimum(distance, _distance(mirrored[:, None], rows[None]))
    near = (distance <= max_distance) & (query_quality >= 50)[:, None] & (row_quality >= 50)
    query, row = np.nonzero(near)
    assert got == set(zip(query.tolist(), row.tolist(), distance[near].tolist(), strict=True))
    assert len(got) > 0


def test_distances_of_rows():
    a = np.array([[0b1011, 0], [255, 255]], np.uint8)
    assert hashes.hash_distances(a, np.zeros_like(a)).tolist() == [3, 16]
