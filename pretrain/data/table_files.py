"""Arrays that are written piece by piece and then mapped: one copy for all processes of a machine, in no one's heap.

The files lie in a folder of their own under TMPDIR and lose their names as soon as all processes have mapped them, so
nothing is left behind, whatever ends them.
"""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

_ABOUT = "about.json"


class ArrayFiles:
    """Named arrays that grow; a context that closes them."""

    def __init__(self, folder: Path, names: dict[str, type[np.generic]]) -> None:
        self.folder, self._types = folder, names
        self._stack = ExitStack()

    def __enter__(self) -> "ArrayFiles":
        self._files = {name: self._stack.enter_context((self.folder / name).open("wb")) for name in self._types}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def append(self, name: str, values: np.ndarray) -> None:
        """Values that the array's type holds."""
        self._files[name].write(np.ascontiguousarray(values, self._types[name]).data)

    def length(self, name: str) -> int:
        return self._files[name].tell() // np.dtype(self._types[name]).itemsize


def write_about(folder: Path, about: dict[str, Any]) -> None:
    (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def read_about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / _ABOUT).read_text(encoding="utf-8"))


def mapped(path: Path, kind: type[np.generic]) -> np.ndarray:
    """An array of a file, read-only; its pages are the system's, shared and given back as it likes."""
    if not path.stat().st_size:
        return np.zeros(0, kind)  # an empty file cannot be mapped
    return np.memmap(path, kind, "r").view(np.ndarray)


def new_folder() -> Path:
    """For the files of one table, readable by this user alone."""
    return Path(tempfile.mkdtemp(prefix="seedbed-table-"))
