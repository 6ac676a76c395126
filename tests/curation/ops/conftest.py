"""What tests of the arithmetic share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def torch_on_one_thread() -> Iterator[None]:
    """Products this small are no faster on two, and threads wait long for each other on a busy machine."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
