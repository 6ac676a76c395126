"""A page to explore pictures with: python -m pretrain.downstream.explore BACKBONE IMAGES -o page.html

One HTML file, which needs no network. Click a patch: what resembles it lights up, in this picture and in all others,
and the pictures come in the order of their best patch. Or search by example: the pictures most like one, by CLS.

BACKBONE is whatever `load_backbone` takes. IMAGES is a folder, tar, Parquet file, glob or several joined by commas; of
more than --max-images, so many are shown, evenly spaced. What cannot be read is left out and named.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.messages import answered
from pretrain.distributed.collectives import choose_device
from pretrain.downstream.backbone import load_backbone
from pretrain.downstream.explore.page import About, page
from pretrain.downstream.explore.pictures import MAX_IMAGES, choose, compact, embed
from pretrain.downstream.pixels import check_px, find_sets

_NAMED = 20  # of what was left out; the page names more


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.downstream.explore", description="A page to explore pictures with, by their patches."
    )
    parser.add_argument("backbone", help="run, checkpoint, teacher, export, released file, hf:OWNER/NAME or timm:NAME")
    parser.add_argument("images", help="folder, tar, Parquet file or glob; several joined by commas")
    parser.add_argument("-o", "--out", required=True, type=Path, help="the page to write, .html")
    parser.add_argument("--architecture", default="", help="of a released file, which does not say")
    parser.add_argument("--px", type=int, help="shorter side of each picture (default: twice that of training)")
    parser.add_argument(
        "--max-images", type=int, default=200, help="pictures on the page, evenly spaced (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    asked = parser.parse_args(arguments)
    return answered(lambda: _run(asked), "nothing was written")


def _run(asked: argparse.Namespace) -> int:
    if asked.out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {asked.out} must end in .html.")
    if not 1 <= asked.max_images <= MAX_IMAGES:
        raise ValueError(f"--max-images {asked.max_images} must be from 1 to {MAX_IMAGES:,}.")
    device = choose_device(asked.device, "--device")
    sets = find_sets(asked.images)
    backbone = load_backbone(asked.backbone, asked.architecture)
    backbone.model.to(device)
    short_px = 2 * backbone.image.px if asked.px is None else asked.px
    check_px(f"--px {short_px}", short_px, backbone.model.patch_size)
    choice = choose(sets, asked.max_images)
    pictures = embed(backbone, choice.places, short_px)
    left_out = choice.left_out + pictures.left_out
    features = compact(pictures.patches)
    about = About(
        backbone=_name(asked.backbone),
        images=_names(asked.images),
        chosen=len(choice.places),
        of=choice.of,
        short_px=short_px,
        left_out=left_out,
    )
    written = page(pictures, features, about).encode()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = asked.out.with_name(f"{asked.out.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(written)
        unfinished.replace(asked.out)
    finally:
        unfinished.unlink(missing_ok=True)  # as on a full disk, which it would keep full
    for key, reason in left_out[:_NAMED]:
        print(f"left out: {key} ({reason})", file=sys.stderr)
    if len(left_out) > _NAMED:
        print(f"and {len(left_out) - _NAMED:,} more", file=sys.stderr)
    print(
        f"{len(pictures.keys)} of {choice.of:,} pictures in {asked.out}, {len(written) / 1e6:.1f} MB; "
        f"{len(features.values)} of {backbone.model.embed_dim} dimensions hold {features.kept:.1%} of the patches, "
        f"cosines differ by {features.mean_error:.3f} (99%: {features.high_error:.3f})"
    )
    return 0


def _name(backbone: str) -> str:
    """Of a path its last part: a page is passed on, and where things lie at home is nobody's business."""
    return Path(backbone).resolve().name if Path(backbone).exists() else backbone


def _names(pattern: str) -> str:
    return ", ".join(Path(one.strip()).resolve().name or one for one in pattern.split(",") if one.strip())


if __name__ == "__main__":
    sys.exit(main())
