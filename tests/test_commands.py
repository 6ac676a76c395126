"""`seedbed COMMAND`: installed from a wheel, beside modules of the same names in the working folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.commands import COMMANDS
from tests.conftest import REPOSITORY
from tests.wheel import build_wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an installed wheel, without what it depends on."""
    root = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(root / "site")]
    subprocess.run([*pip, str(build_wheel(root))], check=True, timeout=300)
    return root / "site"


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": ""}
    command = [sys.executable, str(installed / "bin" / "seedbed"), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_wheel_works_beside_modules_of_the_same_names(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    for name in ("configs/__init__.py", "configs/loader.py", "pretrain.py"):
        (tmp_path / name).write_text("raise SystemExit('a module of somebody else')")
    planned = run(installed, tmp_path, "train", "--config", "cifar", "--dry-run")
    assert (planned.returncode, planned.stderr) == (0, ""), planned.stderr
    assert "Parameters" in planned.stdout
    told = run(installed, tmp_path, "explain", "--help")
    assert (told.returncode, "usage" in told.stdout) == (0, True), told.stderr


def test_every_command_has_a_module_with_a_main() -> None:
    for module, _ in COMMANDS.values():
        path = REPOSITORY / f"{module.replace('.', '/')}.py"
        assert "main" in path.read_text(encoding="utf-8"), path


@pytest.mark.slow
def test_a_command_that_is_not_there(installed: Path, tmp_path: Path) -> None:
    told = run(installed, tmp_path, "trian")
    assert told.returncode == 2
    assert told.stderr.startswith("error: seedbed has no command 'trian'.")
    assert "  train " in told.stderr
    assert run(installed, tmp_path, "--help").returncode == 0
