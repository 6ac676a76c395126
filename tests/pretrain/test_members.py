"""Which members of a tar are images: WebDataset's first dot, and the last one where that finds none."""

from pathlib import Path

import pytest

from pretrain.data.decode import ImageLimits
from pretrain.data.members import image_members
from pretrain.data.shards import ShardReader, read_table
from tests.conftest import encoded, picture, write_tar

CASES = {
    "plain": (["a.jpg", "a.json", "b.PNG"], ["a.jpg", "b.PNG"]),
    "a mask beside the image": (["a.jpg", "a.seg.png", "a.depth.0.png"], ["a.jpg"]),
    "the mask first": (["a.seg.png", "a.jpg"], ["a.jpg"]),
    "a dot in the name": (["img.0.jpg", "img.1.jpg", "img.0.json"], ["img.0.jpg", "img.1.jpg"]),
    "dots and spaces": (["x/Shot 2024 at 10.00.33.png", "x/v1.2.webp"], ["x/Shot 2024 at 10.00.33.png", "x/v1.2.webp"]),
    "another folder's key": (["p/a.jpg", "q/a.0.jpg"], ["p/a.jpg", "q/a.0.jpg"]),
    "no image": (["a.jpg.txt", "b.json", "c", "jpg", ".jpg.d"], []),
}


@pytest.mark.parametrize("name", CASES)
def test_which_members_are_images(name: str, tmp_path: Path) -> None:
    paths, expected = CASES[name]
    assert [paths[i] for i in image_members(paths, {"jpg", "png", "webp"})] == expected
    if expected:
        write_tar(tmp_path / "a.tar", [(path, encoded(picture(3))) for path in paths])
        table = read_table(str(tmp_path / "a.tar"), ImageLimits())
        reader = ShardReader(table)
        assert [reader.name(row).partition(":")[2] for row in range(len(table))] == expected
