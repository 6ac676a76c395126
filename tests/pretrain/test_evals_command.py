"""python -m pretrain.downstream.evals: side by side, again, on several ranks, and during training by name."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from pretrain.checkpoint import write_teacher
from pretrain.downstream.evals.__main__ import main
from pretrain.downstream.evals.baselines import random_like
from pretrain.downstream.evals.compared import shown_names
from pretrain.downstream.evals.protocols import PROTOCOLS
from pretrain.downstream.evals.sets import KINDS, read_sets
from pretrain.downstream.export.folder import export
from pretrain.models.architectures import build
from pretrain.watch.evaluation import EvaluationConfig, check_sets, run_evaluation
from tests.conftest import REPOSITORY, encoded, picture, write_tar
from tests.pretrain.test_evals_dense import deep, scenes, squares
from tests.pretrain.test_evals_pooled import copied, labelled_set, table

FEW = ["knn.k=[5]", "linear.least_steps=20", "logistic.num_strengths=2", "fewshot.shots=[2]", "fewshot.draws=2"]
FEW += ["segmentation.least_steps=10", "depth.least_steps=10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of every kind, sets.yaml, and a teacher."""
    root = tmp_path_factory.mktemp("evals")
    labelled_set(root, 40)
    copied(root)
    table(root / "truth.csv", ["query", "image", "relation"], [[f"q{n}", f"r{n}", "easy"] for n in range(5)])
    table(root / "copies.csv", ["query", "reference"], [[f"q{n}", f"r{n}"] for n in range(5)])
    for name, seeds in (("train", range(4)), ("val", range(10, 13))):
        scenes(root / f"seg-{name}.tar", seeds)
        deep(root / f"depth-{name}.tar", seeds)
    squares(root / "squares.tar", "json")
    sets = {
        "halves": {"kind": "labelled", "train": "train.tar", "val": "val.tar", "px": 32},
        "darker": {"kind": "retrieval", "queries": "queries.tar", "database": "refs.tar", "truth": "truth.csv"},
        "copies": {"kind": "copies", "queries": "queries.tar", "references": "refs.tar", "truth": "copies.csv"},
        "fields": {"kind": "segmentation", "train": "seg-train.tar", "val": "seg-val.tar", "classes": 3},
        "rooms": {"kind": "depth", "train": "depth-train.tar", "val": "depth-val.tar"},
        "squares": {"kind": "objects", "val": "squares.tar"},
    }
    (root / "sets.yaml").write_text(yaml.safe_dump(sets))
    teacher(root / "teacher", seed=0)
    return root


def teacher(path: Path, seed: int) -> None:
    model = build("dinov3_tiny", depth=2)
    model.init_weights(torch.Generator().manual_seed(seed))
    state = {f"backbone.{name}": value for name, value in random_like(model, seed).state_dict().items()}
    image = {"mean": [0.5] * 3, "std": [0.25] * 3, "px": 32}
    write_teacher(path, state, {"architecture": "dinov3_tiny", "model": {"depth": 2}, "image": image})


def results(out: Path) -> dict[tuple[str, str], dict]:
    found = [json.loads(path.read_text()) for path in out.glob("*/*/*/result.json")]
    return {(one["backbone"], one["eval"]): one for one in found}


@pytest.mark.slow
def test_all_evaluations_side_by_side_and_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(folder / "teacher"), "pixels"]
    asked = ["all", *names, "--data", str(folder / "sets.yaml"), "--out", str(tmp_path / "out"), *FEW]
    assert main(asked) == 0
    first = capsys.readouterr()
    found = results(tmp_path / "out")
    assert found.keys() == {(name, evaluation) for name in names for evaluation in PROTOCOLS}
    for one in found.values():
        assert one["source"].startswith("arXiv:")
        assert 0 <= one["standard_error"] < 1
        assert one["value"] >= 0
    page = (tmp_path / "out" / "table.md").read_text()
    assert page.strip() == first.out.strip()
    assert len(page.splitlines()) == 2 + len(PROTOCOLS)
    assert "| rooms   | depth: RMSE, m (less is better) |" in page
    assert "linear on halves" in first.err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")}
    assert main(asked) == 0  # nothing is done again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("result.json")} == before
    assert capsys.readouterr().out == first.out
    assert main([*asked, "linear.epochs=3"]) == 2
    assert "has a result of other settings; remove it, or name another --out" in capsys.readouterr().err
    teacher(folder / "teacher", seed=1)
    assert main(asked) == 2
    assert "has a result of other weights" in capsys.readouterr().err
    teacher(folder / "teacher", seed=0)


