"""Pictures of what a backbone sees: python -m pretrain.downstream.pca BACKBONE IMAGE... -o out.png

A row for each image, at its own aspect: the image, and its patches as colours, the first three principal components of
all the patches of all the images together (DINOv2, arXiv:2304.07193, fig. 1). IMAGE may be a folder, whose images are
taken in the order of their names, or a video, of which some frames are taken, evenly spaced.

    --px N                 shorter side of each image; `own` is its own, to the nearest whole patches
    --frames N             of each video
    --foreground           only patches above the middle of the first component, which come first; others are black
    --attention            beside it the attention of CLS to the patches, a picture for each head of the last block
    --beside NAME          beside it the same of another backbone, of untrained:BACKBONE, or of pixels; repeatable
    --similar-to X,Y       beside it the cosine of every patch with the one at these shares of the first image's width
                           and height, as 0.5,0.5
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from configs.messages import answered
from pretrain.data.decode import IMAGE_SUFFIXES, Damaged, ImageLimits, open_image
from pretrain.distributed.collectives import choose_device
from pretrain.downstream.backbone import Backbone, load_backbone
from pretrain.downstream.evals.compared import Evaluated, load_evaluated
from pretrain.downstream.look import attention_maps, first_component, patch_grids, pca_colours, similarity
from pretrain.downstream.pixels import check_px, whole_picture

MAX_IMAGES = 64
VIDEO_SUFFIXES = frozenset({"avi", "m4v", "mkv", "mov", "mp4", "webm"})
OWN = "own"
# From dark over red to light yellow, for figures from 0 to 1: ever brighter, so it reads without colour too.
HEAT = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float64)
_GAP_PX = 8
_FOREGROUND = 0.5


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image and video files that were named, and the images of named folders, in the order of names.

    Raises:
        ValueError: a path that is not there, a folder without images, or more than MAX_IMAGES.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if _is_image(p)) if path.is_dir() else [path]
        if not inside or not inside[0].exists():
            raise ValueError(f"{path} {'holds no image' if path.is_dir() else 'does not exist'}.")
        found += inside
    _check_number(len(found))
    return found


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix[1:].lower() in IMAGE_SUFFIXES


def _check_number(images: int) -> None:
    if images > MAX_IMAGES:
        raise ValueError(f"{images} images are more than the {MAX_IMAGES} that one picture shows; name fewer.")


def read_pictures(
    paths: Sequence[Path], short_px: int | None, patch_size: int, frames: int
) -> tuple[list[np.ndarray], list[str]]:
    """`whole_picture` of each file, and of so many frames of each video; and what was left out, with the reason.

    Args:
        short_px: shorter side; None for each image's own.

    Raises:
        ValueError: none can be read, one is too large, or there are more than MAX_IMAGES with the frames.
    """
    _check_number(sum(frames if _is_video(path) else 1 for path in paths))
    found, left_out = [], []
    for path in paths:
        for content in video_frames(path, frames) if _is_video(path) else [path.read_bytes()]:
            try:
                encoded = open_image(content, ImageLimits())
                px = max(short_px or min(encoded.height, encoded.width), patch_size)
                check_px(f"{path} at its own {px} px", px, patch_size)
                found.append(whole_picture(content, px, patch_size))
            except Damaged as damage:
                left_out.append(f"{path} cannot be read: {damage.reason}")
    if not found:
        raise ValueError(f"{left_out[0]}{f'; nor can {len(left_out) - 1} others' if len(left_out) > 1 else ''}.")
    return found, left_out


def _is_video(path: Path) -> bool:
    return path.suffix[1:].lower() in VIDEO_SUFFIXES


def video_frames(path: Path, count: int) -> list[bytes]:
    """That many frames of a video, evenly spaced, upright, as PNG: from here on they are images like others.

    Raises:
        ValueError: no opencv, no video, or one without a frame that can be read.
    """
    try:
        import cv2
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} is a video, and those are read by opencv: pip install opencv-python-headless."
        ) from None
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    found: list[bytes] = []
    try:
        total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        for number in sorted({(2 * n + 1) * total // (2 * count) for n in range(count)}):
            capture.set(cv2.CAP_PROP_POS_FRAMES, number)
            there, frame = capture.read()
            if there:  # a count in a header is sometimes an estimate
                found.append(cv2.imencode(".png", frame)[1].tobytes())
    finally:
        capture.release()
    if not found:
        raise ValueError(f"{path} cannot be read as a video: opencv finds no frame in it.")
    return found


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Figures [h, w] as colours, uint8 [h, w, 3]: `low` is dark, `high` light."""
    place = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(HEAT) - 1)
    first = np.minimum(place.astype(int), len(HEAT) - 2)
    share = (place - first)[..., None]
    return (HEAT[first] * (1 - share) + HEAT[first + 1] * share).round().astype(np.uint8)


