import numpy as np
import pyarrow as pa
import pytest

from curation.reading.filters import build_filters, first_reasons


def index(**columns):
    num = len(next(iter(columns.values())))
    defaults = {
        "key": [f"k{i}" for i in range(num)],
        "sha256": [bytes([i]) * 32 for i in range(num)],
        "metadata": [None] * num,
        "width": [100] * num,
        "height": [100] * num,
        "luma_deviation": [30.0] * num,
        "status": ["ok"] * num,
        "reason": [None] * num,
    }
    return pa.table({**defaults, **columns})


def reasons(table, *entries):
    return first_reasons(table, build_filters(list(entries))).tolist()


def test_size_aspect_blank_and_the_first_reason_wins():
    table = index(width=[15, 16, 1000, 64], height=[900, 16, 100, 64], luma_deviation=[9.0, 9.0, 9.0, 0.5])
    entries = [{"kind": "size"}, {"kind": "aspect"}, {"kind": "blank"}]
    assert reasons(table, *entries) == ["too_small", None, "extreme_aspect", "blank"]
    assert reasons(table, *entries[::-1])[0] == "extreme_aspect"


def test_rejected_rows_keep_their_reason():
    table = index(width=[1, 1], status=["rejected", "ok"], reason=["damaged", None])
    assert reasons(table, {"kind": "size"}) == ["damaged", "too_small"]


def test_blocklists(tmp_path):
    listed = tmp_path / "blocked.txt"
    listed.write_text("# comment\nk1\nbad.example\n" + "02" * 32 + "\n")
    table = index(
        metadata=['{"url": "https://img.bad.example/x.jpg"}', None, "{}", '{"url": "https://notbad.example/"}']
    )
    path = str(listed)
    assert reasons(table, {"kind": "blocklist", "of": "key", "path": path}) == [None, "blocked_key", None, None]
    assert reasons(table, {"kind": "blocklist", "of": "sha256", "path": path})[2] == "blocked_sha256"
    assert reasons(table, {"kind": "blocklist", "of": "domain", "path": path}) == ["blocked_domain", None, None, None]


def test_a_changed_list_is_a_changed_setting(tmp_path):
    listed = tmp_path / "blocked.txt"
    listed.write_text("a\nb\n")
    rule = build_filters([{"kind": "blocklist", "of": "key", "path": str(listed)}])[0]
    before = rule.digest()
    listed.write_text("# in another order\nb\na\n")
    assert rule.digest() == before
    listed.write_text("a\n")
    assert rule.digest() != before


def test_score():
    table = index(metadata=['{"s": 1}', '{"s": 5.5}', '{"s": "high"}', None])
    assert reasons(table, {"kind": "score", "column": "s", "min": 2}) == ["score_s", None, None, None]
    strict = reasons(table, {"kind": "score", "column": "s", "min": 2, "missing": "reject"})
    assert strict == ["score_s", None, "no_score_s", "no_score_s"]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"kind": "sise"}, "needs a `kind`"),
        ({"kind": "size", "min_px": 3}, "size knows min_side_px"),
        ({"kind": "score"}, "needs column"),
        ({"kind": "score", "column": "s", "missing": "maybe"}, "keep or reject"),
        ({"kind": "blocklist", "of": "colour", "path": "x"}, "not of 'colour'"),
    ],
)
def test_wrong_entries(entry, words):
    with pytest.raises(ValueError, match=words):
        build_filters([entry])


def test_missing_blocklist_file():
    with pytest.raises(ValueError, match="cannot be read"):
        reasons(index(width=[1]), {"kind": "blocklist", "of": "key", "path": "/nonexistent"})


@pytest.mark.parametrize(
    "path",
    ["nomodule:f", "curation.reading.filters:nothing", "curation.reading.filters", "curation.reading.filters:np"],
)
def test_callables_that_cannot_be_imported(path):
    with pytest.raises(ValueError, match="filters: "):
        build_filters([{"kind": "pixels", "path": path}])[0].function()


def test_invariant_to_how_the_index_is_cut():
    generator = np.random.default_rng(0)
    table = index(width=generator.integers(1, 99, 50), luma_deviation=generator.uniform(0, 4, 50))
    entries = [{"kind": "size", "min_side_px": 40}, {"kind": "blank"}]
    halves = reasons(table.slice(0, 20), *entries) + reasons(table.slice(20), *entries)
    assert halves == reasons(table, *entries)
