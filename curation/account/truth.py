"""Score a finished run against a pool whose truth is known: python -m curation.truth RUN TRUTH.csv [TRUTH.csv ...]

What is counted:

- *Pairs.* Two images are found near-duplicates when they share a component. Precision is the share of found pairs that
  share a truth cluster; over natural images, because screens, charts and emblems are often alike with nothing planted.
- *Copies.* A planted copy (`duplicate_of` is set, `leak_of` is not) is found when its component holds another member
  of its truth cluster, or when the run's `duplicate_of` names one. It does not count for or against when it could not
  be compared: itself, or every other member of its cluster, left as rejected or as a leak without a component.
- *Clusters.* Of the planted groups with at least two comparable members, how many have exactly one survivor of
  deduplication (status kept or not_retrieved).
- *Kinds.* The kept share of natural images and of junk. Their ratio (`natural_over_junk`) and the natural share of
  what was kept over that of the pool (`lift`) say what retrieval did. Copies are in both, as they are in the pool.
  `sure_junk` leaves out rows that the truth marks as borderline.
- *Leaks.* Copies of evaluation images, verbatim (`transform` is exact) and edited: how many are still kept.
- *Damage.* Every row with a defect: `reject` and `reject_no_alloc` must be rejected; `ok`, `ok_convert`,
  `ok_first_frame` and `ok_rotate` must not be; `ok_filter` and `ok_or_reject` may be either. Rejections of the other
  rows, sound ones, are a figure and not an error, since filters may drop them.
"""

import argparse
import csv
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MUST_REJECT = {"reject", "reject_no_alloc"}
MUST_DECODE = {"ok", "ok_convert", "ok_first_frame", "ok_rotate"}
MAY_REJECT = {"ok_filter", "ok_or_reject"}
STATUSES = ("kept", "rejected", "duplicate", "leak", "not_retrieved")
SURVIVED = {"kept", "not_retrieved"}
NEEDED = ("key", "status", "component", "duplicate_of")


@dataclass(frozen=True, kw_only=True)
class TruthRow:
    """What is known of one pool image; empty where nothing is."""

    key: str
    kind: str = ""
    is_junk: bool = False
    borderline: bool = False
    label: str = ""
    in_seed: bool | None = None
    duplicate_of: str = ""
    cluster: str = ""
    transform: str = ""
    leak_of: str = ""
    defect: str = ""
    expect: str = ""


@dataclass(frozen=True)
class Truth:
    """Rows by key."""

    rows: dict[str, TruthRow]


@dataclass(frozen=True, kw_only=True)
class _Decision:
    status: str
    component: int | None
    duplicate_of: str


def read_truth(*paths: Path | str) -> Truth:
    """Read truth files with a `key` column and any of the columns of TruthRow; others are passed over.

    Raises:
        ValueError: a file is not such a csv, or a key is in the files twice.
    """
    rows: dict[str, TruthRow] = {}
    for path in paths:
        for line in _csv_rows(Path(path)):
            row = _truth_row(line, path)
            if row.key in rows:
                raise ValueError(f"{path}: the key {row.key} is in the truth twice; every pool image has one row.")
            rows[row.key] = row
    return Truth(rows)


def score(decisions: pa.Table, truth: Truth) -> dict:
    """Every figure of the module's description, as plain numbers, strings, lists and dicts.

    Args:
        decisions: one row per pool image; the columns in NEEDED, as decisions.parquet has them. A component of null
            or -1 means alone.
        truth: of the same pool.

    Raises:
        ValueError: a column is missing, or a status is unknown.
    """
    found, account = _decisions_by_key(decisions, truth)
    rows = [row for key, row in truth.rows.items() if key in found]
    return {
        "account": account,
        "pairs": {
            "natural": _pairs([row for row in rows if row.kind == "natural"], found),
            "all": _pairs(rows, found),
        },
        "copies": _copies(rows, found),
        "clusters": _clusters(rows, found),
        "kinds": _kinds(rows, found),
        "seed_concepts": _seed_concepts(rows, found),
        "leaks": _leaks(rows, found),
        "damage": _damage(rows, found),
    }


