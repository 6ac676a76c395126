"""What ranks do in step: asking whether to stop, collecting cycles; and what a card reaches at most."""

import gc
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pretrain import garbage
from pretrain.distributed import collectives
from pretrain.numerics import settle_numerics
from pretrain.stopping import ASK_EVERY_STEPS, SharedStop, stop_signals
from pretrain.train import FINISHED
from pretrain.watch.flops import named_peak_flops
from tests.pretrain.ranks import run_ranks
from tests.pretrain.tiny_train import losses, run

SIGNAL_STEP, STEPS = 130, 400


def steps_until_stopped(step_s: float) -> tuple[int, int]:
    """Only rank 1 gets a signal; the step that this rank stops after, and how often it asked."""
    asked = 0
    original = collectives.max_over_ranks

    def counting(number: int) -> int:
        nonlocal asked
        asked += 1
        return original(number)

    collectives.max_over_ranks = counting
    with stop_signals() as request:
        stop = SharedStop(request)
        for step in range(1, STEPS):
            time.sleep(step_s)
            if collectives.rank() == 1 and step == SIGNAL_STEP:
                os.kill(os.getpid(), signal.SIGUSR1)
            if stop.after(step):
                return step, asked
    return STEPS, asked


def test_ranks_stop_after_the_same_step_without_asking_in_each(tmp_path: Path) -> None:
    (first, asked), (second, _) = run_ranks(steps_until_stopped, tmp_path, 0.001)
    assert first == second
    assert SIGNAL_STEP <= first <= SIGNAL_STEP + ASK_EVERY_STEPS
    assert asked <= 2 + first // ASK_EVERY_STEPS + 1


def test_slow_steps_are_asked_after_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than some seconds of steps lie between."""
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    now, asked = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(collectives, "max_over_ranks", lambda number: asked.append(now[0]) or number)
    with stop_signals() as request:
        stop = SharedStop(request)
        for step in range(1, 40):
            now[0] += 2.0
            assert not stop.after(step)
    assert max(b - a for a, b in pairwise(asked)) <= 5.0


def test_cycles_are_collected_by_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in ("collect", "freeze"):
        monkeypatch.setattr(gc, name, lambda name=name: ran.append(name))
    with garbage.collecting_by_steps() as after_step:
        assert not gc.isenabled()
        for step in range(7, 7 + 2 * garbage.EVERY_STEPS):
            after_step(step)
    assert gc.isenabled()
    assert ran == ["collect", "freeze", "collect", "collect"]


def test_a_deterministic_run_has_the_same_losses(config: Path, shards: Path, tmp_path: Path) -> None:
    """On a processor the switch changes nothing, and every operation of a training has an order that it can keep to."""
    try:
        assert run(config, shards, tmp_path / "switched", "execution.deterministic=true") == FINISHED
        assert torch.are_deterministic_algorithms_enabled()
        assert run(config, shards, tmp_path / "plain") == FINISHED
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        settle_numerics(False)
    assert losses(tmp_path / "switched") == losses(tmp_path / "plain")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_packed_attention_has_no_order(
    config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    asked = ["execution.deterministic=true", "model.attention=varlen"]
    assert run(config, shards, tmp_path / "run", *asked) == 2
    assert "use model.attention=sdpa" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A4000", 0),
        ("Tesla T4", 0),
    ],
)
def test_peaks_are_those_of_the_card(name: str, tflops: float) -> None:
    assert named_peak_flops(name) == pytest.approx(tflops * 1e12)
