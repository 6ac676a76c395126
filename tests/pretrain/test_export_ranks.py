"""One file from a checkpoint of any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.loader import merge_config
from pretrain.checkpoint import Checkpoints
from pretrain.config import TrainConfig
from pretrain.distributed import collectives
from pretrain.distributed.fsdp import full_tensors, local_tensor
from pretrain.downstream.backbone import load_backbone
from pretrain.downstream.export.folder import export
from pretrain.network_weights import describe_teacher
from pretrain.phase import start_phase
from pretrain.resume import Standing
from tests.pretrain.ranks import run_ranks
from tests.pretrain.tiny_train import TINY


def save_sharded(folder: Path, execution: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A checkpoint of networks that lie sharded over all ranks; the teacher's tensors, whole, as torch gathers them."""
    config = merge_config(TrainConfig(), TINY | {"execution": execution}, "the test")
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
    phase = start_phase(config, Standing(), checkpoints, torch.device("cpu"))
    with torch.no_grad():
        for parameter in phase.teacher.parameters():  # the student's until then
            local_tensor(parameter).mul_(1.5)
    checkpoints.save(phase.state(), 1, {"teacher": describe_teacher(config, {"step": 1, "phase": "pretrain"}, 0.0)})
    checkpoints.wait()
    teacher = {name: tensor.clone() for name, tensor in full_tensors(phase.teacher)}
    held = sum(local_tensor(parameter).numel() for parameter in phase.teacher.parameters())
    assert held < 0.6 * sum(tensor.numel() for tensor in teacher.values())
    return teacher | {"rank": torch.tensor(collectives.rank())}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "ranks"), [("fsdp", 2), ("hybrid", 4)])
def test_a_checkpoint_of_sharded_ranks_is_one_file(mode: str, ranks: int, tmp_path: Path) -> None:
    execution = {"parallel": mode} | ({"shard_ranks": 2} if mode == "hybrid" else {})
    found = run_ranks(save_sharded, tmp_path / "ranks", tmp_path, execution, num_ranks=ranks)
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    assert len(list(checkpoint.glob("rank-*.safetensors"))) == ranks
    export(checkpoint, tmp_path / "out", "safetensors", heads=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "teacher.safetensors"]
    written = load_file(tmp_path / "out" / "teacher.safetensors")
    for rank, expected in enumerate(found):
        assert expected.pop("rank") == rank
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    export(checkpoint, tmp_path / "huggingface", "huggingface")
    state = load_backbone(tmp_path / "huggingface").model.state_dict()
    assert all(
        torch.equal(state[n.removeprefix("backbone.")], t) for n, t in written.items() if n.startswith("backbone.")
    )
