"""A raw pool like the web's, made of real images: what the folder of data has, and junk, copies and leaks added to it.

The real pool is two thirds natural pictures with one copy in six, which is cleaner than a crawl. Here are added, each a
pure function of SEED and its number: junk as the demo draws it; copies of popular images, few of which make up most, by
the demo's edits; evaluation images, every other one as it is. `truth.csv` says of each what `curation.truth` reads.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import webdataset as wds

from curation.demo.copies import EDITS, copy_of
from curation.demo.pool import COPY_WEIGHTS, JUNK_WEIGHTS, apportion, draw_picture, generator
from curation.engine.progress import StageProgress
from curation.ops.randomness import hash_shuffle

SEED = 29
SAMPLES_PER_SHARD = 2000
EVALUATION = ("eval20-train", "eval20-val", "eval32-train", "eval32-val")
_OURS = re.compile(r"web-\d{4}\.tar|truth\.csv|pool\.json")
POPULARITY = 0.6
"""copies of the popular image of rank r are as many as r to the minus this"""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Images of each part; `popular` is how many have copies."""

    small: int = 8_000
    """natural images of 32 px, beside the real pool"""
    junk: int = 12_000
    copies: int = 15_000
    popular: int = 1_500
    leaks: int = 400


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A row of truth.csv, and the image's bytes."""

    key: str
    ext: str
    kind: str = "natural"
    is_junk: int = 0
    borderline: int = 0
    label: str = ""
    duplicate_of: str = ""
    cluster: str = ""
    transform: str = ""
    leak_of: str = ""
    data: bytes = b""


COLUMNS = [field.name for field in fields(Sample) if field.name != "data"]


def make_pool(data: Path, folder: Path, sizes: Sizes) -> tuple[str, Path]:
    """Write folder/web-????.tar and folder/truth.csv; a pool of these sizes that is there is left as it is.

    Args:
        data: the folder of images, as benchmarks/README.md describes it.

    Returns:
        the glob of the tars, and the path of the truth.

    Raises:
        ValueError: images that are not there, or a folder that holds something else; a pool half written is none.
    """
    shards, truth, done = str(folder / "web-????.tar"), folder / "truth.csv", folder / "pool.json"
    recipe = {"seed": SEED, "sizes": asdict(sizes)}
    if done.is_file() and json.loads(done.read_text()) == recipe:
        return shards, truth
    others = [path.name for path in folder.glob("*") if not _OURS.fullmatch(path.name)]
    if others or done.is_file():
        raise ValueError(f"{folder} holds {others[0] if others else 'a pool of other sizes'}: move it away.")
    with StageProgress("raw pool", sizes.junk + sizes.copies, "images") as progress:
        samples = list(_samples(data, sizes, progress))
    folder.mkdir(parents=True, exist_ok=True)
    samples = [samples[place] for place in hash_shuffle(SEED, np.arange(len(samples)))]
    for start in range(0, len(samples), SAMPLES_PER_SHARD):
        write_tar(folder / f"web-{start // SAMPLES_PER_SHARD:04d}.tar", samples[start : start + SAMPLES_PER_SHARD])
    with truth.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(sample) for sample in samples)
    done.write_text(json.dumps(recipe))
    return shards, truth


def write_tar(path: Path, samples: Iterable[Sample]) -> None:
    with wds.TarWriter(str(path), encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, sample.ext: sample.data})


def _samples(data: Path, sizes: Sizes, progress: StageProgress) -> Iterator[Sample]:
    def counted(samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            progress.advance(1)
            yield sample

    real = [*_real_pool(data), *_small(data, sizes.small)]
    kinds = apportion(JUNK_WEIGHTS, sizes.junk)
    junk = list(counted(_drawn(number, kind) for number, kind in enumerate(kinds)))
    copies = list(counted(_copies([sample for sample in real + junk if not sample.leak_of], sizes)))
    clusters = {copy.duplicate_of: copy.cluster for copy in copies}
    for original in real + junk:
        yield replace(original, cluster=original.cluster or clusters.get(original.key, ""))
    yield from copies
    yield from _leaks(data, sizes.leaks)


def _real_pool(data: Path) -> Iterator[Sample]:
    images = {key: (ext, content) for key, ext, content in read_images(data / "pool" / "pool-*.tar")}
    with (data / "pool" / "pool_truth.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            ext, content = images[row["key"]]
            told = {name: row[name] for name in COLUMNS if name in row}
            told |= {name: int(row[name]) for name in ("is_junk", "borderline")}
            yield Sample(**(told | {"ext": ext, "data": content}))


def _small(data: Path, number: int) -> Iterator[Sample]:
    for key, ext, content in sorted(read_images(data / "train" / "train32-*.tar"))[:number]:
        yield Sample(key=key, ext=ext, data=content)


def _drawn(number: int, kind: str) -> Sample:
    content, ext = draw_picture(SEED, number, kind, "")
    return Sample(key=f"junk{number:06d}", ext=ext, kind=kind, is_junk=1, data=content)


def _copies(originals: list[Sample], sizes: Sizes) -> Iterator[Sample]:
    chosen = hash_shuffle(SEED, np.arange(len(originals)))[: sizes.popular]
    share = {str(place): (rank + 1) ** -POPULARITY for rank, place in enumerate(chosen)}
    transforms = np.array(apportion(COPY_WEIGHTS, sizes.copies))[hash_shuffle(SEED + 1, np.arange(sizes.copies))]
    for number, place in enumerate(apportion(share, sizes.copies)):
        original, transform = originals[int(place)], str(transforms[number])
        content, ext, _ = copy_of(generator(SEED, 1 << 32 | number), original.data, transform)
        of = {"duplicate_of": original.key, "cluster": original.cluster or original.key, "transform": transform}
        yield replace(original, key=f"copy{number:06d}", ext=ext or original.ext, data=content, **of)


def _leaks(data: Path, number: int) -> Iterator[Sample]:
    images = sorted(image for name in EVALUATION for image in read_images(data / "eval" / f"{name}-*.tar"))
    for place, index in enumerate(hash_shuffle(SEED, np.arange(len(images)))[:number]):
        key, ext, content = images[index]
        transform = list(EDITS)[place // 2 % len(EDITS)] if place % 2 else "exact"
        content, new_ext, _ = copy_of(generator(SEED, 2 << 32 | place), content, transform)
        yield Sample(key=f"leak{place:06d}", ext=new_ext or ext, transform=transform, leak_of=key, data=content)


def read_images(pattern: Path) -> Iterator[tuple[str, str, bytes]]:
    """(key, suffix, bytes) of every image of the tars of a glob."""
    found = sorted(map(str, pattern.parent.glob(pattern.name)))
    if not found:
        raise ValueError(f"no file is called {pattern}: give the folder of images that benchmarks/README.md describes.")
    for sample in wds.WebDataset(found, shardshuffle=False):
        ext = next(name for name in sample if name in ("jpg", "jpeg", "png", "webp"))
        yield sample["__key__"], ext, sample[ext]
