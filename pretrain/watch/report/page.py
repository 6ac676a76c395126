"""report.html: one self-contained page of a training run, for people. No script, and nothing fetched from anywhere."""

import html
from importlib import resources
from pathlib import Path

from pretrain.watch.lines import read_lines
from pretrain.watch.metrics import ALARMS, CHANGES, EVALUATIONS, METRICS, SESSIONS
from pretrain.watch.report import sections
from pretrain.watch.report.sections import RunRecord

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def read_run(folder: Path) -> RunRecord:
    """What a run folder says of its run, finished or not.

    Raises:
        ValueError: no such folder, or one without a line of metrics.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the run folder of pretrain.train.")
    if not (folder / SESSIONS).exists():
        raise ValueError(f"{folder} is no run folder (no {SESSIONS} in it): give the run folder of pretrain.train.")
    config = folder / "config.yaml"
    return RunRecord(
        name=folder.resolve().name,
        metrics=read_lines(folder / METRICS),
        evaluations=read_lines(folder / EVALUATIONS),
        alarms=read_lines(folder / ALARMS),
        sessions=read_lines(folder / SESSIONS),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        evaluation_folder=folder / "evaluation",
        changes=read_lines(folder / CHANGES),
    )


def write_report(folder: Path) -> Path:
    """Write `<folder>/report.html` and return its path. Raises ValueError: not a run folder."""
    path = folder / "report.html"
    temporary = folder / "report.html.tmp"
    temporary.write_text(report_page(read_run(folder)), encoding="utf-8")
    temporary.replace(path)
    return path


def report_page(run: RunRecord) -> str:
    headline, sentence = sections.verdict(run)
    body = sections.body(run)
    links = "".join(f"<a href='#{name}'>{title}</a>" for name, (title, _) in body.items())
    parts = "".join(
        f"<section id='{name}'><h2>{title}</h2>{content}</section>" for name, (title, content) in body.items()
    )
    style = resources.files("pretrain.watch.report").joinpath("style.css").read_text(encoding="utf-8")
    name = html.escape(run.name)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{name} · Seedbed</title><style>{style}</style></head><body>"
        f"<header class='top'><p class='brand'>Seedbed · training report · {name}</p><h1>{headline}</h1>"
        f"<p>{sentence}</p>{sections.at_a_glance(run)}{sections.strip(run)}</header><nav>{links}</nav>"
        f"<main>{parts}</main><footer>Every figure of this page is in <code>metrics.jsonl</code> and "
        "<code>evaluations.jsonl</code>.</footer></body></html>\n"
    )
