"""report.html: one self-contained page of a run, for people. No script, and nothing fetched from anywhere."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import resources
from typing import Any

from curation.account.report import sections
from curation.account.report.charts import clean, percent
from curation.account.report.choices import Found, choose
from curation.account.report.pictures import read_pictures
from curation.config import CurationConfig
from curation.reading.pictures.images import ImageLimits
from curation.state import Run

_TILE_PX, _MAP_PX = 128, 96
# The page shows what strangers put on the web: even if something slipped through, no script would run.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def report_page(run: Run, found: Found, status_of: Callable[[int], str], figures: Mapping[str, Any]) -> str:
    """The page of a run whose stages are done.

    Args:
        found: what its ranges gave for it.
        status_of: of an image of the pool, by gid.
        figures: what report.json holds.
    """
    chosen = choose(run, found, status_of)
    wanted = list(chosen.pictures())
    on_map = [ref for _, ref in chosen.map.pictures] if chosen.map is not None else []
    sets = {name: run.images(f"embed/{name}") for name in {ref.set for ref in wanted + on_map}}
    limits = ImageLimits(max_file_bytes=run.config.embed.max_file_bytes, max_pixels=run.config.embed.max_pixels)
    pictures = read_pictures(sets, wanted, limits, _TILE_PX)
    small = read_pictures(sets, on_map, limits, _MAP_PX)
    body = {
        "funnel": ("Funnel", sections.funnel(figures)),
        **({"release": ("Release", sections.release(figures))} if figures["release"]["extends"] else {}),
        "retrieved": ("What was drawn", sections.retrieval(chosen.draws, chosen.balanced, figures, pictures)),
        "map": ("Map", sections.pool_map(chosen.map, small)),
        "duplicates": ("Duplicates", sections.duplicate_groups(chosen.groups, figures, pictures)),
        "threshold": ("At the threshold", sections.near_pairs(chosen.above, chosen.below, figures, pictures)),
        "leaks": ("Evaluation leaks", sections.leaks(chosen.leaks, figures, pictures)),
        "rejected": ("Rejected", sections.rejections(chosen.rejections, figures, pictures)),
        "balance": ("Cluster balance", sections.clusters(figures)),
        "recall": ("Certified recall", sections.recall(figures)),
        "time": ("Time", sections.times(figures)),
        "settings": (
            "Settings",
            sections.settings(figures, changed_settings(figures["config"]), _asked(run), run.folder.url),
        ),
    }
    return _assemble(figures, sections.kept_strip(chosen.kept, pictures), body)


def changed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`section.name` -> value, for the settings that differ from the defaults; `execution` changes no result."""
    default, asked = (dict(_leaves(tree)) for tree in (json.loads(json.dumps(asdict(CurationConfig()))), config))
    return {
        name: value
        for name, value in json.loads(json.dumps(asked)).items()
        if not name.startswith("execution.") and default.get(name) != value
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _asked(run: Run) -> dict[str, Any] | None:
    """run.json, where the command line wrote one."""
    try:
        return json.loads(run.folder.read_bytes("run.json"))
    except (FileNotFoundError, ValueError):
        return None


def _assemble(figures: Mapping[str, Any], strip: str, body: Mapping[str, tuple[str, str]]) -> str:
    status, whole = figures["funnel"]["status"], figures["funnel"]["images"]
    shards = figures["shards"]
    chosen_by = list(figures["inputs"]["seeds"]) + (["a balanced sample"] if "balance" in figures else [])
    by = clean(" + ".join(chosen_by))
    links = "".join(f"<a href='#{name}'>{clean(title)}</a>" for name, (title, _) in body.items())
    parts = "".join(
        f"<section id='{name}'><h2>{clean(title)}</h2>{content}</section>" for name, (title, content) in body.items()
    )
    style = resources.files("curation.account.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='referrer' content='no-referrer'>"
        f"<title>{status['kept']:,} of {whole:,} images · Seedbed</title><style>{style}</style></head><body>"
        "<header class='top'><p class='brand'>Seedbed · curation report</p>"
        f"<h1><b>{status['kept']:,}</b> of {whole:,} images kept</h1>"
        f"<p>{percent(status['kept'], whole)} of the pool, chosen by {by}, in {shards['files']:,} "
        f"{'shard' if shards['files'] == 1 else 'shards'} of {_size(shards['bytes'])} with their original bytes.</p>"
        f"{strip}</header><nav>{links}</nav><main>{parts}</main>"
        "<footer>Every image of the pool is a row of <code>decisions.parquet</code>; every figure of this page is in "
        "<code>report.json</code>.</footer></body></html>\n"
    )


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
