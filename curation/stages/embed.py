"""index + embed: every image of a set is read and decoded once; its row and its vectors are written, part by part."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from configs.ranges import check_ranges
from curation.encoders.encoder import Encoder, View
from curation.encoders.load import load_encoder
from curation.encoders.weights import DESCRIPTOR_NAMES
from curation.engine.actors import run_actors
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.store import INDEX_SCHEMA, encoder_folder, register, registered
from curation.engine.workers import (
    ExecutionConfig,
    Losses,
    WorkerLost,
    finished_pieces,
    num_gpus,
    num_workers,
    unwrapped,
)
from curation.reading.filters import Filter, Pixels, first_refusals
from curation.reading.pictures.images import ImageLimits
from curation.reading.samples import Part
from curation.reading.tar_samples import NO_END_MARKER
from curation.stages.decode import DecodeJob, decode_part, unreadable_part

logger = logging.getLogger(__name__)

VERSION = 3
_REQUESTS_AT_ONCE = 16  # when the records of all parts are read from an object store
_DECODE_AHEAD = 2  # batches that a decoder may be ahead of its encoder
# A part whose decode worker dies is decoded again, then each of its images in a process of its own, then it is a row.
_PLAIN_TRIES, _ISOLATED_TRIES = 2, 4


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
class PartTally:
    """What a part holds, for the figures of its set."""

    rows: int
    reasons: dict[str, int]
    """rejected images, by reason"""
    unread: dict[str, int]
    """those of them that could not be read: a filter rejects what was read, and a missing end marker is no loss"""
    damage: list[tuple[int, int | None]]
    """(unread bytes, unread images) of each row that stands for damage"""


def embed_set(
    folder: Folder,
    parts: Sequence[Part],
    encoder_specs: Sequence[str],
    config: EmbedConfig,
    filters: Sequence[Filter],
    execution: ExecutionConfig,
    label: str,
) -> tuple[list[File], list[PartTally], list[int]]:
    """Index and embed the parts of one set into `folder`; parts that a former run finished are kept.

    Returns:
        files: index/part-<id>.parquet and <encoder>/part-<id>.npy of every part that the set has or had, in the order
            of the parts' numbers.
        tallies: what each of `parts` holds.
        gone: numbers of the parts that are not among `parts` any more.

    Raises:
        ValueError: files of a part that has gone are gone too, and cannot be made again.
    """
    done = finished_pieces(folder, [_record_name(part) for part in parts])
    todo = [part for part in parts if _record_name(part) not in done]
    if todo:
        _embed_parts(folder, todo, encoder_specs, config, filters, execution, label)
    records = _read_records(folder, parts)
    register(folder, {part.id: files for part, (files, _) in zip(parts, records, strict=True)})
    known, listed = registered(folder), {part.id for part in parts}
    gone = [number for number, id_ in enumerate(known) if id_ not in listed]
    of_gone = [file.path for id_ in known.keys() - listed for file in known[id_]]
    if lacking := sorted(set(of_gone) - finished_pieces(folder, of_gone)):
        raise ValueError(
            f"{folder.url}/{lacking[0]} is gone, and so is the shard or folder that it was made from: bring one of "
            "them back, or give another --out."
        )
    files = [file for of_part in known.values() for file in of_part]
    index = [file for file in files if file.path.startswith("index/")]
    rest = [file for file in files if not file.path.startswith("index/")]
    return index + rest, [tally for _, tally in records], gone


def _record_name(part: Part) -> str:
    """The file that says that all of a part is written."""
    return f"done/part-{part.id}.json"


def _embed_parts(
    folder: Folder,
    parts: Sequence[Part],
    encoder_specs: Sequence[str],
    config: EmbedConfig,
    filters: Sequence[Filter],
    execution: ExecutionConfig,
    label: str,
) -> None:
    rules = [(rule, rule.view()) for rule in filters if isinstance(rule, Pixels)]
    of_views = [(rule, view) for rule, view in rules if view is not None]
    # Descriptors are computed by processors: an actor for each of those, not one a GPU that would have nothing to do.
    has_models = bool(of_views) or any(spec not in DESCRIPTOR_NAMES for spec in encoder_specs)
    gpus = num_gpus(execution) if has_models else 0
    device = "cuda" if gpus else "cpu"
    encoders = {encoder_folder(spec): load_encoder(spec, device, config.image_px) for spec in encoder_specs}
    job = DecodeJob(
        views=tuple(dict.fromkeys([encoder.view for encoder in encoders.values()] + [view for _, view in of_views])),
        limits=ImageLimits(max_file_bytes=config.max_file_bytes, max_pixels=config.max_pixels),
        pixel_filters=tuple(rule for rule, view in rules if view is None),
        batch_size=config.batch_size,
    )
    # Decoders are Ray tasks of one CPU; encoders are actors, one a GPU, or one a worker where there is none. An actor
    # holds no CPU of its own, or one worker could not run both; it is fed by several decoders at once.
    workers = num_workers(execution)
    num_actors = min(gpus or workers, len(parts))
    feeds = max(1, -(-workers // num_actors))
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 1 if gpus else 0, "max_restarts": 0}
    options |= {"max_concurrency": feeds + 1, "scheduling_strategy": "SPREAD"}
    actor = ray.remote(**options)(_EmbedWorker)
    shared = ray.put((encoders, folder, job, of_views, device))
    results = run_actors(
        lambda: actor.remote(shared),
        "embed_part",
        parts,
        num_actors=num_actors,
        at_once=feeds,
        label=label,
        unit="MB",
        weights=[part.size / 1e6 for part in parts],
        names=[part.url for part in parts],
    )
    for number, told in results:
        if told:
            logger.warning("%s: %s: %s", label, parts[number].url, told)


class _EmbedWorker:
    """An actor that holds the encoders and filters, takes batches from decode tasks, and writes a part's files."""

    def __init__(self, shared: tuple[dict[str, Encoder], Folder, DecodeJob, list[tuple[Pixels, View]], str]) -> None:
        self.encoders, self.folder, self.job, self.rules, self.device = shared
        self.count = 0
        self.locks = {name: threading.Lock() for name in self.encoders}
        self.filter_lock = threading.Lock()
        options: dict[str, Any] = {"num_cpus": 1, "num_returns": "streaming", "max_retries": 0}
        options |= {"_generator_backpressure_num_objects": _DECODE_AHEAD}
        self.decode: Any = ray.remote(**options)(decode_part)

    def start(self) -> None:
        """Every model is built here, once."""
        self.dims = {name: encoder.dim for name, encoder in self.encoders.items()}
        self.filters = [(rule, rule.build(self.device)) for rule, _ in self.rules]

    def beats(self) -> int:
        return self.count

    def embed_part(self, part: Part) -> str | None:
        """Write the part's files; returns what there is to tell about it, if anything."""
        deaths, losses = 0, Losses("embed", [part.url])
        while deaths < _PLAIN_TRIES + _ISOLATED_TRIES:
            isolated = deaths >= _PLAIN_TRIES  # some image crashes native code or takes all memory; find it one by one
            try:
                rows, vectors = self._collect(part, isolated)
            except WorkerLost as error:
                wait_s = losses.wait_s(0, error) if error.taken_by != "worker" else min(8.0, 2.0**deaths - 1)
                deaths += error.taken_by != "node"
                time.sleep(wait_s)
                continue
            write_part(self.folder, part, rows, vectors)
            return f"{deaths} decode workers were lost under it, and it was decoded again" if deaths else None
        empty = {name: np.zeros((1, dim), np.float16) for name, dim in self.dims.items()}
        write_part(self.folder, part, [unreadable_part(part)], empty)
        return f"all of {deaths} decode workers died of it; it is one row, reader_crashed"

    def _collect(self, part: Part, isolated: bool) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        rows: list[dict[str, Any]] = []
        blocks: dict[str, list[np.ndarray]] = {name: [] for name in self.encoders}
        for reference in self.decode.remote(part, self.job, isolated):
            batch = unwrapped(reference)
            if batch is None:
                rows, blocks = [], {name: [] for name in self.encoders}
                continue
            new_rows, views = batch
            for name, block in self._embed_batch(new_rows, views).items():
                blocks[name].append(block)
            rows += new_rows
            self.count += 1
        empty = {name: np.zeros((0, dim), np.float16) for name, dim in self.dims.items()}
        return rows, {name: np.concatenate([empty[name], *blocks[name]]) for name in self.encoders}

    def _embed_batch(self, rows: list[dict[str, Any]], views: dict[View, np.ndarray]) -> dict[str, np.ndarray]:
        """float16 [rows, dim] by encoder, zero for what is rejected; rows that are rejected here say so."""
        good = np.flatnonzero([row["status"] == "ok" for row in rows])
        if self.filters and len(good):
            asked = [rows[row] for row in good]
            with self.filter_lock:
                reasons = first_refusals(self.filters, asked, lambda n, chosen: views[self.rules[n][1]][chosen])
            for row, reason in zip(asked, reasons, strict=True):
                if reason is not None:
                    row |= {"status": "rejected", "reason": reason}
            passed = np.flatnonzero([reason is None for reason in reasons])
            good, views = good[passed], {view: batch[passed] for view, batch in views.items()}
        blocks = {}
        for name, encoder in self.encoders.items():
            blocks[name] = np.zeros((len(rows), self.dims[name]), np.float16)
            if len(good):
                with self.locks[name]:
                    blocks[name][good] = encoder.embed(views[encoder.view]).astype(np.float16)
            # A hostile image can drive a model to NaN or zero: that is its row's fate, not the run's.
            norms = np.linalg.norm(blocks[name][good].astype(np.float32), axis=1)
            for row in good[~(np.abs(norms - 1) < 0.01)]:
                rows[row] |= {"status": "rejected", "reason": "no_embedding"}
        return blocks


