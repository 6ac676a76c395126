"""The whole command on a small pool: results, reruns, workers, kills, faults. Ray, files and processes are real."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from curation.account.decisions import SCHEMA, STATUSES
from curation.run import main
from curation.writing.samples import unpack_others
from tests.conftest import REPOSITORY, encoded, picture, picture_tar, write_tar
from tests.ray_nodes import ray_nodes

SMALL = ["embed.encoder=descriptors", "shard.max_images=40", "execution.workers=2", "execution.memory_gb=0.5"]


def command(demo, out, *more):
    return [
        "--seed", demo.seed, "--pool", demo.pool, "--evaluation", demo.evaluation, "--config", "offline",
        "--out", str(out), *SMALL, *more,
    ]  # fmt: skip


def digest_of(run: Path) -> dict[str, str]:
    """sha256 of everything that must not depend on workers, interruptions or time."""
    paths = [
        *run.glob("shards/*.tar"),
        run / "decisions.parquet",
        *run.glob("*/manifest.json"),
        *run.glob("*/*/manifest.json"),
    ]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)}


@pytest.fixture(scope="module")
def finished(demo_pool, tmp_path_factory, ray_session):
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(command(demo_pool, out)) == 0
    return out


def test_every_pool_image_has_one_decision(finished, demo_pool):
    decisions = pq.read_table(finished / "decisions.parquet")
    assert decisions.schema.equals(SCHEMA)
    assert decisions["gid"].to_pylist() == list(range(decisions.num_rows))
    assert set(decisions["status"].to_pylist()) <= set(STATUSES)
    rows = decisions.to_pylist()
    assert all(row["reason"] for row in rows if row["status"] in ("rejected", "duplicate", "leak", "kept"))
    assert all((row["duplicate_of"] is not None) == (row["status"] == "duplicate") for row in rows)
    assert all((row["eval_match"] is not None) == (row["status"] == "leak") for row in rows)
    assert all((row["shard"] is not None) == (row["status"] == "kept") for row in rows)
    by_gid = {row["gid"]: row for row in rows}
    for row in rows:
        if row["status"] == "duplicate":
            assert by_gid[row["duplicate_of_gid"]]["component"] == row["component"]
            assert by_gid[row["duplicate_of_gid"]]["status"] in ("kept", "not_retrieved")


def test_shards_hold_the_original_bytes_of_what_was_kept(finished, demo_pool):
    originals = {
        sample["__key__"]: sample
        for sample in webdataset.WebDataset(
            sorted(Path(demo_pool.pool).parent.glob("*.tar"))[0].as_posix(), shardshuffle=False
        )
    }
    kept = {r["key"]: r for r in pq.read_table(finished / "decisions.parquet").to_pylist() if r["status"] == "kept"}
    urls = [str(path) for path in sorted(finished.glob("shards/*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert sorted(sample["__key__"] for sample in samples) == sorted(kept)
    for sample in samples:
        about = json.loads(sample["json"])
        image = sample["jpeg"]
        original = originals[sample["__key__"]]
        assert image in original.values()
        assert hashlib.sha256(image).hexdigest() == about["sha256"]
        assert (about["gid"], about["size"]) == (kept[sample["__key__"]]["gid"], len(image))
        assert sample["txt"] == original.get("txt", b"")
    manifest = json.loads((finished / "shards" / "manifest.json").read_text())
    for entry in manifest["files"]:
        assert hashlib.sha256((finished / "shards" / entry["path"]).read_bytes()).hexdigest() == entry["sha256"]


def test_the_same_command_does_nothing_again(finished, demo_pool, capsys):
    before = {
        path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != "run.json"
    }
    assert main(command(demo_pool, finished)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "as before" in capsys.readouterr().err


def test_changed_settings_rerun_only_what_depends_on_them(finished, demo_pool, capsys):
    def rerun(*more):
        assert main(command(demo_pool, finished, *more)) == 0
        lines = [line.split() for line in capsys.readouterr().err.splitlines()]
        steps = (
            "embed/",
            "filter",
            "cells",
            "join",
            "dedup",
            "decontaminate",
            "cluster",
            "retrieve/",
            "shards",
            "report",
        )
        return [
            words[0]
            for words in lines
            if words
            and words[0].startswith(steps)
            and words[-2:] != ["as", "before"]
            and not words[0].endswith(":")
            and ":" not in words[0]
        ]

    assert "cells" not in rerun("shard.seed=1")
    floor = "dedup.edge_floor=0.6"
    rerun(floor)
    changed = rerun(floor, "dedup.similarity_threshold=0.65")
    assert "dedup" in changed
    assert not {"cells", "join"} & set(changed)
    rerun()
    changed = rerun("retrieve.k=2")
    assert not {"embed/pool", "filter", "cells", "join", "dedup", "decontaminate", "cluster"} & set(changed)
    digest = digest_of(finished)
    assert digest["shards/manifest.json"] != ""
    rerun()
    assert digest_of(finished) != digest


@pytest.mark.slow
def test_one_worker_and_two_give_the_same_bytes(finished, demo_pool, tmp_path):
    assert main(command(demo_pool, finished)) == 0  # whatever the tests above changed is back
    run_process(command(demo_pool, tmp_path / "run", "execution.workers=1"))
    assert digest_of(tmp_path / "run") == digest_of(finished)


@pytest.mark.slow
def test_a_cluster_of_two_nodes_gives_the_same_bytes(finished, demo_pool, tmp_path):
    """RAY_ADDRESS joins a cluster; its nodes are real Ray nodes with one CPU each, on this machine."""
    assert main(command(demo_pool, finished)) == 0
    with ray_nodes([{}, {}]) as joined:
        run_process(command(demo_pool, tmp_path / "run"), env={**os.environ, **joined})
    assert digest_of(tmp_path / "run") == digest_of(finished)


@pytest.mark.slow
def test_a_large_pool_is_joined_through_sketches_and_probes(finished, demo_pool, tmp_path, monkeypatch, ray_session):
    """Pools above 16,384 images take another path through the join; here every pool counts as large."""
    assert main(command(demo_pool, finished)) == 0
    monkeypatch.setattr("curation.ops.recall._EXACT_ROWS", 50)
    monkeypatch.setattr("curation.stages.decontaminate._EXACT_ROWS", 50)
    assert main(command(demo_pool, tmp_path / "run", "cells.rows_per_cell=20")) == 0
    figures = json.loads((tmp_path / "run/report.json").read_text())["dedup"]
    assert figures["basis"] in ("sample", "law")
    assert figures["measured_recall"] >= 0.99
    columns = ["key", "status", "reason", "duplicate_of", "component", "eval_match"]
    exact = pq.read_table(finished / "decisions.parquet", columns=columns)
    assert pq.read_table(tmp_path / "run/decisions.parquet", columns=columns).equals(exact)


@pytest.mark.slow
def test_seed_sets_draw_each_in_its_own_mode(finished, demo_pool, tmp_path, ray_session):
    by_cluster = tmp_path / "by_cluster.yaml"
    rule = "{mode: cluster, min_hits: 2, images_per_cluster: 5, max_images: 30}"
    by_cluster.write_text(f"urls: ['{demo_pool.seed}']\nretrieve: {rule}\n")
    arguments = command(
        demo_pool, tmp_path / "run", "--seed", str(by_cluster), "retrieve.k=1", "cluster.levels=[20, 5]"
    )
    assert main([*arguments, "balance.num_images=10"]) == 0
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "retrieve").iterdir()) == ["by_cluster", "seed"]
    drawn = pq.read_table(run / "retrieve/by_cluster/matches.parquet")
    sizes = np.unique(drawn["cluster"].to_numpy(), return_counts=True)[1]
    assert 0 < drawn.num_rows <= 30
    assert sizes.max() <= 5
    kept = [r for r in pq.read_table(run / "decisions.parquet").to_pylist() if r["status"] == "kept"]
    assert {row["seed"] for row in kept} == {"seed", "by_cluster", None}
    assert sum(row["reason"] in ("balanced", "retrieved and balanced") for row in kept) == 10
    sample = next(iter(webdataset.WebDataset(str(run / "shards/shard-000000.tar"), shardshuffle=False)))
    assert set(json.loads(sample["json"])["draws"]) <= {"seed", "by_cluster", "balance"}


KILL_POINTS = (
    "embed/pool/index/*.parquet",
    "embed/evaluation-*/started.json",
    "cells/started.json",
    "join/truth.parquet",
    "dedup/edges/*",
    "shards/shard-000000.tar",
)


@pytest.mark.slow
def test_sigkill_at_six_points_changes_nothing(finished, demo_pool, tmp_path):
    out = tmp_path / "run"
    arguments = command(demo_pool, out)
    for pattern in KILL_POINTS:
        process = start_and_wait_for(arguments, out, pattern, tmp_path / "log.txt")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "report.json").exists()
    run_process(arguments)
    assert main(command(demo_pool, finished)) == 0
    assert digest_of(out) == digest_of(finished)


def start_and_wait_for(arguments, out: Path, pattern: str, log: Path) -> subprocess.Popen:
    """Start the command; return as soon as a file of its run folder matches the pattern."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "curation.run", *arguments], cwd=REPOSITORY, stderr=file)
    deadline = time.monotonic() + 120
    while not list(out.glob(pattern)):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    return process


