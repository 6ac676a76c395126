"""k-means over Ray tasks is k-means; a split hierarchy is what its definition says; both go on from finished pieces."""

import hashlib
import multiprocessing
import os
import signal
import time
from functools import partial

import numpy as np
import pytest

from curation.engine.folder import Folder
from curation.engine.manifest import Manifest
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops.hierarchy import hierarchical_kmeans
from curation.ops.kmeans import kmeans
from curation.ops.randomness import hash_sample
from curation.stages import kmeans as stage
from curation.stages.cluster import ClusterConfig, Clustering, cluster_images
from curation.stages.kmeans import KMeansConfig, sample_limit, train_centroids
from curation.stages.members import ImageRows, unit_rows, write_members

EXECUTION = ExecutionConfig(workers=2)
WIDTH = 12


def image_set(root, sizes) -> tuple[ImageSet, np.ndarray]:
    """An image set of vectors alone: parts of these sizes, in clumps, and all of its vectors."""
    folder = Folder(str(root / "pool"))
    generator = np.random.default_rng(0)
    centres, files, rows = generator.standard_normal((60, WIDTH)), [], []
    for part, size in enumerate(sizes):
        clump = centres[generator.integers(0, 60, size)] + 0.4 * generator.standard_normal((size, WIDTH))
        rows.append((clump / np.linalg.norm(clump, axis=1, keepdims=True)).astype(np.float16))
        folder.write_array(f"vectors/part-{part}.npy", rows[-1])
        file = folder.write_bytes(f"index/part-{part}.parquet", b"", rows=size)
        files.append(file)
    manifest = Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=files)
    return ImageSet.of(folder, manifest), np.concatenate(rows)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    images, rows = image_set(tmp_path_factory.mktemp("vectors"), [700, 50, 900, 0, 850, 500])
    gids = np.flatnonzero(np.random.default_rng(1).random(len(rows)) < 0.8).astype(np.int64)
    return images, rows, gids


def chosen(number: int, gids: np.ndarray, size: int = 700, last: int = 3000) -> np.ndarray:
    """bool by gid of a range."""
    return np.isin(np.arange(number * size, min((number + 1) * size, last)), gids)


def members_of(gids: np.ndarray, ranges: Ranges, folder: Folder):
    return write_members(folder, ranges, partial(chosen, gids=gids, size=ranges.size), EXECUTION, "members")


def source_of(pool, root) -> ImageRows:
    images, _, gids = pool
    return ImageRows(images, "vectors", members_of(gids, Ranges(images.num_images, 512), Folder(str(root / "members"))))


@pytest.fixture
def small_files(monkeypatch):
    """Files and chunks of few rows, so that a small pool takes the path of a large one."""
    monkeypatch.setattr(stage, "_FILE_ROWS", 256)
    monkeypatch.setattr("curation.stages.members.CHUNK_ROWS", 256)


@pytest.mark.parametrize("points_per_cluster", [40, 1000])
def test_iterations_over_tasks_give_the_bytes_of_one_process(
    pool, tmp_path, ray_session, small_files, device, points_per_cluster
):
    _, rows, gids = pool
    config = KMeansConfig(num_iterations=9, points_per_cluster=points_per_cluster)
    found = train_centroids(source_of(pool, tmp_path), 30, config, EXECUTION, Folder(str(tmp_path / "k")), "k-means")
    sample = hash_sample(0, gids, 30 * points_per_cluster)
    expected = kmeans(unit_rows(rows[sample]), 30, 9, 0, ids=sample).centroids
    assert found.tobytes() == expected.tobytes()


def test_the_sample_is_read_once(pool, tmp_path, ray_session, small_files):
    images, _, _ = pool
    source, scratch = source_of(pool, tmp_path), Folder(str(tmp_path / "k"))
    config = KMeansConfig(num_iterations=2, points_per_cluster=20)
    train_centroids(source, 30, config, EXECUTION, scratch, "k-means")
    hidden = ImageRows(ImageSet(Folder(str(tmp_path / "gone")), images.parts), "vectors", source.members)
    for name in ("centroids.npy", "iteration-001.npy"):
        scratch.delete(name)
    train_centroids(hidden, 30, config, EXECUTION, scratch, "k-means")  # the vectors are gone, and not missed


