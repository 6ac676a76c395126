"""The results of a benchmark as tables: python -m benchmarks.gpu.report FOLDER

Prints them, and keeps them under benchmarks/results/: the lines as they are, and the tables as Markdown, in two files
named by date, device and revision.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import RESULTS, by_section, facts, missed, read_results
from benchmarks.gpu.table import SECTIONS

KEPT = Path(__file__).parents[1] / "results"
_LEFT_OUT = ("section", "traceback", "seconds")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="the --out of python -m benchmarks.gpu")
    parser.add_argument("--results", type=Path, default=KEPT, help="where to keep them (default: benchmarks/results)")
    asked = parser.parse_args(arguments)
    try:
        lines = read_results(asked.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = tables(lines)
    print(text)
    asked.results.mkdir(parents=True, exist_ok=True)
    name = asked.results / file_name(facts(lines))
    shutil.copyfile(asked.folder / RESULTS, name.with_suffix(".jsonl"))
    name.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(f"\nkept: {name}.jsonl and .md")
    return 0


def file_name(run: Mapping[str, Any]) -> str:
    """gpu-2027-01-31-nvidia-h100-80gb-hbm3-0123456789ab"""
    words = (run.get("date", ""), run["device"], str(run.get("revision", ""))[:12])
    return "-".join(["gpu", *(re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in words if word)])


def tables(lines: list[dict[str, Any]]) -> str:
    """Markdown: what ran where, how each section ended, then its figures."""
    run, sections = facts(lines), list(by_section(lines))
    versions = next((line for line in lines if line.get("what") == "versions"), {})
    shown = {**run, **{name: versions[name] for name in ("torch", "triton", "cuda", "cores") if versions.get(name)}}
    blocks = [f"# {run['device']}, {run.get('date', 'no date')}", ", ".join(f"{k} {v}" for k, v in shown.items())]
    blocks.append(table([_ending(name, figures, end) for name, figures, end in sections]))
    for name, figures, _ in sections:
        blocks.append(f"## {name}: {SECTIONS[name].what}")
        blocks += [table(group) for group in alike(line for line in figures if line["what"] != "start")]
        blocks += [_failure(line) for line in figures if "traceback" in line]
    return "\n\n".join(block for block in blocks if block)


def _failure(line: Mapping[str, Any]) -> str:
    return f"{line['what']} failed:\n\n```\n{line['traceback'].strip()}\n```"


def _ending(name: str, figures: list[dict[str, Any]], end: Mapping[str, Any]) -> dict[str, Any]:
    beyond, failed = missed(figures), [line["what"] for line in figures if "traceback" in line]
    imports = next((line["import_s"] for line in figures if line["what"] == "start"), None)
    return {
        "section": f"{name}: {SECTIONS[name].what}",
        "ended": end.get("ended", "not at all"),
        "seconds": end.get("seconds"),
        "limit_s": end.get("limit_s"),
        "import_s": imports,
        "checks": sum("ok" in line for line in figures),
        "beyond tolerance": len(beyond),
        "failed": ", ".join(failed),
    }


def alike(lines: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Lines with the same fields, which make one table; in the order of their first ones."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        shown = {name: value for name, value in line.items() if name not in _LEFT_OUT}
        if len(shown) > 1:  # else it failed: its traceback is shown by itself
            groups.setdefault(tuple(shown), []).append(shown)
    return list(groups.values())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of rows with the same fields; a single row with many is turned on its side."""
    if len(rows) == 1 and len(rows[0]) > 10:
        return table([{"what": name, "is": value} for name, value in rows[0].items()])
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """Four digits of a figure; whole numbers whole."""
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
