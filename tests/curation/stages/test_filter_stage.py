"""Reasons by range of gids: the same for any cut, and ranges that are there are not judged again."""

from pathlib import Path

import pytest

from curation.engine.folder import Folder
from curation.engine.manifest import Manifest
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.reading.filters import build_filters
from curation.reading.listing import find_parts
from curation.stages.embed import EmbedConfig, embed_set
from curation.stages.filter import filter_pool, read_range
from tests.conftest import picture_tar

EXECUTION = ExecutionConfig(workers=2)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> ImageSet:
    """Parts of 3, 7 and 4 images; the tars' own scores run from 0 to 0.13."""
    folder = tmp_path_factory.mktemp("pool")
    for name, seeds in {"a": range(3), "b": range(3, 10), "c": range(10, 14)}.items():
        picture_tar(folder / f"{name}.tar", seeds)
    config, out = EmbedConfig(encoder="descriptors"), Folder(str(folder / "embed"))
    files, *_ = embed_set(out, find_parts([str(folder / "*.tar")]), ["descriptors"], config, [], EXECUTION, "embed")
    return ImageSet.of(out, Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=files))


@pytest.mark.parametrize("size", [1, 4, 5, 14, 100])
def test_any_cut_gives_the_same_reasons(pool: ImageSet, tmp_path: Path, size: int) -> None:
    folder, ranges = Folder(str(tmp_path)), Ranges(14, size)
    rules = build_filters([{"kind": "score", "column": "score", "min": 0.045, "max": 0.105}])
    files, counts = filter_pool(folder, pool, rules, ranges, EXECUTION)
    assert sum(file.rows for file in files) == 14
    found = [reason for r in range(len(ranges)) for reason in read_range(folder, r, ["reason"])["reason"].to_pylist()]
    assert found == ["score_score"] * 5 + [None] * 6 + ["score_score"] * 3
    assert counts == {"images out": 6, "score_score": 8}
    start, stop = ranges.bounds(len(ranges) - 1)
    assert len(read_range(folder, len(ranges) - 1, ["bytes"])) == stop - start
    if size == 4:  # a range that is gone is judged again, and only that
        folder.delete(files[1].path)
        others = [Path(folder.path(file.path)).stat().st_mtime_ns for file in files if file is not files[1]]
        assert filter_pool(folder, pool, rules, ranges, EXECUTION) == (files, counts)
        assert others == [Path(folder.path(f.path)).stat().st_mtime_ns for f in files if f is not files[1]]
