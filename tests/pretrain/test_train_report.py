"""report.html of a training run: what the first screen says, curves where the values are, nothing from outside."""

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.watch.lines import read_lines
from pretrain.watch.metrics import METRICS, Metrics, WatchConfig
from pretrain.watch.report.charts import Curve, Level, Mark, line_chart, short_number, ticks
from pretrain.watch.report.page import write_report
from tests.conftest import REPOSITORY

VOID = {"meta", "img", "path", "circle", "polyline", "br"}


class Balanced(HTMLParser):
    """Raises at a tag that closes another than the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def run_folder(folder: Path, knn: tuple[float, ...] = (0.2, 0.5), alarm: str = "") -> Path:
    """Twenty steps in two phases, with evaluations and their pictures."""
    metrics = Metrics(folder, WatchConfig(every_steps=1), torch.device("cpu"), peak_flops=1e12)
    (folder / "config.yaml").write_text("seed: 0\nname: <script>alert(1)</script>\n")
    for step in range(1, 21):
        metrics.update({"loss": torch.tensor(10.0 - step / 4), "loss/dino_global": torch.tensor(5.0)}, 8, 1e9)
        metrics.flush(step, {"phase": "pretrain" if step <= 15 else "high_resolution", "images": 8 * step, "lr": 1e-3})
    for n, accuracy in enumerate(knn):
        step = 20 * n
        metrics.evaluation(step, {"knn": accuracy, "knn/10": accuracy, "knn_pixels": 0.36, "knn_random": 0.24})
        write_picture(folder, step)
    if alarm:
        metrics.alarm(12, "collapsed_features", alarm)
    metrics.close()
    return folder


def write_picture(folder: Path, step: int) -> None:
    target = folder / "evaluation" / f"step-{step:08d}"
    target.mkdir(parents=True)
    colours = np.full((3, 4, 4, 3), step, np.uint8)
    np.savez(target / "pca.npz", images=np.full((3, 32, 32, 3), 200, np.uint8), colours=colours, scores=colours)


def page(folder: Path) -> str:
    text = write_report(folder).read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    return text


def test_the_first_screen_says_whether_it_learned(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path))
    first = text[: text.index("<nav>")]
    assert "<b>50.0%</b> k-NN accuracy" in first
    assert "It learned: 20.0% at step 0, now above what needs no learning." in first
    assert "raw pixels 36.0%, untrained features 24.0%" in first
    assert "<dd>20</dd><dt>steps</dt>" in first


@pytest.mark.parametrize(
    ("knn", "words"),
    [
        ((0.2, 0.3), "It is learning, but not yet above what needs none"),
        ((0.4, 0.3), "It did not learn what k-NN measures"),
        ((0.3,), "One evaluation so far"),
        ((), "No k-NN evaluation was configured"),
    ],
)
def test_the_other_verdicts(tmp_path: Path, knn: tuple[float, ...], words: str) -> None:
    assert words in page(run_folder(tmp_path, knn))


def test_other_evaluations_have_a_curve_each(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    assert "segmentation" not in page(folder)
    metrics = Metrics(folder, WatchConfig(), torch.device("cpu"))
    for step in (30, 40):
        metrics.evaluation(step, {"knn": 0.5, "segmentation": 0.1 + step / 1000, "linear/birds": 0.7})
    metrics.close()
    text = page(folder)
    assert "linear/birds" in text
    assert "0.140" in text
    assert "pca_explained" not in text


def test_nothing_comes_from_outside_and_no_text_is_markup(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path, alarm="spread <0.05 & falling"))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "spread &lt;0.05 &amp; falling" in text
    assert set(re.findall(r"(?:src|href)='([^:,']*)", text)) <= {"data"} | {
        f"#{n}" for n in re.findall("id='(.*?)'", text)
    }
    assert "http://" not in text
    assert "https://" not in text


def test_pictures_are_those_of_the_evaluations(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path))
    section = text[text.index("id='pictures'") :]
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))[0, 0, 0]
        for content in re.findall(r"base64,([^']+)", section)
    ]
    assert shown == [200, 0, 20] * 3
    assert "<span>step 0</span><span>step 20</span>" in section


def test_pictures_of_steps_that_were_taken_back_are_not_shown(tmp_path: Path) -> None:
    run_folder(tmp_path)
    Metrics(tmp_path, WatchConfig(), torch.device("cpu"), start_step=15)
    assert [line["step"] for line in read_lines(tmp_path / METRICS)][-1] == 15
    text = page(tmp_path)
    assert "step 20" not in text
    assert "Resumed at step 15." in text


def test_a_run_without_anything_yet_has_a_page(tmp_path: Path) -> None:
    Metrics(tmp_path, WatchConfig(), torch.device("cpu"))
    assert "Nothing measured yet" in page(tmp_path)


def test_phases_and_alarms_are_marked(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path, alarm="All images look the same."))
    chart = text[text.index("loss, weighted sum") :]
    assert "<title>phase high_resolution</title>" in chart
    assert 'class="mark alarm"' in chart
    assert "All images look the same." in text[text.index("id='alarms'") :]


def test_command(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    command = [sys.executable, "-m", "pretrain.watch.report"]
    done = subprocess.run([*command, tmp_path / "run"], capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).exists()
    wrong = subprocess.run([*command, tmp_path], capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert wrong.returncode == 2
    assert "is no run folder" in wrong.stderr


def points(chart: str) -> np.ndarray:
    return np.array([pair.split(",") for pair in re.findall('points="(.*?)"', chart)[-1].split()], float)


def test_a_straight_line_is_straight_from_corner_to_corner() -> None:
    found = points(line_chart("t", [Curve("a", "c1", [0, 10, 20], [0.0, 1.0, 2.0])], from_zero=True))
    assert found[:, 0].tolist() == [48, 233, 418]
    assert np.diff(found[:, 1]) == pytest.approx([-79.2, -79.2], abs=0.1)  # 168 px hold 2.12
    assert found[0, 1] == 182


def test_thinned_and_smoothed_curves_keep_ends_and_level() -> None:
    rng = np.random.default_rng(0)
    values = 5 + rng.normal(size=5000)
    chart = line_chart("t", [Curve("a", "c1", range(5000), list(values), smooth=True)])
    assert len(points(chart)) == 360
    assert chart.count("<polyline") == 2
    assert points(chart)[:, 1].std() < 50


def test_gaps_and_empty_curves() -> None:
    curve = Curve("a", "c1", [1, 2, 3, 4], [1.0, None, float("nan"), 2.0])
    assert len(points(line_chart("t", [curve]))) == 2
    assert line_chart("t", [Curve("a", "c1", [1, 2], [None, None])], [Level("b", "c2", 1.0)]) == ""
    for value in (0.0, 3.0, -2.0):
        ends = points(line_chart("t", [Curve("a", "c1", [5, 6], [value, value])], marks=[Mark(5, "x", "phase")]))
        assert (ends[:, 1] >= 10).all()
        assert (ends[:, 1] <= 186).all()


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.13, 0.52, 4) == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert [short_number(v) for v in (500, 20_000, 1_500_000)] == ["500", "20k", "1.5M"]
