"""Files of one JSON object a line: appended while a run goes on, cut back when it resumes."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line. Floats keep every digit (`repr`), so equal text means equal bits; what is not finite is null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: _finite(value) for name, value in line.items()}, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line; a last one that a killed run left torn is not there. A missing file has none."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def drop_after(path: Path, step: int) -> None:
    """Keep the lines up to `step`: a run that resumes there writes the later ones again. Rewritten in one move."""
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for line in read_lines(path):
            if line.get("step", 0) <= step:
                file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
