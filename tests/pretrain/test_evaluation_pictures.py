"""PCA pictures: against an independent SVD, steady from one evaluation to the next, and the files of a real run."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pretrain.downstream.backbone import ImageSettings
from pretrain.downstream.evals.baselines import random_like
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.pictures import contact_sheet, patch_features, patch_pca, write_pictures
from pretrain.models.architectures import build
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.watch.evaluation import EvaluationConfig, run_evaluation
from pretrain.watch.pictures import chosen_steps
from tests.conftest import encoded, picture, write_tar

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def tiny_model(seed: int = 0) -> VisionTransformer:
    model = build("dinov3_tiny", patch_size=8, depth=1)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def blobs(seed: int, noise: float = 0.05) -> torch.Tensor:
    """Patch features [2, 6, 5, 16] with three clear directions of unlike strength."""
    shared = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(16, 3, generator=shared)).Q.T
    strengths = torch.rand(2, 6, 5, 3, generator=shared) * torch.tensor([5.0, 3.0, 2.0])
    generator = torch.Generator().manual_seed(seed)
    return strengths @ directions + noise * torch.randn(2, 6, 5, 16, generator=generator)


def test_scores_equal_an_svd() -> None:
    features = blobs(0)
    rows = features.flatten(0, 2).double().numpy()
    u, s, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    expected = u[:, :3] * np.sqrt(len(rows))  # unit variance
    found = patch_pca(features)
    assert np.abs(found.scores.reshape(-1, 3)) == pytest.approx(np.abs(expected), abs=1e-5)
    assert found.explained == pytest.approx((s[:3] ** 2).sum() / (s**2).sum())


def test_pictures_do_not_depend_on_a_turn_of_the_feature_space() -> None:
    first = patch_pca(blobs(0))
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3))).Q
    again = patch_pca(blobs(0) @ turn * 3 + 1, first.scores)
    assert again.scores == pytest.approx(first.scores, abs=1e-4)


def test_order_and_signs_follow_the_previous_pictures() -> None:
    first = patch_pca(blobs(0))
    swapped = first.scores[..., [2, 0, 1]] * np.array([-1, 1, -1], np.float32)
    again = patch_pca(blobs(5), swapped)
    for n in range(3):
        correlation = np.corrcoef(again.scores[..., n].ravel(), swapped[..., n].ravel())[0, 1]
        assert correlation > 0.95


def test_too_few_patches_are_an_error() -> None:
    with pytest.raises(ValueError, match="needs 4 patches"):
        patch_pca(torch.zeros(1, 1, 3, 8))


def test_features_of_no_spread_give_a_grey_picture() -> None:
    assert set(patch_pca(torch.ones(1, 4, 4, 8)).colours().ravel()) <= {127, 128}


def test_small_images_are_scaled_up_to_the_grid_and_large_ones_left() -> None:
    model = tiny_model()
    small = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8)
    assert patch_features(model, small, MEAN, STD, 14).shape == (2, 14, 21, 192)
    assert patch_features(model, small, MEAN, STD, 2).shape == (2, 4, 6, 192)
    direct = model([(small[:1] / 255 - 0.5) / 0.25])[0].patches.detach()
    unscaled = patch_features(model, small, MEAN, STD, 2)
    torch.testing.assert_close(unscaled[0].flatten(0, 1), direct[0], atol=1e-4, rtol=1e-4)  # another batch size


def test_sheet_has_a_column_for_each_picture() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    red, blue = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    sheet = contact_sheet(images, [red, blue])
    assert sheet.size == (3 * 128 + 2 * 6, 2 * 128 + 6)
    assert [sheet.getpixel((x, 200)) for x in (60, 194, 328)] == [(0, 0, 0), (255, 0, 0), (0, 0, 255)]


def test_chosen_steps_keep_first_and_last() -> None:
    assert chosen_steps([30, 0, 10]) == [0, 10, 30]
    chosen = chosen_steps(range(0, 1010, 10), 5)
    assert chosen == [0, 250, 500, 750, 1000]


def test_pictures_are_written_and_the_sheet_grows(tmp_path: Path) -> None:
    images = torch.stack([torch.from_numpy(np.array(picture(n, (32, 32)))) for n in range(3)]).permute(0, 3, 1, 2)
    for step in (0, 10, 20):
        explained = write_pictures(tiny_model(step), images, tmp_path, step, MEAN, STD, least_grid=6)
        assert 0 < explained <= 1
    assert Image.open(tmp_path / "pca.png").size == (4 * 134 - 6, 3 * 134 - 6)
    assert Image.open(tmp_path / "step-00000020" / "pca.png").size == (2 * 134 - 6, 3 * 134 - 6)
    before = np.asarray(Image.open(tmp_path / "pca.png"), np.float64)
    write_pictures(tiny_model(20), images, tmp_path, 20, MEAN, STD, least_grid=6)  # a resumed run does it again
    assert np.abs(np.asarray(Image.open(tmp_path / "pca.png")) - before).mean() < 0.5  # sums in another order


def test_untrained_baseline_is_of_the_same_form_and_leaves_the_model() -> None:
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fresh, again = random_like(model), random_like(model)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(model.state_dict()[name], before[name])
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    frozen = Frozen(tokens=fresh, image=ImageSettings(tuple(MEAN), tuple(STD), 32), device=torch.device("cpu"))
    features = F.normalize(frozen.pool(images)[0][:, 0], dim=1)
    assert (features @ features.T).min() < 0.9999  # not one feature for all images


def test_evaluation_by_name_writes_figures_pictures_and_baselines_once(tmp_path: Path) -> None:
    members = []
    for n in range(24):
        label = json.dumps({"label": "ab"[n % 2]}).encode()
        members += [(f"k{n:02d}.png", encoded(picture(n, (32, 32)), "PNG")), (f"k{n:02d}.json", label)]
    write_tar(tmp_path / "set.tar", members)
    tar = str(tmp_path / "set.tar")
    config = EvaluationConfig(
        every_steps=5, train=tar, val=tar, px=32, resize_px=32, k=[1, 5], pca_images=2, pca_grid=5
    )
    run = tmp_path / "run"
    first = run_evaluation(tiny_model(), tiny_model, config, run, 0, MEAN, STD, torch.device("cpu"))
    assert first["knn"] == first["knn/1"] == first["knn_pixels"] == 1.0  # each image is its own neighbour
    small = EvaluationConfig(**asdict(config) | {"k": [1, 5, 200]})  # more neighbours than there are images
    again = run_evaluation(tiny_model(), tiny_model, small, tmp_path / "small", 0, MEAN, STD, torch.device("cpu"))
    assert again.keys() == first.keys()
    baselines = (run / "evaluation" / "baselines.json").stat().st_mtime_ns
    run_evaluation(tiny_model(1), tiny_model, config, run, 5, MEAN, STD, torch.device("cpu"))
    assert (run / "evaluation" / "baselines.json").stat().st_mtime_ns == baselines
    result = json.loads((run / "evaluation" / "step-00000005" / "result.json").read_text())
    assert result["evaluations"]["knn"]["images"]["val"] == 24
    assert (run / "evaluation" / "pca.png").exists()
    with np.load(run / "evaluation" / "step-00000005" / "pca.npz") as file:
        assert file["scores"].shape == (2, 5, 5, 3)


def test_evaluation_config() -> None:
    config = EvaluationConfig(every_steps=10, val="x")
    assert [step for step in range(26) if config.is_due(step, 25)] == [0, 10, 20, 25]
    assert not EvaluationConfig().is_due(0, 10)
    assert asdict(config)["k"] == [10, 20, 100, 200]
    with pytest.raises(ValueError, match=r"give evaluation\.val"):
        EvaluationConfig(every_steps=10)
    with pytest.raises(ValueError, match=r"evaluation\.resize_px=16"):
        EvaluationConfig(px=32, resize_px=16)
