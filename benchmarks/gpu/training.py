"""Sections I and J: the command `pretrain.train`, in this process: its steps, a stop and a resume, what it learns."""

import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml
from safetensors.torch import load_file

from benchmarks.gpu.measure import Setting, check, peak, relative_error
from benchmarks.gpu.steps import SMALL
from benchmarks.gpu.table import Figures, Part
from benchmarks.loading import drawn, write_shard
from curation.demo.drawing import SCENES, draw_scene
from pretrain.downstream.evals.labelled import Sample, samples
from pretrain.train import FINISHED, STOPPED, main
from pretrain.watch.lines import read_lines

CIFAR = Path(__file__).parents[2] / "configs" / "pretrain" / "cifar.yaml"
NEIGHBOURS = 20
DRAWN_PX = 48


def image_tar(at: Setting) -> Path:
    """A tar of 500 x 375 JPEGs, made by the first section that needs it."""
    path = at.work / "images.tar"
    if not path.exists():
        with ThreadPoolExecutor() as pool:
            contents = list(pool.map(_encoded, range(at.sizes.tar_images)))
        write_shard(path.with_suffix(".partial"), contents)
        path.with_suffix(".partial").rename(path)
    return path


def _encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    drawn(seed).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def run(at: Setting, config: str | Path, shards: Path, out: Path, *settings: str) -> int:
    """The training command; its exit status."""
    workers = at.sizes.workers[-1]
    own = [f"execution.device={at.device.type}", f"execution.loader.num_workers={workers}", "execution.compile=false"]
    own.append(f"watch.peak_tflops={peak(at.device)[0] / 1e12}")
    return main(["--config", str(config), "--shards", str(shards), "--out", str(out), *own, *settings])


