"""The self-join where rows are alike by the thousand: its caps from their definition, whatever tile, run or product."""

from itertools import pairwise

import numpy as np
import pytest

from curation.ops import neighbours
from curation.ops.cells import cells_from_arrays, nearest_cells
from curation.ops.join import merge_pairs
from curation.ops.neighbour_kernels import MAX_HITS, MAX_NEIGHBOURS, code_width, decode_probes, encode_probes
from curation.ops.neighbours import near_rows, self_pairs
from curation.ops.sketches import radius_needed

DIM, NUM_CELLS, FLOOR = 32, 12, 0.6


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def crowd(num_rows, num_alone, num_cells=NUM_CELLS, seed=0):
    """Rows about one centre (mean cosine 0.7) spread over cells of which some are theirs, others, and their mirror."""
    rng = np.random.default_rng(seed)
    mirror = np.where(rng.random(DIM) < 0.5, -1, 1)
    centre = unit(rng.standard_normal((1, DIM)))
    x = unit(centre + 0.65 * unit(rng.standard_normal((num_rows, DIM))))
    x[: num_rows // 5] *= mirror
    x = np.concatenate([x, unit(rng.standard_normal((num_alone, DIM)))])[rng.permutation(num_rows + num_alone)]
    near = unit(centre + 0.8 * unit(rng.standard_normal((num_cells - 2, DIM))))
    centroids = np.concatenate([near, unit(rng.standard_normal((2, DIM)))]).astype(np.float32)
    half = x.astype(np.float16)
    gids = np.sort(rng.choice(20 * len(x), len(x), replace=False))
    own = nearest_cells(half.astype(np.float32), centroids, 1)[:, 0]
    return cells_from_arrays(half, gids, own, centroids), mirror


def reference(cells, nprobe, radius, mirror, asks=None):
    """The edges (a, b, similarity, mirrored) that the rows which ask keep, and who is capped: from the definition."""
    x, gids = cells.read(0, cells.num_rows), cells.read_gids(0, cells.num_rows)
    found = [{} for _ in x]
    leader = [None] * len(x)
    capped = np.zeros(len(x), bool)
    for mirrored, asked in enumerate([x] if mirror is None else [x, x * mirror.astype(np.float32)]):
        similarity = (asked.astype(np.float64) @ x.astype(np.float64).T).astype(np.float32)
        probes = nearest_cells(asked, cells.centroids, nprobe)
        sketches, own = cells.sketch(asked), cells.sketch(x)
        for row in range(len(x)) if asks is None else asks.tolist():
            total = 0
            near = np.ones(len(x), bool)
            if radius is not None:
                near = radius_needed(np.broadcast_to(sketches[row], own.shape), own) <= radius
            for cell in probes[row]:
                limit, count = 1 if total >= MAX_HITS else MAX_NEIGHBOURS, 0
                for other in range(*cells.offsets[cell : cell + 2]):
                    s = similarity[row, other]
                    if other == row or s < np.float32(FLOOR) or not near[other]:
                        continue
                    key = (-float(s), int(gids[other]), mirrored)
                    found[row][gids[other]] = min(found[row].get(gids[other], key), key)
                    if leader[row] is None or (other, key) < leader[row]:
                        leader[row] = (other, key)
                    count += 1
                    if count == limit:
                        capped[row] = True
                        break
                total += count
    edges = {}
    for row, hits in enumerate(found):
        if not hits:
            continue
        capped[row] |= len(hits) > MAX_NEIGHBOURS
        for minus, gid, mirrored in {*sorted(hits.values())[:MAX_NEIGHBOURS], leader[row][1]}:
            pair = min(gid, int(gids[row])), max(gid, int(gids[row]))
            edges[pair] = min(edges.get(pair, (0.0, 0)), (minus, mirrored))
    return [(*pair, -minus, bool(m)) for pair, (minus, m) in sorted(edges.items())], gids[capped]


def as_list(pairs):
    return list(zip(*(column.tolist() for column in pairs), strict=True))


@pytest.fixture(scope="module")
def small():
    return crowd(700, 150)


@pytest.mark.usefixtures("torch_on_one_thread")
@pytest.mark.parametrize("nprobe", [1, 5, NUM_CELLS])
@pytest.mark.parametrize("radius", [None, 170])
@pytest.mark.parametrize("with_mirror", [False, True])
def test_caps_are_the_definition(small, nprobe, radius, with_mirror):
    cells, mirror = small
    mirror = mirror if with_mirror else None
    edges, capped = reference(cells, nprobe, radius, mirror)
    assert len(capped) > 100
    for memory, device in [(2**22, None), (200_000, None), (2**22, "cpu"), (100_000, "cpu")]:
        kind = {"mirror": mirror, "max_memory_bytes": memory, "device": device}
        assert as_list(self_pairs(cells, 0, cells.num_rows, FLOOR, nprobe, radius, **kind)) == edges
        run = near_rows(cells, np.arange(cells.num_rows), FLOOR, nprobe, radius, **kind)
        np.testing.assert_array_equal(np.concatenate([rows for _, _, rows in run.pieces()]), capped)


@pytest.mark.usefixtures("torch_on_one_thread")
@pytest.mark.parametrize(("nprobe", "radius"), [(5, 170), (5, None), (NUM_CELLS, 170)])
def test_some_rows_ask_all(small, nprobe, radius, monkeypatch):
    """Those that ask find what they find when all do; pieces are cut among them."""
    cells, mirror = small
    asks = np.sort(np.random.default_rng(1).choice(cells.num_rows, 230, replace=False))
    edges, capped = reference(cells, nprobe, radius, mirror, asks)
    monkeypatch.setattr(neighbours, "PIECE_ROWS", 100)
    for memory, device, cuts in [(2**22, None, (0, 230)), (200_000, None, (0, 100, 230)), (100_000, "cpu", (0, 230))]:
        found, numbers, cap = [], [], []
        for start, stop in pairwise(cuts):
            run = near_rows(
                cells, asks[start:stop], FLOOR, nprobe, radius, start=start, mirror=mirror, max_memory_bytes=memory,
                device=device,
            )  # fmt: skip
            for number, pairs, of_capped in run.pieces():
                found, numbers, cap = [*found, pairs], [*numbers, number], [*cap, of_capped]
        assert numbers == [0, 1, 2]
        assert as_list(merge_pairs(found)) == edges
        np.testing.assert_array_equal(np.concatenate(cap), capped)


def test_pieces_are_the_same_whatever_the_run(small, monkeypatch):
    cells, mirror = small
    monkeypatch.setattr(neighbours, "PIECE_ROWS", 100)

    def pieces(start, stop):
        return near_rows(cells, np.arange(start, stop), FLOOR, 5, 170, start=start, mirror=mirror).pieces()

    whole = {n: (as_list(e), c.tolist()) for n, e, c in pieces(0, 850)}
    assert sorted(whole) == list(range(9))
    for bounds in [(0, 100, 300, 850), (0, 600, 700, 800, 850)]:
        for start, stop in pairwise(bounds):
            for number, edges, capped in pieces(start, stop):
                assert (as_list(edges), capped.tolist()) == whole[number]
    for edges, _ in whole.values():
        assert len({edge[:2] for edge in edges}) == len(edges)


@pytest.mark.parametrize(("num_cells", "nprobe"), [(1, 1), (30, 7), (3000, 3), (70_000, 2), (300, 299)])
def test_probe_codes_tell_the_probes(num_cells, nprobe):
    rng = np.random.default_rng(0)
    probes = np.sort(rng.permuted(np.tile(np.arange(num_cells), (20, 1)), axis=1)[:, :nprobe]).astype(np.int32)
    codes = np.empty((20, code_width(nprobe, num_cells)), np.uint8)
    asked = np.zeros(num_cells, np.int64)
    encode_probes(probes, codes, asked)
    np.testing.assert_array_equal(asked, np.bincount(probes.ravel(), minlength=num_cells))
    position, following = np.zeros(20, np.int32), np.zeros(20, np.int32)
    cuts = np.unique(np.concatenate([[0, num_cells], rng.integers(0, num_cells, 5)]))
    seen = [[] for _ in range(20)]
    for first, after in pairwise(cuts.tolist()):
        order, starts, stops = decode_probes(
            codes, position, following, first, after - 1, int(asked[first:after].sum())
        )
        for cell in range(first, after):
            for row in order[starts[cell - first] : stops[cell - first]]:
                seen[row].append(cell)
    assert seen == probes.tolist()


def test_time_and_memory_of_a_crowd_grow_with_its_size():
    """20,000 rows that are all alike, in one cell: each meets 64 of them and a block more, not 20,000."""
    rng = np.random.default_rng(0)
    x = unit(unit(rng.standard_normal((1, DIM))) + 0.3 * unit(rng.standard_normal((20_000, DIM)))).astype(np.float16)
    cells = cells_from_arrays(x, np.arange(20_000), np.zeros(20_000, int), x[:1].astype(np.float32))
    run = near_rows(cells, np.arange(20_000), FLOOR, 1, 200)
    ((_, edges, capped),) = run.pieces()
    assert len(capped) == 20_000
    assert len(edges.a) <= 65 * 20_000
    assert (run.lists.leader >> 1).max() == 1  # all hang on the first row, which hangs on the second