def test_one_failure_keeps_no_other_from_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [f"train={folder}/train.tar", f"val={folder}/val.tar", "px=32"]
    assert main(["knn,fewshot", "pixels", "colours", "--data", *data, "knn.k=[100]", "fewshot.shots=[2]"]) == 2
    shown = capsys.readouterr()
    assert (
        "error: knn of pixels, knn of colours on data: k=100 neighbours asked for, but the training set has 40 images"
        in shown.err
    )
    assert shown.out.count("failed") == 2
    assert shown.out.count(" ± ") == 2


def test_a_dry_run_reads_next_to_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["all", "pixels", "--data", str(folder / "sets.yaml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "knn on halves: accuracy; arXiv:2104.14294" in shown
    assert f"  train: {folder}/train.tar: 1 parts, 0.2 MB, about 40 images" in shown
    assert "pixels: 0.0 M parameters, crop 224 px" in shown


@pytest.mark.slow
def test_two_ranks_find_what_one_does(folder: Path, tmp_path: Path) -> None:
    names = "knn,logistic,retrieval,copies,segmentation,depth,discovery"
    few = [word for word in FEW if word.partition(".")[0] in names]
    asked = [names, str(folder / "teacher"), "--data", str(folder / "sets.yaml"), *few, "--batch-size", "7"]
    asked += ["--device", "cpu"]
    assert main([*asked, "--out", str(tmp_path / "one")]) == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "pretrain.downstream.evals", *asked, "--out", str(tmp_path / "two")]
    subprocess.run(command, check=True, env=environment, timeout=300, capture_output=True)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, found in one.items():
        assert two[key]["value"] == pytest.approx(found["value"], rel=1e-4), key
        assert two[key]["images"] == found["images"]


def test_training_evaluates_by_name(folder: Path, tmp_path: Path) -> None:
    sets = f"{folder}/train.tar", f"{folder}/val.tar"
    names = ["knn", "logistic", "discovery"]
    config = EvaluationConfig(
        every_steps=1,
        names=names,
        sets=str(folder / "objects.yaml"),
        train=sets[0],
        val=sets[1],
        px=32,
        k=[3],
        pca_images=0,
    )
    (folder / "objects.yaml").write_text(yaml.safe_dump({"squares": {"kind": "objects", "val": "squares.tar"}}))
    check_sets(config)
    model = random_like(build("dinov3_tiny", depth=2))
    found = run_evaluation(model, lambda: model, config, tmp_path, 3, (0.5,) * 3, (0.25,) * 3, torch.device("cpu"))
    assert found.keys() == {"knn", "knn/3", "knn_pixels", "knn_random", "logistic", "discovery"}
    kept = json.loads((tmp_path / "evaluation" / "step-00000003" / "result.json").read_text())
    assert {name: one["value"] for name, one in kept["evaluations"].items()} == {name: found[name] for name in names}
    for wrong, told in (
        ({"names": ["knm"]}, "there is no evaluation 'knm'"),
        ({"names": ["depth"]}, "depth needs a set of kind depth, and there is none among evaluation, squares"),
        ({"sets": "gone.yaml"}, "gone.yaml is not readable"),
    ):
        with pytest.raises(ValueError, match=told):
            check_sets(EvaluationConfig(**asdict(config) | wrong))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: {train: x}", "a needs a kind, one of labelled, retrieval"),
        ("a: {kind: labelled, train: x}", "a: give val; this kind of set has train, val"),
        ("a: {kind: labelled, train: x, val: y, vals: z}", "a: vals is unknown"),
        ("a: {kind: labelled, train: x, val: 3}", "val=3 must be text"),
        ("a: {kind: segmentation, train: x, val: y, classes: 3, ignore: 7}", "ignore=7 must be a list of numbers"),
        ("a: {kind: segmentation, train: x, val: y, classes: 1}", "classes=1 must be"),
        ("a: {kind: labelled, train: x, val: y, px: many}", "px='many' must be a whole number"),
        ("- a", "must hold `key: value` lines"),
        ("", "names no set"),
    ],
)
def test_a_wrong_set_is_one_sentence(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text(content)
    with pytest.raises(ValueError, match=told):
        read_sets(tmp_path / "sets.yaml")


def test_paths_are_relative_to_the_file_of_sets(tmp_path: Path) -> None:
    text = "a: {kind: labelled, train: 'x/*.tar, y.tar', val: 'hf://datasets/o/n/v.parquet', train_labels: /l.csv}"
    (tmp_path / "sets.yaml").write_text(text)
    (found,) = read_sets(tmp_path / "sets.yaml").values()
    assert found.train == f"{tmp_path}/x/*.tar,{tmp_path}/y.tar"
    assert found.val == "hf://datasets/o/n/v.parquet"
    assert found.train_labels == "/l.csv"


def test_columns_have_the_ends_of_names() -> None:
    assert shown_names(["/a/b/run", "untrained:/a/b/run", "pixels"]) == ["run", "untrained:run", "pixels"]
    assert shown_names(["/a/one/teacher", "/a/two/teacher/"]) == ["one/teacher", "two/teacher"]
    assert shown_names(["hf:o/n", "timm:n"]) == ["n", "timm:n"]


def test_every_kind_of_set_is_taken_by_an_evaluation() -> None:
    assert {protocol.takes for protocol in PROTOCOLS.values()} == set(KINDS.values())


def test_sets_of_datasets_are_read(tmp_path: Path) -> None:
    """What `datasets` writes as Parquet: images with bytes, labels as numbers."""
    import datasets

    rows = {"image": [picture(n, (40, 40)) for n in range(8)], "label": [n % 2 for n in range(8)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set.parquet")
    data = [f"train={tmp_path}/set.parquet", f"val={tmp_path}/set.parquet", "px=32", "resize_px=32"]
    assert main(["knn", "pixels", "--data", *data, "knn.k=[1]", "--out", str(tmp_path / "out")]) == 0
    (found,) = results(tmp_path / "out").values()
    assert found["value"] == 1.0


def test_folders_of_classes_are_read(tmp_path: Path) -> None:
    for n in range(8):
        path = tmp_path / "set" / "ab"[n % 2] / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(n, (40, 40)), "PNG"))
    data = [f"train={tmp_path}/set", f"val={tmp_path}/set", "px=32", "resize_px=32"]
    assert main(["knn", "colours", "--data", *data, "knn.k=[1]"]) == 0
    write_tar(tmp_path / "x.tar", [("a.png", encoded(picture(1), "PNG"))])
    assert main(["knn", "colours", "--data", f"train={tmp_path}/set", f"val={tmp_path}/x.tar", "knn.k=[1]"]) == 2


@pytest.mark.slow
def test_a_program_is_evaluated_by_its_last_layer(folder: Path, tmp_path: Path) -> None:
    export(folder / "teacher", tmp_path / "onnx", "onnx")
    names = [str(folder / "teacher"), str(tmp_path / "onnx")]
    data = [f"train={folder}/train.tar", f"val={folder}/val.tar"]
    few = [word for word in FEW if word.startswith(("knn", "linear"))]
    assert main(["knn,linear", *names, "--data", *data, *few, "--out", str(tmp_path / "out")]) == 0
    found = results(tmp_path / "out")
    assert found[names[0], "knn"]["value"] == found[names[1], "knn"]["value"]
    assert "best on val, CLS of 2 layers" in found[names[0], "linear"]["figures"]
    assert "best on val, CLS of 2 layers" not in found[names[1], "linear"]["figures"]