def sheet(rows: Sequence[Sequence[np.ndarray]], sizes: Sequence[tuple[int, int]]) -> Image.Image:
    """A row for each image: it and its pictures [h, w, 3], all as large as the image; one square is one patch.

    Args:
        sizes: height and width of each image in pixels.
    """
    height = sum(h + _GAP_PX for h, _ in sizes) - _GAP_PX
    width = max(len(row) * (w + _GAP_PX) - _GAP_PX for row, (_, w) in zip(rows, sizes, strict=True))
    page = Image.new("RGB", (width, height), "white")
    top = 0
    for row, (h, w) in zip(rows, sizes, strict=True):
        for column, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((w, h), Image.Resampling.NEAREST)
            page.paste(tile, (column * (w + _GAP_PX), top))
        top += h + _GAP_PX
    return page


def draw(
    backbone: Backbone,
    images: Sequence[np.ndarray],
    foreground: bool = False,
    attention: bool = False,
    similar_to: tuple[float, float] | None = None,
    beside: Sequence[Evaluated] = (),
) -> Image.Image:
    """The page of a command, of images uint8 [H, W, 3]; see the top of this file."""
    device = next(backbone.model.parameters()).device
    ready = [torch.tensor(image, device=device).permute(2, 0, 1)[None] for image in images]
    normal = [backbone.image.normalise(image)[0] for image in ready]
    grids = patch_grids(backbone, normal)
    masks = None
    if foreground:
        masks = [component > _FOREGROUND for component in first_component(grids)]
    rows = [[image, colours] for image, colours in zip(images, pca_colours(grids, masks), strict=True)]
    for other in beside:
        for row, colours in zip(rows, pca_colours(_grids_of(other, ready)), strict=True):
            row.append(colours)
    if similar_to is not None:
        h, w = grids[0].shape[:2]
        x, y = similar_to
        chosen = min(int(y * h), h - 1), min(int(x * w), w - 1)
        for row, values in zip(rows, similarity(grids, 0, *chosen), strict=True):
            row.append(heat(values, 0.0, 1.0))
        rows[0][-1][chosen] = 255  # which patch it is
    if attention:
        for row, image in zip(rows, normal, strict=True):
            maps = attention_maps(backbone, image)
            row += [heat(one, float(one.min()), float(one.max())) for one in maps]
    return sheet(rows, [(image.shape[0], image.shape[1]) for image in images])


def _grids_of(other: Evaluated, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Patch features [h, w, D] of each image [1, 3, H, W]."""
    found = []
    for image in images:
        features = other.model.to(image.device).eval()([other.image.normalise(image)])[0]
        found.append(features.patches[0].float().unflatten(0, features.grid))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.downstream.pca", description="Pictures of what a backbone sees: patches as colours."
    )
    parser.add_argument("backbone", help="run, checkpoint, teacher, export, released file, hf:OWNER/NAME or timm:NAME")
    parser.add_argument("images", nargs="+", type=Path, help="images, folders of them, or videos")
    parser.add_argument("-o", "--out", required=True, type=Path, help="the picture to write, .png or .jpg")
    parser.add_argument("--architecture", default="", help="of a released file, which does not say")
    parser.add_argument("--px", help="shorter side of each image, or own (default: twice that of training)")
    parser.add_argument("--frames", type=int, default=16, help="of each video, evenly spaced (default: %(default)s)")
    parser.add_argument("--foreground", action="store_true", help="only what stands out by the first component")
    parser.add_argument("--attention", action="store_true", help="also the attention of CLS, by head")
    parser.add_argument(
        "--beside", metavar="NAME", action="append", default=[], help="another backbone, untrained:BACKBONE or pixels"
    )
    parser.add_argument("--similar-to", metavar="X,Y", help="also the cosine with a patch of the first image")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    asked = parser.parse_args(arguments)
    return answered(lambda: _run(asked), "nothing was written")


def _run(asked: argparse.Namespace) -> int:
    if asked.out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--out {asked.out} must end in .png or .jpg.")
    similar_to = None if asked.similar_to is None else _share(asked.similar_to)
    if asked.frames < 1:
        raise ValueError(f"--frames {asked.frames} must be 1 or more.")
    paths = find_images(asked.images)
    device = choose_device(asked.device, "--device")
    backbone = load_backbone(asked.backbone, asked.architecture)
    backbone.model.to(device)
    short_px = _short_px(asked.px, backbone)
    images, left_out = read_pictures(paths, short_px, backbone.model.patch_size, asked.frames)
    beside = load_evaluated(asked.beside, asked.architecture, px=None)
    page = draw(backbone, images, asked.foreground, asked.attention, similar_to, beside)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    page.save(asked.out)
    columns = ["image", "patches as colours", *asked.beside] + ["similarity"] * (similar_to is not None)
    columns += ["attention of each head"] * asked.attention
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    print(f"{len(images)} images in {asked.out}: {', '.join(columns)}")
    return 0


def _short_px(text: str | None, backbone: Backbone) -> int | None:
    if text is None:
        return 2 * backbone.image.px
    if text == OWN:
        return None
    if not text.isdecimal():
        raise ValueError(f"--px {text} must be a number of pixels, or {OWN}.")
    check_px(f"--px {text}", int(text), backbone.model.patch_size)
    return int(text)


def _share(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--similar-to {text} must be two shares, X,Y, such as 0.5,0.5.") from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"--similar-to {text}: shares of width and height are from 0 to 1.")
    return x, y


if __name__ == "__main__":
    sys.exit(main())
