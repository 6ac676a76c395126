"""benchmarks/records/EXPERIMENT/VARIANT-seedN: all that tables are made from, in less than 30 kB.

config.yaml     the settings of the run, as the trainer writes them; $SEEDBED_DATA and $WORK stand for its folders
record.json     command, seed, commit, machine, what it cost; written last: a folder without it is no record
metrics.jsonl   losses and rates, at most 60 lines, each a mean; and a line for each point of the curve
result.json     every evaluation: value, standard error, further figures, images
"""

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LINES = 60
OWN = "own"
"""in result.json beside the evaluations: accuracy of the classifier of what learned from labels"""
_KEPT = ("step", "images", "phase", "loss", "lr", "feature_std", "images_per_second", "memory_mib", "steps", "seconds")
_KEPT_PREFIXES = ("loss/", "teacher_entropy/", "prototype_use/", "grad_norm/backbone")
_SUMMED = ("steps", "seconds")
_LAST = ("step", "images", "phase")
_FREE = ("execution", "checkpoint", "watch", "evaluation")  # sections that change nothing in what is learned
RECORD, RESULT, METRICS, CONFIG = "record.json", "result.json", "metrics.jsonl", "config.yaml"


@dataclass(frozen=True)
class Record:
    """One run, as it was recorded."""

    variant: str
    seed: int
    facts: dict[str, Any]
    """record.json"""
    results: dict[str, dict[str, Any]]
    """result.json: evaluation -> value, standard_error, metric, figures ..."""
    points: list[dict[str, Any]]
    """of the curve: images, evaluation, value"""


def write_record(
    folder: Path,
    facts: Mapping[str, Any],
    results: Mapping[str, Any],
    config: str,
    metrics: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
) -> None:
    """All four files, or none: what a killed command left is replaced."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / CONFIG).write_text(config, encoding="utf-8")
    lines = [*thinned(metrics, max(LINES - len(points), 1)), *points]
    lines = sorted(lines, key=lambda line: (line["images"], "evaluation" in line))
    text = "".join(json.dumps(rounded(line)) + "\n" for line in lines)
    (partial / METRICS).write_text(text, encoding="utf-8")
    for name, content in ((RESULT, results), (RECORD, facts)):
        (partial / name).write_text(json.dumps(rounded(content), indent=1) + "\n", encoding="utf-8")
    partial.replace(folder)


def is_recorded(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def read_records(folder: Path) -> list[Record]:
    """Those of an experiment, by variant and seed.

    Raises:
        ValueError: a record that cannot be read, or seeds of one variant with different settings.
    """
    found = []
    settings: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in sorted(folder.glob(f"*/{RECORD}")):
        try:
            facts, results = (json.loads((path.parent / name).read_text(encoding="utf-8")) for name in (RECORD, RESULT))
            lines = (path.parent / METRICS).read_text(encoding="utf-8").splitlines()
            points = [line for text in lines if "evaluation" in (line := json.loads(text))]
            found.append(Record(facts["variant"], facts["seed"], facts, results, points))
            own = {key: value for key, value in read_config(path.parent).items() if key != "seed"}
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path.parent} is no whole record ({error!r}); remove it, and run it again.") from None
        first, theirs = settings.setdefault(facts["variant"], (path.parent, own))
        if different := differing(theirs, own):
            raise ValueError(f"{path.parent} and {first} differ in {different[0]}, not in the seed alone: remove one.")
    return sorted(found, key=lambda record: (record.variant, record.seed))


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a recorded run, as one mapping in another."""
    return yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Settings of what is learned that both have, with different values: `optim.base_lr`."""
    flat, others = (_flat({key: tree[key] for key in tree if key not in _FREE}) for tree in (one, other))
    return [key for key in flat if key in others and flat[key] != others[key]]


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


def thinned(lines: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` lines, each the mean of neighbours: `seconds` and `steps` are sums, `step` and `images` those of
    the last."""
    size = -(-len(lines) // count) if lines else 1
    return [_mean(lines[start : start + size]) for start in range(0, len(lines), size)]


def _mean(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in lines[-1]:
        if name not in _KEPT and not name.startswith(_KEPT_PREFIXES):
            continue
        values = [line[name] for line in lines if line.get(name) is not None]
        if name in _LAST or not values:
            found[name] = lines[-1][name]
        else:
            found[name] = sum(values) if name in _SUMMED else statistics.fmean(values)
    return found


def rounded(content: Any, digits: int = 4) -> Any:
    """Floats to so many significant digits; whole numbers stay."""
    if isinstance(content, Mapping):
        return {key: rounded(value, digits) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value, digits) for value in content]
    return float(f"{content:.{digits}g}") if isinstance(content, float) else content
