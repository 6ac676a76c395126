"""Clusters that stay: every image of the earlier run is where it was, and a new one in the cluster nearest to it."""

from functools import partial

import numpy as np
import pytest

from curation.engine.folder import Folder
from curation.engine.ownership import file_names
from curation.engine.ranges import Ranges
from curation.stages.cells_before import CellsBefore
from curation.stages.cluster import ClusterConfig, Clustering, cluster_images
from curation.stages.cluster_before import was_clustered
from curation.stages.grouped import open_cells
from curation.stages.kmeans import KMeansConfig
from curation.stages.members import unit_rows
from tests.curation.stages.test_cells_before import EXECUTION, NUM, OLD, RANGE_ROWS, SIZES, among, image_set, unit

GONE, LATE = np.array([4, 700, 1499]), np.array([3, 1000])
ONE = ClusterConfig(levels=[40], kmeans=KMeansConfig(num_iterations=3))
HIERARCHY = ClusterConfig(levels=[60, 12], num_resamplings=[1, 1], kmeans=KMeansConfig(num_iterations=3))
SPLIT = ClusterConfig(
    levels=[60, 12], num_resamplings=[1, 1], clusters_per_group=20,
    kmeans=KMeansConfig(num_iterations=3, max_points_in_memory=1000),
)  # fmt: skip


@pytest.fixture(scope="module")
def pool(tmp_path_factory, ray_session):
    generator = np.random.default_rng(3)
    rows = unit(generator.standard_normal((NUM, 8))).astype(np.float16)
    root = Folder(str(tmp_path_factory.mktemp("clusters")))
    return root, rows, image_set(root / "old", SIZES[:3], rows), image_set(root / "now", SIZES, rows)


@pytest.mark.parametrize(("name", "config"), [("one", ONE), ("hierarchy", HIERARCHY), ("split", SPLIT)])
def test_clusters_keep_their_images(pool, name, config):
    root, rows, old_images, images = pool
    was, ranges = np.setdiff1d(np.arange(OLD), LATE), Ranges(OLD, RANGE_ROWS)
    old = root / name
    cluster_images(old, old_images, "vectors", ranges, partial(among, gids=was, ranges=ranges), config, EXECUTION)
    before = CellsBefore(old, partial(was_clustered, folder=old), ranges)
    members, ranges = np.setdiff1d(np.arange(NUM), GONE), Ranges(NUM, RANGE_ROWS)
    folder = root / f"{name}-extended"
    chosen = partial(among, gids=members, ranges=ranges)
    files, figures = cluster_images(folder, images, "vectors", ranges, chosen, config, EXECUTION, before)

    earlier, now = Clustering(old), Clustering(folder)
    assert (folder / "level-1").exists("groups.npy") == (name == "split")
    assert figures["levels"] == [len(earlier.sizes(level + 1)) for level in range(earlier.num_levels)]
    had, has = earlier.between(0, OLD), now.between(0, NUM)
    stay = np.setdiff1d(was, GONE)
    np.testing.assert_array_equal(has[stay], had[stay])
    assert (has[GONE] == -1).all()
    new = np.array([*LATE, *range(OLD, NUM)])
    np.testing.assert_array_equal(has[new], earlier.finest_of(unit_rows(rows[new])))
    np.testing.assert_array_equal(now.sizes(), np.bincount(has[members], minlength=len(earlier.sizes())))
    for one, other in zip(earlier.parents(), now.parents(), strict=True):
        np.testing.assert_array_equal(one, other)
    cells = open_cells(folder)
    np.testing.assert_array_equal(np.sort(cells.read_gids(0, cells.num_rows)), members)
    np.testing.assert_array_equal(cells.centroids, open_cells(old).centroids)
    assert sorted(file.path for file in files) == [n for n in folder.names() if not n.startswith("cells/done/")]
    folder.clear(file_names("cluster"))  # every file has a name of ours
