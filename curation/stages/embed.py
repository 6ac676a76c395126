"""index + embed: every image of a set is read and decoded once; its row and its vectors are written, part by part."""

import hashlib
import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from configs.ranges import check_ranges
from curation.encoders.load import Encoder, View, load_encoder
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.store import INDEX_SCHEMA, NOT_IN_POOL, ImageSet, encoder_folder, register, registered
from curation.engine.workers import ExecutionConfig, WorkerLost, drive, num_gpus, num_workers, unwrapped
from curation.ops.hashes import perceptual_hash
from curation.reading.filters import Filter, Pixels
from curation.reading.pictures.images import ImageLimits, Rejected, decode, luma_deviation
from curation.reading.samples import Part, Sample
from curation.reading.sources import read_samples
from curation.reading.tar_samples import NO_END_MARKER, HeadersFirst

VERSION = 2
_DECODE_AHEAD = 2  # batches that a decoder may be ahead of its encoder
_ISOLATED_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """One decode an image, for every encoder."""

    encoder: str = "vit_small_patch14_dinov2.lvd142m"
    """retrieval and clustering; spec strings are listed in curation/encoders/load.py"""
    copy_encoder: str | None = None
    """copy detection (deduplication, decontamination); null: the same as `encoder`"""
    image_px: int | None = None
    """side of the encoders' square input, pixels; null: each model's own"""
    batch_size: int = 64
    """images in one call of the encoder"""
    max_file_bytes: int = 64 << 20
    """bytes of an encoded image; larger ones are rejected unread"""
    max_pixels: int = 90_000_000
    """width x height, from the header; larger ones are rejected undecoded"""
    images_per_folder_part: int = 1000
    """a folder of loose images is cut into parts of this many"""
    max_rejected_fraction: float = 0.5
    """more rejected images than this share of a set stops the run: the input is probably not what was meant; counts the
    images that the unread bytes of damaged shards would hold"""

    def __post_init__(self) -> None:
        at_least_one = ("image_px", "batch_size", "max_file_bytes", "max_pixels", "images_per_folder_part")
        check_ranges("embed", self, **dict.fromkeys(at_least_one, "[1, inf)"), max_rejected_fraction="[0, 1]")

    def encoders(self) -> list[str]:
        """The different encoders: retrieval first, then copy detection."""
        return list(dict.fromkeys([self.encoder, self.copy_encoder or self.encoder]))


@dataclass(frozen=True)
class DecodeJob:
    """What a decode worker needs to know; small, and free of weights."""

    views: dict[str, View]
    limits: ImageLimits
    pixel_filters: tuple[Pixels, ...]
    batch_size: int


@dataclass(frozen=True)
class Prepared:
    """One sample after its decode: the index row and, for a good image, one view an encoder."""

    row: dict[str, Any]
    views: dict[str, np.ndarray]


def embed_set(
    folder: Folder,
    parts: Sequence[Part],
    encoder_specs: Sequence[str],
    config: EmbedConfig,
    filters: Sequence[Filter],
    execution: ExecutionConfig,
    label: str,
) -> tuple[list[File], list[int]]:
    """Index and embed the parts of one set into `folder`; parts that a former run finished are kept.

    Returns:
        files: index/part-<id>.parquet and <encoder>/part-<id>.npy of every part that the set has or had, in the order
            of the parts' numbers.
        gone: numbers of the parts that are not among `parts` any more.

    Raises:
        ValueError: files of a part that has gone are gone too, and cannot be made again.
    """
    done = dict.fromkeys(folder.names())
    todo = [part for part in parts if f"done/part-{part.id}.json" not in done]
    if todo:
        _embed_parts(folder, todo, encoder_specs, config, filters, execution, label)
    known = registered(folder)
    register(folder, {part.id: _read_record(folder, part) for part in parts if part.id not in known})
    known, listed = registered(folder), {part.id for part in parts}
    gone = [number for number, id_ in enumerate(known) if id_ not in listed]
    for id_ in known.keys() - listed:
        if lacking := [file.path for file in known[id_] if file.path not in done]:
            raise ValueError(
                f"{folder.url}/{lacking[0]} is gone, and so is the shard or folder that it was made from: bring one "
                "of them back, or give another --out."
            )
    files = [file for of_part in known.values() for file in of_part]
    index = [f for f in files if f.path.startswith("index/")]
    return index + [f for f in files if not f.path.startswith("index/")], gone


