"""PCA pictures of patch features: what a backbone tells apart, as colours (DINOv2, arXiv:2304.07193, fig. 1).

Three components of all patches of a few images together become red, green and blue. The same images at each evaluation;
components keep their order and sign from one to the next, so that what changes in the pictures is the backbone.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pretrain.distributed import collectives
from pretrain.downstream.components import as_colours, principal_scores
from pretrain.watch.evaluation import Backbone
from pretrain.watch.pictures import chosen_steps, pca_files, read_pictures

_TILE_PX, _GAP_PX = 128, 6


@dataclass(frozen=True)
class PatchPictures:
    """PCA of patch features of I images on a grid of h x w patches."""

    scores: np.ndarray  # float32 [I, h, w, 3]: components, unit variance over all patches
    explained: float
    """share of the variance that the three components hold"""

    def colours(self) -> np.ndarray:
        """uint8 [I, h, w, 3]: 2.5 standard deviations either way fill the range."""
        return as_colours(self.scores)


def patch_pca(patches: Tensor, previous: np.ndarray | None = None) -> PatchPictures:
    """First three principal components of patch features, over all images together.

    Args:
        patches: [I, h, w, D].
        previous: scores [I, h, w, 3] of an earlier evaluation on the same images. The new components take the order
            and the signs that correlate best with them: scores and not directions are compared, since the feature
            space itself turns during training. Without, each component is positive where it is skewed to.

    Raises:
        ValueError: fewer than 4 patches or 3 dimensions.
    """
    scores, explained = principal_scores(patches.flatten(0, 2), 3)
    if previous is not None:
        scores = _aligned(scores, previous.reshape(-1, 3).astype(np.float64))
    return PatchPictures(scores.reshape(*patches.shape[:3], 3).astype(np.float32), explained)


def _aligned(scores: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Permute and flip columns to the greatest sum of absolute correlations with `previous` (3! orders: all tried)."""
    correlation = previous.T @ scores / len(scores)
    order = max(itertools.permutations(range(3)), key=lambda o: sum(abs(correlation[n, o[n]]) for n in range(3)))
    signs = [-1 if correlation[n, order[n]] < 0 else 1 for n in range(3)]
    return scores[:, list(order)] * signs


@torch.no_grad()
def patch_features(
    backbone: Backbone, images: Tensor, mean: Sequence[float], std: Sequence[float], least_grid: int
) -> Tensor:
    """Patch features [I, h, w, D] of uint8 images [I, 3, H, W].

    Args:
        least_grid: images too small for that many patches on a side are scaled up (bicubic) until they have them.
    """
    patch = backbone.patch_size
    height, width = images.shape[-2:]
    scale = max(1.0, least_grid * patch / min(height, width))
    size = [max(1, round(side * scale / patch)) * patch for side in (height, width)]
    pixels = images.float() / 255
    if size != [height, width]:
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    centre, spread = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    # One image at a time: a picture's size may be far above that of training.
    features: list[Tensor] = []

    def embed(image: Tensor | None) -> None:
        assert image is not None, "every rank has the same images"
        (found,) = backbone([((image - centre) / spread)[None]])
        features.append(found.patches.float().unflatten(1, found.grid))

    collectives.in_step(pixels, embed)
    return torch.cat(features)


def contact_sheet(images: np.ndarray, pictures: Sequence[np.ndarray]) -> Image.Image:
    """A row for each image: the image, then its PCA pictures in the order given.

    Args:
        images: uint8 [I, H, W, 3].
        pictures: uint8 [I, h, w, 3] each.
    """
    columns, rows = 1 + len(pictures), len(images)
    step = _TILE_PX + _GAP_PX
    sheet = Image.new("RGB", (columns * step - _GAP_PX, rows * step - _GAP_PX), "white")
    for row in range(rows):
        for column, source in enumerate([images, *pictures]):
            # Images smoothly, patches as they are: one square is one token.
            kind = Image.Resampling.BICUBIC if column == 0 else Image.Resampling.NEAREST
            tile = Image.fromarray(source[row]).resize((_TILE_PX, _TILE_PX), kind)
            sheet.paste(tile, (column * step, row * step))
    return sheet


def _shows(path: Path, images: np.ndarray) -> bool:
    return np.array_equal(read_pictures(path)["images"], images)


def write_pictures(
    backbone: Backbone,
    images: Tensor,
    folder: Path,
    step: int,
    mean: Sequence[float],
    std: Sequence[float],
    least_grid: int = 16,
) -> float:
    """Make the pictures of one evaluation and renew the contact sheet; every rank calls it, and the first writes.

    Writes `<folder>/step-<step>/pca.png` (images and their pictures) and `pca.npz` (scores, colours), and
    `<folder>/pca.png`: the images and their pictures at up to seven steps.

    Args:
        images: uint8 [I, 3, H, W], the same at each evaluation.
        folder: `evaluation` of the run folder.

    Returns:
        the share of the variance that the three components hold.
    """
    features = patch_features(backbone, images, mean, std, least_grid)
    return collectives.from_rank_zero(lambda: _write_pictures(features, images, folder, step))


def _write_pictures(features: Tensor, images: Tensor, folder: Path, step: int) -> float:
    shown = images.permute(0, 2, 3, 1).cpu().numpy()
    # A phase, or a run that goes on, may show other images: only pictures of the same ones stand side by side.
    earlier = {n: path for n, path in pca_files(folder).items() if n < step and _shows(path, shown)}
    previous = None
    if earlier:
        previous = read_pictures(earlier[max(earlier)])["scores"]
        previous = previous if previous.shape == (*features.shape[:3], 3) else None
    pictures = patch_pca(features, previous)
    target = folder / f"step-{step:08d}"
    target.mkdir(parents=True, exist_ok=True)
    contact_sheet(shown, [pictures.colours()]).save(target / "pca.png")
    np.savez_compressed(target / "pca.npz", scores=pictures.scores, colours=pictures.colours(), images=shown)
    steps = chosen_steps([*earlier, step])
    columns = [read_pictures(target / "pca.npz" if n == step else earlier[n])["colours"] for n in steps]
    contact_sheet(shown, columns).save(folder / "pca.png")
    return pictures.explained
