"""The teacher as an evaluation calls it."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from configs.loader import merge_config
from pretrain import compiling
from pretrain.checks import check_numbers
from pretrain.config import TrainConfig
from pretrain.distributed.fsdp import Placement
from pretrain.downstream.evals.labelled import LeftOut, samples
from pretrain.evaluating import Answering, untrained
from pretrain.phase import fresh_network
from tests.conftest import picture_tar
from tests.pretrain.tiny_train import TINY

CPU = torch.device("cpu")


def test_an_evaluation_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sizes, and its last batch, are none of training's: each would be compiled for."""
    compiled: list[int] = []

    def count(graph: Any, _inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", count)
    torch.compiler.reset()
    config = merge_config(TrainConfig(), TINY, "the test")
    placement = Placement("single", "float32", CPU, None, compile_blocks=True)
    network = fresh_network(config)
    plain = network.backbone.eval()([images := torch.rand(3, 3, 32, 32)])[0].cls.detach()
    placement.frozen(network)
    (found,) = Answering(network, placement)([images])
    assert not compiled
    assert torch.equal(found.cls, plain)
    network(lambda network: network.backbone([images]))
    assert compiled
    torch.compiler.reset()


def test_an_evaluation_has_the_precision_of_training() -> None:
    config = merge_config(TrainConfig(), TINY, "the test")
    images, answers = torch.rand(3, 3, 32, 32), {}
    for precision in ("float32", "bfloat16"):
        network = untrained(config, Placement("single", precision, CPU))
        answers[precision] = network([images])[0].cls.float()
        assert network.patch_size == config.patch_size
    difference = (answers["float32"] - answers["bfloat16"]).norm() / answers["float32"].norm()
    assert 1e-4 < difference < 0.05


def test_ranks_share_a_set_out(tmp_path: Any) -> None:
    for number in range(8):
        picture_tar(tmp_path / f"{number}.tar", range(3 * number, 3 * number + 3))
    whole = [sample.key for sample in samples(str(tmp_path))]

    def shares(ranks: int, most: int = 0, block: int = 4) -> list[list[str]]:
        return [[s.key for s in samples(str(tmp_path), "", most, block, rank, ranks)] for rank in range(ranks)]

    assert shares(2)[1] == [key for n in (1, 3, 5, 7) for key in whole[3 * n : 3 * n + 3]], "four tars a rank: whole"
    assert shares(3) == [whole[:4] + whole[12:16], whole[4:8] + whole[16:20], whole[8:12] + whole[20:]]
    assert shares(2, most=10) == [whole[:4] + whole[8:10], whole[4:8]], "the first images are the first of the set"


def test_what_ranks_left_out_is_counted_together() -> None:
    parts = [LeftOut(images=90), LeftOut(images=60)]
    parts[0].add("a", "damaged")
    for key in "bcdefg":
        parts[1].add(key, "no label")
    whole = LeftOut.of_all(parts)
    assert (whole.images, len(whole), len(whole.names)) == (150, 7, 5)
    with pytest.raises(ValueError, match="7 of the 150 images of 'x' cannot be used"):
        whole.check("x", "")
    LeftOut.of_all([parts[0], LeftOut(images=60)]).check("x", "")  # more than 1% of a rank's, not of the set's


def test_groups_that_do_not_divide_the_ranks_are_refused() -> None:
    config = merge_config(TrainConfig(), TINY | {"global_batch_size": 48}, "the test")
    asked = replace(config, execution=replace(config.execution, parallel="hybrid", shard_ranks=4))
    check_numbers(asked, 8)
    with pytest.raises(ValueError, match=r"shard_ranks=4: groups of 4 ranks do not divide 6 ranks; choose one of 1, 2"):
        check_numbers(asked, 6)
