"""Noise and stochastic depth are drawn for each micro-batch, so two ranks repeat one process with two of them."""

from pathlib import Path

import pytest
import yaml

from tests.conftest import picture_tar
from tests.pretrain.test_train_ranks import train
from tests.pretrain.tiny_train import TINY, losses

NOISE = ["steps=4", "model.drop_path=0.5", "model.rope_rescale=2", "loss.koleo_group_size=4"]


@pytest.mark.slow
def test_two_ranks_draw_the_noise_of_two_micro_batches(tmp_path: Path) -> None:
    model = {"architecture": "dinov3_tiny", "depth": 2, "layerscale": 0.5}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "model": model}))
    picture_tar(tmp_path / "shards" / "a.tar", range(24))
    setting = tmp_path / "tiny.yaml", tmp_path / "shards"
    train(1, setting, tmp_path / "one", *NOISE, "execution.accumulation_steps=2")
    train(2, setting, tmp_path / "two", *NOISE)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
