"""What Ray workers of the tests run, and die of; here, because they import it by the name `tests.mortal`."""

import os
import signal
from pathlib import Path

from curation.engine.folder import Folder


def tries(folder: str, item: int) -> int:
    """How often the item was begun, this time included: a file for each."""
    count = len(list(Path(folder).glob(f"try-{item}-*"))) + 1
    (Path(folder) / f"try-{item}-{count}").touch()
    return count


def dies(item: int, folder: str, times: int) -> int:
    """What a kernel without memory does to a worker, `times` times for the odd items."""
    if tries(folder, item) <= times and item % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def write_square(item: int, folder: Folder, name: str, failing: int) -> None:
    if item == failing:
        raise ValueError("this one not")
    tries(folder.path(), item)
    folder.write_bytes(name, str(item * item).encode())