def test_the_limit_of_a_sample_names_the_sample(pool, tmp_path, ray_session, small_files):
    from curation.ops.randomness import hash_uint64

    _, _, gids = pool
    limit = sample_limit(source_of(pool, tmp_path), 321, 5, EXECUTION, "k-means")
    assert np.array_equal(gids[hash_uint64(5, gids) <= np.uint64(limit)], hash_sample(5, gids, 321))


SPLIT = ClusterConfig(
    levels=[96, 24, 6], min_images_per_cluster=1, num_resamplings=[1, 2, 1], clusters_per_group=12,
    kmeans=KMeansConfig(num_iterations=5, points_per_cluster=1000, max_points_in_memory=1000),
)  # fmt: skip


def digest(root) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*")) if path.is_file()
    }  # fmt: skip


def test_a_split_hierarchy_is_its_definition(pool, tmp_path, ray_session, small_files, device):
    images, rows, gids = pool
    shapes = SPLIT.shapes_for(len(gids))
    assert [(s.num_clusters, s.num_groups) for s in shapes] == [(96, 8), (24, 1), (6, 1)]
    where, members = tmp_path / "run", partial(chosen, gids=gids)
    files, figures = cluster_images(Folder(str(where)), images, "vectors", Ranges(3000, 700), members, SPLIT, EXECUTION)
    # Every group has fewer rows than may be learned from at once, or this would be another sample.
    expected = hierarchical_kmeans(
        unit_rows(rows[gids]), [96, 24, 6], [1, 2, 1], num_iterations=5, split=[12, 1, 1], ids=gids
    )
    clustering = Clustering(Folder(str(tmp_path / "run")))
    found = np.concatenate([clustering.folder.read_array(name) for name in clustering.centroid_files()])
    assert found.tobytes() == expected[0].centroids.tobytes()
    assert np.array_equal(clustering.clusters_of(gids), expected[0].assignment)
    by_gid = np.full(3000, -1)
    by_gid[gids] = expected[0].assignment
    assert np.array_equal(clustering.between(650, 2200), by_gid[650:2200])
    assert np.array_equal(clustering.sizes(), expected[0].sizes)
    for level, parents in zip(expected[1:], clustering.parents(), strict=True):
        assert np.array_equal(parents, level.assignment)
    assert figures["levels"] == [len(level.centroids) for level in expected]
    assert np.array_equal(clustering.finest_of(unit_rows(rows[gids[:50]])), expected[0].assignment[:50])
    named = {file.path for file in files}
    assert named == {path for path in digest(tmp_path / "run") if not path.startswith("cells/done/")}


def _cluster_in_a_process(root, sizes, out) -> None:
    """What the killed driver runs: its own Ray, small files, and a pace at which a kill falls in the middle."""
    stage._FILE_ROWS = 256
    import curation.stages.members

    curation.stages.members.CHUNK_ROWS = 256
    from curation.engine.workers import start_ray

    start_ray(EXECUTION)
    images, rows = image_set(root, sizes)
    gids = np.arange(len(rows), dtype=np.int64)
    for name, config in CASES.items():
        cluster_images(
            Folder(str(out / name)),
            images,
            "vectors",
            Ranges(len(rows), 700),
            partial(chosen, gids=gids, size=700),
            config,
            EXECUTION,
        )


CASES = {
    "flat": ClusterConfig(levels=[40], kmeans=KMeansConfig(num_iterations=12, points_per_cluster=50)),
    "split": SPLIT,
}
KILLS = ("flat/level-1/kmeans/iteration-003.npy", "split/level-1/centroids-*.npy", "split/level-2/kmeans/rows-*")


@pytest.mark.slow
def test_a_killed_driver_goes_on_from_finished_iterations_and_groups(tmp_path):
    sizes = [700, 50, 900, 0, 850, 500]
    spawn = multiprocessing.get_context("spawn")

    def start(out):
        process = spawn.Process(target=_cluster_in_a_process, args=(tmp_path / "pool", sizes, out))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    whole.join(300)
    assert whole.exitcode == 0
    out = tmp_path / "killed"
    for pattern in KILLS:
        process = start(out)
        deadline = time.monotonic() + 120
        while not list(out.glob(pattern)):
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kept = {path: path.stat().st_mtime_ns for path in out.glob(pattern)}
        assert kept
    last = start(out)
    last.join(300)
    assert last.exitcode == 0
    assert digest(out) == digest(tmp_path / "whole")
