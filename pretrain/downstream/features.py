"""Features of a set of images, as files: python -m pretrain.downstream.features BACKBONE IMAGES --out FOLDER

BACKBONE is whatever `load_backbone` takes, or an ONNX export, which needs no torch. IMAGES is a folder, tar, Parquet
file, glob or several joined by commas.
One file for each part of the set (a tar, a Parquet file, 1,000 files of a folder), in the order of its images:

    parquet   features-00000.parquet: key, reason (null for what was read), cls, and what --with asks for: mean (of the
              patches), patches (row-major) with grid_h and grid_w
    npy       features-00000-cls.npy [N, D], and -mean.npy; keys and reasons in features-00000.csv. Images that could
              not be read are rows of zeros.

A command that was stopped goes on where it was: parts that are there are not done again. The processes of torchrun
share the parts out.
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.messages import answered, named_folder
from curation.engine.progress import StageProgress
from curation.reading.samples import Part, Sample
from curation.reading.sources import read_samples
from pretrain.data.decode import Damaged, ImageLimits
from pretrain.downstream.embedders.embedder import Embedded, Embedder
from pretrain.downstream.embedders.load import crop_side, load_embedder
from pretrain.downstream.pixels import check_px, eval_crop, find_sets, short_side, whole_picture

FORMATS = ("parquet", "npy")
EXTRAS = ("mean", "patches")
_SETTINGS = "_features.json"  # with a leading _, which readers of a Parquet folder pass over
_RANKS = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
"""what torchrun tells, and what holds without it"""
_LIMITS = ImageLimits()


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """What is computed of each image, and how."""

    px: int
    """side of the centre crop; with `whole`, the shorter side of the whole image"""
    whole: bool = False
    """the whole image at its own aspect, padded to whole patches, instead of a centre crop"""
    extras: tuple[str, ...] = ()
    """beside CLS: `mean` of the patches, `patches`"""
    format: str = "parquet"
    dtype: str = "float16"
    batch_size: int = 64
    bfloat16: bool = False

    def __post_init__(self) -> None:
        if unknown := set(self.extras) - set(EXTRAS):
            raise ValueError(f"--with {sorted(unknown)[0]} is unknown; choose from {', '.join(EXTRAS)}.")
        if self.format not in FORMATS or self.dtype not in ("float16", "float32"):
            raise ValueError(f"--format {self.format} --dtype {self.dtype}: formats are {', '.join(FORMATS)}.")
        if self.format == "npy" and "patches" in self.extras:
            raise ValueError("--with patches needs --format parquet: images may have different numbers of patches.")
        for name, value in (("--px", self.px), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{name} {value} must be 1 or more.")

    def of(self, backbone: str) -> dict[str, Any]:
        """What must not differ between the files of one folder."""
        of_result = {name: value for name, value in asdict(self).items() if name != "batch_size"}
        return {"backbone": backbone, **of_result, "extras": list(self.extras)}


@dataclass
class Rows:
    """Features of one part, in the order of its images."""

    keys: list[str] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    columns: dict[str, list[np.ndarray | None]] = field(default_factory=dict)
    grids: list[tuple[int, int] | None] = field(default_factory=list)

    def add(
        self, key: str, reason: str | None, row: dict[str, np.ndarray] | None, grid: tuple[int, int] | None
    ) -> None:
        self.keys.append(key)
        self.reasons.append(reason)
        self.grids.append(grid)
        for name, values in self.columns.items():
            values.append(None if row is None else row[name])


def extract(
    embedder: Embedder, sets: Sequence[Part], out: Path, settings: FeatureSettings, rank: int = 0, world_size: int = 1
) -> tuple[int, int]:
    """Write the files of this process's parts that are not there yet; (images, those that could not be read).

    Raises:
        ValueError: `out` holds features of another backbone or of other settings.
        OSError: a part cannot be opened, or the disk is full.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = sha256("".join(part.id for part in sets).encode()).hexdigest()[:16]
    _check_settings(out, settings.of(embedder.source) | {"images": parts})
    mine = range(rank, len(sets), world_size)
    own = [n for n in mine if not _is_done(out, n, settings)]
    if len(own) < len(mine):
        print(f"{len(mine) - len(own)} of {len(mine)} parts of the set are there already", file=sys.stderr)
    images = unread = 0
    with StageProgress("features", sum(sets[n].size for n in own) / 1e6, "MB") as progress:
        for number in own:
            rows = Rows(columns={name: [] for name in ("cls", *settings.extras)})
            seen = 0
            for batch in _batches(_decoded(sets[number], settings), settings.batch_size):
                _add(rows, batch, embedder, settings)
                advanced = sum(one.size for one in batch)
                seen += advanced
                progress.advance(advanced / 1e6)
            progress.advance(max(sets[number].size - seen, 0) / 1e6)
            _write(out, number, rows, settings, embedder.embed_dim)
            images += len(rows.keys)
            unread += sum(reason is not None for reason in rows.reasons)
    return images, unread


