"""shard: the original bytes of what was kept, read by range, shuffled over the whole run, as tars or Parquet files."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from configs.ranges import SEEDS, check_ranges
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.workers import ExecutionConfig, run_pieces, run_tasks
from curation.reading.again import Lost, Wanted, read_again
from curation.reading.filters import Edit
from curation.reading.places import Fetched
from curation.reading.samples import Member
from curation.writing.card import shard_card
from curation.writing.parquet import ParquetShardBuilder
from curation.writing.placed import Outcome, index_name, outcome_of, place, record_name, write_lost
from curation.writing.plan import KeptSet, PlannedShard, forget_plan, plan_shards, planned_rows
from curation.writing.samples import (
    Layout,
    Roles,
    ShardSample,
    assign_roles,
    complete,
    read_label,
    read_text,
    tar_members,
)
from curation.writing.tars import Entry, ShardBuilder, safe_key

VERSION = 3
_ENTRY_SCHEMA = pa.schema(
    [
        ("gid", pa.int64()),
        ("key", pa.string()),
        ("suffix", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
    ]
)
_SUFFIXES = {"webdataset": ".tar", "parquet": ".parquet"}
DROPPED_FILE = "dropped.parquet"
_FETCHED_FILE = "fetched.json"


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """What a shard is, and how large it may be. A worker holds one shard in memory."""

    format: str = "webdataset"
    """webdataset: tars; parquet: the same samples as rows, with the `image` feature of Hugging Face's `datasets`"""
    max_images: int = 10_000
    max_mb: float = 256.0
    """10^6 bytes of a shard; a member beside an image that is larger than this is left out"""
    seed: int = 0
    """of the global shuffle"""

    def __post_init__(self) -> None:
        if self.format not in _SUFFIXES:
            raise ValueError(f"shard.format={self.format!r} must be one of {', '.join(_SUFFIXES)}.")
        check_ranges("shard", self, max_images="[1, inf)", max_mb="(0, inf)", seed=SEEDS)
        if self.format == "parquet" and self.max_mb > 2000:  # the trainer counts its bytes in 32 bits
            raise ValueError(f"shard.max_mb={self.max_mb:g} must be at most 2000 with shard.format=parquet.")


def write_shards(
    folder: Folder,
    kept: Sequence[KeptSet],
    draw_names: Sequence[str],
    config: ShardConfig,
    edits: Sequence[Edit],
    execution: ExecutionConfig,
    max_lost_fraction: float,
    first: int = 0,
) -> tuple[list[File], dict[str, int]]:
    """Write the shards, index/shard-*.parquet and placed/; shards that a former run finished are kept.

    Args:
        kept: the pool first: `placed/` is of its gids.
        draw_names: what can have drawn an image: the fields of its `draws`.
        max_lost_fraction: of the images that were chosen; when more of them are not what they were, nothing is kept
            of the shards that lack them, and the run stops.
        first: number of the first shard: those before it are an earlier release's (take_earlier).

    Returns:
        the shards; and how many images of each set were written, then how many were chosen and are in no shard, because
        their bytes are no longer those that were judged, by reason.

    Raises:
        ValueError: too many images changed, or a source does not answer.
    """
    max_bytes = int(config.max_mb * 1e6)
    plan = plan_shards(folder, kept, draw_names, config.seed, config.max_images, max_bytes, execution)
    layout = Layout(plan.has_label, plan.has_others, tuple(draw_names), max_bytes)
    names = [f"shard-{number:06d}" for number in range(first, first + len(plan.shards))]
    run_pieces(
        _write_shard,
        plan.shards,
        [index_name(name) for name in names],
        folder,
        layout,
        config.format,
        list(edits),
        execution=execution,
        label="shard",
        unit="images",
        weights=[shard.num_rows for shard in plan.shards],
    )
    buckets = [names[start:stop] for start, stop in plan.by_bucket()]
    outcome = outcome_of(folder, buckets, execution)
    total, num_lost = sum(plan.num_rows.values()), sum(outcome.lost.values())
    if total and (num_lost > max_lost_fraction * total or num_lost == total):
        for name in outcome.losers:
            folder.delete(index_name(name))
        raise ValueError(_too_many_lost(outcome, total, max_lost_fraction))
    assert sum(file.rows for file in outcome.files) + num_lost == total
    write_lost(folder, outcome.losers)
    place(folder, buckets, kept[0].name, kept[0].ranges, execution)
    folder.write_bytes(_FETCHED_FILE, json.dumps(dict(sorted(outcome.fetched.items()))).encode())
    folder.write_bytes("README.md", shard_card(layout, f"shard-*{_SUFFIXES[config.format]}").encode())
    forget_plan(folder)
    lost_of, reasons = Counter[str](), Counter[str]()
    for (set_name, reason), count in sorted(outcome.lost.items()):
        lost_of[set_name] += count
        reasons[reason] += count
    return outcome.files, {name: count - lost_of[name] for name, count in plan.num_rows.items()} | dict(reasons)


def take_earlier(folder: Folder, earlier: Folder, files: Sequence[File], execution: ExecutionConfig) -> None:
    """Take over the shards of an earlier release as they are. Of their index, what DROPPED_FILE lists is left out, so
    that who reads a shard by it, as training does, does not meet what this release drops."""
    run_tasks(
        _take_earlier,
        [file.path for file in files],
        folder,
        earlier,
        execution=execution,
        label="earlier shards",
        unit="images",
        weights=[file.rows for file in files],
    )


