"""The edits of copies: one generator, one result; every kind keeps the size and leaves the picture to be known."""

import numpy as np
import pytest
from PIL import Image

from pretrain.data.crops import CropsConfig, multi_crop
from pretrain.data.decode import open_image
from pretrain.data.edits import EDITS, edit
from tests.conftest import encoded, picture


def pixels(seed: int = 0, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return np.asarray(picture(seed, size))


def test_the_generator_alone_decides() -> None:
    image = pixels()
    results = [edit(image, 3, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_from_none_to_the_most_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins that each add a power of ten to every pixel: what was done can be read from the sum."""

    def adding(amount: int):
        return lambda image, rng: Image.fromarray(np.asarray(image) + np.uint8(amount))

    monkeypatch.setattr("pretrain.data.edits.EDITS", tuple(adding(10**power) for power in range(3)))
    found = {int(edit(np.zeros((4, 4, 3), np.uint8), 2, np.random.default_rng(seed))[0, 0, 0]) for seed in range(200)}
    assert found == {0, 1, 10, 100, 11, 101, 110}


@pytest.mark.parametrize("kind", EDITS, ids=lambda kind: kind.__name__)
def test_each_keeps_the_size_and_changes_the_picture(kind) -> None:
    for size in ((64, 64), (96, 96), (16, 16)):
        for seed in range(20):
            image = Image.fromarray(pixels(seed, size))
            edited = kind(image, np.random.default_rng(seed))
            assert edited.size == image.size
            assert edited.mode == "RGB"
            assert np.asarray(edited).any() or seed  # not all black, whatever was drawn
            assert np.array_equal(np.asarray(image), pixels(seed, size))  # the crop that came in is left as it was
    assert not np.array_equal(np.asarray(edited), np.asarray(image))


def test_global_crops_alone_are_edited_and_without_edits_nothing_is_drawn() -> None:
    content = encoded(picture(1, (200, 150)))
    plain, edited = (
        multi_crop(
            open_image(content),
            CropsConfig(global_px=32, local_px=16, gram_px=48, edits=edits),
            np.random.default_rng(3),
        )
        for edits in (0, 4)
    )
    assert not np.array_equal(plain.global_crops.numpy(), edited.global_crops.numpy())
    np.testing.assert_array_equal(plain.local_crops.numpy(), edited.local_crops.numpy())
    np.testing.assert_array_equal(plain.gram_crops.numpy(), edited.gram_crops.numpy())
    np.testing.assert_array_equal(plain.global_photometric.factors.numpy(), edited.global_photometric.factors.numpy())
