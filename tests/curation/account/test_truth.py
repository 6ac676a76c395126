"""Hand-made decisions whose scores can be counted on paper."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.account.truth import Truth, TruthRow, format_score, main, read_truth, score


def decisions(*rows: tuple) -> pa.Table:
    """Rows of (key, status, component, duplicate_of)."""
    names = ("key", "status", "component", "duplicate_of")
    types = (pa.string(), pa.string(), pa.int64(), pa.string())
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(names, map(pa.array, columns, types), strict=True)))


def truth(*rows: TruthRow) -> Truth:
    return Truth({row.key: row for row in rows})


def natural(key: str, cluster: str = "", transform: str = "", **more) -> TruthRow:
    original = cluster if transform else ""
    return TruthRow(key=key, kind="natural", cluster=cluster, duplicate_of=original, transform=transform, **more)


def test_a_perfect_run_scores_one_everywhere():
    known = truth(
        natural("a", "a", in_seed=True),
        natural("b", "a", "crop", in_seed=True),
        natural("c", in_seed=False),
        natural("d", transform="exact", leak_of="e1"),
        TruthRow(key="x", kind="ui", is_junk=True),
        TruthRow(key="bad", defect="zero_bytes", expect="reject"),
    )
    scores = score(
        decisions(
            ("a", "kept", 0, None),
            ("b", "duplicate", 0, "a"),
            ("c", "not_retrieved", None, None),
            ("d", "leak", -1, None),
            ("x", "not_retrieved", None, None),
            ("bad", "rejected", None, None),
        ),
        known,
    )
    assert scores["pairs"]["natural"] == {"found": 1, "planted": 1, "right": 1, "precision": 1.0, "recall": 1.0}
    assert scores["copies"]["recall"] == 1.0
    assert scores["clusters"]["exactly_one"] == 1.0
    assert scores["seed_concepts"]["purity"] == 1.0
    assert scores["seed_concepts"]["share_of_pool"] == pytest.approx(2 / 3)
    assert scores["leaks"]["verbatim"] == {"planted": 1, "caught": 1, "gone_otherwise": 0, "kept": []}
    assert scores["damage"]["right"] == 1
    assert scores["damage"]["wrong"] == []
    assert scores["account"]["exactly_once"]
    assert scores["kinds"]["natural"] == {"pool": 4, "kept": 1, "kept_share": 0.25, "retrieved": 0.5}
    assert scores["kinds"]["natural_over_junk"] is None  # no junk kept: no ratio


def test_pairs_count_every_two_images_of_a_component():
    """Component 0 holds three of cluster a and two of cluster b: 10 pairs, 3 + 1 right; a fourth of a is missed."""
    known = truth(
        *(natural(key, "a1", "" if key == "a1" else "crop") for key in ("a1", "a2", "a3", "a4")),
        *(natural(key, "b1", "" if key == "b1" else "crop") for key in ("b1", "b2")),
    )
    table = decisions(*((key, "kept", 0, None) for key in ("a1", "a2", "a3", "b1", "b2")), ("a4", "kept", None, None))
    pairs = score(table, known)["pairs"]["natural"]
    assert pairs == {"found": 10, "planted": 7, "right": 4, "precision": 0.4, "recall": pytest.approx(4 / 7)}


def test_pair_precision_leaves_junk_out_of_the_natural_figure_only():
    known = truth(natural("a"), natural("b"), TruthRow(key="x", kind="ui", is_junk=True))
    table = decisions(("a", "kept", None, None), ("b", "kept", 1, None), ("x", "duplicate", 1, "b"))
    pairs = score(table, known)["pairs"]
    assert pairs["natural"]["found"] == 0
    assert pairs["natural"]["precision"] is None
    assert pairs["all"]["found"] == 1
    assert pairs["all"]["precision"] == 0.0


def test_images_alone_are_no_pair():
    """Null and -1 both mean alone; neither is a component that two images share."""
    known = truth(natural("a", "a"), natural("b", "a", "blur"), natural("c", "c"), natural("d", "c", "blur"))
    table = decisions(*((key, "kept", part, None) for key, part in zip("abcd", (None, None, -1, -1), strict=True)))
    scores = score(table, known)
    assert scores["pairs"]["natural"]["found"] == 0
    assert scores["copies"] == {
        "compared": 2,
        "found": 0,
        "recall": 0.0,
        "not_compared": 0,
        "by_transform": {"blur": {"compared": 2, "found": 0, "recall": 0.0}},
        "missed": ["b", "d"],
    }
    assert scores["clusters"] == {"compared": 2, "one": 0, "several": 2, "none": 0, "exactly_one": 0.0}


@pytest.mark.parametrize(
    ("original", "copy", "expected"),
    [
        (("kept", 5, None), ("duplicate", 5, "a"), (1, 1)),
        (("duplicate", 5, "b"), ("kept", 5, None), (1, 1)),  # which one survives is free
        (("kept", None, None), ("duplicate", None, "a"), (1, 1)),  # named, though no component is given
        (("kept", None, None), ("duplicate", 7, "other"), (1, 0)),  # swallowed by a stranger
        (("leak", 5, None), ("leak", 5, None), (1, 1)),  # compared before it was dropped
        (("rejected", None, None), ("kept", None, None), (0, 0)),  # nothing to compare with
        (("kept", None, None), ("rejected", None, None), (0, 0)),
        (("kept", None, None), ("leak", None, None), (0, 0)),
        (("not_retrieved", 1, None), ("not_retrieved", 2, None), (1, 0)),
    ],
)
def test_when_a_copy_counts_as_found(original, copy, expected):
    known = truth(natural("a", "a"), natural("b", "a", "crop"), natural("other"))
    scores = score(decisions(("a", *original), ("b", *copy), ("other", "kept", 7, None)), known)
    assert (scores["copies"]["compared"], scores["copies"]["found"]) == expected
    assert scores["copies"]["not_compared"] == 1 - expected[0]


def test_kept_shares_and_lift():
    """Half of four natural and a quarter of four junk are kept: natural is 2/3 of the kept and 1/2 of the pool."""
    known = truth(
        *(natural(f"n{i}") for i in range(4)),
        *(TruthRow(key=f"j{i}", kind="painting" if i else "ui", is_junk=True, borderline=i > 0) for i in range(4)),
    )
    status = {"n0": "kept", "n1": "kept", "j0": "kept", "n2": "duplicate"}
    table = decisions(*((key, status.get(key, "not_retrieved"), None, None) for key in known.rows))
    kinds = score(table, known)["kinds"]
    assert kinds["natural"] == {"pool": 4, "kept": 2, "kept_share": 0.5, "retrieved": pytest.approx(2 / 3)}
    assert kinds["junk"] == {"pool": 4, "kept": 1, "kept_share": 0.25, "retrieved": 0.25}
    assert kinds["sure_junk"]["pool"] == 1
    assert kinds["natural_over_junk"] == 2.0
    assert kinds["lift"] == pytest.approx((2 / 3) / (1 / 2))
    assert kinds["by_kind"]["painting"]["kept"] == 0


def test_leaks_by_kind_and_those_that_no_truth_names():
    known = truth(
        natural("v1", transform="exact", leak_of="e1"),
        natural("v2", transform="exact", leak_of="e2"),
        natural("w1", transform="crop", leak_of="e3"),
        natural("w2", transform="crop", leak_of="e4"),
        natural("n"),
    )
    statuses = {"v1": "leak", "v2": "kept", "w1": "not_retrieved", "w2": "leak", "n": "leak"}
    leaks = score(decisions(*((key, status, None, None) for key, status in statuses.items())), known)["leaks"]
    assert leaks["verbatim"] == {"planted": 2, "caught": 1, "gone_otherwise": 0, "kept": ["v2"]}
    assert leaks["edited"] == {"planted": 2, "caught": 1, "gone_otherwise": 1, "kept": []}
    assert leaks["not_planted"] == ["n"]


@pytest.mark.parametrize(
    ("expect", "status", "right"),
    [
        ("ok", "kept", True),
        ("ok", "rejected", False),
        ("ok_convert", "duplicate", True),
        ("ok_first_frame", "rejected", False),
        ("ok_rotate", "not_retrieved", True),
        ("ok_filter", "rejected", True),
        ("ok_filter", "kept", True),
        ("ok_or_reject", "rejected", True),
        ("ok_or_reject", "leak", True),
        ("reject", "rejected", True),
        ("reject", "kept", False),
        ("reject_no_alloc", "not_retrieved", False),
    ],
)
def test_what_is_right_for_a_damaged_file(expect, status, right):
    known = truth(TruthRow(key="a", defect="some", expect=expect))
    damage = score(decisions(("a", status, None, None)), known)["damage"]
    assert damage["right"] == int(right)
    assert damage["by_expect"] == {expect: {"right": int(right), "wrong": int(not right)}}
    assert damage["wrong"] == ([] if right else [{"key": "a", "defect": "some", "expect": expect, "status": status}])


def test_sound_images_that_were_rejected_are_a_figure():
    damage = score(decisions(("a", "rejected", None, None)), truth(natural("a", expect="ok")))["damage"]
    assert damage["sound_rejected"] == ["a"]
    assert damage["wrong"] == []


def test_every_key_is_accounted_for_once():
    known = truth(natural("a"), natural("b"), natural("c"))
    table = decisions(
        ("a", "kept", None, None), ("b", "kept", None, None), ("b", "kept", None, None), ("z", "kept", None, None)
    )
    account = score(table, known)["account"]
    assert (account["missing"], account["twice"], account["unknown"]) == (["c"], ["b"], ["z"])
    assert not account["exactly_once"]


def test_the_order_of_decisions_changes_nothing():
    known = truth(
        natural("a", "a"), natural("b", "a", "crop"), natural("c"), TruthRow(key="x", kind="ui", is_junk=True)
    )
    rows = [("a", "kept", 0, None), ("b", "duplicate", 0, "a"), ("c", "kept", 0, None), ("x", "kept", None, None)]
    assert score(decisions(*rows), known) == score(decisions(*reversed(rows)), known)


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match="no column component"):
        score(decisions(("a", "kept", 0, None)).drop_columns(["component"]), truth(natural("a")))
    with pytest.raises(ValueError, match="status 'lost'"):
        score(decisions(("a", "lost", 0, None)), truth(natural("a")))


def test_truth_files_of_several_layouts_are_read(tmp_path):
    pool = tmp_path / "pool.csv"
    pool.write_text(
        "key,sha256,kind,is_junk,borderline,label,duplicate_of,cluster,transform,leak_of,license\n"
        "a,00,natural,0,0,dog,,a,,,CC0\n"
        "b,01,natural,0,0,dog,a,a,crop,,CC0\n"
        "c,02,painting,1,1,,,,,,CC0\n"
    )
    damaged = tmp_path / "damaged.csv"
    damaged.write_text("key,member,bytes,defect,expect\nbad_café,bad.jpg,0,zero_bytes,reject\n", encoding="utf-8")
    rows = read_truth(pool, damaged).rows
    assert rows["b"] == TruthRow(key="b", kind="natural", label="dog", duplicate_of="a", cluster="a", transform="crop")
    assert rows["c"].is_junk
    assert rows["c"].borderline
    assert rows["c"].in_seed is None
    assert rows["bad_café"] == TruthRow(key="bad_café", defect="zero_bytes", expect="reject")
    with pytest.raises(ValueError, match="key a is in the truth twice"):
        read_truth(pool, pool)


def test_truth_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no truth file"):
        read_truth(tmp_path / "none.csv")
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("name,label\na,b\n")
    with pytest.raises(ValueError, match="column `key`"):
        read_truth(wrong)
    wrong.write_text("key,expect\na,perhaps\n")
    with pytest.raises(ValueError, match="expects 'perhaps'; known are ok, "):
        read_truth(wrong)


def test_the_command_prints_a_table_or_one_sentence(tmp_path, capsys):
    known = tmp_path / "truth.csv"
    known.write_text("key,kind,is_junk,duplicate_of,cluster,transform\na,natural,0,,a,\nb,natural,0,a,a,crop\n")
    assert main([str(tmp_path), str(known)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    table = decisions(("a", "kept", 0, None), ("b", "duplicate", 0, "a"))
    pq.write_table(table, tmp_path / "decisions.parquet")
    assert main([str(tmp_path), str(known)]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == format_score(score(table, read_truth(known)))
    assert "1.000" in shown.split("copy recall")[1].splitlines()[0]
    (tmp_path / "decisions.parquet").write_bytes(b"not parquet")
    assert main([str(tmp_path), str(known)]) == 2
