"""The import rules: arithmetic without Ray or torch, and one door between curation and pretrain."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LIGHT = sorted(
    path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for path in [
        *(path for path in (REPOSITORY / "curation" / "ops").glob("*.py") if not path.name.startswith("torch_")),
        REPOSITORY / "curation" / "engine" / "lock.py",
        REPOSITORY / "curation" / "engine" / "manifest.py",
        *(REPOSITORY / "curation" / "reading").rglob("*.py"),
        REPOSITORY / "configs" / "loader.py",
    ]
)
"""Of curation.ops, torch_*.py take a device and import torch; the others import those in functions that were given one.
"""
HEAVY = ("ray", "torch")
# From the ground up: a room imports from its own and from those before it.
ROOMS = [
    "ops",
    "engine",
    "reading",
    "encoders",
    "writing",
    "stages",
    "config",
    "state",
    "account",
    "step_work",
    "steps",
    "pipeline",
    "planning",
    "demo",
    "run",
    "explain",
    "truth",
]
FROM_CURATION = ("curation.engine.lock", "curation.engine.manifest", "curation.engine.progress", "curation.reading")
"""what pretrain may import: locks, manifests, progress, and the one reader of images and samples"""


def imported_names(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, at any depth; relative imports made absolute."""
    package = path.relative_to(REPOSITORY).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def python_file(module: str) -> Path:
    path = REPOSITORY / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def offences(path: Path, allowed_from_curation: tuple[str, ...]) -> list[str]:
    """Imports of curation modules other than those allowed."""
    return [
        name
        for name in imported_names(path)
        if name.split(".")[0] == "curation"
        and name != "curation"
        and not any(name == allowed or name.startswith(f"{allowed}.") for allowed in allowed_from_curation)
    ]


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_names_neither_ray_nor_torch(module: str) -> None:
    named = {name.split(".")[0] for name in imported_names(python_file(module))}
    assert not named & set(HEAVY)


def test_light_modules_import_neither_ray_nor_torch() -> None:
    """Through what they import, too; in a fresh interpreter, for pytest itself may have loaded both."""
    code = f"import sys, {', '.join(LIGHT)}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_curation_imports_no_torch_before_it_needs_it() -> None:
    """It installs without: seedbed[curation]. Encoders, GPUs and the costs of models do need it."""
    code = "import sys, curation.run, curation.explain, curation.engine.devices; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


TRAINER = (
    "ray",
    "numba",
    "webdataset",
    "submitit",
    "pretrain.train",
    "pretrain.config",
    "pretrain.losses",
    "pretrain.student_teacher",
    "pretrain.optim",
)
"""what seedbed[use] has not, and what its users need not load"""


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (("backbone", "pca", "explore.__main__"), TRAINER),
        (("features", "pixels", "embedders.of_onnx", "serve.command"), (*TRAINER, "torch")),
    ],
    ids=["with torch", "without torch"],
)
def test_who_uses_a_backbone_loads_no_trainer(modules: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    imports = ", ".join(f"pretrain.downstream.{name}" for name in modules)
    code = f"import sys, {imports}; print(*(name for name in {forbidden} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_what_takes_a_device_imports_torch_and_no_ray() -> None:
    files = sorted((REPOSITORY / "curation" / "ops").glob("torch_*.py"))
    assert files
    for path in files:
        named = {name.split(".")[0] for name in imported_names(path)}
        assert named & set(HEAVY) == {"torch"}, path


def test_pretrain_imports_only_manifest_lock_and_reader_from_curation() -> None:
    for path in sorted((REPOSITORY / "pretrain").rglob("*.py")):
        assert offences(path, FROM_CURATION) == [], path


def test_curation_imports_nothing_from_pretrain() -> None:
    for path in sorted((REPOSITORY / "curation").rglob("*.py")):
        assert not [name for name in imported_names(path) if name.split(".")[0] == "pretrain"], path


def imports_within(package: str) -> dict[str, set[str]]:
    """Module of a package -> the modules of it that it imports, at any depth of the code."""
    files = sorted((REPOSITORY / package).rglob("*.py"))
    names = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in files}
    graph = {}
    for path in files:
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = {name for name in imported_names(path) if name in names and name.count(".")} - {module}
    return graph


def upward(graph: dict[str, set[str]]) -> list[str]:
    def floor(module: str) -> int:
        return ROOMS.index(module.split(".")[1])

    return [f"{a} <- {b}" for a, names in graph.items() if "." in a for b in names if floor(b) > floor(a)]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that come back to themselves."""
    left = dict(graph)
    while ready := [module for module, names in left.items() if not names & left.keys()]:
        left = {module: names for module, names in left.items() if module not in ready}
    return sorted(left)


def test_every_room_of_curation_has_its_floor_and_imports_point_down() -> None:
    assert upward(imports_within("curation")) == []


@pytest.mark.parametrize("package", ["curation", "pretrain"])
def test_no_file_imports_in_a_circle(package: str) -> None:
    assert circles(imports_within(package)) == []


def test_circles_and_upward_imports_are_seen() -> None:
    graph = {
        "curation.ops.a": {"curation.run"},
        "curation.run": {"curation.state"},
        "curation.state": {"curation.ops.a"},
    }
    assert upward(graph) == ["curation.ops.a <- curation.run"]
    assert circles(graph) == sorted(graph)


@pytest.mark.parametrize("folder", ["models", "losses"])
def test_models_and_losses_know_nothing_of_the_rest(folder: str) -> None:
    forbidden = (
        "configs",
        "curation",
        "omegaconf",
        "pretrain.data",
        "pretrain.checkpoint",
        "pretrain.config",
        "torch.distributed.fsdp",
    )
    for path in sorted((REPOSITORY / "pretrain" / folder).rglob("*.py")):
        named = [n for n in imported_names(path) if any(n == f or n.startswith(f"{f}.") for f in forbidden)]
        assert named == [], path


def test_only_downstream_imports_downstream() -> None:
    inside = REPOSITORY / "pretrain" / "downstream"
    for path in sorted((REPOSITORY / "pretrain").rglob("*.py")):
        if inside not in path.parents:
            assert not [n for n in imported_names(path) if n.startswith("pretrain.downstream")], path


def test_the_rules_catch_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that the rules are for may not be there yet, so they are tried on one that breaks them."""
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    path = tmp_path / "pretrain" / "data" / "shards.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from curation.engine.manifest import Manifest\nfrom curation.engine import store\nfrom .. import config\n"
    )
    assert offences(path, FROM_CURATION) == ["curation.engine", "curation.engine.store"]
    assert "pretrain.config" in list(imported_names(path))
    with pytest.raises(AssertionError):
        test_pretrain_imports_only_manifest_lock_and_reader_from_curation()
