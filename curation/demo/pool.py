"""The demo pool: a small web crawl made on the spot, offline, with known truth.

Twelve concepts of procedural scenes (long-tailed), junk, planted near-duplicates, leaked evaluation pictures and
damaged files, as plain WebDataset tars; a seed set of some of the concepts; a labelled evaluation set, and a labelled
set whose neighbours name its pictures (k-NN); and `truth.csv`. Every picture is a pure function of (seed, its id), so
the bytes are the same on every run with the same Pillow and NumPy.

Columns of truth.csv, one row for each pool sample (empty where they do not apply):
    key, shard, ext, sha256 (of the image member), width, height (after EXIF);
    kind: natural, a junk kind, or damaged; is_junk: 1 or 0; label: the concept; in_seed: 1 when the seed set shows it;
    duplicate_of: key of the original in the pool; cluster: that key for the whole group, the original included;
    transform, transform_params: how a copy or a leak was made (exact: byte for byte);
    leak_of: key of the evaluation picture that it copies;
    defect, expect, mean_luma: see `curation.demo.damage`; expect is ok for ordinary samples.
"""

import csv
import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from curation.demo.copies import EDITS, copy_of, encode_as
from curation.demo.damage import Damaged, damaged_files
from curation.demo.drawing import draw_junk, draw_scene
from curation.engine.folder import Folder, listed
from curation.engine.ownership import DEMO_RECORD
from curation.ops.randomness import hash_shuffle, hash_uint64, hash_uniform

VERSION = 2  # of the recipe: raise it when the same seed gives other bytes
SAMPLES_PER_SHARD = 500
_SETS = ("pool", "seed", "evaluation", "labelled")
_FILES = [
    f"{name}{partial}"
    for name in (DEMO_RECORD, "truth.csv", *(f"{kind}/{kind}-????.tar" for kind in _SETS))
    for partial in ("", ".partial")
]
MIN_IMAGES = 100

# The commonest first; the seed set shows those marked True, so that retrieval has something to leave out.
CONCEPTS = {
    "house": True,
    "sunset": False,
    "flowers": True,
    "mountains": True,
    "balloons": False,
    "forest": True,
    "fish": True,
    "desert": False,
    "sailing": True,
    "butterfly": True,
    "night": False,
    "fruit": True,
}
ZIPF_EXPONENT = 0.9
JUNK_SHARE, COPY_SHARE, LEAK_SHARE = 0.2, 0.15, 0.012
JUNK_WEIGHTS = {"ui": 0.25, "cartoon": 0.25, "chart": 0.15, "document": 0.2, "emoji": 0.15}
COPY_WEIGHTS = {
    "reencode": 12,
    "resize": 12,
    "crop": 12,
    "hflip": 9,
    "color": 9,
    "exact": 8,
    "text": 7,
    "gray": 5,
    "combo": 6,
    "border": 4,
    "rotate": 4,
    "blur": 4,
    "noise": 4,
    "stretch": 4,
}
CAPTIONS = {
    "house": "our new home",
    "sunset": "evening by the sea",
    "flowers": "in bloom",
    "mountains": "on the trail",
    "balloons": "balloon festival",
    "forest": "a walk in the woods",
    "fish": "diving at the reef",
    "desert": "road trip",
    "sailing": "regatta",
    "butterfly": "a visitor in the garden",
    "night": "clear sky tonight",
    "fruit": "still life",
}
HOSTS = ("photos.example", "cdn.example", "blog.example", "shop.example", "forum.example")

