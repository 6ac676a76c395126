"""Decode tasks of the embed stage: a part's samples -> index rows and views, in batches, whatever its images do."""

import contextlib
import hashlib
import multiprocessing
import posixpath
import resource
import signal
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curation.encoders.encoder import View
from curation.engine.store import INDEX_SCHEMA
from curation.ops.hashes import perceptual_hash
from curation.reading.filters import Pixels, first_refusals
from curation.reading.pictures.images import ImageLimits, Rejected, decode, luma_deviation
from curation.reading.samples import Part, Sample
from curation.reading.sources import read_samples
from curation.reading.tar_samples import HeadersFirst

_IMAGE_TIMEOUT_S = 60.0
_FILTER_BYTES = 64 << 20  # decoded pictures that wait to be shown to a filter
_CHILD_BYTES_PER_PIXEL = 32  # what decoding the largest image allowed may take, in a child process


@dataclass(frozen=True)
class DecodeJob:
    """What a decode worker needs to know; small, and free of weights."""

    views: tuple[View, ...]
    """the different ones that the encoders and filters of the actor want"""
    limits: ImageLimits
    pixel_filters: tuple[Pixels, ...]
    """those that see whole pictures"""
    batch_size: int


@dataclass(frozen=True)
class Prepared:
    """One sample after its decode: the index row and, for a good image, its views."""

    row: dict[str, Any]
    views: dict[View, np.ndarray]


Batch = tuple[list[dict[str, Any]], dict[View, np.ndarray]]


def decode_part(part: Part, job: DecodeJob, isolated: bool) -> Iterator[Batch | None]:
    """Batches of (index rows, views [good images among them, height, width, 3]), in the part's order.

    A batch closes when it holds `batch_size` good images, so the encoder's batches are full but for a part's last, and
    do not depend on workers. An image that takes a minute ends the process. `isolated` decodes each in a child process
    that may die without harm. None: what came so far is void, for the part has to be read in another order.
    """
    prepare = _prepare_isolated if isolated else prepare_samples
    try:
        yield from _batches(prepare(read_samples(part, job.limits.max_file_bytes), part, job), job)
    except HeadersFirst:
        yield None
        samples = read_samples(part, job.limits.max_file_bytes, headers_first=True)
        yield from _batches(prepare(samples, part, job), job)


def _batches(prepared: Iterable[Prepared], job: DecodeJob) -> Iterator[Batch]:
    rows: list[dict[str, Any]] = []
    views: list[dict[View, np.ndarray]] = []
    for sample in prepared:
        rows.append(sample.row)
        if sample.views:
            views.append(sample.views)
        if len(views) == job.batch_size:
            yield rows, _stacked(views)
            rows, views = [], []
    if rows:
        yield rows, _stacked(views)


def _stacked(views: list[dict[View, np.ndarray]]) -> dict[View, np.ndarray]:
    return {view: np.stack([made[view] for made in views]) for view in (views[0] if views else ())}


def prepare_samples(samples: Iterable[Sample], part: Part, job: DecodeJob) -> Iterator[Prepared]:
    """Decode each once; hash it, show it to the filters of whole pictures, many at a time, and make its views."""
    waiting: list[tuple[dict[str, Any], Image.Image | None]] = []
    held_bytes = 0
    for sample in samples:
        with _deadline():
            row, image = _decoded(sample, part, job)
        waiting.append((row, image))
        held_bytes += 3 * image.width * image.height if image is not None else 0
        if not job.pixel_filters or len(waiting) == job.batch_size or held_bytes > _FILTER_BYTES:
            yield from _judged(waiting, job)
            waiting, held_bytes = [], 0
    yield from _judged(waiting, job)


