"""Use without Ray and the trainer: the wheel in a clean environment of its extra alone, beside modules of its names."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pretrain.downstream.export.__main__ import main as export
from pretrain.downstream.features import main as features
from tests.conftest import encoded, picture, write_tar
from tests.pretrain.tiny_train import TINY, run
from tests.wheel import build_wheel

pytestmark = pytest.mark.slow
FORMATS = ("huggingface", "safetensors", "timm", "onnx")
LOADS = """
import sys
from pretrain.downstream.backbone import load_backbone
for path in sys.argv[1:]:
    backbone = load_backbone(path)
    print(backbone.architecture, backbone.model.embed_dim)
loaded = {name.partition(".")[0] for name in sys.modules}
print(*sorted(loaded & {"ray", "numba", "webdataset", "submitit", "transformers"}))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, its exports, and pictures, one of them cut."""
    root = tmp_path_factory.mktemp("made")
    good = [encoded(picture(n)) for n in range(8)]
    write_tar(root / "shards" / "a.tar", [(f"{n}.jpg", content) for n, content in enumerate(good)])
    (root / "tiny.yaml").write_text(json.dumps(TINY))
    assert run(root / "tiny.yaml", root / "shards", root / "run", "steps=2") == 0
    for name in FORMATS:
        changes = ["position_antialias=true"] if name == "timm" else []  # which is equal at the size of training
        assert export([str(root / "run"), str(root / name), "--format", name, *changes]) == 0
    (root / "pictures").mkdir()
    for n in range(3):
        (root / "pictures" / f"{n}.jpg").write_bytes(good[n])
    (root / "pictures" / "3.jpg").write_bytes(good[3][:200])
    return root


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of somebody's, with modules of our names."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "configs").mkdir()
    for name in ("configs/__init__.py", "configs/loader.py", "pretrain.py", "curation.py"):
        (folder / name).write_text("raise SystemExit('a module of somebody else')")
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["use", "onnx"])
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The programs of a new environment, and the extra that was installed there, from the registry."""
    folder = tmp_path_factory.mktemp(request.param) / "venv"
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    venv.create(folder, with_pip=uv is None)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install"] if uv is None else [uv, "pip", "install", "--python", python]
    subprocess.run([*pip, "--quiet", f"{wheel}[{request.param}]"], check=True, timeout=1800)
    yield folder / "bin", request.param
    shutil.rmtree(folder)  # gigabytes


def outside() -> dict[str, str]:
    """The environment of somebody who has not our working tree on any path."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def done(command: list[object], folder: Path) -> str:
    """What a command prints in a folder; it is to end well."""
    words = [str(part) for part in command]
    finished = subprocess.run(words, cwd=folder, env=outside(), capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def backbones(made: Path, extra: str) -> list[Path]:
    """What the extra can use, of the one teacher."""
    if extra == "onnx":
        return [made / "onnx", made / "onnx" / "model.onnx"]
    newest = max((made / "run" / "checkpoints").iterdir())
    return [made / "run", newest, *(made / name for name in FORMATS)]


def rows(folder: Path) -> list[list[float] | None]:
    return pq.read_table(folder / "features-00000.parquet")["cls"].to_pylist()


def test_backbones_load_without_ray_and_trainer(installed, made: Path, foreign: Path) -> None:
    programs, extra = installed
    if extra == "onnx":
        pytest.skip("load_backbone is torch's")
    told = done([programs / "python", "-P", "-c", LOADS, *backbones(made, extra)], foreign)
    assert told.splitlines() == ["dinov2_tiny 192"] * 6 + [""]
    lacking = "import importlib.util as i; print(*filter(i.find_spec, ('ray', 'numba', 'webdataset', 'submitit')))"
    assert done([programs / "python", "-P", "-c", lacking], foreign).strip() == ""


def test_features_are_those_of_the_teacher(installed, made: Path, foreign: Path, tmp_path: Path) -> None:
    programs, extra = installed
    same = ["--dtype", "float32", "--device", "cpu"]
    assert features([str(made / "run"), str(made / "pictures"), "--out", str(tmp_path / "here"), *same]) == 0
    expected = rows(tmp_path / "here")
    for number, path in enumerate(backbones(made, extra)):
        out = tmp_path / str(number)
        told = done([programs / "seedbed", "features", path, made / "pictures", "--out", out, *same], foreign)
        assert told.startswith("4 images written")
        assert "1 of them could not be read" in told
        found = rows(out)
        assert found[3] is None
        for row, right in zip(found[:3], expected[:3], strict=True):
            assert row == pytest.approx(right, abs=1e-5), path


def test_pictures(installed, made: Path, foreign: Path, tmp_path: Path) -> None:
    programs, extra = installed
    if extra == "onnx":
        pytest.skip("pictures ask for attention, so for torch")
    picture_of = [made / "run", made / "pictures" / "0.jpg", "-o", tmp_path / "a.png", "--attention"]
    assert done([programs / "seedbed", "pca", *picture_of], foreign).startswith("1 images in")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_serving(installed, made: Path, foreign: Path, tmp_path: Path) -> None:
    programs, extra = installed
    path = made / ("onnx" if extra == "onnx" else "huggingface")
    command = [str(programs / "seedbed"), "serve", str(path), "--port", "0"]
    with subprocess.Popen(command, cwd=foreign, env=outside(), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().partition(" at ")[2].split()[0]
            content = (made / "pictures" / "0.jpg").read_bytes()
            with urllib.request.urlopen(urllib.request.Request(f"{address}/embed", content), timeout=30) as answer:
                served = json.loads(answer.read())["images"][0]["cls"]
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    same = ["--dtype", "float32", "--device", "cpu"]
    assert features([str(made / "run"), str(made / "pictures"), "--out", str(tmp_path / "here"), *same]) == 0
    assert served == pytest.approx(rows(tmp_path / "here")[0], abs=1e-5)
