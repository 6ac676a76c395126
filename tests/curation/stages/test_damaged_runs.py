"""A run over damaged tars, end to end: rows, counts, the report, the story, and the fraction that stops a run."""

import gzip
from pathlib import Path

import pytest

from curation.account.explain import explain
from curation.account.report.wording import reason_meaning
from curation.config import CurationConfig
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig
from curation.pipeline import run_pipeline
from curation.reading.listing import find_parts
from curation.reading.seeds import RetrievalRule, SeedSet
from curation.stages.embed import EmbedConfig
from curation.state import Inputs, Run
from tests.tiny_run import curate, jpeg, picture, write_tar


def numbered(start: int, stop: int) -> dict[str, dict[str, bytes]]:
    return {f"p{i:02d}": {"jpg": jpeg(picture(i)), "txt": b"text"} for i in range(start, stop)}


def without_end(path: Path) -> bytes:
    content = path.read_bytes().rstrip(b"\0")
    return content + bytes(-len(content) % 512)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound tar; one with six of twelve samples overwritten; one without an end; one compressed, its files apart."""
    folder = tmp_path_factory.mktemp("damaged") / "pool"
    write_tar(folder / "a.tar", numbered(0, 8))
    lost = Path(write_tar(folder / "b.tar", numbered(10, 22)))
    content = bytearray(lost.read_bytes())
    fourth, tenth = (content.index(f"{key}.jpg".encode()) for key in ("p13", "p19"))
    content[fourth:tenth] = b"\xa5" * (tenth - fourth)
    lost.write_bytes(content)
    unmarked = Path(write_tar(folder / "c.tar", numbered(30, 34)))
    unmarked.write_bytes(without_end(unmarked))
    apart = Path(write_tar(folder / "d.tar", {k: {"jpg": v["jpg"]} for k, v in numbered(40, 44).items()}))
    texts = Path(write_tar(folder.parent / "t.tar", {k: {"txt": v["txt"]} for k, v in numbered(40, 44).items()}))
    apart.write_bytes(gzip.compress(without_end(apart) + texts.read_bytes()))
    return folder


def test_damage_is_told_everywhere(ray_session: None, pool: Path, tmp_path: Path) -> None:
    seed = write_tar(tmp_path / "seed.tar", numbered(0, 4))
    run = curate(tmp_path / "run", str(pool), {"s": SeedSet(name="s", urls=(seed,), rule=RetrievalRule(k=2))})
    rows = run.folder.read_table("decisions.parquet").to_pylist()
    told = [row for row in rows if row["unread_bytes"] is not None]
    assert [(r["reason"], r["unread_bytes"] > 0, r["unread_images"]) for r in told] == [
        ("damaged_shard", True, 6),
        ("no_end_marker", False, 0),
    ]
    others = run.pool.rows(0, run.pool.num_images, ["others"])["others"].to_pylist()
    assert [len(o) for o, row in zip(others, rows, strict=True) if row["source"].endswith("d.tar")] == [1] * 4
    counts = run.manifests["embed/pool"].counts
    assert counts["images"] == len(rows) == 8 + 6 + 1 + 4 + 1 + 4
    assert (counts["damaged shards"], counts["unread images"]) == (2, 6)
    assert counts["unread bytes"] == told[0]["unread_bytes"]
    story = " ".join(explain(run.folder.url, gid=told[0]["gid"]).split())
    assert f"{told[0]['unread_bytes']:,} bytes cannot be read, about 6 images at the shard's mean size" in story
    assert reason_meaning("no_end_marker") in " ".join(explain(run.folder.url, gid=told[1]["gid"]).split())
    page = run.folder.read_bytes("report.html").decode()
    assert f"2 damaged shards: {told[0]['unread_bytes']:,} bytes cannot be read, about 6 images" in page


@pytest.mark.parametrize(("fraction", "stops"), [(0.2, True), (0.3, False)])
def test_the_fraction_that_stops_a_run_counts_what_cannot_be_read(
    ray_session: None, pool: Path, tmp_path: Path, fraction: float, stops: bool
) -> None:
    """Six of 29 are lost, in one row of 24: the row alone would stop nothing."""
    config = CurationConfig(
        embed=EmbedConfig(encoder="descriptors", max_rejected_fraction=fraction), execution=ExecutionConfig(workers=2)
    )
    run = Run(Folder(str(tmp_path / "run")), config, Inputs(find_parts([str(pool)]), {}, {}))
    if not stops:
        run_pipeline(run, "embed")
        return
    with pytest.raises(ValueError, match=r"6 of 29 images .* \(2 damaged shards, .* about 6 images\)"):
        run_pipeline(run, "embed")