def run_process(arguments, expected=0, **options):
    result = subprocess.run(
        [sys.executable, "-m", "curation.run", *arguments],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, **options,
    )  # fmt: skip
    assert result.returncode == expected, result.stderr
    return result


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_clean_and_the_command_continues(demo_pool, tmp_path, number):
    out, log = tmp_path / "run", tmp_path / "log.txt"
    process = start_and_wait_for(command(demo_pool, out), out, "embed/pool/started.json", log)
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    errors = log.read_text()
    assert "the same command continues" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_removed_copies_follow_the_setting(demo_pool, tmp_path, ray_session):
    """Three pictures, one of them three times over, one of those an evaluation image."""
    small, large = encoded(picture(1), quality=80), encoded(picture(1, (192, 144)), quality=95)
    pool = write_tar(
        tmp_path / "pool.tar",
        [
            ("a.jpg", small),
            ("b.jpg", large),
            ("c.jpg", small),
            ("d.jpg", encoded(picture(2))),
            ("e.jpg", encoded(picture(3))),
        ],
    )
    evaluation = write_tar(tmp_path / "evaluation.tar", [("x.jpg", encoded(picture(3)))])
    seed = picture_tar(tmp_path / "seed.tar", range(1, 4))
    arguments = ["--seed", str(seed), "--pool", str(pool), "--evaluation", str(evaluation), "--config", "offline"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "retrieve.k=5"]) == 0
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "run" / "decisions.parquet").to_pylist()}
    assert {key: row["status"] for key, row in rows.items()} == {
        "a": "duplicate", "b": "kept", "c": "duplicate", "d": "kept", "e": "leak",
    }  # fmt: skip
    assert rows["a"]["duplicate_of"] == rows["c"]["duplicate_of"] == "b"
    assert (rows["e"]["eval_match"], rows["e"]["reason"]) == ("x", "exact")
    assert (rows["b"]["component"], rows["b"]["component_size"], rows["d"]["component"]) == (0, 3, None)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "leaks"), [("component", {"a", "b", "c"}), ("direct", {"a", "b"})])
