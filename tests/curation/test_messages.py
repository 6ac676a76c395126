"""What a user gets wrong, or meets, is one sentence in the config's own names, and no traceback."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from ray.exceptions import OutOfDiskError, RayActorError

from configs.loader import load_config
from curation.account import explain
from curation.config import CurationConfig
from curation.engine import workers
from curation.engine.folder import Folder
from curation.engine.progress import StageProgress
from curation.reading.filters import build_filters
from curation.run import main
from tests.conftest import REPOSITORY, encoded, picture_tar, write_tar


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_tar(tmp_path_factory.mktemp("messages") / "pool.tar", range(8))


def run(pool: object, out: Path, *more: str, seed: object = None) -> int:
    settings = ["--config", "offline", "execution.workers=1", "execution.memory_gb=0.5"]
    return main(["--seed", str(seed or pool), "--pool", str(pool), "--out", str(out), *settings, *more])


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error; lines of progress may stand before it."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    return lines[-1]


# --- settings ---------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "embed.image_px": ["0", "-5"],
    "embed.batch_size": ["0", "-1"],
    "embed.max_file_bytes": ["0", "-1"],
    "embed.max_pixels": ["0", "-1"],
    "embed.images_per_folder_part": ["0", "-1"],
    "embed.max_rejected_fraction": ["-0.1", "1.1", "nan", "inf"],
    "cells.rows_per_cell": ["0", "-1"],
    "cells.max_cells": ["0", "-1"],
    "cells.kmeans.num_iterations": ["0"],
    "cells.kmeans.seed": ["-1", "99999999999999999999999"],
    "dedup.perceptual_distance": ["-1", "32"],
    "dedup.similarity_threshold": ["-1", "1.01", "nan"],
    "dedup.target_recall": ["0", "1", "nan"],
    "dedup.max_component_size": ["1", "-1"],
    "dedup.min_similarity_to_representative": ["7", "-1.5", "nan"],
    "dedup.seed": ["-1", "99999999999999999999999"],
    "decontaminate.perceptual_distance": ["-1", "32"],
    "decontaminate.similarity_threshold": ["-1", "1.01", "nan"],
    "cluster.levels": ["[0]", "[-1]", "[100, 0]"],
    "cluster.scale": ["0", "-1", "nan", "inf"],
    "cluster.min_images_per_cluster": ["0", "-4"],
    "cluster.num_resamplings": ["[-1]", "[1, -1]", "[]"],
    "cluster.kmeans.points_per_cluster": ["0"],
    "cluster.kmeans.max_points_in_memory": ["0"],
    "cluster.clusters_per_group": ["0", "1"],
    "retrieve.k": ["0", "-1"],
    "retrieve.target_recall": ["0", "1", "nan"],
    "retrieve.min_similarity": ["7", "-1.5", "nan", "inf"],
    "retrieve.min_hits": ["0"],
    "retrieve.images_per_cluster": ["0"],
    "retrieve.max_images": ["0"],
    "balance.num_images": ["-1"],
    "balance.fraction": ["-0.1", "1.1", "nan"],
    "balance.seed": ["-1"],
    "dedup.perceptual_rows": ["-1"],
    "dedup.edge_floor": ("2", "-1.5", "nan"),
    "range_rows": ["0", "-1"],
    "shard.max_images": ["0"],
    "shard.max_mb": ["0", "-1", "nan", "inf"],
    "shard.seed": ["-1"],
    "execution.workers": ["-1"],
    "execution.memory_gb": ["0", "nan", "inf", "-4"],
}


def numeric_settings(node: object, prefix: str = "") -> set[str]:
    """Names of all settings of a config that are numbers, or lists of them."""
    names: set[str] = set()
    for name, kind in type(node).__annotations__.items():
        value, label = getattr(node, name), f"{prefix}{name}"
        if hasattr(value, "__dataclass_fields__"):
            names |= numeric_settings(value, f"{label}.")
        elif "int" in str(kind) or "float" in str(kind):
            names.add(label)
    return names


def test_every_numeric_setting_is_tried() -> None:
    shared = {f"{stage}.kmeans.{name}" for stage in ("cells", "cluster") for name in (
        "num_iterations", "points_per_cluster", "max_points_in_memory", "seed")}  # fmt: skip
    assert numeric_settings(CurationConfig()) - shared == OUT_OF_RANGE.keys() - shared
    assert {name.rpartition(".")[2] for name in shared} <= {name.rpartition(".")[2] for name in OUT_OF_RANGE}


@pytest.mark.parametrize("setting", [f"{name}={value}" for name, values in OUT_OF_RANGE.items() for value in values])
def test_a_number_out_of_range_is_named(setting: str) -> None:
    name = setting.partition("=")[0].removeprefix("cells.kmeans").removeprefix("cluster.kmeans").lstrip(".")
    with pytest.raises(ValueError, match=rf"(^|\.| ){name}=.* must "):
        load_config(CurationConfig, "curation", "offline", [setting])


@pytest.mark.parametrize("value", ["many", "[1]", "{a: 1}", "1.5.2"])
@pytest.mark.parametrize("name", ["embed.batch_size", "retrieve.k", "shard.max_mb", "execution.workers"])
def test_what_is_no_number_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name}"):
        load_config(CurationConfig, "curation", "offline", [f"{name}={value}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.levels=5", "cluster.levels is a list, found 5; write cluster.levels=[5]"),
        ("cluster.num_resamplings=3", "cluster.num_resamplings is a list, found 3; write cluster.num_resamplings=[3]"),
        (
            "dedup.representative=bytes",
            "is a list, found 'bytes'; write dedup.representative=[bytes]",
        ),
        ("filters=5", "filters is a list"),
        ("filters=null", "filters is a list"),
        ("filters={kind: size}", "'kind' names none of its entries"),
        ("filters.9.min_side_px=20", "'9' names none of its entries: it has the entries 0 to 2"),
        ("filters.size.min_side_px=20", "'size' names none of its entries"),
        ("filters.0=5", "5 needs a `kind`"),
        ("filters.0.min_px=20", "size knows min_side_px, max_side_px, not min_px"),
        ("filters.0.min_side_px=big", "filters.0.min_side_px='big' must be a whole number"),
        ("cluster=5", "cluster is a section"),
    ],
)
def test_lists_and_their_entries(
    tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    assert run(tar, tmp_path / "run", override) == 1
    assert words in sentence(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "entries"),
    [
        ("filters.0.min_side_px=20", [{"kind": "size", "min_side_px": 20}, {"kind": "aspect"}, {"kind": "blank"}]),
        ("filters[2].min_luma_deviation=3", [*({"kind": k} for k in ("size", "aspect")),
                                             {"kind": "blank", "min_luma_deviation": 3}]),
        ("filters.1={kind: aspect, max_ratio: 3}", [{"kind": "size"}, {"kind": "aspect", "max_ratio": 3},
                                                    {"kind": "blank"}]),
    ],
)  # fmt: skip
def test_one_entry_of_a_list_can_be_set(override: str, entries: list[dict]) -> None:
    assert load_config(CurationConfig, "curation", "offline", [override]).filters == entries
    levels = ["cluster.levels=[9, 5, 2]", "cluster.levels.1=4"]
    assert load_config(CurationConfig, "curation", "offline", levels).cluster.levels == [9, 4, 2]


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "size", "min_side_px": "big"},
        {"kind": "size", "min_side_px": -1},
        {"kind": "size", "min_side_px": 1.5},
        {"kind": "size", "max_side_px": None},
        {"kind": "size", "max_side_px": [3]},
        {"kind": "size", "min_side_px": 50, "max_side_px": 40},
        {"kind": "size", "min_side_px": float("nan")},
        {"kind": "aspect", "max_ratio": "wide"},
        {"kind": "aspect", "max_ratio": 0.5},
        {"kind": "aspect", "max_ratio": float("inf")},
        {"kind": "aspect", "max_ratio": True},
        {"kind": "blank", "min_luma_deviation": "grey"},
        {"kind": "blank", "min_luma_deviation": 200},
        {"kind": "blank", "min_luma_deviation": float("nan")},
        {"kind": "score", "column": "s", "min": "high"},
        {"kind": "score", "column": "s", "min": 2, "max": 1},
        {"kind": "score", "column": "s", "max": float("nan")},
        {"kind": "score", "column": 5},
        {"kind": "blocklist", "of": "key", "path": 5},
        {"kind": "pixels", "path": 5},
        {"kind": "edit", "path": ""},
    ],
)
def test_every_parameter_of_every_filter_is_checked_when_it_is_built(entry: dict) -> None:
    with pytest.raises(ValueError, match=r"^filters"):
        build_filters([entry])


@pytest.mark.parametrize("kind", ["pixels", "edit"])
def test_a_filter_that_cannot_be_imported_is_found_before_the_pool_is_read(
    tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert run(tar, tmp_path / "run", f"filters=[{{kind: {kind}, path: 'no_module:blur'}}]") == 1
    assert "cannot import 'no_module:blur'" in sentence(capsys)
    assert not (tmp_path / "run" / "embed").exists()


# --- stages with nothing left -----------------------------------------------------------------------------------------


def blank_tar(path: Path) -> Path:
    return write_tar(path, [(f"b{i}.png", encoded(Image.new("RGB", (64, 64), (i, i, i)), "PNG")) for i in range(6)])


def test_a_pool_of_blanks(tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_session: None) -> None:
    out = tmp_path / "run"
    for _ in range(2):  # the same command again says the same
        assert run(blank_tar(tmp_path / "blank.tar"), out) == 1
        assert "none of the 6 images of the pool can be used: 6 blank" in sentence(capsys)
    assert (out / "filter" / "range-00000.parquet").exists()
    assert not [name for name in ("shards", "report.html", "decisions.parquet") if (out / name).exists()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--evaluation", "{tar}"], "all of the 8 different images of the pool match one of --evaluation"),
        (["--evaluation", "{text}", "embed.max_rejected_fraction=1"], "evaluation-text: none of its 3 images can be"),
        (["--seed", "{text}", "embed.max_rejected_fraction=1"], "seed-text: none of its 3 images can be read"),
        (["--evaluation", "{empty}"], "evaluation-empty: there is no image in"),
        (["retrieve.min_similarity=1", "--seed", "{other}"], "none of the 8 images that are left was drawn"),
        (["retrieve.mode=none"], "retrieve.mode=none draws nothing"),
        (["balance.fraction=0.001"], "balance.fraction=0.001 of the 8 images that are left is less than one image"),
    ],
)
def test_nothing_left(
    tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_session: None, more: list[str], words: str
) -> None:
    places = {
        "{tar}": tar,
        "{text}": write_tar(tmp_path / "text.tar", [(f"{i}.txt", b"no image") for i in range(3)]),
        "{empty}": write_tar(tmp_path / "empty.tar", []),
        "{other}": picture_tar(tmp_path / "other.tar", range(50, 53)),
    }
    more = [str(places.get(word, word)) for word in more]
    seed = more.pop(more.index("--seed") + 1) if "--seed" in more else None
    assert run(tar, tmp_path / "run", *(word for word in more if word != "--seed"), seed=seed) == 1
    assert words in sentence(capsys)
    assert not (tmp_path / "run" / "report.html").exists()


# --- stores and disks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["credentials", "server", "bucket"])
@pytest.mark.parametrize("command", ["explain", "run"])
def test_an_object_store_that_cannot_be_reached(tar: Path, command: str, what: str) -> None:
    with socket.socket() as listener:  # a port that is ours, and closed again before the call
        listener.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    hidden = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
    environment = {**hidden, "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1", "AWS_CONFIG_FILE": "/none",
                   "AWS_SHARED_CREDENTIALS_FILE": "/none", "FSSPEC_S3_ENDPOINT_URL": endpoint}  # fmt: skip
    if what != "credentials":
        environment |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    url = "s3://bucket/run" if what != "bucket" else "s3://"
    arguments = {"explain": [url, "key"], "run": ["--seed", tar, "--pool", tar, "--config", "offline", "--out", url]}
    words = [sys.executable, "-m", f"curation.{command}", *map(str, arguments[command])]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: s3:")
    if what == "credentials":
        assert "redentials" in done.stderr


def test_an_unknown_store_and_a_missing_package(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("nosuch://bucket/run", "gdrive://bucket/run"):
        assert explain.main([url, "key"]) == 1
        assert url in sentence(capsys)


def test_a_full_disk_of_a_worker_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.ray, "get", lambda _: (_ for _ in ()).throw(OutOfDiskError()))
    with pytest.raises(OSError, match="No space left") as raised:
        workers.unwrapped(None)
    assert raised.value.errno == errno.ENOSPC


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("kb", [40, 160, 260])
@pytest.mark.slow
def test_a_disk_that_fills_at_any_stage(tar: Path, tmp_path: Path, kb: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kb}k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    command = [sys.executable, "-m", "curation.run", "--seed", tar, "--pool", tar, "--config", "offline", "--out",
               disk / "run", "execution.workers=1"]  # fmt: skip
    try:
        done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
        assert done.returncode == 1, done.stderr
        assert "error: the disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list((disk / "run").glob("lock.json*")), "a full disk keeps no lock"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_lost_worker_is_a_sentence(
    tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: object) -> None:
        try:
            monkeypatch.setattr(workers.ray, "get", lambda _: (_ for _ in ()).throw(RayActorError()))
            workers.unwrapped(None)
        finally:
            monkeypatch.undo()

    monkeypatch.setattr("curation.run.run_pipeline", lost)
    assert run(tar, tmp_path / "run") == 1
    assert "a Ray worker was lost" in sentence(capsys)


def test_a_store_s_own_errors_become_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Exception):
        pass

    folder = Folder("memory://somewhere")
    for name, call in (
        ("cat_file", lambda: folder.read_bytes("x")),
        ("exists", folder.exists),
        ("pipe_file", lambda: folder.write_bytes("x", b"")),
        ("ls", folder.entries),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(folder._fs[0], name, lambda *_, **__: (_ for _ in ()).throw(Odd("no way")))
            with pytest.raises(OSError, match=r"memory://somewhere cannot be reached: no way"):
                call()


# --- progress ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["MB", "images", "evaluation images"])
def test_a_rate_has_its_unit(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("curation.engine.progress.time.monotonic", lambda: now[0])
    progress = StageProgress("embed", 60, unit)
    now[0] += 2
    progress.advance(24)
    assert progress.line() == f"24 of 60 {unit}, 12 {unit}/s, 3.0 s left"


def test_the_live_line_has_the_unit_too() -> None:
    from rich.progress import Progress

    from curation.engine.progress import _Rate

    bar = Progress()
    task = bar.add_task("embed", total=60)
    bar.advance(task, 24)
    assert "MB/s" in str(_Rate("MB").render(bar.tasks[0]))
