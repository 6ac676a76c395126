"""The sections of a run's page, each a string of HTML made from what the run folder holds."""

import html
import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pretrain.watch.pictures import chosen_steps, pca_files, read_pictures
from pretrain.watch.progress import duration, rate
from pretrain.watch.report.charts import Curve, Level, Mark, line_chart, short_number

_COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
_IMAGE_PX = 96  # of the photographs on the page


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of its run."""

    name: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    sessions: list[dict[str, Any]]
    config: str
    """config.yaml as text; empty when there is none"""
    evaluation_folder: Path
    changes: list[dict[str, Any]]
    """settings changed on the way: step, phase, key, from, to"""

    @property
    def last_step(self) -> int:
        return max([line["step"] for line in self.metrics + self.evaluations], default=0)

    def marks(self) -> list[Mark]:
        """Where phases after the first start, and alarms."""
        phases = [
            Mark(before["step"], f"phase {after['phase']}", "phase")
            for before, after in zip(self.metrics, self.metrics[1:], strict=False)
            if before.get("phase") != after.get("phase")
        ]
        return phases + [Mark(alarm["step"], alarm["message"], "alarm") for alarm in self.alarms]

    def figures(self, name: str) -> list[float]:
        """The finite values of one figure over the lines."""
        return [line[name] for line in self.metrics if line.get(name) is not None]


_OWN_PLACE = ("step", "knn", "pca_explained", "failed")
"""figures of an evaluation line that have a chart or sentence of their own"""


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def knn_curve(run: RunRecord) -> tuple[list[dict[str, Any]], list[Level]]:
    """Evaluations with a k-NN figure, and the floors that say what it is worth."""
    scored = [line for line in run.evaluations if line.get("knn") is not None]
    names = (("knn_pixels", "raw pixels", "floor"), ("knn_random", "untrained features", "random"))
    levels = [Level(words, colour, scored[0][key]) for key, words, colour in names if scored and key in scored[0]]
    return scored, levels


def verdict(run: RunRecord) -> tuple[str, str]:
    """(headline, sentence): whether it learned, in one look."""
    scored, levels = knn_curve(run)
    if scored:
        first, last = scored[0], scored[-1]
        headline = f"<b>{percent(last['knn'])}</b> k-NN accuracy"
        best = max([level.value for level in levels], default=first["knn"])
        against = ", ".join(f"{level.name} {percent(level.value)}" for level in levels)
        if len(scored) == 1:
            said = "One evaluation so far."
        elif last["knn"] > max(best, first["knn"]):
            said = f"It learned: {percent(first['knn'])} at step {first['step']:,}, now above what needs no learning."
        elif last["knn"] > first["knn"]:
            said = f"It is learning, but not yet above what needs none: from {percent(first['knn'])}."
        else:
            said = f"It did not learn what k-NN measures: it started at {percent(first['knn'])}."
        return headline, f"{said}{f' For comparison: {against}.' if against else ''}"
    losses = run.figures("loss")
    if losses:
        return f"Loss <b>{losses[-1]:.3f}</b>", f"From {losses[0]:.3f}. No k-NN evaluation was configured."
    return "Nothing measured yet", "The run has not written a line of metrics."


def at_a_glance(run: RunRecord) -> str:
    """The figures of the run in a row of cards."""
    seconds = sum(line.get("seconds", 0) for line in run.metrics)
    cards = [("steps", f"{run.last_step:,}")]
    if run.metrics and run.metrics[-1].get("images"):
        cards.append(("images seen", short_number(float(f"{run.metrics[-1]['images']:.3g}"))))
    cards.append(("time in training", duration(seconds)))
    for name, words, form in (
        ("images_per_second", "images per second", rate),
        ("mfu", "of the device's peak (MFU)", percent),
        ("data_wait", "waiting for data", percent),
    ):
        if run.figures(name):
            cards.append((words, form(float(np.median(run.figures(name))))))
    if run.figures("memory_mib"):
        cards.append(("memory", f"{max(run.figures('memory_mib')) / 1024:.1f} GiB"))
    cards.append(("alarms", str(len(run.alarms))))
    return "<dl class='cards'>" + "".join(f"<div><dd>{v}</dd><dt>{k}</dt></div>" for k, v in cards) + "</dl>"


def learning(run: RunRecord) -> str:
    """k-NN over the steps, at each k, with its floors; and what else was measured."""
    scored, levels = knn_curve(run)
    if not scored:
        return _other_evaluations(run)
    steps = [line["step"] for line in scored]
    names = [name for name in scored[-1] if name.startswith("knn/")]
    headline = line_chart(
        "k-NN accuracy",
        [Curve("teacher", "c1", steps, [line["knn"] for line in scored], dots=True)],
        levels,
        run.marks(),
        "{:.1%}",
        from_zero=True,
    )
    by_k = [
        Curve(f"k = {name.removeprefix('knn/')}", colour, steps, [line.get(name) for line in scored])
        for name, colour in zip(names, _COLOURS, strict=False)
    ]
    return (
        "<p>Features of the teacher, compared by cosine with labelled images that took no part in training. The dashed "
        "lines are what raw pixels and an untrained network of the same form reach on the same images.</p>"
        f"<div class='plots'>{headline}{line_chart('at each k', by_k, (), run.marks(), '{:.1%}')}</div>"
        + _other_evaluations(run)
    )


def _other_evaluations(run: RunRecord) -> str:
    """A curve for each evaluation beside k-NN that the config names."""
    found = {name for line in run.evaluations for name in line if not name.startswith(_OWN_PLACE)}
    charts = []
    for name in sorted(found):
        lines = [line for line in run.evaluations if line.get(name) is not None]
        curve = Curve("teacher", "c1", [line["step"] for line in lines], [line[name] for line in lines], dots=True)
        charts.append(line_chart(name, [curve], (), run.marks(), "{:.3f}"))
    return f"<div class='plots'>{''.join(charts)}</div>" if charts else ""


def losses(run: RunRecord) -> str:
    """Each term, raw and smoothed."""
    names = sorted({name for line in run.metrics for name in line if name == "loss" or name.startswith("loss/")})
    return _plots(run, [(name, "c1" if name == "loss" else "c2") for name in names], smooth=True)


def diagnostics(run: RunRecord) -> str:
    """What says whether it collapses."""
    prefixes = ("feature_std", "teacher_entropy", "kl", "prototype_use", "prototype_perplexity", "grad_norm")
    names = {name for line in run.metrics for name in line if name.split("/")[0] in prefixes}
    ordered = sorted(names, key=lambda name: (prefixes.index(name.split("/")[0]), name))
    text = (
        "<p>Feature spread is 1 for directions spread evenly over the sphere and 0 when all images look the same. "
        "Entropy and divergence are in nats. Prototype use is the share of the prototypes that a batch could use.</p>"
    )
    return text + _plots(run, [(name, "c3") for name in ordered], smooth=True) if ordered else ""


def speed(run: RunRecord) -> str:
    shares = [(name, "c4") for name in ("images_per_second", "mfu", "data_wait", "memory_mib")]
    machines = "; ".join(
        dict.fromkeys(
            f"{session.get('ranks', 1)} x {session.get('device', 'unknown')}, torch {session.get('torch', '')}"
            for session in run.sessions
        )
    )
    resumed = ", ".join(f"{session['step']:,}" for session in run.sessions if session.get("step"))
    again = f" Resumed at step {resumed}." if resumed else ""
    return f"<p>{html.escape(machines)}.{again}</p>" + _plots(run, shares, from_zero=True)


def schedules(run: RunRecord) -> str:
    known = ("lr", "last_layer_lr", "weight_decay", "teacher_momentum", "teacher_temperature")
    return _plots(run, [(name, "c5") for name in known])


def _plots(run: RunRecord, names: Sequence[tuple[str, str]], smooth: bool = False, from_zero: bool = False) -> str:
    steps, marks = [line["step"] for line in run.metrics], run.marks()
    charts = [
        line_chart(
            words(name),
            [Curve(words(name), colour, steps, [line.get(name) for line in run.metrics], smooth=smooth)],
            (),
            marks,
            "{:.1%}" if name in ("mfu", "data_wait") else "{:.4g}",
            from_zero,
        )
        for name, colour in names
    ]
    return f"<div class='plots'>{''.join(charts)}</div>" if any(charts) else ""


def words(name: str) -> str:
    """`loss/dino_global` -> `loss: dino global`."""
    known = {"lr": "learning rate", "mfu": "MFU", "data_wait": "waiting for data", "memory_mib": "memory, MiB"}
    known |= {"loss": "loss, weighted sum", "feature_std": "feature spread", "images_per_second": "images per second"}
    start, slash, rest = name.partition("/")
    start = {"kl": "divergence of student from teacher", "grad_norm": "gradient norm"}.get(start, start)
    return known.get(name, f"{start}{': ' if slash else ''}{rest}".replace("_", " "))


def alarms(run: RunRecord) -> str:
    if not run.alarms:
        return "<p class='empty'>None: features stayed apart, prototypes stayed in use, and data came in time.</p>"
    rows = "".join(
        f"<article class='alarm'><header><b>step {alarm['step']:,}</b></header><p>{html.escape(alarm['message'])}</p>"
        "</article>"
        for alarm in run.alarms
    )
    return rows


def pictures(run: RunRecord) -> str:
    """A row for each image: the image, and its PCA picture at some steps."""
    files = _files(run)
    if not files:
        return ""
    steps = chosen_steps(list(files))
    columns = [read_pictures(files[step]) for step in steps]
    head = "<span></span>" + "".join(f"<span>step {step:,}</span>" for step in steps)
    rows = "".join(
        _photo(columns[-1]["images"][n]) + "".join(_patches(column["colours"][n]) for column in columns)
        for n in range(len(columns[-1]["images"]))
    )
    return (
        "<p>The same images at each evaluation. The first three principal components of the teacher's patch features, "
        "over all of these images together, are red, green and blue: patches that the network takes for the same thing "
        "get the same colour. One square is one patch.</p>"
        f"<div class='scroll'><div class='pca' style='--n:{len(steps) + 1}'>{head}{rows}</div></div>"
    )


def strip(run: RunRecord) -> str:
    """For the top of the page: images, and their picture at the first and last evaluation."""
    files = _files(run)
    if not files:
        return ""
    first, last = read_pictures(files[min(files)]), read_pictures(files[max(files)])
    count = min(8, len(last["images"]))
    tiles = "".join(_photo(image) for image in last["images"][:count])
    labels = ["images"]
    for step, column in ((min(files), first), (max(files), last)) if len(files) > 1 else ((max(files), last),):
        tiles += "".join(_patches(column["colours"][n]) for n in range(count))
        labels.append(f"step {step:,}")
    rows = f"<p class='rows'>From top to bottom: {', '.join(labels)} (patch features as colours).</p>"
    return f"<div class='top-strip' style='--n:{count}'>{tiles}</div>{rows}"


def _files(run: RunRecord) -> dict[int, Path]:
    """Those of the newest evaluation's images; evaluations beyond the last step are of a try that was taken back."""
    files = {step: path for step, path in pca_files(run.evaluation_folder).items() if step <= run.last_step}
    if not files:
        return {}
    newest = read_pictures(files[max(files)])["images"]
    return {step: path for step, path in files.items() if np.array_equal(read_pictures(path)["images"], newest)}