def _decisions_by_key(decisions: pa.Table, truth: Truth) -> tuple[dict[str, _Decision], dict]:
    missing = [name for name in NEEDED if name not in decisions.column_names]
    if missing:
        known = ", ".join(decisions.column_names)
        raise ValueError(f"The decisions have no column {', '.join(missing)}; they have {known}.")
    columns = [decisions.column(name).to_pylist() for name in NEEDED]
    unknown = sorted(set(columns[1]) - set(STATUSES), key=str)
    if unknown:
        raise ValueError(f"The decisions have the status {unknown[0]!r}; known are {', '.join(STATUSES)}.")
    found = {}
    for key, status, component, duplicate_of in zip(*columns, strict=True):
        alone = component is None or component < 0
        found[key] = _Decision(status=status, component=None if alone else component, duplicate_of=duplicate_of or "")
    counts = Counter(columns[0])
    account = {
        "in_truth": len(truth.rows),
        "decided": len(columns[0]),
        "missing": sorted(key for key in truth.rows if key not in counts),
        "twice": sorted(key for key, count in counts.items() if count > 1),
        "unknown": sorted(key for key in counts if key not in truth.rows),
        "statuses": {status: columns[1].count(status) for status in STATUSES},
    }
    account["exactly_once"] = not (account["missing"] or account["twice"] or account["unknown"])
    return found, account


