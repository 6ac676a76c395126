import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from curation.account import explain as module
from curation.account.explain import explain, shortest_chain
from curation.account.report.wording import visible
from curation.state import Run
from tests.tiny_run import HOSTILE, full_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return full_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def rows(run) -> list[dict]:
    return pq.read_table(run.folder.path("decisions.parquet")).to_pylist()


def told(run: Run, key: str) -> str:
    """The story on one line."""
    return " ".join(explain(run.folder.url, key).split())


def test_every_image_of_the_pool_has_a_story(run, rows):
    for row in rows:
        text = explain(run.folder.url, gid=row["gid"])
        assert text.startswith(f"{visible(row['key'])} (gid {row['gid']}): ")
        verdict = {"kept": "kept", "rejected": "rejected", "duplicate": "dropped as", "leak": "dropped, because"}
        assert verdict.get(row["status"], "not kept") in text.splitlines()[0]
        assert ("drawn by" in text) == (row["cluster"] is not None)
        assert ("shards/" in text) == (row["shard"] is not None)
        assert max(map(len, text.splitlines())) <= 300
        assert text.replace("\n", "").isprintable()


def test_same_bytes(run, rows):
    dropped = next(row for row in rows if row["key"] in ("p00", "p00-same") and row["status"] == "duplicate")
    other = {"p00": "p00-same", "p00-same": "p00"}[dropped["key"]]
    text = told(run, dropped["key"])
    assert f"dropped as a duplicate of {other}." in text
    assert "one of 2 near-duplicates" in text
    assert "Both have the very same bytes." in text


def test_a_copy_names_the_step_and_the_cosine(run, rows):
    row = next(row for row in rows if row["status"] == "duplicate" and row["reason"] != "exact")
    text = told(run, row["key"])
    assert f"represented by {visible(row['duplicate_of'])}" in text
    assert f"cosine {row['similarity']:.3f}" in text


def test_a_leak_names_what_it_matched(run, rows):
    row = next(row for row in rows if row["status"] == "leak")
    text = told(run, row["key"])
    assert f"leaks {row['eval_match']} of the evaluation set held-out" in text
    assert f"matches {row['eval_match']} of held-out" in text or f"same bytes as {row['eval_match']}" in text


def test_a_kept_image_names_every_draw_and_its_place(run):
    matches = pq.read_table(run.folder.path("retrieve/near<b>/matches.parquet")).to_pylist()
    gids = [match["gid"] for match in matches]
    gid = max(sorted(set(gids)), key=gids.count)
    text = " ".join(explain(run.folder.url, gid=gid).split())
    assert f"{gids.count(gid)} seed image" in text
    for match in matches:
        if match["gid"] == gid:
            assert f"s{match['seed_gid']:02d} (its no. {match['rank'] + 1}, cosine {match['similarity']:.3f})" in text
    assert "shard-000000.tar" in text


def test_what_was_not_drawn_says_how_near_it_came(run, rows):
    row = next(row for row in rows if row["status"] == "not_retrieved")
    text = told(run, row["key"])
    assert "no seed image of near<b>. The nearest is s" in text
    assert "its 3 draws all have" in text
    assert "not by the seed set hit" in text
    assert "not by the balanced sample" in text


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("<i>broken", "It could not be used: not an image (not in any known image format"),
        ("<i>nothing", "no image could be located there"),
        ("tiny", "A filter rejected it: too small (a side is shorter than the limit)"),
        ("scored", "A filter rejected it: score <img src=x>"),
    ],
)
def test_rejections_say_why(run, key, reason):
    text = told(run, key)
    assert "rejected as" in text
    assert reason in text


def test_hostile_keys_cannot_steer_the_terminal(run):
    for key in HOSTILE:
        text = explain(run.folder.url, key)
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert "esc\\x1b[2Jape (gid" in explain(run.folder.url, "esc\x1b[2Jape")


def test_a_key_that_repeats_is_told_for_each_image(run, rows):
    text = explain(run.folder.url, "twice")
    assert "2 images of the pool have the key twice." in text
    assert all(f"twice (gid {row['gid']})" in text for row in rows if row["key"] == "twice")


def test_mistakes_are_one_sentence(run, tmp_path):
    url = run.folder.url
    with pytest.raises(ValueError, match=r"has the key leak9: the nearest are leak\d, leak\d, leak\d\.$"):
        explain(url, "leak9")
    with pytest.raises(ValueError, match="for a row number say --gid 3"):
        explain(url, "3")
    with pytest.raises(ValueError, match="its pool has the gids 0 to"):
        explain(url, gid=10**6)
    with pytest.raises(ValueError, match="there is no folder"):
        explain(str(tmp_path / "nowhere"), "a")
    with pytest.raises(ValueError, match="is no run folder"):
        explain(str(tmp_path), "a")
    (tmp_path / "dedup").mkdir()
    (tmp_path / "dedup" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has not finished \(done: dedup\)"):
        explain(str(tmp_path), "a")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not readable"):
        explain(str(tmp_path), "a")


def test_exit_statuses(run, capsys):
    assert module.main([run.folder.url, "p01"]) == 0
    assert capsys.readouterr().out.startswith("p01 (gid ")
    assert module.main([run.folder.url, "--gid", "0"]) == 0
    assert module.main([run.folder.url, "no such key"]) == 1
    assert capsys.readouterr().err.startswith("error: no image of ")
    with pytest.raises(SystemExit) as stopped:
        module.main([run.folder.url])
    assert stopped.value.code == 2


def test_the_command(run):
    command = [sys.executable, "-m", "curation.explain", run.folder.url, "p02"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=120, check=False)
    assert done.returncode == 0
    assert done.stdout == explain(run.folder.url, "p02")


def test_shortest_chain():
    links = [(1, 2, 0.9), (2, 3, 0.8), (3, 4, 0.7), (1, 5, 0.95), (5, 4, 0.6), (8, 9, 0.9)]
    assert shortest_chain(links, 1, 4) == [(5, 0.95), (4, 0.6)]
    assert shortest_chain(links, 4, 2) == [(3, 0.7), (2, 0.8)]
    assert shortest_chain(links, 1, 1) == []
    assert shortest_chain(links, 1, 9) == []
    assert shortest_chain([(1, 2, 0.7), (1, 3, 0.8), (2, 4, 0.9), (3, 4, 0.9)], 1, 4) == [(3, 0.8), (4, 0.9)]