# Ids name pictures and choices; the ranges keep them apart.
_SEED_IDS, _EVALUATION_IDS, _DAMAGE_IDS, _SAMPLE_IDS, _GROUP_IDS, _ORDER_IDS, _COPY_IDS, _LABELLED_IDS = (
    n << 32 for n in range(1, 9)
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DemoPaths:
    """Where the demo lies: globs of tars, and the truth's csv."""

    pool: str
    seed: str
    evaluation: str
    labelled: str
    truth: Path


@dataclass(kw_only=True)
class PoolSample:
    """One pool sample: a row of truth.csv and, under the line, what it takes to draw it."""

    key: str = ""
    shard: str = ""
    ext: str = ""
    sha256: str = ""
    width: int | None = None
    height: int | None = None
    kind: str = "natural"
    is_junk: int = 0
    label: str = ""
    in_seed: int | None = None
    duplicate_of: str = ""
    cluster: str = ""
    transform: str = ""
    transform_params: str = ""
    leak_of: str = ""
    defect: str = ""
    expect: str = "ok"
    mean_luma: float | None = None
    # ----
    picture: int = 0  # id of the picture that it shows; a copy shows its original's
    original: "PoolSample | None" = None
    num_copies: int = 0
    damage: Damaged | None = None


COLUMNS = [f.name for f in fields(PoolSample)][: -len(("picture", "original", "num_copies", "damage"))]


def make_demo(root: Path, seed: int = 0, num_images: int = 3000) -> DemoPaths:
    """Write the demo's pool, seed set, evaluation set and truth under `root`.

    A finished demo of the same recipe is left as it is; `demo.json`, written first and last, says which recipe that is.

    Args:
        root: a folder, made when missing.
        seed: every picture and choice follows from it.
        num_images: samples in the pool, with the junk, the copies, the leaks and some fifty damaged files.

    Raises:
        ValueError: num_images is too small to hold every kind of sample, or the folder holds something else.
    """
    if num_images < MIN_IMAGES:
        raise ValueError(f"num_images={num_images} does not hold every kind of sample; ask for at least {MIN_IMAGES}.")
    root = Path(root)
    paths = DemoPaths(
        pool=str(root / "pool" / "pool-*.tar"),
        seed=str(root / "seed" / "seed-*.tar"),
        evaluation=str(root / "evaluation" / "evaluation-*.tar"),
        labelled=str(root / "labelled" / "labelled-*.tar"),
        truth=root / "truth.csv",
    )
    recipe = {"version": VERSION, "seed": seed, "num_images": num_images}
    done = root / DEMO_RECORD
    found = _record(done)
    if found == recipe:
        return paths
    folder = Folder(str(root))
    if found is None and (others := folder.entries()):
        raise ValueError(f"{root} is where a demo is drawn, and holds other files ({listed(others)}): move them away.")
    folder.clear(_FILES)
    folder.write_bytes(DEMO_RECORD, json.dumps({**recipe, "unfinished": True}).encode())
    seeds = [concept for concept, in_seed in CONCEPTS.items() if in_seed]
    _write_tar(root / "seed" / "seed-0000.tar", _labelled(seed, "s", _SEED_IDS, seeds, max(24, num_images // 12)))
    num_evaluation = max(24, num_images // 15)
    evaluation = _labelled(seed, "e", _EVALUATION_IDS, list(CONCEPTS), num_evaluation)
    _write_tar(root / "evaluation" / "evaluation-0000.tar", evaluation)
    labelled = _labelled(seed, "l", _LABELLED_IDS, list(CONCEPTS), max(24, num_images // 5))
    _write_tar(root / "labelled" / "labelled-0000.tar", labelled)
    samples = plan_pool(seed, num_images, num_evaluation)
    originals: dict[int, tuple[bytes, str]] = {}
    for start in range(0, num_images, SAMPLES_PER_SHARD):
        part = samples[start : start + SAMPLES_PER_SHARD]
        _write_tar(root / "pool" / part[0].shard, ((s.key, _members(seed, s, originals)) for s in part))
        log.info("demo pool: %d of %d samples", start + len(part), num_images)
    with _renamed_when_written(paths.truth) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(sample) for sample in samples)
        text.detach()
    with _renamed_when_written(done) as file:
        file.write(json.dumps(recipe).encode() + b"\n")
    return paths


def _record(path: Path) -> dict[str, Any] | None:
    """The recipe of a demo that was begun; None: there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) and {"version", "seed", "num_images"} <= content.keys() else None


def plan_pool(seed: int, num_images: int, num_evaluation: int) -> list[PoolSample]:
    """What each pool sample will be, in pool order, with its key and shard; nothing is drawn but the damaged files."""
    damaged = damaged_files(generator(seed, _DAMAGE_IDS))
    num_leaks, num_copies = max(2, round(num_images * LEAK_SHARE)), round(num_images * COPY_SHARE)
    num_originals = num_images - len(damaged) - num_leaks - num_copies
    num_junk = round(num_originals * JUNK_SHARE)
    zipf = {concept: (rank + 1) ** -ZIPF_EXPONENT for rank, concept in enumerate(CONCEPTS)}
    samples = [PoolSample(label=concept) for concept in apportion(zipf, num_originals - num_junk)]
    samples += [PoolSample(kind=kind, is_junk=1) for kind in apportion(JUNK_WEIGHTS, num_junk)]
    for picture, sample in enumerate(samples):
        sample.picture = picture
    samples += _plan_copies(seed, samples, num_copies)
    samples += _plan_leaks(seed, num_leaks, num_evaluation)
    for damage in damaged:
        fields_of = {"ext": damage.ext, "width": damage.width, "height": damage.height, "mean_luma": damage.mean_luma}
        samples.append(
            PoolSample(kind="damaged", defect=damage.defect, expect=damage.expect, damage=damage, **fields_of)
        )
    order = hash_shuffle(seed, _ORDER_IDS + np.arange(num_images)) - _ORDER_IDS
    samples = [samples[index] for index in order]
    for position, sample in enumerate(samples):
        sample.shard = f"pool-{position // SAMPLES_PER_SHARD:04d}.tar"
        sample.key = f"p{position:06d}" + ("_café_猫" if sample.defect == "unicode_key" else "")
        if sample.label:
            sample.in_seed = int(CONCEPTS[sample.label])
    for sample in samples:
        if sample.original is not None:
            sample.duplicate_of = sample.cluster = sample.original.key
            sample.original.cluster = sample.original.key
    return samples


def _plan_copies(seed: int, originals: list[PoolSample], num_copies: int) -> list[PoolSample]:
    """Most groups are pairs, a quarter larger, up to eight: what a popular picture is on the web."""
    transforms = apportion(COPY_WEIGHTS, num_copies)
    order = hash_shuffle(seed, _COPY_IDS + np.arange(num_copies)) - _COPY_IDS
    copies: list[PoolSample] = []
    for picture in hash_shuffle(seed, np.arange(len(originals))):
        original, draw = originals[picture], float(hash_uniform(seed, _GROUP_IDS + picture))
        size = 1 if draw < 0.75 else 2 if draw < 0.9 else 3 + int((draw - 0.9) * 50)
        original.num_copies = min(size, num_copies - len(copies))
        for _ in range(original.num_copies):
            copy = replace(original, transform=transforms[order[len(copies)]], original=original, num_copies=0)
            copies.append(copy)
        if len(copies) == num_copies:
            break
    return copies


def _plan_leaks(seed: int, num_leaks: int, num_evaluation: int) -> list[PoolSample]:
    """Copies of evaluation pictures, no picture twice: every other one byte for byte, the rest edited."""
    chosen = hash_shuffle(seed, _EVALUATION_IDS + np.arange(num_evaluation))[:num_leaks] - _EVALUATION_IDS
    edits = list(EDITS)
    leaks = []
    for number, index in enumerate(chosen.tolist()):
        transform = edits[number // 2 % len(edits)] if number % 2 else "exact"
        label = list(CONCEPTS)[index % len(CONCEPTS)]
        leak = PoolSample(label=label, picture=_EVALUATION_IDS + index, transform=transform, leak_of=f"e{index:06d}")
        leaks.append(leak)
    return leaks


def _labelled(seed: int, prefix: str, first: int, concepts: list[str], number: int) -> Iterator[tuple[str, dict]]:
    """The samples of a clean, labelled set, each concept as often as the others."""
    for index in range(number):
        label = concepts[index % len(concepts)]
        data, ext = draw_picture(seed, first + index, "natural", label)
        yield f"{prefix}{index:06d}", {ext: data, "json": _json({"label": label, **_size(data), "license": "CC0-1.0"})}


def _members(seed: int, sample: PoolSample, originals: dict[int, tuple[bytes, str]]) -> dict[str, bytes]:
    """The sample's members by suffix; fills in what truth.csv says of its bytes.

    Originals with copies are kept in `originals` until the last copy is made, whichever comes first in the pool.
    """
    if sample.damage is not None:
        members = {} if sample.damage.data is None else {sample.ext: sample.damage.data}
        sample.sha256 = hashlib.sha256(sample.damage.data).hexdigest() if sample.damage.data is not None else ""
        if sample.damage.members is not None:
            return members | sample.damage.members
    else:
        data, ext = originals.get(sample.picture) or draw_picture(seed, sample.picture, sample.kind, sample.label)
        if sample.num_copies or sample.original:
            originals[sample.picture] = data, ext
        if sample.transform:
            rng = generator(seed, _SAMPLE_IDS + _number(sample))
            data, new_ext, sample.transform_params = copy_of(rng, data, sample.transform)
            ext = new_ext or ext
        sample.ext, sample.sha256 = ext, hashlib.sha256(data).hexdigest()
        size = _size(data)
        sample.width, sample.height = size["width"], size["height"]
        members = {ext: data}
    draws = hash_uniform(seed, _SAMPLE_IDS + _number(sample) * 4 + np.arange(4))
    host = HOSTS[int(draws[0] * len(HOSTS))]
    size = {"width": sample.width, "height": sample.height} if sample.width is not None else {}
    members["json"] = _json({"url": f"https://{host}/{int(draws[1] * 2**40):010x}.{sample.ext}", **size})
    if draws[2] < 0.4:
        caption = CAPTIONS[sample.label] if sample.label and draws[3] < 0.7 else f"IMG_{int(draws[3] * 9999):04d}"
        members["txt"] = caption.encode()
    return members


def draw_picture(seed: int, number: int, kind: str, label: str) -> tuple[bytes, str]:
    """An image file and its suffix: a pure function of the seed, the picture's number, its kind and concept."""
    rng = generator(seed, number)
    long = 96 + 224 * float(rng.random()) ** 1.7
    short = long / float(rng.choice([1.0, 1.25, 4 / 3, 4 / 3, 1.5, 1.5, 1.6, 16 / 9]))
    width, height = (round(long), round(short)) if rng.random() < 0.65 else (round(short), round(long))
    image = draw_scene(label, rng, width, height) if label else draw_junk(kind, rng, width, height)
    if label and rng.random() < 0.02:
        image = image.convert("L")
    png, webp = (0.04, 0.05) if label else (0.35, 0.05)
    draw = float(rng.random())
    ext = "png" if draw < png else "webp" if draw < png + webp else "jpg"
    return encode_as(image, ext, quality=int(rng.integers(74, 95)))


def generator(seed: int, number: int) -> np.random.Generator:
    """The generator of one picture or choice."""
    return np.random.default_rng(int(hash_uint64(seed, np.int64(number))))


def apportion(weights: dict[str, float], total: int) -> list[str]:
    """`total` names, each as often as its weight says, to within one: largest remainders first."""
    share = np.array(list(weights.values()), np.float64) * total / sum(weights.values())
    counts = np.floor(share).astype(np.int64)
    counts[np.argsort(counts - share, kind="stable")[: total - counts.sum()]] += 1
    return [name for name, count in zip(weights, counts.tolist(), strict=True) for _ in range(count)]


def _number(sample: PoolSample) -> int:
    return int(sample.key[1:7])


def _size(data: bytes) -> dict[str, int]:
    width, height = Image.open(io.BytesIO(data)).size
    return {"width": width, "height": height}


def _json(content: dict) -> bytes:
    return json.dumps(content).encode()


def _write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    with _renamed_when_written(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for suffix, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


@contextmanager
def _renamed_when_written(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        yield file
    os.replace(partial, path)
