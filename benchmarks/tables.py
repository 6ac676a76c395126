"""Write the tables that are made of records: python -m benchmarks.tables [--check]

README.md, docs/*.md and the comments of configs/pretrain/*.yaml hold blocks

    <!-- records: EXPERIMENT [table | curve | claims | sentence | images] [key=value ...] -->
    ... written by this command ...
    <!-- /records -->

table (the default) has a row a variant, curve a row a number of images seen, claims a sentence for each claim of the
experiment, sentence one line for each variant, images what images.json says of what is learned from. Keys:
variants=a,b and evaluations=c,d, to choose and to order; `own` is what a classifier answers that learned from labels
itself. In YAML marks and lines stand behind `# `. `--check` writes nothing, and fails where a file is not what the
records give.
"""

import argparse
import json
import re
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.description import Experiment, read_experiment
from benchmarks.study.record import OWN, read_records
from benchmarks.study.summary import Summary, curve, number, signed, spread, unit
from configs.messages import answered

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "docs/*.md", "configs/pretrain/*.yaml")
_OPEN = re.compile(r"(?P<before>(?:# )?)<!-- records: (?P<words>.*) -->")
_CLOSE = "<!-- /records -->"
_KEYS = ("variants", "evaluations")
_IMAGES = "images"
_WIDTH = 120


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Returns 0, or 1 where `--check` finds a file that differs; 2: a wrong mark or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file would change")
    asked = parser.parse_args(arguments)
    return answered(lambda: _write(root, asked.check), "the same command does the rest")