def write_part(folder: Folder, part: Part, rows: list[dict[str, Any]], vectors: dict[str, np.ndarray]) -> None:
    """The index and the vectors of one part, then the record that says both are whole."""
    files = [folder.write_table(f"index/part-{part.id}.parquet", pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))]
    files += [folder.write_array(f"{name}/part-{part.id}.npy", values) for name, values in vectors.items()]
    rejected = [row for row in rows if row["reason"] is not None]
    unread = [row for row in rejected if row["pdq"] is None and row["reason"] != NO_END_MARKER]
    tally = PartTally(
        rows=len(rows),
        reasons=dict(Counter(row["reason"] for row in rejected)),
        unread=dict(Counter(row["reason"] for row in unread)),
        damage=[(row["unread_bytes"], row["unread_images"]) for row in rows if row["unread_bytes"] is not None],
    )
    record = {"files": [asdict(file) for file in files], "tally": asdict(tally)}
    folder.write_bytes(_record_name(part), json.dumps(record).encode())


def count_losses(parts: Sequence[Part], tallies: Sequence[PartTally]) -> tuple[dict[str, int], int, int, str]:
    """What a set holds, for its manifest, and what of it cannot be read.

    Returns:
        counts: images (rows); rejected, by reason; where there are any: damaged shards, unread bytes, unread images.
        lost, total: images that cannot be read, and all, those counted in that a shard's unread bytes would hold. A
            missing end marker is no loss, nor is what a filter rejects.
        worst: the most frequent reason of those; empty where there are none.
    """
    images = sum(tally.rows for tally in tallies)
    reasons: Counter[str] = Counter()
    lost_by: Counter[str] = Counter()
    for tally in tallies:
        reasons.update(tally.reasons)
        lost_by.update(tally.unread)
    lost = lost_by.total()
    damage = [entry for tally in tallies for entry in tally.damage]
    unread_bytes = sum(num_bytes for num_bytes, _ in damage)
    good = max(images - lost - reasons[NO_END_MARKER], 1)
    mean = max((sum(part.size for part in parts) - unread_bytes) / good, 1)
    # Where a shard has no whole sample, so that its own mean is not known: at the mean of the set.
    unread = [known if known is not None else max(1, round(num_bytes / mean)) for num_bytes, known in damage]
    beyond_rows = sum(max(number - 1, 0) for number in unread)
    figures = {
        "damaged shards": len({part.url for part, tally in zip(parts, tallies, strict=True) if tally.damage}),
        "unread bytes": unread_bytes,
        "unread images": sum(unread),
    }
    counts = {"images": images, **{f"rejected: {reason}": number for reason, number in reasons.items() if number}}
    counts |= {name: number for name, number in figures.items() if number}
    worst = max(lost_by, key=lambda reason: lost_by[reason], default="")
    return counts, lost + beyond_rows, images + beyond_rows, worst


def _read_records(folder: Folder, parts: Sequence[Part]) -> list[tuple[list[File], PartTally]]:
    def read(part: Part) -> tuple[list[File], PartTally]:
        record = json.loads(folder.read_bytes(_record_name(part)))
        return [File(**entry) for entry in record["files"]], PartTally(**record["tally"])

    with ThreadPoolExecutor(1 if folder.is_local else _REQUESTS_AT_ONCE) as pool:
        return list(pool.map(read, parts))
