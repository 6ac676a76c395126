"""A pool of several ranges of gids has the same account as one of a single range: rows, figures, stories."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from curation.account.decisions import SCHEMA, decide
from curation.account.explain import explain
from curation.account.fates import Sources, fates
from curation.account.report.tally import Tally, tally, total
from curation.engine.folder import Folder
from curation.pipeline import run_pipeline
from curation.state import Run
from tests.tiny_run import full_run

ROWS = 7


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return full_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def cut(run: Run, tmp_path_factory) -> Run:
    """The same run, cut into ranges of 7 images."""
    out = tmp_path_factory.mktemp("cut") / "run"
    shutil.copytree(run.folder.path(), out)
    again = Run(Folder(str(out)), replace(run.config, range_rows=ROWS), run.inputs)
    run_pipeline(again)
    return again


def shards_of(run: Run) -> list[str]:
    return [file.sha256 for file in run.manifests["shards"].files]


@pytest.mark.slow
def test_the_decisions_are_a_folder_of_parts_and_the_same(run, cut):
    whole = pq.read_table(run.folder.path("decisions.parquet"))
    parts = sorted((cut.folder / "decisions.parquet").names())
    assert parts == [f"part-{number:05d}.parquet" for number in range(len(parts))]
    assert len(parts) == -(-whole.num_rows // ROWS) > 1
    table = pq.read_table(cut.folder.path("decisions.parquet"))
    assert table.schema.equals(SCHEMA)
    assert table.equals(whole)
    assert ds.dataset(cut.folder.path("decisions.parquet")).to_table().equals(whole)
    named = table.filter(pa.compute.is_valid(table["duplicate_of"]))
    across = named["gid"].to_numpy() // ROWS != named["duplicate_of_gid"].to_numpy() // ROWS
    assert across.any()  # or no key had to travel
    assert shards_of(run) == shards_of(cut)


def test_the_figures_are_sums_over_ranges(run, cut):
    one, many = (json.loads(r.folder.read_bytes("report.json")) for r in (run, cut))
    for name in ("funnel", "dedup", "clusters", "retrieve", "balance", "shards"):
        assert many[name] == one[name], name
    pages = [r.folder.read_bytes("report.html").decode() for r in (run, cut)]
    sections = [page.split("<section id='time'>")[0].split("<nav>")[1] for page in pages]
    assert sections[0] == sections[1]


def test_the_stories_are_the_same(run, cut):
    for gid in range(0, run.pool.num_images, 3):
        assert explain(cut.folder.url, gid=gid) == explain(run.folder.url, gid=gid)
    with pytest.raises(ValueError, match=r"has the key leak9: the nearest are leak\d, leak\d, leak\d\.$"):
        explain(cut.folder.url, "leak9")


def test_another_number_of_ranges_leaves_nothing_of_the_former(cut, run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(cut.folder.path(), out)
    fewer = Run(Folder(str(out)), replace(cut.config, range_rows=20), run.inputs)
    run_pipeline(fewer)
    assert len((fewer.folder / "decisions.parquet").names()) == 3
    run_pipeline(Run(Folder(str(out)), run.config, run.inputs))
    assert (out / "decisions.parquet").is_file()
    assert (out / "decisions.parquet").read_bytes() == run.folder.read_bytes("decisions.parquet")


def test_decide_goes_on_from_finished_ranges(cut, tmp_path):
    folder = Folder(str(tmp_path / "decide"))
    files, _, _ = decide(cut, folder)
    path = tmp_path / "decide" / files[1].path
    untouched = tmp_path / "decide" / files[0].path
    before = untouched.stat().st_mtime_ns
    path.unlink()
    assert decide(cut, folder)[0] == files
    assert untouched.stat().st_mtime_ns == before
    assert folder.names() == [file.path for file in files]


def test_fates_of_a_span_are_those_of_its_rows(run):
    sources, num = Sources.of(run), run.pool.num_images
    whole = fates(sources, 0, num)
    spans = [fates(sources, start, min(start + 5, num)) for start in range(0, num, 5)]
    np.testing.assert_array_equal(np.concatenate([span.place for span in spans]), whole.place)
    for name, column in whole.columns.items():
        assert pa.chunked_array([span.columns[name] for span in spans]).to_pylist() == column.to_pylist(), name


def test_a_tally_does_not_depend_on_how_rows_are_cut(run):
    rows = pq.read_table(run.folder.path("decisions.parquet"))
    drawn = np.zeros(rows.num_rows, bool)
    whole = tally(rows, drawn)
    for size in (1, 4, 17):
        parts = total(tally(rows.slice(i, size), drawn[i : i + size]) for i in range(0, rows.num_rows, size))
        assert parts.counts == whole.counts
        assert {k: v.tolist() for k, v in parts.examples.items()} == {k: v.tolist() for k, v in whole.examples.items()}
        assert sorted(parts.groups.tolist()) == sorted(whole.groups.tolist())
    assert (whole + Tally()).counts == whole.counts


def test_a_report_that_was_cut_short_goes_on_from_its_finished_ranges(cut, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(cut.folder.path(), out)
    whole = json.loads((out / "report/manifest.json").read_text())["files"]
    written = {path: path.stat().st_mtime_ns for path in (out / "decisions.parquet").iterdir()}
    for name in ("report/manifest.json", "report/tally-00001.json"):
        (out / name).unlink()
    again = Run(Folder(str(out)), cut.config, cut.inputs)
    assert [step for step, seconds in run_pipeline(again) if seconds is not None] == ["report"]
    anew = [path.name for path, at in written.items() if path.stat().st_mtime_ns != at]
    assert anew == ["part-00001.parquet"]
    assert json.loads((out / "report/manifest.json").read_text())["files"] == whole
    pages = [(folder / "report.json").read_text() for folder in (out, Path(cut.folder.path()))]
    assert [json.loads(page)["funnel"] for page in pages] == 2 * [json.loads(pages[0])["funnel"]]