def _decoded(sample: Sample, part: Part, job: DecodeJob) -> tuple[dict[str, Any], Image.Image | None]:
    """The row of a sample, and its picture, if that is good so far."""
    row = empty_row(sample, part)
    if sample.content is None:
        return {**row, "reason": sample.reason or "no_image"}, None
    row["sha256"] = hashlib.sha256(sample.content).digest()
    try:
        decoded = decode(sample.content, job.limits)
        if isinstance(decoded, Rejected):
            size = {"width": decoded.width, "height": decoded.height, "format": decoded.format}
            return {**row, **size, "reason": decoded.reason}, None
        pdq, quality, mirrored = perceptual_hash(decoded.image)
        deviation = luma_deviation(decoded.image)
    except Exception:  # a hole in our own reading: one image must not end a run of a billion
        return {**row, "reason": "decoder_failed"}, None
    row |= {
        "width": decoded.width,
        "height": decoded.height,
        "format": decoded.format,
        "mode": decoded.mode,
        "pdq": pdq,
        "pdq_quality": quality,
        "pdq_mirrored": mirrored,
        "luma_deviation": deviation,
        "warning": sample.warning or decoded.warning,
    }
    return row, decoded.image


def _judged(waiting: list[tuple[dict[str, Any], Image.Image | None]], job: DecodeJob) -> Iterator[Prepared]:
    good = [(row, image) for row, image in waiting if image is not None]
    if job.pixel_filters and good:
        pictures, rows = [np.asarray(image) for _, image in good], [row for row, _ in good]
        filters = [(rule, rule.build("cpu")) for rule in job.pixel_filters]
        reasons = first_refusals(filters, rows, lambda _, chosen: [pictures[i] for i in chosen])
        for row, reason in zip(rows, reasons, strict=True):
            row["reason"] = reason
    for row, image in waiting:
        if image is None or row["reason"] is not None:
            yield Prepared(row, {})
        else:
            row["status"] = "ok"
            with _deadline():
                yield Prepared(row, {view: view(image) for view in job.views})


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """End this process when an image takes too long: a loop in native code holds the interpreter, and no exception
    would reach it. The part is then decoded image by image.
    """
    signal.setitimer(signal.ITIMER_REAL, _IMAGE_TIMEOUT_S)  # SIGALRM has no handler here: the kernel ends the process
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def unreadable_part(part: Part) -> dict[str, Any]:
    """The row of a part that ends every process that reads it."""
    name = posixpath.basename(part.url.rstrip("/"))
    return {**empty_row(Sample(f"{name}@0", unread_bytes=part.size), part), "reason": "reader_crashed"}


def empty_row(sample: Sample, part: Part) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(INDEX_SCHEMA.names)
    row |= {
        "key": sample.key,
        "source": part.url,
        "source_kind": part.kind,
        "image": asdict(sample.image) if sample.image is not None else None,
        "others": [asdict(member) for member in sample.others],
        "metadata": sample.metadata,
        "width": 0,
        "height": 0,
        "status": "rejected",
        "warning": sample.warning,
        "unread_bytes": sample.unread_bytes,
        "unread_images": sample.unread_images,
    }
    return row


def _prepare_isolated(samples: Iterable[Sample], part: Part, job: DecodeJob) -> Iterator[Prepared]:
    for rule in job.pixel_filters:
        rule.build("cpu")  # before the fork, and outside the time that one image has
    child = _Child(job)
    try:
        for sample in samples:
            yield child.prepare(sample, part)
    finally:
        child.stop()


class _Child:
    """prepare_samples in a forked process: a crash, a hang or a flood of native code costs one image, with a reason."""

    def __init__(self, job: DecodeJob) -> None:
        self.job = job
        self.process: Any = None

    def prepare(self, sample: Sample, part: Part) -> Prepared:
        if self.process is None:
            self._start()
        reason = "decoder_crashed"
        try:
            self.pipe.send((sample, part))
            if self.pipe.poll(_IMAGE_TIMEOUT_S):
                answer = self.pipe.recv()
                if isinstance(answer, Exception):
                    raise answer
                return answer
            reason = "decoder_timeout"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
        self.stop()
        return Prepared({**empty_row(sample, part), "reason": reason}, {})

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # spawn would start Ray's worker script again
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.job), daemon=True)
        self.process.start()
        theirs.close()


def _serve(pipe: Any, job: DecodeJob) -> None:
    _limit_memory(_CHILD_BYTES_PER_PIXEL * job.limits.max_pixels)
    while True:
        try:
            sample, part = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(next(prepare_samples([sample], part, job)))
        except Exception as error:
            pipe.send(error)


def _limit_memory(more_bytes: int) -> None:
    """Let this process take so much more than it has: it fails then, before the machine does."""
    with contextlib.suppress(OSError, ValueError):  # no /proc, or a lower limit already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
