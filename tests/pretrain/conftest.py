"""What the tests of training share: small shards and a small config."""

from pathlib import Path

import pytest
import yaml

from tests.conftest import picture_tar, write_tar
from tests.pretrain.tiny_train import TINY


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures in two tars, and one damaged image in a third."""
    folder = tmp_path_factory.mktemp("shards")
    picture_tar(folder / "a.tar", range(12))
    picture_tar(folder / "b.tar", range(12, 24))
    write_tar(folder / "c.tar", [("broken.jpg", b"\xff\xd8\xff no image"), ("none.txt", b"x")])
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path