def _pairs(rows: Sequence[TruthRow], found: dict[str, _Decision]) -> dict:
    """Counts of pairs among these rows: found together, planted together, both; from group sizes, no pair is listed."""
    components = Counter(found[row.key].component for row in rows if found[row.key].component is not None)
    clusters = Counter(row.cluster for row in rows if row.cluster)
    both = Counter(
        (found[row.key].component, row.cluster) for row in rows if row.cluster and found[row.key].component is not None
    )
    every = (sum(n * (n - 1) // 2 for n in groups.values()) for groups in (components, clusters, both))
    num_found, num_planted, right = every
    rates = {"precision": _ratio(right, num_found), "recall": _ratio(right, num_planted)}
    return {"found": num_found, "planted": num_planted, "right": right, **rates}


def _comparable(row: TruthRow, found: dict[str, _Decision]) -> bool:
    decision = found[row.key]
    return decision.component is not None or decision.status not in ("rejected", "leak")


def _copies(rows: Sequence[TruthRow], found: dict[str, _Decision]) -> dict:
    members = _by_cluster(rows)
    by_transform: dict[str, list[bool]] = defaultdict(list)
    not_compared = 0
    missed = []
    for row in rows:
        if not row.duplicate_of or row.leak_of:
            continue
        others = [other for other in members[row.cluster] if other is not row and _comparable(other, found)]
        if not others or not _comparable(row, found):
            not_compared += 1
            continue
        mine = found[row.key]
        together = any(found[other.key].component == mine.component is not None for other in others)
        hit = together or mine.duplicate_of in {other.key for other in others}
        by_transform[row.transform or "unnamed"].append(hit)
        if not hit:
            missed.append(row.key)
    order = sorted(by_transform, key=lambda name: (-len(by_transform[name]), name))
    return {
        **_found_of([hit for group in by_transform.values() for hit in group]),
        "not_compared": not_compared,
        "by_transform": {name: _found_of(by_transform[name]) for name in order},
        "missed": sorted(missed),
    }


def _found_of(hits: list[bool]) -> dict:
    return {"compared": len(hits), "found": sum(hits), "recall": _ratio(sum(hits), len(hits))}


def _clusters(rows: Sequence[TruthRow], found: dict[str, _Decision]) -> dict:
    survivors = Counter()
    for group in _by_cluster(rows).values():
        compared = [row for row in group if _comparable(row, found)]
        if len(compared) > 1:
            number = sum(found[row.key].status in SURVIVED for row in compared)
            survivors["none" if number == 0 else "one" if number == 1 else "several"] += 1
    total = sum(survivors.values())
    counts = {name: survivors[name] for name in ("one", "several", "none")}
    return {"compared": total, **counts, "exactly_one": _ratio(survivors["one"], total)}


def _kinds(rows: Sequence[TruthRow], found: dict[str, _Decision]) -> dict:
    """Kept shares. Of the deduplicated images alone, `retrieved` is the share that retrieval chose."""
    groups: dict[str, list[TruthRow]] = defaultdict(list)
    for row in rows:
        if row.kind == "natural" or row.is_junk:
            groups[row.kind].append(row)
    natural, junk = groups.get("natural", []), [row for row in rows if row.is_junk]
    shares = {
        "natural": _kept(natural, found),
        "junk": _kept(junk, found),
        "sure_junk": _kept([row for row in junk if not row.borderline], found),
        "by_kind": {name: _kept(group, found) for name, group in sorted(groups.items(), key=lambda g: -len(g[1]))},
    }
    kept_natural, kept_junk = shares["natural"]["kept"], shares["junk"]["kept"]
    in_kept, in_pool = _ratio(kept_natural, kept_natural + kept_junk), _ratio(len(natural), len(natural) + len(junk))
    return {
        **shares,
        "natural_over_junk": _ratio(shares["natural"]["kept_share"], shares["junk"]["kept_share"]),
        "natural_share_of_kept": in_kept,
        "natural_share_of_pool": in_pool,
        "lift": _ratio(in_kept, in_pool),
    }


def _kept(rows: Sequence[TruthRow], found: dict[str, _Decision]) -> dict:
    statuses = Counter(found[row.key].status for row in rows)
    kept, survived = statuses["kept"], statuses["kept"] + statuses["not_retrieved"]
    return {"pool": len(rows), "kept": kept, "kept_share": _ratio(kept, len(rows)), "retrieved": _ratio(kept, survived)}


def _seed_concepts(rows: Sequence[TruthRow], found: dict[str, _Decision]) -> dict | None:
    """How much of the kept natural images shows a concept of the seed set; None where truth does not say."""
    natural = [row for row in rows if row.kind == "natural" and row.in_seed is not None]
    if not natural:
        return None
    inside, outside = [row for row in natural if row.in_seed], [row for row in natural if not row.in_seed]
    seen, other = _kept(inside, found), _kept(outside, found)
    purity, share = _ratio(seen["kept"], seen["kept"] + other["kept"]), _ratio(len(inside), len(natural))
    labels = sorted({row.label for row in natural})
    by_label = {label: _kept([row for row in natural if row.label == label], found) for label in labels}
    for row in natural:
        by_label[row.label]["in_seed"] = row.in_seed
    figures = {"purity": purity, "share_of_pool": share, "lift": _ratio(purity, share)}
    return {**figures, "in_seed": seen, "other": other, "by_label": by_label}


def _leaks(rows: Sequence[TruthRow], found: dict[str, _Decision]) -> dict:
    scores = {}
    for name in ("verbatim", "edited"):
        group = [row for row in rows if row.leak_of and (row.transform == "exact") == (name == "verbatim")]
        statuses = Counter(found[row.key].status for row in group)
        kept = sorted(row.key for row in group if found[row.key].status == "kept")
        gone = len(group) - statuses["leak"] - len(kept)
        scores[name] = {"planted": len(group), "caught": statuses["leak"], "gone_otherwise": gone, "kept": kept}
    false = [row.key for row in rows if not row.leak_of and found[row.key].status == "leak"]
    return {**scores, "not_planted": sorted(false)}


def _damage(rows: Sequence[TruthRow], found: dict[str, _Decision]) -> dict:
    by_expect: dict[str, Counter] = defaultdict(Counter)
    wrong = []
    sound = [row for row in rows if not row.defect]
    for row in rows:
        if not row.defect:
            continue
        rejected = found[row.key].status == "rejected"
        right = row.expect in MAY_REJECT or rejected == (row.expect in MUST_REJECT)
        by_expect[row.expect]["right" if right else "wrong"] += 1
        if not right:
            wrong.append({"key": row.key, "defect": row.defect, "expect": row.expect, "status": found[row.key].status})
    sound_rejected = sorted(row.key for row in sound if found[row.key].status == "rejected")
    return {
        "right": sum(counts["right"] for counts in by_expect.values()),
        "wrong": wrong,
        "by_expect": {name: {"right": c["right"], "wrong": c["wrong"]} for name, c in sorted(by_expect.items())},
        "sound": len(sound),
        "sound_rejected": sound_rejected,
    }


def format_score(scores: dict) -> str:
    """The figures as a table for the terminal, a few lines a subject."""
    account, pairs, copies, clusters = scores["account"], scores["pairs"], scores["copies"], scores["clusters"]
    kinds, seed, leaks, damage = scores["kinds"], scores["seed_concepts"], scores["leaks"], scores["damage"]
    lines: list[tuple[str, str, str]] = []  # figure, value, in words

    def add(figure: str, value: float | None, words: str) -> None:
        lines.append((figure, "-" if value is None else f"{value:.3f}", words))

    for name in ("natural", "all"):
        part = pairs[name]
        add(
            f"pair precision, {name}", part["precision"], f"{part['right']} of {part['found']} pairs found were planted"
        )
    add(
        "copy recall",
        copies["recall"],
        f"{copies['found']} of {copies['compared']} ({copies['not_compared']} not compared)",
    )
    for name, part in copies["by_transform"].items():
        add(f"  {name}", part["recall"], f"{part['found']} of {part['compared']}")
    words = f"{clusters['one']} of {clusters['compared']}; {clusters['several']} keep several, {clusters['none']} none"
    add("groups with one survivor", clusters["exactly_one"], words)
    for name in ("natural", "junk", "sure_junk"):
        if name != "sure_junk" or kinds["sure_junk"] != kinds["junk"]:
            words = f"{kinds[name]['kept']} of {kinds[name]['pool']}"
            add(f"kept, {name.replace('_', ' ')}", kinds[name]["kept_share"], words)
    for name, part in kinds["by_kind"].items():
        if name != "natural":
            add(f"  {name}", part["kept_share"], f"{part['kept']} of {part['pool']}")
    of_kept, of_pool = _percent(kinds["natural_share_of_kept"]), _percent(kinds["natural_share_of_pool"])
    words = f"natural images are {of_kept} of the kept, {of_pool} of the pool"
    add("lift of natural", kinds["lift"], words)
    if seed is not None:
        words = f"of the kept show a concept of the seed set; {_percent(seed['share_of_pool'])} of the pool"
        add("seed-concept purity", seed["purity"], words)
    for name in ("verbatim", "edited"):
        part = leaks[name]
        words = f"of {part['planted']} are kept; {part['caught']} caught, {part['gone_otherwise']} gone otherwise"
        lines.append((f"leaks kept, {name}", str(len(part["kept"])), words))
    lines.append(("leaks not planted", str(len(leaks["not_planted"])), "dropped as leaks; truth names no such copy"))
    wrong = "; ".join(f"{w['key']} {w['defect']}: {w['status']}, expected {w['expect']}" for w in damage["wrong"])
    lines.append(
        ("damaged files right", str(damage["right"]), f"{len(damage['wrong'])} wrong{': ' + wrong if wrong else ''}")
    )
    lines.append(("sound files rejected", str(len(damage["sound_rejected"])), f"of {damage['sound']}"))
    faults = ", ".join(f"{len(account[name])} {name}" for name in ("missing", "twice", "unknown"))
    words = f"{account['decided']} decisions for {account['in_truth']} images ({faults})"
    lines.append(("accounted exactly once", "yes" if account["exactly_once"] else "NO", words))
    wide = max(len(figure) for figure, _, _ in lines)
    return "\n".join(f"{figure:<{wide}}  {value:>6}  {words}" for figure, value, words in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m curation.truth", description="Score a run against known truth.")
    parser.add_argument("run", type=Path, help="run folder with decisions.parquet")
    parser.add_argument("truth", type=Path, nargs="+", help="csv with a row for every pool image")
    asked = parser.parse_args(arguments)
    path = asked.run / "decisions.parquet"
    try:
        truth = read_truth(*asked.truth)
        if not path.exists():
            raise ValueError(f"{asked.run} has no decisions.parquet; finish the run first, or name another folder.")
        print(format_score(score(pq.read_table(path, columns=list(NEEDED)), truth)))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _csv_rows(path: Path) -> Iterable[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise ValueError(f"There is no truth file {path}; give a csv with a row for every pool image.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} is not a csv in UTF-8 ({error}); give a csv with a row for every pool image."
        ) from None
    if not rows or "key" not in rows[0]:
        raise ValueError(f"{path} has no rows with a column `key`; give a csv with a row for every pool image.")
    return rows


def _truth_row(line: dict[str, str], path: Path | str) -> TruthRow:
    def cell(name: str) -> str:
        return line.get(name) or ""

    expect = cell("expect")
    if expect and expect not in MUST_REJECT | MUST_DECODE | MAY_REJECT:
        known = ", ".join(sorted(MUST_REJECT | MUST_DECODE | MAY_REJECT))
        raise ValueError(f"{path}: {line['key']} expects {expect!r}; known are {known}.")
    named = {name: cell(name) for name in ("kind", "label", "duplicate_of", "cluster", "transform", "leak_of")}
    return TruthRow(
        key=line["key"],
        is_junk=cell("is_junk") == "1",
        borderline=cell("borderline") == "1",
        in_seed=None if cell("in_seed") == "" else cell("in_seed") == "1",
        defect=cell("defect") if expect else "",
        expect=expect,
        **named,
    )


def _by_cluster(rows: Sequence[TruthRow]) -> dict[str, list[TruthRow]]:
    groups: dict[str, list[TruthRow]] = defaultdict(list)
    for row in rows:
        if row.cluster:
            groups[row.cluster].append(row)
    return groups


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