@dataclass(frozen=True)
class Decoded:
    """One image: pixels, uint8 [H, W, 3], or why there are none."""

    key: str
    size: int
    """encoded bytes"""
    pixels: np.ndarray | None
    reason: str | None


def _decoded(part: Part, settings: FeatureSettings) -> Iterator[Decoded]:
    """The images of a part in order; decoded by threads, a bounded number ahead."""
    found = (s for s in read_samples(part, _LIMITS.max_file_bytes, headers_first=True) if _is_image(s))
    with ThreadPoolExecutor(4) as pool:
        ahead = [pool.submit(_decode, sample, settings) for sample in islice(found, 2 * settings.batch_size)]
        while ahead:
            yield ahead.pop(0).result()
            ahead += [pool.submit(_decode, sample, settings) for sample in islice(found, 1)]


def _is_image(sample: Sample) -> bool:
    return sample.image is not None or sample.content is not None or sample.reason == "damaged_shard"


def _decode(sample: Sample, settings: FeatureSettings) -> Decoded:
    if sample.content is None:
        return Decoded(sample.key, 0, None, sample.reason or "unreadable")
    size = len(sample.content)
    try:
        if settings.whole:
            pixels = whole_picture(sample.content, settings.px)
        else:
            pixels = eval_crop(sample.content, settings.px, short_side(settings.px))
    except Damaged as damage:
        return Decoded(sample.key, size, None, damage.reason)
    return Decoded(sample.key, size, pixels, None)


def _batches(found: Iterator[Decoded], batch_size: int) -> Iterator[list[Decoded]]:
    while batch := list(islice(found, batch_size)):
        yield batch


