"""results.jsonl of a benchmark: what was asked, then a line for every figure and one for the end of every section."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pretrain.watch.lines import read_lines

RESULTS, LOG = "results.jsonl", "log.txt"
Line = Mapping[str, Any]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every whole line. Raises ValueError where there is none."""
    lines = read_lines(folder / RESULTS)
    if not lines:
        raise ValueError(f"{folder} holds no {RESULTS}: give the --out folder of python -m benchmarks.gpu.")
    return lines


def facts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the whole run: date, revision, versions; and the device that its sections ran on."""
    found = next((line for line in lines if "run" in line), {})
    device = next((line["device"] for line in lines if line.get("what") == "start"), "unknown")
    return {"device": device, **found.get("run", {})}


def by_section(lines: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """Name, figures and end (how it ended, seconds) of every section that was begun."""
    for name in dict.fromkeys(line["section"] for line in lines if "section" in line):
        own = [line for line in lines if line.get("section") == name]
        figures = [line for line in own if "ended" not in line and "outcome" not in line]
        yield name, figures, next((line for line in own if "ended" in line), {})


def missed(figures: list[dict[str, Any]]) -> list[str]:
    """Checks beyond their tolerance, by name."""
    return [str(line["what"]) for line in figures if line.get("ok") is False]
