"""Retrieval: one pass for all seed sets, its recall against brute force, and leaks that are left out of draws."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from curation.engine.exchange import exchange
from curation.engine.folder import Folder
from curation.engine.manifest import Manifest
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops.cells import cells_from_arrays
from curation.ops.hierarchy import rank_in_segment
from curation.ops.kmeans import kmeans
from curation.ops.nearest import assign
from curation.ops.retrieval import first_neighbours, resolve_collisions
from curation.reading.seeds import RetrievalRule
from curation.stages import retrieve, seed_neighbours
from curation.stages.asking import Asked
from curation.stages.cluster import Clustering
from curation.stages.members import unit_rows
from curation.stages.retrieve import retrieve_set
from curation.stages.seed_neighbours import SeedQueries, certificate, find_neighbours
from curation.stages.survivors import Survivors

EXECUTION = ExecutionConfig(workers=2)
NUM, WIDTH, CELLS = 4000, 8, 80


def vectors(number: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, WIDTH))
    rows = centres[generator.integers(0, 40, number)] + 0.5 * generator.standard_normal((number, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def cells():
    rows = unit_rows(vectors(NUM, 0)).astype(np.float16)
    centroids = kmeans(unit_rows(rows), CELLS, 8).centroids
    cell = assign(unit_rows(rows), centroids)[0]
    return cells_from_arrays(rows, np.arange(NUM), cell, centroids)


def seed_set(root, name: str, number: int, seed: int, **rule) -> SeedQueries:
    folder = Folder(str(root / f"embed-{name}"))
    sizes, rows = [number // 3, number - number // 3], vectors(number, seed)
    files = [folder.write_bytes(f"index/part-{part}.parquet", b"", rows=size) for part, size in enumerate(sizes)]
    for part, some in enumerate(np.split(rows, [sizes[0]])):
        folder.write_array(f"vectors/part-{part}.npy", some)
    images = ImageSet.of(folder, Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=files))
    asked = Asked(images, np.arange(number, dtype=np.int64), "vectors")
    return SeedQueries(Folder(str(root / "retrieve" / name)), asked, RetrievalRule(**rule))


@pytest.fixture
def small(monkeypatch):
    """A sample, blocks and slices of few rows, so that small sets take the path of large ones."""
    monkeypatch.setattr(seed_neighbours, "SAMPLED_QUERIES", 400)
    monkeypatch.setattr(seed_neighbours, "BLOCK", 300)
    monkeypatch.setattr(seed_neighbours, "_SLICE_ROWS", 500)


def survivors(one: SeedQueries, survives=None) -> Survivors:
    """As the survivors step writes them, in ranges of 1,000 images."""
    survives = np.ones(NUM, bool) if survives is None else survives
    folder, gids = one.folder / "survivors", np.where(survives, np.arange(NUM), -1)
    for number, some in enumerate(np.split(gids, NUM // 1000)):
        folder.write_array(f"representative-{number:05d}.npy", some)
        folder.write_array(f"counts-{number:05d}.npy", np.array([1000, (some >= 0).sum(), 0]))
    return Survivors(folder)


def draws(one: SeedQueries, cells, survives=None) -> tuple[pa.Table, dict]:
    """What `retrieve_set` writes, of a pool whose images of one gid modulo 7 are one cluster."""
    root = one.folder / "others"
    for number in range(NUM // 1000):
        assignment = (np.arange(1000 * number, 1000 * (number + 1)) % 7).astype(np.int32)
        root.write_array(f"level-1/assignment-{number:05d}.npy", assignment)
    files, figures = retrieve_set(
        one.folder, one, cells, Clustering(root), survivors(one, survives), EXECUTION, "seeds"
    )  # fmt: skip
    assert not [name for name in one.folder.names() if name.startswith(("drawn-", "moved/", "back/"))]
    table = one.folder.read_table("matches.parquet")
    assert files[0].rows == figures["num_draws"] == table.num_rows
    assert table.equals(table.sort_by([("gid", "ascending"), ("seed_gid", "ascending")]))
    assert (table["cluster"].to_numpy() == table["gid"].to_numpy() % 7).all()
    assert figures["num_images"] == len(np.unique(table["gid"].to_numpy()))
    return table, figures


def drawn(one: SeedQueries, cells, survives=None) -> tuple[dict, dict]:
    table, figures = draws(one, cells, survives)
    lists: dict[int, list[int]] = {}
    for row in table.sort_by([("seed_gid", "ascending"), ("rank", "ascending")]).to_pylist():
        lists.setdefault(row["seed_gid"], []).append(row["gid"])
    return lists, figures


def true_lists(one: SeedQueries, k: int, survives=None) -> list[list[int]]:
    """By brute force in float64, of the vectors as they are stored; the smaller gid of equally near ones first."""
    pool, asked = unit_rows(vectors(NUM, 0)), one.asked.vectors()
    similarity = asked.astype(np.float16).astype(float) @ pool.astype(np.float16).astype(float).T
    if survives is not None:
        similarity[:, ~survives] = -2
    return np.argsort(-similarity.astype(np.float32), axis=1, kind="stable")[:, :k].tolist()


def test_recall_is_certified_and_kept(cells, tmp_path, ray_session, small, device):
    one = seed_set(tmp_path, "many", 1500, 1, k=4, target_recall=0.95)
    find_neighbours([one], cells, EXECUTION)
    lists, figures = drawn(one, cells)
    assert figures["basis"] == "sample"
    assert figures["nprobe"] < CELLS
    assert figures["num_queries"] == 400
    assert 0.95 <= figures["lower_bound"] <= figures["recall"]
    expected = true_lists(one, 4)
    hits = [len(set(lists[number]) & set(expected[number])) for number in range(1500)]
    assert sum(hits) >= figures["lower_bound"] * 4 * 1500
    for number in one.sample().tolist():  # those that were compared with everything have their very neighbours
        assert lists[number] == expected[number]


def test_few_seeds_are_answered_exactly(cells, tmp_path, ray_session, small):
    one = seed_set(tmp_path, "few", 300, 2, k=3)
    find_neighbours([one], cells, EXECUTION)
    lists, figures = drawn(one, cells)
    assert (figures["basis"], figures["recall"], figures["lower_bound"]) == ("exact", 1.0, 1.0)
    assert [lists[number] for number in range(300)] == true_lists(one, 3)


def test_sets_asked_together_are_answered_as_alone(cells, tmp_path, ray_session, small):
    rules = {"a": {"k": 2}, "b": {"k": 5, "target_recall": 0.9}}
    both = [seed_set(tmp_path / "both", name, 700, 3 + i, **rule) for i, (name, rule) in enumerate(rules.items())]
    find_neighbours(both, cells, EXECUTION)
    alone = seed_set(tmp_path / "alone", "b", 700, 4, **rules["b"])
    find_neighbours([alone], cells, EXECUTION)
    assert alone.folder.names() == both[1].folder.names()
    for name in alone.folder.names():
        assert alone.folder.read_bytes(name) == both[1].folder.read_bytes(name)
    assert certificate(alone, cells) == certificate(both[1], cells)


def test_leaks_are_left_out_and_lists_go_deeper_for_them(cells, tmp_path, ray_session, small, device):
    """Nine of ten images leak: the neighbours that were written do not suffice, and those behind them are found."""
    one = seed_set(tmp_path, "few", 40, 2, k=4)
    find_neighbours([one], cells, EXECUTION)
    survives = np.random.default_rng(5).random(NUM) < 0.1
    lists, _ = drawn(one, cells, survives)
    assert [lists[number] for number in range(40)] == true_lists(one, 4, survives)
    few = np.zeros(NUM, bool)
    few[[3, 70]] = True
    lists, figures = drawn(one, cells, few)
    assert all(sorted(gids) == [3, 70] for gids in lists.values())
    assert figures["shortfall"] == 2 * 40


def test_least_similarity_bounds_what_is_drawn(cells, tmp_path, ray_session, small):
    one = seed_set(tmp_path, "few", 100, 2, k=4, min_similarity=0.9)
    find_neighbours([one], cells, EXECUTION)
    table, _ = draws(one, cells)
    assert table["similarity"].to_numpy().min() >= 0.9
    loose = replace(one, rule=RetrievalRule(k=4))
    more, _ = draws(loose, cells)
    assert table.num_rows == (more["similarity"].to_numpy() >= 0.9).sum()


@pytest.mark.parametrize("collisions", ["drop", "next_neighbor"])
def test_collisions_are_resolved_over_all_seed_images(cells, tmp_path, ray_session, small, collisions):
    """Against the rules over whole lists: blocks and ranges of gids do not show."""
    one = seed_set(tmp_path, "many", 1200, 6, k=3, collisions=collisions)
    find_neighbours([one], cells, EXECUTION)
    survives = np.random.default_rng(7).random(NUM) < 0.9  # no list must go deeper
    table, figures = draws(one, cells, survives)
    names = ["sample.parquet", *(name for name in one.folder.names() if name.startswith("neighbours-"))]
    found = pa.concat_tables([one.folder.read_table(name) for name in names])
    query, gid, similarity = (found[name].to_numpy() for name in ("seed_gid", "gid", "similarity"))
    left = survives[gid]
    query, gid, similarity = first_neighbours(query[left], gid[left], similarity[left], one.num_drawable)
    rank = rank_in_segment(query)
    counts = resolve_collisions(query, rank, gid, similarity, 3, collisions)
    expected = sorted(zip(gid[counts].tolist(), query[counts].tolist(), rank[counts].tolist(), strict=True))
    assert [(row["gid"], row["seed_gid"], row["rank"]) for row in table.to_pylist()] == expected
    assert figures["shortfall"] == 3 * 1200 - len(expected)
    assert len(np.unique(table["gid"].to_numpy())) == len(expected)  # nothing is drawn twice


def test_draws_of_other_survivors_are_not_taken_for_ours(cells, tmp_path, ray_session, small, monkeypatch):
    """A run that was killed while it drew, and goes on after an evaluation set was added."""
    one = seed_set(tmp_path, "few", 100, 2, k=4)
    find_neighbours([one], cells, EXECUTION)
    outputs: list[str] = []

    def interrupted(*arguments, **told):
        exchange(*arguments, **told)
        outputs.extend(told["outputs"][1])
        raise KeyboardInterrupt

    monkeypatch.setattr(retrieve, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draws(one, cells)
    monkeypatch.setattr(retrieve, "exchange", exchange)
    assert set(outputs) <= set(one.folder.names())
    survives = np.random.default_rng(5).random(NUM) < 0.5
    lists, _ = drawn(one, cells, survives)
    assert [lists[number] for number in range(100)] == true_lists(one, 4, survives)
