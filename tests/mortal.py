"""What Ray workers of the tests run, and die of; here, because they import it by the name `tests.mortal`."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curation.encoders.encoder import View
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


def is_first(folder: str, name: str) -> bool:
    """Whether nobody asked for this name before."""
    try:
        (Path(folder) / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Squares:
    """An actor of `run_actors`; the first that starts has `trouble`."""

    def __init__(self, folder: str, trouble: str) -> None:
        self.folder, self.trouble, self.count = folder, trouble, 0

    def start(self) -> None:
        if not is_first(self.folder, "first") and self.trouble != "all-broken":
            self.trouble = ""
        if "broken" in self.trouble:
            raise ValueError("no such device")

    def beats(self) -> int:
        return self.count

    def square(self, item: int) -> tuple[int, int]:
        """(square, process)"""
        self.count += 1
        (Path(self.folder) / f"item-{item}-{os.getpid()}").touch()
        if self.trouble == "slow":
            time.sleep(0.4)
        if self.trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.02)
        return item * item, os.getpid()


class DiesAtView:
    """A pixel filter with a view, so in an embedding actor: its process dies at the `at`th batch of the first actor."""

    def __init__(self, device: str, folder: str, at: int) -> None:
        assert device == "cpu"
        self.folder, self.left = folder, at

    @classmethod
    def view(cls, folder: str, at: int) -> View:
        return View(height=8, width=6)

    def __call__(self, images: np.ndarray, rows: Sequence[dict]) -> list[str | None]:
        assert images.shape == (len(rows), 8, 6, 3)
        assert images.dtype == np.uint8
        self.left -= 1
        if self.left == 0 and is_first(self.folder, "died"):
            os.kill(os.getpid(), signal.SIGKILL)
        return [None] * len(rows)


def dies_at(images: list[np.ndarray], rows: Sequence[dict], folder: str, key: str, times: int) -> list[str | None]:
    """A pixel filter of whole pictures, so in a decode task: its process dies at one image, the first `times` times."""
    if any(row["key"] == key for row in rows) and tries(folder, 0) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return [None] * len(rows)


class DiesAtOnce:
    """A pixel filter that kills whoever builds it."""

    def __init__(self, device: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def slowly(images: list[np.ndarray], rows: Sequence[dict], seconds: float) -> list[str | None]:
    """A pixel filter that takes its time."""
    time.sleep(seconds * len(images))
    return [None] * len(rows)


def square_slowly(item: int, folder: Folder, name: str) -> None:
    time.sleep(0.3)
    folder.write_bytes(name, f"{item * item}".encode())


def drops(images: list[np.ndarray], rows: Sequence[dict], reason: str, but: str) -> list[str | None]:
    """A pixel filter that lets one image pass."""
    return [None if row["key"] == but else reason for row in rows]


def doomed(function: Callable[..., Any], folder: str, group: int) -> Callable[..., Any]:
    """A task's function whose first call kills its worker: when a file that it wrote is about to get its name, or, of
    every other group, when all is written and nobody was told yet."""

    def task(item: Any, *shared: Any) -> Any:
        if not is_first(folder, f"group-{group:03d}"):
            return function(item, *shared)
        if group % 2:
            sys.addaudithook(_die_at_rename)
        function(item, *shared)
        os.kill(os.getpid(), signal.SIGKILL)

    return task


def _die_at_rename(event: str, _: Any) -> None:
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)
