"""What ranks say to each other, and what one process says to itself."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.distributed import collectives
from pretrain.losses.koleo import koleo_loss
from pretrain.optim.clip import FiniteWatch
from tests.pretrain.ranks import run_ranks

ROWS, WIDTH = 6, 4
REPOSITORY = str(Path(__file__).parents[2])


def rows_and_weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(4 * ROWS, 3, generator=generator, dtype=torch.float64),
        torch.randn(3, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True),
    )


def averaged_gradient(about: str, ranks_per_group: int | None = None) -> Tensor:
    """Of a loss over the features of all ranks by the weight that makes them, averaged over ranks as DDP does."""
    rows, weight = rows_and_weight()
    ranks = collectives.world_size()
    mine = rows.chunk(ranks)[collectives.rank()] @ weight
    group = None if ranks_per_group is None else collectives.consecutive_ranks(ranks_per_group)
    gathered = collectives.gather_with_grad(mine, group)
    # A loss that couples all rows: of the gathered ones, or of our own towards all.
    first = gathered if about == "all rows" else mine
    loss = torch.cdist(first, gathered).square().exp().log1p().mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    return collectives.mean_over_ranks(gradient)


def koleo_gradient() -> tuple[Tensor, Tensor]:
    rows, weight = rows_and_weight()
    ranks = collectives.world_size()
    x = (rows.chunk(ranks)[collectives.rank()] @ weight).float()
    gather = collectives.gather_with_grad if ranks > 1 else None
    loss = koleo_loss(x, len(rows) if ranks > 1 else None, gather, collectives.rank())
    (gradient,) = torch.autograd.grad(loss, weight)
    return collectives.mean_over_ranks(loss.detach()), collectives.mean_over_ranks(gradient)


def talk() -> dict[str, Any]:
    rank = collectives.rank()
    found: dict[str, Any] = {
        "sum": collectives.sum_over_ranks(torch.tensor([1.0, rank])),
        "mean": collectives.mean_over_ranks(torch.tensor([1.0, rank])),
        "any": [collectives.any_over_ranks(rank == 1), collectives.any_over_ranks(False)],
        "zero": collectives.from_rank_zero(lambda: f"from {rank}"),
        "all rows": averaged_gradient("all rows"),
        "own rows": averaged_gradient("own rows"),
        "koleo": koleo_gradient(),
        "pairs": averaged_gradient("all rows", ranks_per_group=2),
    }
    try:
        collectives.from_rank_zero(lambda: 1 // rank)
    except ZeroDivisionError:
        found["error"] = True
    watch = FiniteWatch()
    found["flag"] = watch.watch(4, {"dino": torch.tensor(1.0), "ibot": torch.tensor(1.0 if rank else torch.nan)}).item()
    try:
        watch.check()
    except FloatingPointError as error:
        found["not finite"] = str(error)
    return found


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(talk, tmp_path_factory.mktemp("ranks"), num_ranks=4)


def test_ranks_agree(four_ranks: list[dict[str, Any]]) -> None:
    for found in four_ranks:
        assert found["sum"].tolist() == [4, 6]
        assert found["mean"].tolist() == [1, 1.5]
        assert found["any"] == [True, False]
        assert found["zero"] == "from 0"
        assert found["error"], "what goes wrong on rank 0 is raised on all"
        assert found["flag"] == 1
        assert "step 4: ibot not finite" in found["not finite"]


@pytest.mark.parametrize("about", ["all rows", "own rows"])
def test_gathered_gradient_is_that_of_one_process(four_ranks: list[dict[str, Any]], about: str) -> None:
    """float64; the mean over ranks of a loss about own rows is the loss about all of them."""
    expected = averaged_gradient("all rows")
    for found in four_ranks:
        torch.testing.assert_close(found[about], expected, rtol=1e-10, atol=1e-12)


def test_groups_of_ranks_see_their_own_rows(four_ranks: list[dict[str, Any]]) -> None:
    rows, weight = rows_and_weight()
    losses = [torch.cdist(half, half).square().exp().log1p().mean() for half in (rows @ weight).chunk(2)]
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), weight)
    torch.testing.assert_close(four_ranks[3]["pairs"], expected, rtol=1e-10, atol=1e-12)


def test_koleo_across_ranks_is_koleo_of_the_whole_batch(four_ranks: list[dict[str, Any]]) -> None:
    loss, gradient = koleo_gradient()
    for found in four_ranks:
        torch.testing.assert_close(found["koleo"][0], loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["koleo"][1], gradient, rtol=1e-5, atol=1e-6)


def test_alone_nothing_happens() -> None:
    x = torch.ones(2, requires_grad=True)
    assert collectives.gather_with_grad(x) is x
    assert collectives.sum_over_ranks(torch.ones(2)).tolist() == [1, 1]
    assert collectives.mean_over_ranks(torch.ones(2)).tolist() == [1, 1]
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert collectives.any_over_ranks(True)
    assert collectives.consecutive_ranks(1) is None
    with pytest.raises(ValueError, match="groups of 2 ranks do not divide 1 ranks"):
        collectives.consecutive_ranks(2)
    collectives.barrier()
    collectives.stop()


def test_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert collectives.start("cpu") == torch.device("cpu")
    assert not collectives.is_distributed()
    with pytest.raises(ValueError, match="one of auto, cpu, cuda"):
        collectives.start("tpu")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match="Slurm started several tasks"):
        collectives.start("cpu")


def test_cuda_without_a_gpu_is_said() -> None:
    code = "from pretrain.distributed import collectives; collectives.start('cuda')"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": REPOSITORY}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert "ValueError: execution.device=cuda, but torch sees no GPU here" in done.stderr


@pytest.mark.slow
def test_torchrun_starts_a_process_group(tmp_path: Path) -> None:
    code = (
        "import torch; from pretrain.distributed import collectives as c; device = c.start('cpu');"
        "said = (device.type, c.world_size(), int(c.sum_over_ranks(torch.tensor(c.rank() + 1))));"
        "print(f'{said}\\n', end='', flush=True); c.stop(); c.stop()"
    )
    script = tmp_path / "ranks_of_torchrun.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": REPOSITORY}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["('cpu', 2, 3)"] * 2


@pytest.mark.parametrize("status", [0, 3, 75])
def test_a_rank_ends_with_its_status_and_words_and_no_teardown(status: int) -> None:
    """Taking the interpreter apart under threads of gloo aborts ranks whose work is done."""
    code = (
        "import atexit, os; from pretrain.distributed import collectives; atexit.register(os.abort); "
        f"print('said', end=''); collectives.end_process({status})"
    )
    environment = {**os.environ, "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (status, "said")
