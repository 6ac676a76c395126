"""A start that never holds a whole network: first values by rows, memory of a rank, what is read of a file."""

import gc
import resource
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.loader import merge_config
from pretrain.checkpoint import Checkpoints, write_teacher
from pretrain.config import TrainConfig
from pretrain.distributed.fsdp import full_tensors, local_tensor, place
from pretrain.models import architectures
from pretrain.models.initial import Initial, fill_rows
from pretrain.network_weights import describe_teacher
from pretrain.phase import fresh_network, start_phase
from pretrain.resume import Position, Standing
from tests.pretrain.ranks import run_ranks
from tests.pretrain.tiny_train import TINY

CPU = torch.device("cpu")
NARROW = "dinov3_vit7b16_narrow"
SHARDED = {"fsdp": {}, "hybrid": {"shard_ranks": 2}}


def narrow_7b() -> TrainConfig:
    """The 7B model and its heads with a sixteenth of the width: 40 blocks all the same."""
    width = {"embed_dim": 256, "num_heads": 8}
    architectures.ARCHITECTURES[NARROW] = {**architectures.ARCHITECTURES["dinov3_vit7b16"], **width}
    head = {"num_prototypes": 16384, "hidden_dim": 512, "bottleneck_dim": 64, "weight_norm": False}
    return merge_config(
        TrainConfig(),
        {"model": {"architecture": NARROW}, "heads": {"dino": head, "ibot": head}, "precision": "float32"},
        "the test",
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors on the processor that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = local_tensor(tensor).untyped_storage()
                if storage.data_ptr() not in self._known and storage.nbytes():
                    self._known.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        return result

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def start_narrow_7b(folder: Path) -> dict[str, float]:
    """Start and resume the phase sharded over all ranks; bytes of this rank, and its share of all that is kept."""
    config = narrow_7b()
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
    one_block = merge_config(config, {"model": {"depth": 1}}, "the test")
    start_phase(_parallel(one_block, "fsdp"), Standing(), checkpoints, CPU)  # what is imported and kept for good
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with LiveBytes() as counted:
        phase = start_phase(_parallel(config, "fsdp"), Standing(), checkpoints, CPU)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    parameters = sum(p.numel() for p in phase.teacher.parameters())
    describe = describe_teacher(config, {"step": 1, "phase": "pretrain"}, 0.0)
    checkpoints.save(phase.state(), 1, {"teacher": describe})
    checkpoints.wait()
    del phase
    gc.collect()
    latest = checkpoints.latest()
    with LiveBytes() as resumed:
        start_phase(_parallel(config, "fsdp"), Standing(Position(0, 1, 1), latest), checkpoints, CPU)
    return {
        "network": 4 * parameters,
        "kept": 16 * parameters,
        "peak": counted.peak,
        "resumed": resumed.peak,
        "grown": grown,
    }


def _parallel(config: TrainConfig, mode: str, **more: Any) -> TrainConfig:
    return merge_config(config, {"execution": {"parallel": mode, **more}}, "the test")


@pytest.mark.slow
def test_a_rank_of_a_7b_start_holds_its_share(tmp_path: Path) -> None:
    """Student, EMA and two moments, 16 bytes a parameter, over 8 ranks; on top two blocks of first values as drawn."""
    for rank in run_ranks(start_narrow_7b, tmp_path, tmp_path / "run", num_ranks=8):
        share = rank["kept"] / 8
        assert share <= rank["peak"] < 1.06 * share + 4e6, rank
        assert rank["grown"] < 1.25 * share + 40e6, rank
        assert share <= rank["resumed"] < 1.06 * share + 4e6, rank
        assert max(rank["peak"], rank["resumed"]) < rank["network"], "less than one network"


def starts(config: TrainConfig, folder: Path, mode: str, more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every kind of start -> whole tensors of all networks, and the hash of the teacher that is distilled."""
    teacher = str(folder / "teacher")
    gram = {"gram": {"weight": 1.0, "teacher": teacher}, "crops": {"gram_px": 32}}
    phases = {"phases": {"a": {}, "b": {"model": {"position_px": 48}}}}
    kinds: dict[str, dict[str, Any]] = {
        "fresh": {},
        "init_from": {"init_from": teacher},
        "no heads": {"init_from": str(folder / "backbone.pth")},
        "gram": gram,
        "distill": {"distill_from": teacher},
        "phase": phases,
    }
    found = {}
    for kind, settings in kinds.items():
        asked = _parallel(merge_config(config, settings, kind), mode, **more)
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
        standing = Standing(Position(1, 0, 1), checkpoints.latest()) if kind == "phase" else Standing()
        phase = start_phase(asked, standing, checkpoints, CPU)
        networks = {"student": phase.student, "teacher": phase.teacher, "gram": phase.gram, "frozen": phase.frozen}
        found[kind] = {"hash": phase.distilled} | {
            f"{role}.{name}": tensor.clone()
            for role, network in networks.items()
            if network is not None
            for name, tensor in full_tensors(network)
        }
    return found


def starts_sharded(config: TrainConfig, folder: Path) -> dict[str, Any]:
    return {mode: starts(config, folder, mode, more) for mode, more in SHARDED.items()}


@pytest.mark.slow
def test_first_weights_are_equal_for_every_mesh_and_source(tmp_path: Path) -> None:
    config = merge_config(TrainConfig(), TINY, "the test")
    other = fresh_network(replace(config, seed=7))
    describe = describe_teacher(config, {"step": 1, "phase": "a"}, 0.1)
    write_teacher(tmp_path / "teacher", other.state_dict(), describe)
    torch.save({"model": other.backbone.state_dict()}, tmp_path / "backbone.pth")
    checkpoints = Checkpoints(tmp_path / "checkpoints", config.checkpoint)
    checkpoints.save({"student": fresh_network(replace(config, seed=8)), "teacher": other}, 1, {"teacher": describe})
    checkpoints.wait()

    one = starts(config, tmp_path, "single", {})
    whole, sevens = fresh_network(config).state_dict(), other.state_dict()
    for role in ("student", "teacher"):
        assert all(torch.equal(one["fresh"][f"{role}.{name}"], tensor) for name, tensor in whole.items())
        assert all(torch.equal(one["init_from"][f"{role}.{name}"], tensor) for name, tensor in sevens.items())
        assert torch.equal(one["no heads"][f"{role}.backbone.norm.weight"], sevens["backbone.norm.weight"])
        assert torch.equal(one["no heads"][f"{role}.dino_head.mlp.0.weight"], whole["dino_head.mlp.0.weight"])
    for role, kind in (("gram", "gram"), ("frozen", "distill")):
        assert all(torch.equal(one[kind][f"{role}.{name}"], tensor) for name, tensor in sevens.items())
    assert one["distill"]["hash"]
    assert one["phase"]["teacher.backbone.pos_embed"].shape[1] > whole["backbone.pos_embed"].shape[1]

    for rank in run_ranks(starts_sharded, tmp_path, config, tmp_path, num_ranks=4):
        for mode, kinds in rank.items():
            for kind, found in kinds.items():
                assert found.pop("hash") == one[kind]["hash"]
                assert found.keys() == one[kind].keys() - {"hash"}
                for name, tensor in found.items():
                    assert torch.equal(tensor, one[kind][name]), (mode, kind, name)


@pytest.mark.parametrize("shape", [(7, 5), (3000, 257), (1, 400_000), (13,)])
@pytest.mark.parametrize("kind", ["normal", "uniform", "constant"])
def test_rows_are_drawn_alone_as_with_the_others(shape: tuple[int, ...], kind: Any) -> None:
    initial = Initial(kind, 0.3)
    whole = torch.full(shape, torch.nan)
    fill_rows(whole, initial, shape, 0, 5, "a.weight")
    assert whole.isfinite().all()
    for ranks in (2, 3, 8):
        size = -(-shape[0] // ranks)
        parts = [torch.full_like(whole[i * size : (i + 1) * size], torch.nan) for i in range(ranks)]
        for i, part in enumerate(parts):
            fill_rows(part, initial, shape, min(i * size, shape[0]), 5, "a.weight")
        assert torch.equal(torch.cat(parts), whole)


def test_first_values_have_their_distribution_and_differ_by_name_and_seed() -> None:
    shape = (2000, 500)
    drawn = {key: torch.empty(shape) for key in ((0, "a"), (0, "b"), (1, "a"))}
    for (seed, name), rows in drawn.items():
        fill_rows(rows, Initial("normal", 0.02), shape, 0, seed, name)
        assert rows.std() == pytest.approx(0.02, rel=0.01)
        assert abs(rows.mean()) < 1e-4
    one, *others = (rows.flatten() for rows in drawn.values())
    assert all(abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.01 for other in others)
    blocks = one.view(-1, 500)[:1048].view(2, 524, 500)  # rows of two blocks
    assert not torch.equal(blocks[0], blocks[1])
    fill_rows(uniform := torch.empty(shape), Initial("uniform", 0.1), shape, 0, 0, "a")
    assert uniform.abs().max() == pytest.approx(0.1, rel=1e-3)
    assert uniform.std() == pytest.approx(0.1 / 3**0.5, rel=0.01)


def test_a_network_on_meta_is_given_room_and_nothing_more_until_it_is_filled() -> None:
    with torch.device("meta"):
        network = nn.Module()
        network.backbone = architectures.build("dinov3_tiny", device="meta", depth=1)
    place("single", "float32", CPU, 0, 1).frozen(network)
    assert all(p.device == CPU and p.isnan().all() for p in network.parameters())
