"""The peer of the quality benchmark is the same model as ours, and the table says what the runs say."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.quality import first_phase_only, summary
from pretrain.config import load_train_config, total_steps
from pretrain.phase import fresh_network

# lightly's head uses the old weight_norm.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


def test_lightlys_networks_start_as_ours():
    lightly_dinov2 = pytest.importorskip("benchmarks.lightly_dinov2", reason="lightly is a peer, not a dependency")
    config = load_train_config("cifar", ["model.layerscale=0.5"], [])
    peer = lightly_dinov2.LightlyDinov2(config)
    ours = fresh_network(config).backbone.eval()
    torch.manual_seed(0)
    for side in (config.crops.global_px, config.crops.local_px):
        images = torch.randn(2, 3, side, side)
        with torch.inference_mode():
            torch.testing.assert_close(peer.features(images), ours([images])[0].cls, atol=1e-5, rtol=1e-5)
            student = peer.backbone(peer.student).eval().encode(images)[:, 0]
        torch.testing.assert_close(student, peer.features(images))
    assert sum(p.numel() for p in peer.student.parameters()) == sum(
        p.numel() for p in fresh_network(config).parameters()
    )


def test_without_its_high_resolution_stage_a_run_has_as_many_steps():
    config = load_train_config("cifar", ["steps=100"], [])
    assert len(config.phase_names) == 2
    alone = first_phase_only(config)
    assert alone.phase_names == ["pretrain"]
    assert alone.phase("pretrain").steps == total_steps(config) > 100


def test_table_has_mean_and_deviation_over_seeds(tmp_path: Path):
    figures = {("full", 0): 0.5, ("full", 1): 0.6, ("lightly", 0): 0.45, ("lightly", 1): 0.45, ("pixels", 0): 0.3}
    for (variant, seed), accuracy in figures.items():
        folder = tmp_path / f"{variant}-{seed}"
        folder.mkdir()
        result = {
            "variant": variant,
            "seed": seed,
            "steps": 8,
            "train_s": 60,
            "accuracy": accuracy,
            "by_k": {"10": 0.5},
        }
        (folder / "result.json").write_text(json.dumps(result))
    rows = {line.split("|")[1].strip(): line for line in summary(tmp_path).splitlines()}
    assert "| 55.0 ± 7.1 | 2 |" in rows["full"]
    assert "| 45.0 ± 0.0 | 2 | -10.0 |" in rows["lightly"]
    assert "| 30.0 | 1 | -20.0 |" in rows["pixels"]