def test_decontamination_of_matches_or_of_their_components(tmp_path, ray_session, mode, leaks):
    """a and b look the same and match an evaluation image; c is a crop of them, too far from it for the threshold."""
    from PIL.PngImagePlugin import PngInfo

    original = picture(5, (128, 128))
    info = PngInfo()
    info.add_text("page", "2")
    members = [("a.png", encoded(original, "PNG")), ("b.png", encoded(original, "PNG", pnginfo=info))]
    members += [("c.png", encoded(original.crop((6, 6, 122, 122)), "PNG")), ("d.png", encoded(picture(6), "PNG"))]
    pool = write_tar(tmp_path / "pool.tar", members)
    evaluation = write_tar(tmp_path / "evaluation.tar", [("x.jpg", encoded(original, quality=90))])
    arguments = ["--pool", str(pool), "--evaluation", str(evaluation), "--config", "offline", "balance.num_images=4"]
    settings = [f"decontaminate.mode={mode}", "decontaminate.similarity_threshold=0.99"]
    settings += ["decontaminate.perceptual_distance=8", "dedup.similarity_threshold=0.6"]
    assert main([*arguments, *settings, "--out", str(tmp_path / "run")]) == 0
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "run" / "decisions.parquet").to_pylist()}
    assert {key for key, row in rows.items() if row["status"] == "leak"} == leaks
    assert {key for key, row in rows.items() if row["status"] == "kept"} == {"a", "b", "c", "d"} - leaks
    assert rows["c"]["component_size"] == 3


def test_a_hot_group_is_linked_without_comparing_all_its_pairs(tmp_path, ray_session):
    """The same pixels in 80 different files, as a placeholder image is on the web, and three of another picture."""
    from PIL.PngImagePlugin import PngInfo

    def placeholder(number):
        info = PngInfo()
        info.add_text("page", str(number))
        return encoded(picture(1), "PNG", pnginfo=info)

    members = [(f"hot{i:02d}.png", placeholder(i)) for i in range(80)]
    members += [(f"other{q}.jpg", encoded(picture(2), quality=q)) for q in (70, 80, 90)]
    pool = write_tar(tmp_path / "pool.tar", members)
    out = tmp_path / "run"
    assert main(["--pool", str(pool), "--config", "offline", "--out", str(out), "balance.num_images=2"]) == 0
    rows = {row["key"]: row for row in pq.read_table(out / "decisions.parquet").to_pylist()}
    kept = [key for key, row in rows.items() if row["status"] == "kept"]
    assert [key[:3] for key in kept] == ["hot", "oth"]
    assert {row["component_size"] for key, row in rows.items() if key.startswith("hot")} == {80}
    pairs = sum(pq.read_table(path).num_rows for path in out.glob("join/edges/*.parquet"))
    assert pairs <= 3


