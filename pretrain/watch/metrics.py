"""Figures of a run: gathered on the device without a stop, read once every few steps, written where people look.

Names in a line of metrics.jsonl: `step`, `phase` and whatever else the trainer states (learning rate, images seen);
`loss` and `loss/<term>`, `grad_norm/<module>`, `teacher_entropy/<head>` and `kl/<head>` in nats,
`prototype_use/<head>`, `prototype_perplexity/<head>`, `feature_std`; then `images_per_second`, `mfu` where the peak is
known, `data_wait` (shares from 0 to 1), `memory_mib`, `steps` (how many the means are over) and `seconds` (how long
those took).
"""

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from configs.ranges import check_ranges
from pretrain.watch.lines import append_line, drop_after
from pretrain.watch.writers import TensorBoardWriter, WandbWriter, Writer

METRICS, EVALUATIONS, ALARMS, SESSIONS = "metrics.jsonl", "evaluations.jsonl", "alarms.jsonl", "sessions.jsonl"
CHANGES = "changes.jsonl"


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is written while training goes on; nothing here changes a result."""

    every_steps: int = 10
    """steps between two lines of metrics.jsonl, each a mean over them; 1 or more"""
    tensorboard: bool = False
    """also write event files under <run>/tensorboard"""
    wandb_project: str = ""
    """Weights & Biases project; empty: not used"""
    peak_tflops: float = 0.0
    """dense peak of one device in TFLOP/s, for the utilisation; 0: from the table in flops.py; a device
    that is not there, such as any processor, has no utilisation"""

    def __post_init__(self) -> None:
        check_ranges("watch", self, every_steps="[1, inf)", peak_tflops="[0, inf)")


class Metrics:
    """Takes each step's figures as tensors on the device, and writes their means every `every_steps`.

    All ranks build one and call it alike; the first rank (`folder` is given) writes. Nothing waits for the device
    but `flush`.

    Args:
        folder: the run folder on the first rank, None on the others.
        device: where the step runs; its memory is watched.
        mean_over_ranks: float64 [n] -> the same, averaged; the identity on one rank.
        start_step: the step that a resumed run continues after: later lines are dropped.
        peak_flops: of all devices together, in FLOP/s, for the utilisation; 0 leaves it out.
        run_config: what Weights & Biases shows as the configuration.

    Raises:
        ValueError: TensorBoard or Weights & Biases asked for and not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        config: WatchConfig,
        device: torch.device,
        mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
        start_step: int = 0,
        peak_flops: float = 0.0,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder, self._config, self._device, self._peak_flops = folder, config, device, peak_flops
        self._mean_over_ranks = mean_over_ranks or (lambda values: values)
        self._start_window()
        self._writers: list[Writer] = []
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, EVALUATIONS, ALARMS):
            drop_after(folder / name, start_step or -1)  # a start from nothing evaluates step 0 again
        append_line(folder / SESSIONS, {"step": start_step, "time": time.time(), **machine(device)})
        if config.tensorboard:
            self._writers.append(TensorBoardWriter(folder, start_step))
        if config.wandb_project:
            self._writers.append(WandbWriter(folder, config.wandb_project, run_config or {}))

    def _start_window(self) -> None:
        self._tensors: list[tuple[tuple[str, ...], Tensor]] = []
        self._floats: dict[str, list[float]] = {}
        self._steps, self._images, self._flops, self._waited, self._untimed = 0, 0, 0.0, 0.0, 0.0
        self._start = time.perf_counter()

    def update(self, values: Mapping[str, Tensor | float], images: int = 0, flops: float = 0.0) -> None:
        """Take one step's figures; tensors [] stay on the device unread (one small copy, no synchronisation).

        Args:
            values: the same names on every rank. A name may be left out of a step: means are over those that had it.
            images: how many the step took, over all ranks.
            flops: what the step cost, over all ranks.
        """
        names = tuple(name for name, value in values.items() if isinstance(value, Tensor))
        if names:
            # Stacking copies: a kept view would keep the step's whole tensor alive.
            self._tensors.append((names, torch.stack([values[name].detach().float() for name in names])))
        for name, value in values.items():
            if not isinstance(value, Tensor):
                self._floats.setdefault(name, []).append(float(value))
        self._steps += 1
        self._images += images
        self._flops += flops

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch: the share of time that goes to it. On a GPU that runs behind, an upper
        bound, since it may still have work queued."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Around evaluations: their time does not count against images per second."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # or the steps still queued would be left out with it
        start = time.perf_counter()
        yield
        self._untimed += time.perf_counter() - start

    def is_due(self, step: int) -> bool:
        return step % self._config.every_steps == 0

    def flush(self, step: int, facts: Mapping[str, float | int | str]) -> dict[str, Any]:
        """Read the means since the last flush (this waits for the device), write them, and start anew.

        Every rank calls it at the same steps. Means are float64 over float32 values, so that over one step and one
        rank they are that step's value to the last bit.

        Args:
            step: how many steps are done.
            facts: what is known without the device, written as it is: phase, images seen, learning rate ...

        Returns:
            the line.
        """
        means = self._means()
        seconds = max(time.perf_counter() - self._start - self._untimed, 1e-9)
        line: dict[str, Any] = {"step": step, **facts, **means}
        line["images_per_second"] = self._images / seconds
        if self._peak_flops and self._flops:
            line["mfu"] = self._flops / seconds / self._peak_flops
        line["data_wait"] = min(self._waited / seconds, 1.0)
        line["memory_mib"] = memory_mib(self._device)
        line["steps"], line["seconds"] = self._steps, seconds
        self._write(METRICS, step, line)
        self._start_window()
        return line

    def _means(self) -> dict[str, float]:
        """Over the steps where a value was finite: those that were skipped are counted apart."""
        by_names: dict[tuple[str, ...], list[Tensor]] = {}
        for names, values in self._tensors:
            by_names.setdefault(names, []).append(values)
        sums: dict[str, float] = {name: sum(values) for name, values in self._floats.items()}
        counts = {name: len(values) for name, values in self._floats.items()}
        if by_names:
            tables = [torch.stack(rows).double() for rows in by_names.values()]
            totals = torch.cat([table.nan_to_num(0.0, 0.0, 0.0).sum(dim=0) for table in tables])
            finite = torch.cat([table.isfinite().sum(dim=0) for table in tables])
            flat = [name for names in by_names for name in names]
            for name, total, count in zip(flat, *torch.stack([totals, finite]).tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + count
        if not sums:
            return {}
        order = sorted(sums)
        values = [sums[name] / counts[name] if counts[name] else math.nan for name in order]
        means = torch.tensor(values, dtype=torch.float64, device=self._device)
        return dict(zip(order, self._mean_over_ranks(means).tolist(), strict=True))

    def evaluation(self, step: int, figures: Mapping[str, float | str]) -> None:
        """Write what an evaluation found, or `failed`: evaluations.jsonl, and the writers as `evaluation/<name>`."""
        self._write(EVALUATIONS, step, {"step": step, **figures}, prefix="evaluation/")

    def alarm(self, step: int, name: str, message: str) -> None:
        """Write an alarm (alarms.py): alarms.jsonl."""
        self._write(ALARMS, step, {"step": step, "name": name, "message": message})

    def _write(self, file: str, step: int, line: Mapping[str, Any], prefix: str = "") -> None:
        if self._folder is None:
            return
        append_line(self._folder / file, line)
        figures = {prefix + k: float(v) for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        for writer in self._writers:
            writer.write(step, figures)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def memory_mib(device: torch.device) -> float:
    """Most memory that tensors held on a CUDA device since the start; elsewhere the process's memory now. In MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


def machine(device: torch.device) -> dict[str, Any]:
    """What a run ran on, for its record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return {"device": name, "ranks": ranks, "threads": torch.get_num_threads(), "torch": torch.__version__}
