"""Serving: images a second at 1, 8 and 32 clients, with batches and without, against the plain loop, interleaved.

    python -m benchmarks.serve [BACKBONE] [--images 96] [--repeats 5]

A client is a thread that posts one JPEG of 500 x 375 after another on a connection of its own. The plain loop is that
of `pretrain.downstream.features`, the bound of a server: the same images, decoded by threads, embedded 32 at a time by
the same code. BACKBONE is whatever `serve` takes; by default a random ViT-S/16. torch has one thread everywhere.
Wall time depends on what else the cores do, so all take turns in each round; the processor time is that of the server
alone, and of the loop.
"""

import argparse
import contextlib
import http.client
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch

from benchmarks.loading import SIZE, images
from pretrain.checkpoint import write_teacher
from pretrain.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pretrain.downstream.embedders.embedder import Embedder
from pretrain.downstream.embedders.load import crop_side, load_embedder
from pretrain.downstream.pixels import eval_crop, short_side
from pretrain.models.architectures import build

CLIENTS, BATCH = (1, 8, 32), 32
LOOP = "plain loop"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backbone", nargs="?", default="", help="whatever serve takes (default: a random ViT-S/16)")
    parser.add_argument("--images", type=int, default=96, help="of a measurement")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    contents, source = images(options.images)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        backbone = options.backbone or str(random_backbone(Path(folder)))
        embedder = load_embedder(backbone)
        timed = {LOOP: (partial(loop, embedder, contents), psutil.Process())}
        for name, flags in (("batches", []), ("no batches", ["--max-batch", "1"])):
            port, process = servers.enter_context(server(backbone, *flags))
            timed |= {f"{name}, {n} clients": (partial(ask, port, contents, n), process) for n in CLIENTS}
        measured = compare(timed, options.images, options.repeats)
        print(
            f"{embedder.architecture}, crops of {crop_side(None, embedder)} px, {embedder.runs_on}; {options.images} "
            f"images, {SIZE[0]} x {SIZE[1]} JPEG, {source}"
        )
    print(f"{'how':24} {'img/s, median':>14} {'of the loop':>12} {'processor ms an image':>22}")
    for name, values in measured.items():
        share = statistics.median(a.rate / b.rate for a, b in zip(values, measured[LOOP], strict=True))
        rate, cost = statistics.median(m.rate for m in values), statistics.median(m.processor_ms for m in values)
        print(f"{name:24} {rate:14.1f} {share:12.2f} {cost:22.1f}")


def random_backbone(folder: Path) -> Path:
    model = build("dinov3_vits16")
    model.init_weights()
    image = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "px": 224}
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    write_teacher(folder, state, {"architecture": "dinov3_vits16", "model": {}, "image": image})
    return folder


@contextlib.contextmanager
def server(backbone: str, *flags: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server of its own process: its port, and the process."""
    command = [sys.executable, "-m", "pretrain.downstream.serve", backbone, "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().partition(" at http://")[2].split()[0]
        yield int(address.rpartition(":")[2]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def loop(embedder: Embedder, contents: Sequence[bytes]) -> None:
    px = crop_side(None, embedder)
    with ThreadPoolExecutor(4) as threads:
        crops = threads.map(lambda content: eval_crop(content, px, short_side(px)), contents)
        while batch := list(islice(crops, BATCH)):
            embedder(np.stack(batch), False)


def ask(port: int, contents: Sequence[bytes], num_clients: int) -> None:
    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        for content in contents[first::num_clients]:
            connection.request("POST", "/embed", content)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, body
        connection.close()

    with ThreadPoolExecutor(num_clients) as threads:
        list(threads.map(client, range(num_clients)))


@dataclass(frozen=True)
class Measured:
    """One measurement: images a second, and the processor's milliseconds for each."""

    rate: float
    processor_ms: float


def compare(
    timed: Mapping[str, tuple[Callable[[], object], psutil.Process]], num_images: int, repeats: int
) -> dict[str, list[Measured]]:
    """Each in each round, in turn, so that a busy machine slows all alike; the first round warms up."""
    found: dict[str, list[Measured]] = {name: [] for name in timed}
    for repetition in range(repeats + 1):
        for name, (run, process) in timed.items():
            start, used = time.perf_counter(), sum(process.cpu_times()[:2])
            run()
            took_s, used_s = time.perf_counter() - start, sum(process.cpu_times()[:2]) - used
            if repetition:
                found[name].append(Measured(num_images / took_s, 1000 * used_s / num_images))
    return found


if __name__ == "__main__":
    main()
