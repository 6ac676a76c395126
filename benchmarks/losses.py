"""Sinkhorn-Knopp and the prototype cross-entropy, with gradients: ours, the plain formulation and lightly's, in turns.

    python -m benchmarks.losses                        236 x 65,536 and 472 x 8,192, width 256, float32 and bfloat16
    python -m benchmarks.losses --sizes 472x65536      other tokens x prototypes

One measurement is what a head's loss costs in a step, from unit-norm features on: teacher logits, three Sinkhorn
iterations, student logits, cross-entropy, and the gradients by student features and prototypes. "plain" writes the
published formulation with torch: assignments as a float32 matrix, log_softmax of the float32 student logits.
"lightly" is its `loss.swav_loss.sinkhorn` and the softmax cross-entropy of its IBOTPatchLoss (whose own targets are
softmax-centred) on those assignments. bfloat16 is autocast: matrix products in bfloat16, the rest in float32. Memory
is the peak of resident memory above the start of the measurement, inputs not counted, gradients counted; each
measurement is a process of its own for that, while times are taken in one process, in turns. Prints a table, and its
figures as JSON (to --json, if given).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lightly.loss.swav_loss import sinkhorn
from torch import Tensor

from pretrain.losses.centering import sinkhorn_knopp
from pretrain.losses.prototypes import prototype_cross_entropy

WIDTH = 256
TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.07, 0.1
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def ours(student: Tensor, student_prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor) -> Tensor:
    with torch.no_grad():
        [targets] = sinkhorn_knopp([teacher @ teacher_prototypes.T], TEACHER_TEMPERATURE)
    weights = torch.full((len(student),), 1 / len(student))
    return prototype_cross_entropy(student, student_prototypes, targets, weights, STUDENT_TEMPERATURE)[0]


def plain(student: Tensor, student_prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor) -> Tensor:
    with torch.no_grad():
        logits = (teacher @ teacher_prototypes.T).float()
        assignments = torch.exp(logits / TEACHER_TEMPERATURE).T  # [K, N]
        num_prototypes, num_samples = assignments.shape
        assignments /= assignments.sum()
        for _ in range(3):
            assignments /= assignments.sum(dim=1, keepdim=True)
            assignments /= num_prototypes
            assignments /= assignments.sum(dim=0, keepdim=True)
            assignments /= num_samples
        assignments *= num_samples
        assignments = assignments.T
    student_logits = student @ student_prototypes.T
    log_probabilities = F.log_softmax(student_logits.float() / STUDENT_TEMPERATURE, dim=-1)
    return -(assignments * log_probabilities).sum(dim=-1).mean()


def lightly(student: Tensor, student_prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor) -> Tensor:
    with torch.no_grad():
        assignments = sinkhorn((teacher @ teacher_prototypes.T).float(), epsilon=TEACHER_TEMPERATURE)
    log_probabilities = F.log_softmax(student @ student_prototypes.T / STUDENT_TEMPERATURE, dim=-1)
    return -torch.sum(assignments * log_probabilities, dim=-1).mean()


METHODS: dict[str, Callable[..., Tensor]] = {"plain": plain, "lightly": lightly, "ours": ours}


def inputs(num_tokens: int, num_prototypes: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def unit(num_rows: int) -> Tensor:
        return F.normalize(torch.randn(num_rows, WIDTH, generator=generator), dim=-1)

    student, prototypes = unit(num_tokens).requires_grad_(), unit(num_prototypes).requires_grad_()
    return student, prototypes, unit(num_tokens), unit(num_prototypes)


def step(method: str, dtype: str, tensors: Inputs) -> float:
    """One measurement; returns the loss."""
    for tensor in tensors[:2]:
        tensor.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = METHODS[method](*tensors)
    loss.backward()
    return loss.item()


def seconds(dtype: str, tensors: Inputs, num_runs: int) -> dict[str, list[tuple[float, float]]]:
    """Of each run, by method: seconds, and processor seconds (which a busy machine stretches less)."""
    for method in METHODS:
        step(method, dtype, tensors)  # warm up
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for _ in range(num_runs):
        for method in METHODS:
            start, cpu_start = time.perf_counter(), time.process_time()
            step(method, dtype, tensors)
            times[method].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return times


def peak_mb(method: str, dtype: str, num_tokens: int, num_prototypes: int) -> None:
    """Print the peak memory of one measurement in this process."""
    tensors = inputs(num_tokens, num_prototypes)
    step(method, dtype, inputs(8, 64))  # what the libraries load once
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at what is used now
    before = resident_mb("VmHWM")
    step(method, dtype, tensors)
    print(resident_mb("VmHWM") - before)


def resident_mb(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def peak_mb_in_a_process(method: str, dtype: str, size: str, num_threads: int) -> float:
    command = [sys.executable, "-m", "benchmarks.losses", "--peak", method, dtype, size, "--threads", str(num_threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["236x65536", "472x8192"], metavar="TOKENSxPROTOTYPES")
    parser.add_argument("--runs", type=int, default=7, help="medians are over them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=3, metavar=("METHOD", "DTYPE", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        method, dtype, size = args.peak
        peak_mb(method, dtype, *(int(number) for number in size.split("x")))
        return
    figures: dict[str, dict] = {}
    for size in args.sizes:
        num_tokens, num_prototypes = (int(number) for number in size.split("x"))
        for dtype in ("float32", "bfloat16"):
            name = f"{num_tokens} x {num_prototypes}, width {WIDTH}, {dtype}, {args.threads} threads"
            print(name, flush=True)
            tensors = inputs(num_tokens, num_prototypes)
            times = seconds(dtype, tensors, args.runs)
            figures[name] = {
                method: {
                    "seconds": float(np.median(times[method], axis=0)[0]),
                    "fastest": min(times[method])[0],
                    "cpu_seconds": float(np.median(times[method], axis=0)[1]),
                    "plain_over_this": float(np.median(np.divide(times["plain"], times[method]), axis=0)[0]),
                    "peak_mb": peak_mb_in_a_process(method, dtype, size, args.threads),
                    "loss": step(method, dtype, tensors),
                }
                for method in METHODS
            }
            for method, row in figures[name].items():
                print(f"  {method:8}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    text = json.dumps(figures, indent=2)
    if args.json:
        args.json.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