def _take_earlier(name: str, folder: Folder, earlier: Folder) -> None:
    folder.take(name, earlier)
    index = earlier.read_table(index_name(name))
    dropped = folder.read_table(DROPPED_FILE, ["gid"])["gid"]
    is_dropped = pc.and_(pc.equal(index["set"], "pool"), pc.is_in(index["gid"], dropped))
    folder.write_table(index_name(name), index.filter(pc.invert(is_dropped)))


def _write_shard(
    shard: PlannedShard, folder: Folder, index: str, layout: Layout, format_: str, edits: list[Edit]
) -> None:
    name = index.removeprefix("index/").removesuffix(".parquet")
    rows = planned_rows(folder, shard).to_pylist()
    roles = [_roles(row, layout) for row in rows]
    fetched = Fetched()
    contents = read_again([_wanted(row, r) for row, r in zip(rows, roles, strict=True)], fetched)
    builder = ShardBuilder() if format_ == "webdataset" else ParquetShardBuilder(layout)
    row_of: list[int] = []
    lost: dict[int, str] = {}
    for i, row in enumerate(rows):
        content, contents[i] = contents[i], []
        if isinstance(content, Lost):
            lost[i] = content.reason
            continue
        sample = _sample(row, content, roles[i], layout, edits)
        if isinstance(builder, ShardBuilder):
            members = tar_members(sample, layout)
            builder.add(sample.key, members)
            row_of += [i] * len(members)
        else:
            builder.add(sample)
            row_of.append(i)
    file = None
    if row_of:  # some readers cannot open a file of no samples
        file = folder.write_bytes(name + _SUFFIXES[format_], builder.finish(), rows=len(rows) - len(lost))
    entries = builder.entries if row_of else []
    record = {
        "file": asdict(file) if file is not None else None,
        "lost": [{"set": rows[i]["set"], "gid": rows[i]["gid"], "reason": lost[i]} for i in sorted(lost)],
        "fetched": {"requests": fetched.requests, "bytes": fetched.bytes},
    }
    folder.write_bytes(record_name(name), json.dumps(record).encode())
    gid_of, set_of = [rows[i]["gid"] for i in row_of], [rows[i]["set"] for i in row_of]
    folder.write_table(index, _entry_table(entries, gid_of, set_of))


def _entry_table(entries: list[Entry], gids: list[int], sets: list[str]) -> pa.Table:
    columns = {
        name: [getattr(entry, name) for entry in entries] for name in ("key", "suffix", "offset", "size", "sha256")
    }
    return pa.table({"gid": gids, **columns}, schema=_ENTRY_SCHEMA).append_column("set", pa.array(sets, pa.string()))


def _others(row: dict[str, Any]) -> list[Member]:
    return [Member(**other) for other in row["others"]]


def _roles(row: dict[str, Any], layout: Layout) -> Roles:
    others = _others(row)
    return assign_roles(
        [m.suffix for m in others], [m.size for m in others], row["metadata"] is not None, layout.max_member_bytes
    )


def _wanted(row: dict[str, Any], roles: Roles) -> Wanted:
    """The image that was judged, and what stands beside it: caption, label, the members that are carried."""
    others = _others(row)
    beside = [others[i] for i in (roles.text, roles.label, *roles.carried) if i is not None]
    return Wanted(row["source_kind"], row["source"], Member(**row["image"]), row["sha256"], beside)


def _sample(row: dict[str, Any], contents: list[bytes], roles: Roles, layout: Layout, edits: list[Edit]) -> ShardSample:
    """One sample, from the contents of what `_wanted` names."""
    content, *beside = contents
    digest = row["sha256"].hex()
    others = _others(row)
    text, encoding = read_text(beside.pop(0)) if roles.text is not None else ("", "")
    label = read_text(beside.pop(0))[0] if roles.label is not None else ""
    about = complete(
        {
            "gid": row["gid"],
            "set": row["set"],
            "key": row["key"],
            "format": row["format"],
            "width": row["width"],
            "height": row["height"],
            "sha256": digest,
            "sha256_original": digest,
            "source": row["source"],
            "offset": row["image"]["offset"],
            "size": row["image"]["size"],
            "original": row["metadata"],
            "text_encoding": encoding,
            "label_text": label,
            "left_out": json.dumps([others[i].name for i in roles.left_out]) if roles.left_out else "",
            **{name: value for name, value in row["provenance"].items() if value is not None},
        },
        layout,
    )
    edited_by = []
    for edit in edits:
        original, content = content, edit.function()(content, dict(about))
        if content != original:
            edited_by.append(edit.path)
    if edited_by:
        about |= {"edited_by": ", ".join(edited_by), "sha256": hashlib.sha256(content).hexdigest()}
    return ShardSample(
        safe_key(
            row["key"],
            f"s{row['set_number']}g{row['gid']}" if row["set_number"] else f"g{row['gid']}",
            row["is_unique"],
        ),
        content,
        about,
        text,
        read_label(label) if roles.label is not None else None,
        [(others[i].suffix, other) for i, other in zip(roles.carried, beside, strict=True)],
    )


def _too_many_lost(outcome: Outcome, total: int, fraction: float) -> str:
    counts: Counter[str] = Counter()
    for (_, reason), count in outcome.lost.items():
        counts[reason] += count
    worst = max(sorted(counts), key=lambda reason: counts[reason])
    return (
        f"{sum(counts.values()):,} of the {total:,} images to write are not what they were when they were indexed, "
        f"most with {worst!r}; that is more than embed.max_rejected_fraction={fraction}. If a disk or a share is "
        "missing, bring it back; if the pool changed, let it come to rest. Then run the same command: what changed is "
        "read anew."
    )
