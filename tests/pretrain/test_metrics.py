"""Metrics: means to the last bit, one line per window, and a file that a resumed run continues."""

import json
import time
from pathlib import Path

import pytest
import torch

from pretrain.watch.lines import append_line, drop_after, read_lines
from pretrain.watch.metrics import EVALUATIONS, METRICS, SESSIONS, Metrics, WatchConfig

CPU = torch.device("cpu")


def test_one_step_is_written_to_the_last_bit(tmp_path: Path) -> None:
    loss = torch.tensor(11.090354919433594)
    metrics = Metrics(tmp_path, WatchConfig(every_steps=1), CPU)
    metrics.update({"loss": loss, "loss/dino": loss / 3}, images=8)
    metrics.flush(1, {"phase": "pretrain", "lr": 1e-3})
    (line,) = read_lines(tmp_path / METRICS)
    assert line["loss"] == loss.item()
    assert line["loss/dino"] == (loss / 3).item()
    assert (line["step"], line["phase"], line["lr"], line["steps"]) == (1, "pretrain", 1e-3, 1)


def test_means_are_over_the_steps_that_had_the_name(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, WatchConfig(), CPU)
    values = torch.randn(6, generator=torch.Generator().manual_seed(0))
    for step, value in enumerate(values):
        metrics.update({"loss": value, "host": float(step)} | ({"rare": value * 2} if step % 2 else {}))
    line = metrics.flush(6, {})
    assert line["loss"] == pytest.approx(values.double().mean().item(), abs=1e-15)
    assert line["rare"] == pytest.approx(values[1::2].double().mean().item() * 2, abs=1e-15)
    assert line["host"] == 2.5
    assert "loss" not in metrics.flush(7, {})  # the window starts anew


def test_a_kept_figure_does_not_change_with_its_tensor(tmp_path: Path) -> None:
    metrics = Metrics(None, WatchConfig(), CPU)
    buffer = torch.tensor([1.0, 2.0])
    metrics.update({"a": buffer[0]})
    buffer.fill_(9.0)
    assert metrics.flush(1, {})["a"] == 1.0
    assert list(tmp_path.iterdir()) == []


def test_means_go_through_the_ranks(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, WatchConfig(), CPU, mean_over_ranks=lambda values: (values + 3.0) / 2)
    metrics.update({"loss": torch.tensor(1.0)})
    assert metrics.flush(1, {})["loss"] == 2.0


def test_rates(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, WatchConfig(), CPU, peak_flops=1e6)
    for _ in range(2):
        with metrics.waiting():
            time.sleep(0.02)
        time.sleep(0.02)
        metrics.update({}, images=16, flops=1e4)
    with metrics.untimed():
        time.sleep(0.2)
    line = metrics.flush(2, {})
    assert 0.08 <= line["seconds"] < 0.2  # without the untimed 0.2
    assert line["images_per_second"] == pytest.approx(32 / line["seconds"])
    assert line["mfu"] == pytest.approx(2e4 / line["seconds"] / 1e6)
    assert 0.04 / line["seconds"] <= line["data_wait"] < 1
    assert line["memory_mib"] > 50


def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    first = Metrics(tmp_path, WatchConfig(every_steps=1), CPU)
    for step in range(1, 6):
        first.update({"loss": torch.tensor(float(step))})
        first.flush(step, {})
    first.evaluation(4, {"knn": 0.5})
    before = (tmp_path / METRICS).read_text().splitlines()
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 3, "lo')  # killed here
    second = Metrics(tmp_path, WatchConfig(every_steps=1), CPU, start_step=3)
    assert (tmp_path / METRICS).read_text().splitlines() == before[:3]
    assert read_lines(tmp_path / EVALUATIONS) == []
    second.update({"loss": torch.tensor(4.0)})
    second.flush(4, {})
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == [1, 2, 3, 4]
    assert [line["step"] for line in read_lines(tmp_path / SESSIONS)] == [0, 3]


def test_a_start_from_nothing_leaves_no_earlier_line(tmp_path: Path) -> None:
    Metrics(tmp_path, WatchConfig(), CPU).evaluation(0, {"knn": 0.1})  # killed before the first checkpoint
    Metrics(tmp_path, WatchConfig(), CPU).evaluation(0, {"knn": 0.1})
    assert read_lines(tmp_path / EVALUATIONS) == [{"step": 0, "knn": 0.1}]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    append_line(tmp_path / "a.jsonl", {"step": 1, "loss": float("nan"), "b": float("inf"), "c": 1.5})
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"step": 1, "loss": None, "b": None, "c": 1.5}
    drop_after(tmp_path / "missing.jsonl", 0)
    assert read_lines(tmp_path / "missing.jsonl") == []


def test_tensorboard_holds_the_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, WatchConfig(tensorboard=True), CPU)
    metrics.update({"loss": torch.tensor(2.5)})
    metrics.flush(10, {"phase": "pretrain"})
    metrics.evaluation(10, {"knn": 0.25})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("evaluation/knn")] == [(10, 0.25)]


def test_wandb_that_is_not_installed_is_a_sentence(tmp_path: Path) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="needs the package wandb"):
            Metrics(tmp_path, WatchConfig(wandb_project="seedbed"), CPU)
    else:
        pytest.skip("wandb is installed")


def test_config_errors() -> None:
    with pytest.raises(ValueError, match="every_steps=0"):
        WatchConfig(every_steps=0)
    with pytest.raises(ValueError, match="peak_tflops"):
        WatchConfig(peak_tflops=-1.0)
    assert Metrics(None, WatchConfig(every_steps=5), CPU).is_due(10)
    assert not Metrics(None, WatchConfig(every_steps=5), CPU).is_due(11)