def _write(root: Path, check: bool) -> int:
    stale = []
    for path in sorted(file for pattern in FILES for file in root.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        try:
            written = with_blocks(text, root / "benchmarks" / "experiments")
        except ValueError as error:
            raise ValueError(f"{path.relative_to(root)}: {error}") from None
        if written == text:
            continue
        stale.append(str(path.relative_to(root)))
        if not check:
            path.write_text(written, encoding="utf-8")
            print(f"{stale[-1]}: written")
    if check and stale:
        print(f"{', '.join(stale)}: not as the records say; run python -m benchmarks.tables.", file=sys.stderr)
        return 1
    return 0


def with_blocks(text: str, experiments: Path) -> str:
    """The text with every block as the records give it.

    Raises:
        ValueError: a block that does not end, a wrong word in its mark, an experiment or a record that cannot be read.
    """
    lines, out, start = text.split("\n"), [], None
    before, block = "", ""
    for number_, line in enumerate(lines, start=1):
        if start is not None:
            if line.strip() != f"{before}{_CLOSE}".strip():
                continue
            out += [f"{before}{one}".rstrip() for one in block.split("\n")]
            start = None
        elif opened := _OPEN.fullmatch(line):
            start, before = number_, opened["before"]
            block = _block(opened["words"].split(), experiments, _WIDTH - len(before))
        out.append(line)
    if start is not None:
        raise ValueError(f"line {start}: the block has no {_CLOSE} after it.")
    return "\n".join(out)


def _block(words: Sequence[str], experiments: Path, width: int) -> str:
    name, *options = words
    described = read_experiment(name, experiments)
    if options == [_IMAGES]:
        return _images(described.records)
    experiment, records = described.experiment, read_records(described.records)
    kinds = [word for word in options if "=" not in word] or ["table"]
    asked = dict(word.split("=", 1) for word in options if "=" in word)
    if len(kinds) > 1 or kinds[0] not in _BLOCKS or (unknown := sorted(set(asked) - set(_KEYS))):
        wrong = kinds[-1] if len(kinds) > 1 or kinds[0] not in _BLOCKS else unknown[0]
        raise ValueError(f"records: {name}: {wrong!r} is none of {', '.join([*_BLOCKS, _IMAGES, *_KEYS])}.")
    variants = _chosen("variants", asked.get("variants"), [*experiment.variants])
    evaluations = _chosen("evaluations", asked.get("evaluations"), [*experiment.evaluations], also=(OWN,))
    if not records:
        return f"No record yet: `python -m benchmarks.experiment {name}`."
    return _BLOCKS[kinds[0]](Summary(experiment, records), name, variants, evaluations, width)


def _chosen(key: str, asked: str | None, known: list[str], also: Sequence[str] = ()) -> list[str]:
    """Names that a mark gives, of those that are `known` or that can `also` be asked for; by default all known ones."""
    names = known if asked is None else asked.split(",")
    if unknown := [name for name in names if name not in known and name not in also]:
        raise ValueError(f"records: {key}={unknown[0]} is none of {', '.join(known)}.")
    return names


def _table(of: Summary, name: str, variants: list[str], evaluations: list[str], width: int) -> str:
    experiment, first, reference = of.experiment, evaluations[0], of.experiment.reference
    against = [f"{first} against {reference}"] if reference else []
    heads = [f"{one}{', %' * (unit(of.metric(one)) == '%')}" for one in evaluations]
    rows = [["variant", *heads, *against, "seeds", "images seen", "minutes"]]
    for variant in [one for one in variants if of.of(one)]:
        records = of.of(variant)
        figures = [spread(list(of.values(variant, one).values()), of.metric(one)) for one in evaluations]
        seen = sorted({record.facts["images_seen"] for record in records})
        minutes = statistics.fmean(record.facts["minutes"]["processor"] for record in records)
        compared = [_against(of, variant, reference, first)] if reference else []
        took = f"{minutes:.{1 if minutes < 10 else 0}f}" if seen != [0] else ""
        counts = [str(len(records)), ", ".join(f"{n:,}" for n in seen), took]
        rows.append([variant, *figures, *compared, *counts])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join([*_aligned(rows), "", *textwrap.wrap(_note(of, name, experiment, variants), width)])


def _against(of: Summary, variant: str, reference: str, evaluation: str) -> str:
    found = None if variant == reference else of.difference(variant, reference, evaluation)
    return "" if found is None else f"{signed(found.mean, of.metric(evaluation))} ({found.evidence()})"


def _note(of: Summary, name: str, experiment: Experiment, variants: list[str]) -> str:
    """What the figures are, and what they were measured with."""
    records = [record for variant in variants for record in of.of(variant)]
    machines = {(m["cpu"], m["threads"], m["torch"].partition("+")[0]) for m in (r.facts["machine"] for r in records)}
    on = "; ".join(
        f"{cpu}, {threads} thread{'s' * (threads != 1)}, torch {torch}" for cpu, threads, torch in sorted(machines)
    )
    difference = " differences by a t-test paired by seed;" if experiment.reference else ""
    return (
        f"Mean ± standard deviation over seeds;{difference} minutes of processor, with loaders and the curve's "
        f"evaluations ({on}). `python -m benchmarks.experiment {name}`."
    )


def _curve(of: Summary, name: str, variants: list[str], evaluations: list[str], width: int) -> str:
    metric = of.metric(of.experiment.curve.evaluation)
    columns = {variant: found for variant in variants if (found := curve(of.of(variant)))}
    cells = {
        variant: {seen: spread(values, metric) for seen, values in found.items()} for variant, found in columns.items()
    }
    for heading, published in of.experiment.published.items():
        cells[heading] = {seen: number(value, metric) for seen, value in published.points.items()}
    rows = [["images seen", *cells], ["---"] * (1 + len(cells))]
    for seen in sorted({seen for column in cells.values() for seen in column}):
        rows.append([f"{seen:,}", *(column.get(seen, "") for column in cells.values())])
    sources = "".join(f" {heading}: {one.source}." for heading, one in of.experiment.published.items())
    said = f"{of.experiment.curve.evaluation}{', %' * (unit(metric) == '%')}, while training.{sources}"
    return "\n".join([*_aligned(rows), "", *textwrap.wrap(said, width)])


def _claims(of: Summary, name: str, variants: list[str], evaluations: list[str], width: int) -> str:
    claims = [one for one in of.experiment.claims if {one.better, one.worse} <= set(variants)]
    items = [of.sentence(claim) for claim in claims if claim.evaluation in evaluations]
    return "\n".join(textwrap.fill(f"- {item}", width, subsequent_indent="  ") for item in items)


def _sentence(of: Summary, name: str, variants: list[str], evaluations: list[str], width: int) -> str:
    lines = []
    for variant in [one for one in variants if of.of(one)]:
        figures = ", ".join(f"{one} {of.spread(variant, one)}" for one in evaluations)
        num_seeds = len(of.of(variant))
        lines.append(f"{variant}: {figures} ({num_seeds} seed{'s' * (num_seeds != 1)})")
    return "\n".join(textwrap.fill(line, width) for line in lines)


def _images(records: Path) -> str:
    """A row for each set of images.json: its name, counts, and shares in %."""
    path = records / f"{_IMAGES}.json"
    if not path.is_file():
        return f"No record yet: {path.parent.name}/{path.name}."
    sets = json.loads(path.read_text(encoding="utf-8"))
    rows = [[name + ", %" * isinstance(value, float) for name, value in sets[0].items()], ["---"] * len(sets[0])]
    rows += [[_told(value) for value in one.values()] for one in sets]
    return "\n".join(_aligned(rows))


def _told(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{100 * value:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in rows]


_BLOCKS = {"table": _table, "curve": _curve, "claims": _claims, "sentence": _sentence}


if __name__ == "__main__":
    sys.exit(main())
