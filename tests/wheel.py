"""The wheel of this working tree, with what is not committed yet, for the tests that install it."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

_OF_THE_WHEEL = ("curation/", "configs/", "pretrain/", "pyproject.toml", "README", "LICENSE")


def build_wheel(folder: Path) -> Path:
    """Build it in a folder, from the files that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if name.startswith(_OF_THE_WHEEL) and (REPOSITORY / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((REPOSITORY / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, str(folder), str(folder / "source")], check=True, timeout=300)
    return next(folder.glob("*.whl"))