def _photo(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_IMAGE_PX, _IMAGE_PX), Image.Resampling.LANCZOS)
    return f"<img src='{_png(picture)}' alt=''>"


def _patches(colours: np.ndarray) -> str:
    return f"<img class='patches' src='{_png(Image.fromarray(colours))}' alt=''>"


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"


def changes(run: RunRecord) -> str:
    """What was changed on purpose between the parts of the run."""
    texts = [
        f"after step {change['step']:,}, phase {change['phase']}: {change['key']} was {change['from']}, "
        f"then {change['to']}"
        for change in run.changes
    ]
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def settings(run: RunRecord) -> str:
    if not run.config:
        return ""
    return f"<details open><summary>config.yaml</summary><pre>{html.escape(run.config)}</pre></details>"


def body(run: RunRecord) -> Mapping[str, tuple[str, str]]:
    """id -> (title, content) of the sections that have something to show."""
    parts = {
        "learning": ("Did it learn?", learning(run)),
        "pictures": ("What it sees", pictures(run)),
        "losses": ("Losses", losses(run)),
        "alarms": ("Alarms", alarms(run)),
        "diagnostics": ("Diagnostics", diagnostics(run)),
        "speed": ("Speed", speed(run)),
        "schedules": ("Schedules", schedules(run)),
        "changes": ("Changed on the way", changes(run)),
        "settings": ("Settings", settings(run)),
    }
    return {name: part for name, part in parts.items() if part[1]}
