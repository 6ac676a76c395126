"""The union of matches and its rules, by exchange over ranges, against the obvious code on whole arrays."""

import numpy as np
import pyarrow as pa
import pytest

from curation.engine.folder import Folder
from curation.engine.ranges import Ranges, range_file
from curation.engine.workers import ExecutionConfig
from curation.stages import groups
from curation.stages.decontaminate import MATCHES, STEPS
from curation.stages.survivors import Survivors, find_survivors, is_clustered

EXECUTION = ExecutionConfig(workers=2)
NUM, SIZE = 230, 64


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Components of every size, some filtered out, looks within components; matches of two sets."""
    root, generator = tmp_path_factory.mktemp("pool"), np.random.default_rng(3)
    passed = generator.random(NUM) < 0.9
    group = generator.integers(0, 90, NUM)
    component, representative, look = (np.full(NUM, -1) for _ in range(3))
    for number in range(90):
        members = np.flatnonzero((group == number) & passed)
        if len(members):
            component[members], representative[members] = members[0], generator.choice(members)
            kinds = generator.integers(0, 2, len(members))
            for kind in (0, 1):
                if (kinds == kind).any():
                    look[members[kinds == kind]] = members[kinds == kind][-1]
    closeness = generator.random(NUM).astype(np.float32)
    sizes = np.bincount(component[passed], minlength=NUM)
    ranges = Ranges(NUM, SIZE)
    for number in range(len(ranges)):
        own = slice(*ranges.bounds(number))
        out = ~passed[own]
        columns = [component[own], sizes[component[own]].astype(np.int32), representative[own], closeness[own],
                   np.zeros(len(out), np.uint8)]  # fmt: skip
        table = pa.table([pa.array(c, mask=out) for c in columns], schema=groups.SCHEMA)
        Folder(str(root / "dedup")).write_table(range_file("range", number), table)
        heads = pa.table({"head": pa.array(look[own], mask=out)})
        Folder(str(root / "heads")).write_table(range_file("range", number), heads)
    matches, rows = {}, []
    for name, share in (("b", 0.1), ("a", 0.15)):
        folder, files = Folder(str(root / name)), []
        for piece in range(2):
            gids = np.flatnonzero(passed & (generator.random(NUM) < share))
            similarity = generator.choice(np.array([0.5, 0.7, 0.9], np.float32), len(gids))
            steps, evaluation_gids = generator.choice(STEPS, len(gids)), generator.integers(0, 5, len(gids))
            columns = dict(zip(MATCHES.names, [gids, evaluation_gids, similarity, steps.tolist()], strict=True))
            files.append(folder.write_table(f"looks-{piece:05d}.parquet", pa.table(columns, schema=MATCHES)))
            rows += list(zip(gids.tolist(), steps.tolist(), similarity.tolist(), evaluation_gids.tolist(), strict=True))
            rows[-len(gids) :] = [(*row, name) for row in rows[-len(gids) :]]
        matches[name] = (folder, files)
    return root, ranges, matches, rows, (component, representative, look, closeness)


@pytest.mark.parametrize("mode", ["component", "direct"])
def test_union_and_rules_are_those_of_whole_arrays(pool, tmp_path, ray_session, mode):
    root, ranges, matches, rows, (component, representative, look, closeness) = pool
    best = {}
    for gid, step, similarity, evaluation_gid, name in rows:
        rank = (STEPS.index(step), -similarity, name, evaluation_gid)
        best[gid] = min(best.get(gid, (rank, step)), (rank, step))
    label = component if mode == "component" else look
    leaks = {gid: (gid, step) for gid, (_, step) in best.items()}
    for gid in sorted(best):
        for other in np.flatnonzero(label == label[gid]).tolist():
            leaks.setdefault(other, (gid, "component"))
    after = representative.copy()
    after[list(leaks)] = -1
    for old in set(leaks) & set(representative.tolist()):
        left = [gid for gid in np.flatnonzero(representative == old).tolist() if gid not in leaks]
        if left:
            after[left] = min(left, key=lambda gid: (-closeness[gid], gid))

    out = Folder(str(tmp_path / "survivors"))
    files, counts = find_survivors(
        out, Folder(str(root / "dedup")), Folder(str(root / "heads")), matches, mode, ranges, EXECUTION
    )
    found = Survivors(out)
    assert np.array_equal(found.between(0, NUM), after)
    assert np.array_equal(found.between(60, 140), after[60:140])
    table = [row for number in range(len(ranges)) for row in found.leaks(number).to_pylist()]
    assert {row["gid"]: (row["via"], row["step"]) for row in table} == leaks
    assert [row["gid"] for row in table] == sorted(leaks)
    everyone = np.arange(NUM)
    survivors = np.flatnonzero(after == everyone)
    assert np.array_equal(np.concatenate([found.gids(number) for number in range(len(ranges))]), survivors)
    assert counts["images out"] == len(survivors) == sum(found.counts())
    assert (counts["images in"], counts["leaks"]) == ((representative == everyone).sum(), len(leaks))
    assert counts["leaks, direct"] == len(best)
    clustered = [is_clustered(n, Folder(str(root / "dedup")), out, ranges) for n in range(len(ranges))]
    assert np.array_equal(np.concatenate(clustered), (representative == everyone) | (after == everyone))
    assert {file.path for file in files} == set(out.names())