def _add(rows: Rows, batch: Sequence[Decoded], embedder: Embedder, settings: FeatureSettings) -> None:
    """Embed a batch, images of equal size together, and add a row for each of them in their order."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for number, one in enumerate(batch):
        if one.pixels is not None:
            sizes.setdefault(one.pixels.shape, []).append(number)
    found: dict[int, tuple[dict[str, np.ndarray], tuple[int, int]]] = {}
    for numbers in sizes.values():
        images = np.stack([pixels for n in numbers if (pixels := batch[n].pixels) is not None])
        embedded = embedder(images, with_patches=bool(settings.extras))
        columns = _columns(embedded, settings)
        for place, number in enumerate(numbers):
            found[number] = {name: values[place] for name, values in columns.items()}, embedded.grid
    for number, one in enumerate(batch):
        row, grid = found.get(number, (None, None))
        rows.add(one.key, one.reason, row, grid)


def _columns(embedded: Embedded, settings: FeatureSettings) -> dict[str, np.ndarray]:
    found = {"cls": embedded.cls}
    if embedded.patches is not None:
        if "mean" in settings.extras:
            found["mean"] = embedded.patches.mean(axis=1)
        if "patches" in settings.extras:
            found["patches"] = embedded.patches.reshape(len(embedded.cls), -1)
    return {name: values.astype(settings.dtype) for name, values in found.items()}


def _name(number: int, rest: str) -> str:
    return f"features-{number:05d}{rest}"


def _is_done(out: Path, number: int, settings: FeatureSettings) -> bool:
    return (out / _name(number, ".parquet" if settings.format == "parquet" else ".csv")).exists()


def _write(out: Path, number: int, rows: Rows, settings: FeatureSettings, dim: int) -> None:
    """The files of one part; the last of them, by which it counts as done, appears whole."""
    if settings.format == "parquet":
        kind = pa.float16() if settings.dtype == "float16" else pa.float32()
        arrays = {"key": pa.array(rows.keys, pa.string()), "reason": pa.array(rows.reasons, pa.string())}
        for name, values in rows.columns.items():
            fixed = pa.list_(kind, dim) if name != "patches" else pa.list_(kind)
            arrays[name] = pa.array(values, fixed)
        if "patches" in rows.columns:
            for axis, which in enumerate(("grid_h", "grid_w")):
                arrays[which] = pa.array([None if grid is None else grid[axis] for grid in rows.grids], pa.int32())
        part = out / _name(number, ".parquet.tmp")
        pq.write_table(pa.table(arrays), part, compression="zstd")
        part.rename(out / _name(number, ".parquet"))
        return
    nothing = np.zeros(dim, settings.dtype)
    for name, values in rows.columns.items():
        stacked = np.stack([nothing if value is None else value for value in values]) if values else nothing[None][:0]
        np.save(out / _name(number, f"-{name}.npy"), stacked)
    part = out / _name(number, ".csv.tmp")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "reason"])
        writer.writerows(zip(rows.keys, (reason or "" for reason in rows.reasons), strict=True))
    part.rename(out / _name(number, ".csv"))


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Write what the files of the folder have in common, whichever process comes first; the others compare."""
    path = out / _SETTINGS
    others = [name for name in os.listdir(out) if not name.startswith(_SETTINGS)]
    if others and not path.exists():
        raise ValueError(f"--out {out} holds other files, such as {others[0]}; name a folder that does not exist yet.")
    own = path.with_name(f"{_SETTINGS}.{os.getpid()}")
    own.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    try:
        os.link(own, path)
    except FileExistsError:
        found = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in settings if found.get(name) != settings[name]]
    else:
        different = []
    finally:
        own.unlink()
    if "images" in different:
        raise ValueError(f"{out} holds features of other images, or of these before they changed; name another.")
    if different:
        name = different[0]
        raise ValueError(
            f"{out} holds features with {name}={found.get(name)!r}, and {name}={settings[name]!r} is asked for: name "
            "another folder, or the same settings."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.downstream.features", description="Features of a set of images, as files."
    )
    parser.add_argument("backbone", help="run, checkpoint, export, ONNX, released file, hf:OWNER/NAME or timm:NAME")
    parser.add_argument("images", help="folder, tar, Parquet file or glob; several joined by commas")
    parser.add_argument("--out", required=True, type=named_folder, help="folder for the files")
    parser.add_argument("--architecture", default="", help="of a released file, which does not say")
    parser.add_argument("--px", type=int, help="side of the crop (default: that of the backbone)")
    parser.add_argument("--whole", action="store_true", help="whole images at their own aspect, shorter side --px")
    parser.add_argument("--with", dest="extras", nargs="+", default=[], help=f"beside CLS: {', '.join(EXTRAS)}")
    parser.add_argument("--format", default="parquet", choices=FORMATS)
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--bfloat16", action="store_true", help="run the backbone in bfloat16")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    asked = parser.parse_args(arguments)
    return answered(lambda: _run(asked), "the same command continues")


def _run(asked: argparse.Namespace) -> int:
    rank, world_size, local = (int(os.environ.get(name, default)) for name, default in _RANKS)
    sets = find_sets(asked.images)
    gpu = local if world_size > 1 else None
    embedder = load_embedder(asked.backbone, asked.architecture, asked.device, asked.bfloat16, gpu)
    if asked.whole and asked.px is not None:
        check_px(f"--px {asked.px}", max(asked.px, embedder.patch_size), embedder.patch_size)
    settings = FeatureSettings(
        px=asked.px if asked.whole and asked.px is not None else crop_side(asked.px, embedder),
        whole=asked.whole,
        extras=tuple(asked.extras),
        format=asked.format,
        dtype=asked.dtype,
        batch_size=asked.batch_size,
        bfloat16=asked.bfloat16,
    )
    images, unread = extract(embedder, sets, asked.out, settings, rank, world_size)
    told = f"; {unread:,} of them could not be read, their rows say why" if unread else ""
    print(f"{images:,} images written to {asked.out}{told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
