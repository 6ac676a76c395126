"""Draws what the copy encoder learns from, as shards: python -m benchmarks.copies_pictures --out FOLDER [--images N]

No photograph: dead leaves (fit_descriptors), drawings of one thing, the demo's scenes and its junk, 128 x 128 px.
About 5 ms of a core and 6 kB an image. Every picture is a pure function of (SEED, its number).
"""

import argparse
import io
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from benchmarks import fit_descriptors
from curation.demo.drawing import JUNK, SCENES, draw_junk, draw_scene
from curation.demo.drawing.canvas import Canvas
from curation.demo.drawing.clipart import clipart

SEED = 11
SIDE_PX = 128
IMAGES_PER_SHARD = 1000
# Kinds of pictures and their shares within a set: `shaded` ones fill the frame, `flat` ones are drawn on a ground.
SETS = {"shaded": {"leaves": 0.85, "scene": 0.15}, "flat": {"clipart": 0.8, "junk": 0.2}}
_textures = cache(fit_descriptors.textures)


def draw(of: str, number: int) -> Image.Image:
    """Picture `number` of a set, RGB of 128 x 128 px."""
    rng = np.random.default_rng((SEED, list(SETS).index(of), number))
    kind = rng.choice(list(SETS[of]), p=list(SETS[of].values()))
    if kind == "leaves":
        cv2.setNumThreads(1)
        pixels = fit_descriptors.draw_image(rng, _textures())
        return Image.fromarray(cv2.resize(pixels, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA))
    if kind == "clipart":
        canvas = Canvas(rng, SIDE_PX, SIDE_PX)
        clipart(canvas)
        return canvas.flat()
    names, of_kind = (SCENES, draw_scene) if kind == "scene" else (JUNK, draw_junk)
    return of_kind(str(rng.choice(list(names))), rng, SIDE_PX, SIDE_PX)


def write_shard(shard: tuple[str, int], folder: Path) -> Path:
    """1000 pictures of a set, from a number on, as a tar of JPEG files."""
    of, first = shard
    path = folder / f"{of}-{first // IMAGES_PER_SHARD:04d}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(first, first + IMAGES_PER_SHARD):
            file = io.BytesIO()
            draw(of, number).save(file, "JPEG", quality=92)
            entry = tarfile.TarInfo(f"{of}-{number:08d}.jpeg")
            entry.size = file.tell()
            file.seek(0)
            tar.addfile(entry, file)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=40_000, help="of each set, a multiple of 1000")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    shards = [(of, first) for first in range(0, arguments.images, IMAGES_PER_SHARD) for of in SETS]
    with ProcessPoolExecutor(arguments.processes) as pool:
        for path in pool.map(partial(write_shard, folder=arguments.out), shards):
            print(path, flush=True)


if __name__ == "__main__":
    main()
