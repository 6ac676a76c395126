"""Procedural pictures for the demo pool: twelve concepts of natural scenes, five kinds of junk."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from curation.demo.drawing import junk, landscapes, subjects
from curation.demo.drawing.canvas import Canvas

SCENES: dict[str, Callable[[Canvas], None]] = {
    "sunset": landscapes.sunset,
    "forest": landscapes.forest,
    "mountains": landscapes.mountains,
    "night": landscapes.night,
    "sailing": landscapes.sailing,
    "desert": landscapes.desert,
    "flowers": subjects.flowers,
    "fruit": subjects.fruit,
    "fish": subjects.fish,
    "butterfly": subjects.butterfly,
    "house": subjects.house,
    "balloons": subjects.balloons,
}
JUNK: dict[str, Callable[[Canvas], None]] = {
    "ui": junk.ui,
    "chart": junk.chart,
    "cartoon": junk.cartoon,
    "document": junk.document,
    "emoji": junk.emoji,
}


def draw_scene(concept: str, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """One RGB picture of a concept (a key of SCENES), width x height pixels, different for every generator."""
    canvas = Canvas(rng, width, height)
    SCENES[concept](canvas)
    return canvas.photograph()


def draw_junk(kind: str, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """One RGB picture of a kind (a key of JUNK), width x height pixels, different for every generator."""
    canvas = Canvas(rng, width, height)
    JUNK[kind](canvas)
    return canvas.flat()
