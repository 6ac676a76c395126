"""Features of a set of images as files: what they hold, stopping and going on, processes, hostile images."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pretrain.downstream.backbone import load_backbone
from pretrain.downstream.export.__main__ import main as export
from pretrain.downstream.features import main
from pretrain.downstream.pixels import eval_crop
from tests.conftest import encoded, picture, write_tar
from tests.pretrain.randomised import randomise


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("model")
    config = Dinov2Config(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14)
    theirs = Dinov2Model(config)
    randomise(theirs)
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars of five and three members; of the first, one picture is cut and one is 1 x 1."""
    root = tmp_path_factory.mktemp("pool")
    good = [encoded(picture(n, (90, 60 + 10 * n))) for n in range(6)]
    broken = good[2][: len(good[2]) // 3]
    first = [("a.jpg", good[0]), ("b.jpg", broken), ("c.png", encoded(picture(7, (1, 1)), "PNG")), ("d.jpg", good[1])]
    write_tar(root / "0.tar", [*first, ("d.txt", b"a note")])
    write_tar(root / "1.tar", [(f"{n}.jpg", good[n]) for n in (3, 4, 5)])
    return root


def run(model: Path, pool: Path, out: Path, *arguments: str) -> int:
    return main([str(model), f"{pool}/*.tar", "--out", str(out), "--px", "56", "--device", "cpu", *arguments])


def table(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_rows_are_the_features_of_the_images_in_their_order(model, pool, tmp_path) -> None:
    assert run(model, pool, tmp_path, "--with", "mean", "patches", "--dtype", "float32", "--batch-size", "2") == 0
    first, second = (table(tmp_path / f"features-0000{n}.parquet") for n in (0, 1))
    assert [row["key"].rpartition("/")[2] for row in first] == ["a", "b", "c", "d"]
    assert [row["reason"] is None for row in first] == [True, False, True, True]
    assert first[1]["cls"] is None
    backbone = load_backbone(model)
    content = encoded(picture(4, (90, 100)))
    pixels = torch.tensor(eval_crop(content, 56, 64)).permute(2, 0, 1)[None]
    expected = backbone.features(backbone.image.normalise(pixels))
    assert np.allclose(second[1]["cls"], expected.cls[0], atol=1e-5)
    assert np.allclose(second[1]["mean"], expected.patches[0].mean(dim=0), atol=1e-5)
    assert np.allclose(np.reshape(second[1]["patches"], (16, 48)), expected.patches[0], atol=1e-5)
    assert (second[1]["grid_h"], second[1]["grid_w"]) == (4, 4)


def test_whole_images_keep_their_aspect(model, pool, tmp_path) -> None:
    assert run(model, pool, tmp_path, "--whole", "--with", "patches") == 0
    rows = table(tmp_path / "features-00001.parquet")
    assert [(row["grid_h"], row["grid_w"]) for row in rows] == [(4, 4), (5, 4), (5, 4)]  # 90 x 90, 90 x 100, 90 x 110
    assert all(len(row["patches"]) == row["grid_h"] * row["grid_w"] * 48 for row in rows)


def test_what_is_there_is_not_done_again_and_processes_share(model, pool, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run(model, pool, tmp_path / "two") == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert run(model, pool, tmp_path / "one") == 0
    for name in ("features-00000.parquet", "features-00001.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    kept = (tmp_path / "one" / "features-00000.parquet").stat().st_mtime_ns
    (tmp_path / "one" / "features-00001.parquet").unlink()
    capsys.readouterr()
    assert run(model, pool, tmp_path / "one") == 0
    assert capsys.readouterr().out.startswith("3 images written")
    assert (tmp_path / "one" / "features-00000.parquet").stat().st_mtime_ns == kept


def test_arrays(model, pool, tmp_path) -> None:
    assert run(model, pool, tmp_path / "npy", "--format", "npy", "--with", "mean") == 0
    assert run(model, pool, tmp_path / "parquet", "--with", "mean") == 0
    cls = np.load(tmp_path / "npy" / "features-00000-cls.npy")
    rows = table(tmp_path / "parquet" / "features-00000.parquet")
    assert cls.dtype == np.float16
    assert not cls[1].any()
    assert np.array_equal(cls[3], np.float16(rows[3]["cls"]))
    keys = (tmp_path / "npy" / "features-00000.csv").read_text().splitlines()
    assert keys[0] == "key,reason"
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--px", "57"], "--px 57 does not split into patches of 14 px; use 56 or 70."),
        (["--format", "npy", "--with", "patches"], "needs --format parquet"),
        (["--with", "median"], "choose from mean, patches"),
        (["--batch-size", "0"], "must be 1 or more"),
    ],
)
def test_wrong_inputs(model, pool, tmp_path, capsys, arguments, message) -> None:
    assert run(model, pool, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(model, pool, tmp_path, capsys) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert run(model, pool, tmp_path) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert run(model, pool, tmp_path / "out") == 0
    assert run(model, pool, tmp_path / "out", "--whole") == 2
    assert "holds features with whole=False" in capsys.readouterr().err
    assert main([str(model), f"{pool}/1.tar", "--out", str(tmp_path / "out"), "--px", "56", "--device", "cpu"]) == 2
    assert "features of other images" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "_features.json").read_text())["px"] == 56


@pytest.mark.slow
def test_an_onnx_export_gives_the_same_rows(model, pool, tmp_path) -> None:
    assert export([str(model), str(tmp_path / "onnx"), "--format", "onnx"]) == 0
    asked = ["--with", "mean", "patches", "--dtype", "float32", "--whole", "--batch-size", "2"]
    assert run(model, pool, tmp_path / "torch", *asked) == 0
    assert run(tmp_path / "onnx", pool, tmp_path / "rows", *asked) == 0
    for name in ("features-00000.parquet", "features-00001.parquet"):
        ours, theirs = table(tmp_path / "torch" / name), table(tmp_path / "rows" / name)
        for row, same in zip(ours, theirs, strict=True):
            assert [row[k] for k in ("key", "reason", "grid_h")] == [same[k] for k in ("key", "reason", "grid_h")]
            for column in ("cls", "mean", "patches"):
                assert (row[column] is None) == (same[column] is None)
                assert row[column] is None or np.allclose(row[column], same[column], atol=1e-5)