def resumed(at: Setting) -> Iterator[Part]:
    tar, steps = image_tar(at), at.sizes.resumed_steps
    settings = [*at.sizes.models, f"global_batch_size={at.sizes.resumed_batch}", f"steps={steps}"]
    settings += ["optim.warmup_steps=4", "optim.freeze_last_layer_steps=2", "optim.teacher_temperature_warmup_steps=4"]
    settings += ["watch.every_steps=1", f"checkpoint.every_steps={steps}", "loss.koleo_group_size=0"]
    whole, stopped = at.work / "whole", at.work / "stopped"

    def uninterrupted() -> Figures:
        status = run(at, SMALL, tar, whole, *settings)
        lines = read_lines(whole / "metrics.jsonl")[steps // 4 :]
        names = ("images_per_second", "data_wait", "mfu")
        means = {name: float(np.mean([line[name] for line in lines])) for name in names}
        return {"exit_status": status, "steps": len(lines), **means, "memory_gib": lines[-1]["memory_mib"] / 1024}

    def interrupted() -> Figures:
        stop_at(stopped / "metrics.jsonl", steps // 2)
        first = run(at, SMALL, tar, stopped, *settings)
        at_step = read_lines(stopped / "metrics.jsonl")[-1]["step"]
        second = run(at, SMALL, tar, stopped, *settings)
        return {
            "stopped_at": at_step,
            "exit_status": first,
            "resumed_exit_status": second,
            "ok": (first, second) == (STOPPED, FINISHED),
        }

    yield f"{steps} steps", uninterrupted
    yield "stopped and resumed", interrupted
    yield "the same to the last bit", lambda: compare(whole, stopped)


def stop_at(metrics: Path, step: int) -> None:
    """Ask this process to stop, as a scheduler would, once the run has done so many steps."""

    def watch() -> None:
        while not any(line["step"] >= step for line in read_lines(metrics)):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def compare(whole: Path, stopped: Path) -> Figures:
    """Losses and gradient norms by step, and the teacher: 0 is promised."""
    differing, largest = None, 0.0
    pairs = zip(read_lines(whole / "metrics.jsonl"), read_lines(stopped / "metrics.jsonl"), strict=True)
    for one, other in pairs:
        for name in (name for name in one if name.startswith(("loss", "grad_norm"))):
            difference = abs(one[name] - other[name]) / max(abs(one[name]), 1e-12)
            largest = max(largest, difference)
            differing = one["step"] if difference and differing is None else differing
    teachers = [load_file(folder / "teacher" / "teacher.safetensors") for folder in (whole, stopped)]
    teacher = max(relative_error(teachers[1][name], tensor) for name, tensor in teachers[0].items())
    return {"first_differing_step": differing, "teacher_error": teacher, **check(max(largest, teacher), 0.0)}


# Learning


def learning(at: Setting) -> Iterator[Part]:
    """ViT-Ti with patches of 4 px on pictures of 32 px, for as many steps as there is time."""
    sizes, shards = at.sizes, at.work / "shards"
    vote, classify = shards / "vote.tar", at.work / "classify.tar"
    config = at.work / "learning.yaml"
    raw = yaml.safe_load(CIFAR.read_text(encoding="utf-8"))
    raw["model"]["patch_size"] = 4
    raw["global_batch_size"] = sizes.learning_batch
    config.write_text(yaml.safe_dump(raw))
    rate: list[float] = []

    def pictures() -> Figures:
        found, others = labelled(at)
        shards.mkdir()
        for number, path in enumerate(others):
            (shards / f"{number}.tar").symlink_to(path)
        write_labelled(vote, [sample for i, sample in enumerate(found) if i % 5])
        write_labelled(classify, found[::5])
        source = ", ".join(Path(path).name for path in at.images) or "drawn"
        facts = {"source": source, "tars_without_labels": len(others)}
        return {**facts, "vote": len(found) - len(found[::5]), "classified": len(found[::5])}

    def trial() -> Figures:
        steps = sizes.learning_trial_steps
        out = at.work / "trial"
        status = run(at, config, shards, out, *schedule(steps), f"watch.every_steps={max(steps // 4, 1)}")
        rate.append(read_lines(out / "metrics.jsonl")[-1]["images_per_second"])
        return {"exit_status": status, "images_per_s": rate[0]}

    def trained() -> Figures:
        steps = int(min(max(0.55 * at.left_s() * rate[0] / sizes.learning_batch, 1), sizes.learning_steps))
        out = at.work / "learned"
        asked = [f"evaluation.train={vote}", f"evaluation.val={classify}", f"evaluation.every_steps={steps}"]
        asked += [f"evaluation.k=[{NEIGHBOURS}]", "evaluation.pca_images=0", f"watch.every_steps={max(steps // 20, 1)}"]
        status = run(at, config, shards, out, *schedule(steps), *asked)
        lines, (before, *_, after) = read_lines(out / "metrics.jsonl"), read_lines(out / "evaluations.jsonl")
        return {
            "exit_status": status,
            "steps": steps,
            "images_per_s": lines[-1]["images_per_second"],
            "data_wait": lines[-1]["data_wait"],
            "mfu": lines[-1]["mfu"],
            "first_loss": lines[0]["loss"],
            "last_loss": lines[-1]["loss"],
            "knn_before": before["knn"],
            "knn_after": after["knn"],
            "knn_pixels": after["knn_pixels"],
            "knn_random": after["knn_random"],
        }

    yield "pictures", pictures
    yield "trial", trial
    yield "trained", trained


def schedule(steps: int) -> list[str]:
    """A whole schedule in so many steps."""
    return [
        f"steps={steps}",
        f"optim.warmup_steps={steps // 10}",
        f"optim.freeze_last_layer_steps={steps // 50}",
        f"checkpoint.every_steps={steps}",
    ]


def labelled(at: Setting) -> tuple[list[Sample], list[str]]:
    """The labelled images of the user's tars, and those tars without any; else drawn ones of twelve concepts."""
    if not at.images:
        # These processes draw and end; the device stays this one's.
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
            return list(pool.map(_drawn_sample, range(at.sizes.learned_images), chunksize=32)), []
    by_tar = {path: [sample for sample in samples(path) if sample.label is not None] for path in at.images}
    found = [sample for own in by_tar.values() for sample in own]
    if len(found) < 5 * NEIGHBOURS:
        raise ValueError(
            f"--images: {len(found)} images have a label in a json member beside them; k-NN needs {5 * NEIGHBOURS}."
        )
    return found, [path for path, own in by_tar.items() if not own]


def _drawn_sample(number: int) -> Sample:
    concept = list(SCENES)[number * 5 // 12 % 12]  # not in step with the fifth that is classified
    buffer = io.BytesIO()
    draw_scene(concept, np.random.default_rng(number), DRAWN_PX, DRAWN_PX).save(buffer, "JPEG", quality=90)
    return Sample(f"{number:06d}", buffer.getvalue(), concept)


def write_labelled(path: Path, found: list[Sample]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(found):
            label = json.dumps({"label": sample.label}).encode()
            for suffix, content in (("jpg", sample.content), ("json", label)):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