def _embed_parts(
    folder: Folder,
    parts: Sequence[Part],
    encoder_specs: Sequence[str],
    config: EmbedConfig,
    filters: Sequence[Filter],
    execution: ExecutionConfig,
    label: str,
) -> None:
    gpus = num_gpus(execution)
    device = "cuda" if gpus else "cpu"
    encoders = {encoder_folder(spec): load_encoder(spec, device, config.image_px) for spec in encoder_specs}
    job = DecodeJob(
        views={name: encoder.view for name, encoder in encoders.items()},
        limits=ImageLimits(max_file_bytes=config.max_file_bytes, max_pixels=config.max_pixels),
        pixel_filters=tuple(rule for rule in filters if isinstance(rule, Pixels)),
        batch_size=config.batch_size,
    )
    # Decoders are Ray tasks of one CPU; encoders are actors, one a GPU, or one a worker where there is none. An actor
    # holds no CPU of its own, or one worker could not run both; it is fed by several decoders at once.
    workers = num_workers(execution)
    num_actors = gpus or min(workers, len(parts))
    feeds = max(1, -(-workers // num_actors))
    actor = ray.remote(num_cpus=0, num_gpus=1 if gpus else 0, max_restarts=3, max_concurrency=feeds)(_EmbedWorker)
    actors = [actor.remote(encoders, folder, job) for _ in range(num_actors)]
    try:
        drive(
            (lambda i=i, part=part: actors[i % num_actors].embed_part.remote(part) for i, part in enumerate(parts)),
            len(parts),
            in_flight=num_actors * feeds * 2,
            label=label,
            unit="MB",
            weights=[part.size / 1e6 for part in parts],
        )
    finally:
        for handle in actors:
            ray.kill(handle)


class _EmbedWorker:
    """A Ray actor that holds the encoders, takes batches from decode tasks, and writes a part's files."""

    def __init__(self, encoders: dict[str, Encoder], folder: Folder, job: DecodeJob) -> None:
        self.encoders, self.folder, self.job = encoders, folder, job
        self.decode = ray.remote(
            num_cpus=1, num_returns="streaming", max_retries=1, _generator_backpressure_num_objects=_DECODE_AHEAD
        )(decode_part)

    def embed_part(self, part: Part) -> None:
        try:
            rows, vectors = self._collect(part, isolated=False)
        except WorkerLost:  # some image crashes native code or takes all memory; find it one by one
            rows, vectors = self._collect(part, isolated=True)
        write_part(self.folder, part, rows, vectors)

    def _collect(self, part: Part, isolated: bool) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        rows: list[dict[str, Any]] = []
        blocks: dict[str, list[np.ndarray]] = {name: [] for name in self.encoders}
        for reference in self.decode.remote(part, self.job, isolated):
            batch = unwrapped(reference)
            if batch is None:
                rows, blocks = [], {name: [] for name in self.encoders}
                continue
            new_rows, views = batch
            good = np.flatnonzero([row["status"] == "ok" for row in new_rows])
            for name, encoder in self.encoders.items():
                block = np.zeros((len(new_rows), encoder.dim), np.float16)
                if len(good):
                    block[good] = encoder.embed(views[name]).astype(np.float16)
                blocks[name].append(block)
                # A hostile image can drive a model to NaN or zero: that is its row's fate, not the run's.
                norms = np.linalg.norm(block[good].astype(np.float32), axis=1)
                for row in good[~(np.abs(norms - 1) < 0.01)]:
                    new_rows[row] |= {"status": "rejected", "reason": "no_embedding"}
            rows += new_rows
        empty = {name: np.zeros((0, encoder.dim), np.float16) for name, encoder in self.encoders.items()}
        return rows, {name: np.concatenate([empty[name], *blocks[name]]) for name in self.encoders}


Batch = tuple[list[dict[str, Any]], dict[str, Any]]


def decode_part(part: Part, job: DecodeJob, isolated: bool) -> Iterator[Batch | None]:
    """Batches of (index rows, views of the good images among them by encoder), in the part's order.

    A batch closes when it holds `batch_size` good images, so the encoder's batches are full but for a part's last, and
    do not depend on workers. `isolated` decodes each image in a child process that may die without harm. None: what
    came so far is void, for the part has to be read in another order.
    """
    try:
        yield from _decode_samples(read_samples(part, job.limits.max_file_bytes), part, job, isolated)
    except HeadersFirst:
        yield None
        samples = read_samples(part, job.limits.max_file_bytes, headers_first=True)
        yield from _decode_samples(samples, part, job, isolated)


def _decode_samples(samples: Iterable[Sample], part: Part, job: DecodeJob, isolated: bool) -> Iterator[Batch]:
    prepare = _IsolatedPrepare(job) if isolated else lambda sample: prepare_sample(sample, part, job)
    rows: list[dict[str, Any]] = []
    views: dict[str, list[np.ndarray]] = {name: [] for name in job.views}
    for sample in samples:
        prepared = prepare(sample) if not isolated else prepare(sample, part)
        rows.append(prepared.row)
        for name, view in prepared.views.items():
            views[name].append(view)
        if len(next(iter(views.values()))) == job.batch_size:
            yield rows, {name: np.stack(batch) for name, batch in views.items()}
            rows, views = [], {name: [] for name in job.views}
    if rows:
        yield rows, {name: np.stack(batch) if batch else None for name, batch in views.items()}


def prepare_sample(sample: Sample, part: Part, job: DecodeJob) -> Prepared:
    """Decode once; hash, filter by pixels and make the encoders' views."""
    row = _empty_row(sample, part)
    if sample.content is None:
        return Prepared({**row, "reason": sample.reason or "no_image"}, {})
    row["sha256"] = hashlib.sha256(sample.content).digest()
    decoded = decode(sample.content, job.limits)
    if isinstance(decoded, Rejected):
        size = {"width": decoded.width, "height": decoded.height, "format": decoded.format}
        return Prepared({**row, **size, "reason": decoded.reason}, {})
    pdq, quality, mirrored = perceptual_hash(decoded.image)
    row |= {
        "width": decoded.width,
        "height": decoded.height,
        "format": decoded.format,
        "mode": decoded.mode,
        "pdq": pdq,
        "pdq_quality": quality,
        "pdq_mirrored": mirrored,
        "luma_deviation": luma_deviation(decoded.image),
        "warning": sample.warning or decoded.warning,
    }
    for rule in job.pixel_filters:
        try:
            reason = rule.function()([np.asarray(decoded.image)], [row])[0]
        except Exception as error:
            raise ValueError(
                f"filters: {rule.path} failed on {sample.key!r} of {part.url}: {type(error).__name__}: {error}"
            ) from None
        if reason is not None:
            return Prepared({**row, "reason": str(reason)}, {})
    row["status"] = "ok"
    made = {view: view(decoded.image) for view in set(job.views.values())}  # encoders may share a view
    return Prepared(row, {name: made[view] for name, view in job.views.items()})


def write_part(folder: Folder, part: Part, rows: list[dict[str, Any]], vectors: dict[str, np.ndarray]) -> None:
    """The index and the vectors of one part, then the record that says both are whole."""
    files = [folder.write_table(f"index/part-{part.id}.parquet", pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))]
    files += [folder.write_array(f"{name}/part-{part.id}.npy", values) for name, values in vectors.items()]
    folder.write_bytes(f"done/part-{part.id}.json", json.dumps([asdict(file) for file in files]).encode())


def count_losses(images: ImageSet, bytes_read: int) -> tuple[dict[str, int], int, int]:
    """What a set holds, for its manifest, and what of it cannot be read.

    Args:
        bytes_read: of all parts of the set.

    Returns:
        counts: images (rows of the parts that are listed); rejected, by reason; where there are any: rows of parts that
            are not listed any more, damaged shards, unread bytes, unread images.
        lost, total: images that cannot be read, and all, those counted in that a shard's unread bytes would hold. A
            missing end marker is no loss.
    """
    columns = ["reason", "source", "unread_bytes", "unread_images"]
    there = [part for part in range(images.num_parts) if part not in images.parts.gone]
    table = pa.concat_tables([INDEX_SCHEMA.empty_table().select(columns), *(images.index(p, columns) for p in there)])
    counts = {"images": table.num_rows}
    if images.num_images > table.num_rows:
        counts[NOT_IN_POOL] = images.num_images - table.num_rows
    for entry in table["reason"].drop_null().value_counts().to_pylist():
        counts[f"rejected: {entry['values']}"] = entry["counts"]
    lost = len(table["reason"].drop_null()) - counts.get(f"rejected: {NO_END_MARKER}", 0)
    damage = table.filter(pc.is_valid(table["unread_bytes"])).to_pylist()
    unread_bytes = sum(row["unread_bytes"] for row in damage)
    good = max(table.num_rows - len(table["reason"].drop_null()), 1)
    mean = max((bytes_read - unread_bytes) / good, 1)
    unread = []
    for row in damage:
        known = row["unread_images"]  # else the shard has no whole sample: at the mean of the set
        unread.append(known if known is not None else max(1, round(row["unread_bytes"] / mean)))
    beyond_rows = sum(max(number - 1, 0) for number in unread)
    figures = {
        "damaged shards": len({row["source"] for row in damage}),
        "unread bytes": unread_bytes,
        "unread images": sum(unread),
    }
    counts |= {name: number for name, number in figures.items() if number}
    return counts, lost + beyond_rows, table.num_rows + beyond_rows


def _read_record(folder: Folder, part: Part) -> list[File]:
    return [File(**entry) for entry in json.loads(folder.read_bytes(f"done/part-{part.id}.json"))]


def _empty_row(sample: Sample, part: Part) -> dict[str, Any]:
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


class _IsolatedPrepare:
    """prepare_sample in a forked child: a crash or a hang of native code costs one image, with a reason."""

    def __init__(self, job: DecodeJob) -> None:
        self.job = job
        self.child: Any = None

    def __call__(self, sample: Sample, part: Part) -> Prepared:
        if self.child is None:
            self._start()
        self.pipe.send((sample, part))
        reason = "decoder_crashed"
        try:
            if self.pipe.poll(_ISOLATED_TIMEOUT_S):
                answer = self.pipe.recv()
                if isinstance(answer, Exception):
                    raise answer
                return answer
            reason = "decoder_timeout"
        except EOFError:
            pass
        self._stop()
        return Prepared({**_empty_row(sample, part), "reason": reason}, {})

    def _stop(self) -> None:
        assert self.child is not None
        self.child.kill()
        self.child.join()
        self.child = None

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # spawn would start Ray's worker script again
        self.pipe, theirs = context.Pipe()
        self.child = context.Process(target=_serve_prepare, args=(theirs, self.job), daemon=True)
        self.child.start()
        theirs.close()


def _serve_prepare(pipe: Any, job: DecodeJob) -> None:
    while True:
        try:
            sample, part = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(prepare_sample(sample, part, job))
        except Exception as error:
            pipe.send(error)