@pytest.mark.slow
def test_repeated_keys_hostile_keys_and_captions_survive(tmp_path, ray_session):
    contents = {f"k{i}": encoded(picture(i)) for i in range(4)}
    a = write_tar(
        tmp_path / "a.tar", [("same.jpg", contents["k0"]), ("../../up.png", contents["k1"]), ("same.txt", b"apart")]
    )
    b = write_tar(
        tmp_path / "b.tar", [("same.jpg", contents["k2"]), ("same.txt", b"caption"), ("same.json", b"{broken")]
    )
    arguments = [
        "--seed",
        str(a),
        "--pool",
        str(a),
        "--pool",
        str(b),
        "--config",
        "offline",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*arguments, "retrieve.k=9"]) == 0
    samples = list(webdataset.WebDataset(str(tmp_path / "run/shards/shard-000000.tar"), shardshuffle=False))
    assert sorted(sample["__key__"] for sample in samples) == ["_/_/up_g1", "same_g0", "same_g2"]
    first = next(sample for sample in samples if sample["__key__"] == "same_g0")
    assert (first["jpeg"], first["txt"]) == (contents["k0"], b"apart")
    last = next(sample for sample in samples if sample["__key__"] == "same_g2")
    assert (last["jpeg"], last["txt"]) == (contents["k2"], b"caption")
    assert unpack_others(last["others.tar"]) == {"json": b"{broken"}


@pytest.mark.slow
def test_parquet_and_folders_go_all_the_way(tmp_path, ray_session):
    import pyarrow as pa

    rows = [{"image": {"bytes": encoded(picture(i)), "path": f"n{i}.jpg"}, "caption": f"text {i}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5, 9):
        (folder / f"n{i}.png").write_bytes(encoded(picture(i), "PNG"))
        (folder / f"n{i}.txt").write_text(f"text {i}")
    arguments = ["--pool", str(tmp_path / "train.parquet"), "--pool", str(folder), "--config", "offline"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "balance.num_images=9"]) == 0
    samples = list(webdataset.WebDataset(str(tmp_path / "run/shards/shard-000000.tar"), shardshuffle=False))
    assert sorted((s["__key__"], s["txt"].decode()) for s in samples) == [(f"n{i}", f"text {i}") for i in range(9)]


def crash_on_red(images, rows):
    """A pixel filter that takes the whole process down, as a bug in a native decoder would."""
    for image in images:
        if np.array_equal(image.reshape(-1, 3).mean(0).round(), [255, 0, 0]):
            os.kill(os.getpid(), signal.SIGSEGV)
    return [None] * len(images)


@pytest.mark.slow
def test_an_image_that_crashes_the_decoder_is_a_row_with_a_reason(tmp_path, ray_session):
    from PIL import Image

    bad = encoded(Image.new("RGB", (64, 64), (255, 0, 0)), "PNG")
    members = [(f"k{i}.jpg", encoded(picture(i))) for i in range(6)]
    pool = write_tar(tmp_path / "a.tar", [*members[:3], ("bad.png", bad), *members[3:]])
    (tmp_path / "filters.yaml").write_text(
        "embed: {encoder: descriptors}\nfilters: [{kind: pixels, path: 'tests.curation.test_pipeline:crash_on_red'}]\n"
    )
    arguments = ["--pool", str(pool), "--config", str(tmp_path / "filters.yaml"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "balance.num_images=3"]) == 0
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "run" / "decisions.parquet").to_pylist()}
    assert (rows["bad"]["status"], rows["bad"]["reason"]) == ("rejected", "decoder_crashed")
    assert sum(row["status"] == "rejected" for row in rows.values()) == 1


def stamp(content, row):
    """An edit of bytes, standing for a face blur."""
    return content + b"edited"


@pytest.mark.slow
def test_an_edit_changes_bytes_and_says_so(tmp_path, ray_session):
    pool = picture_tar(tmp_path / "a.tar", range(3))
    (tmp_path / "edit.yaml").write_text(
        "embed: {encoder: descriptors}\nfilters: [{kind: edit, path: 'tests.curation.test_pipeline:stamp'}]\n"
    )
    arguments = ["--pool", str(pool), "--config", str(tmp_path / "edit.yaml"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "balance.num_images=3"]) == 0
    for sample in webdataset.WebDataset(str(tmp_path / "run/shards/shard-000000.tar"), shardshuffle=False):
        about = json.loads(sample["json"])
        assert sample["jpeg"].endswith(b"edited")
        assert about["edited_by"] == "tests.curation.test_pipeline:stamp"
        assert about["sha256"] == hashlib.sha256(sample["jpeg"]).hexdigest() != about["sha256_original"]
