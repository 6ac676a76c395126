"""What `benchmarks.bytes` counts on fake CUDA tensors, against numbers made by hand; and its own backward passes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bytes import __main__ as command
from benchmarks.bytes.backward import in_python
from benchmarks.bytes.compiled import backend
from benchmarks.bytes.count import Counter
from benchmarks.bytes.device import described
from pretrain.models.vision_transformer import VisionTransformer

TINY = (
    "model.architecture=dinov2_tiny",
    "model.patch_size=16",
    "model.position_px=64",
    "model.depth=2",
    "crops.global_px=64",
    "crops.local_px=32",
    "crops.num_local_crops=2",
    "heads.dino={num_prototypes: 512, hidden_dim: 128, bottleneck_dim: 64}",
    "heads.ibot={num_prototypes: 512, hidden_dim: 128, bottleneck_dim: 64}",
    "global_batch_size=4",
)


def gradients() -> list[Tensor | None]:
    """Of a network with every kind of layer, stochastic depth and two sizes of crops; and `autograd.grad`."""
    torch.manual_seed(0)
    network = VisionTransformer(embed_dim=32, depth=2, num_heads=2, patch_size=8, drop_path=0.3, layerscale=0.1).train()
    crops = torch.randn(4, 3, 32, 32)
    large, small = network([crops, crops[:, :, :16, :16]], generator=torch.Generator().manual_seed(0))
    (large.cls.square().sum() + small.patches.sum()).backward()
    x = torch.randn(3, 4, requires_grad=True)
    y = (x * x).sin()
    return [p.grad for p in network.parameters()] + list(torch.autograd.grad((y.sum(), y.square().sum()), (x, y)))


def test_backward_in_python_gives_the_gradients_of_the_engine() -> None:
    expected = gradients()
    with in_python():
        found = gradients()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_operators_are_counted_by_what_they_read_and_write() -> None:
    """In bytes: a product, its operands' casts, a gather of a quarter of the rows, a mean, and backwards."""
    counter = Counter()
    with described(), in_python(counter.enter_node), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(64, 128, device="cuda", requires_grad=True)
        w = torch.empty(128, 32, device="cuda")
        rows = torch.arange(16).to("cuda")
        with counter:
            with torch.autocast("cuda", torch.bfloat16):
                y = x @ w
            x.index_select(0, rows)
            z = y.view(32, 64).mean(dim=1)
            z.sum().backward()
    found = {operator: traffic.bytes for (_, operator), traffic in counter.by_operator.items()}
    assert found["mm"] == 2 * (64 * 128 + 128 * 32 + 64 * 32) + 2 * (64 * 128 + 128 * 32 + 64 * 32)  # and the gradient
    assert found["index_select"] == 2 * 4 * 16 * 128 + 8 * 16
    assert found["mean"] == 2 * (64 * 32 + 32)
    assert found["sum"] == 2 * (32 + 1)
    assert "view" not in found
    assert x.grad is not None
    assert x.grad.device.type == "cuda"


def test_what_is_compiled_is_counted_as_inductor_fuses_it() -> None:
    """Norm and GELU around a product: one kernel before it, which keeps mean and deviation, and one after."""
    counter = Counter()

    def layer(x: Tensor, w: Tensor) -> Tensor:
        return F.gelu(F.layer_norm(x, (128,)) @ w).sum(dim=1)

    with described(), in_python(counter.enter_node), FakeTensorMode(allow_non_fake_inputs=True):
        torch._dynamo.reset()
        x, w = torch.empty(64, 128, device="cuda"), torch.empty(128, 256, device="cuda")
        compiled = torch.compile(layer, backend=backend(counter))
        with counter, torch.no_grad():
            out = compiled(x, w)
    assert out.shape == (64,)
    traffic = {operator: (found.bytes, found.launches) for (_, operator), found in counter.by_operator.items()}
    assert traffic["mm"] == (4 * (64 * 128 + 128 * 256 + 64 * 256), 1)
    assert traffic["fused"] == (4 * (2 * 64 * 128 + 64 * 256 + 64), 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it, where its inputs are fake already
def test_a_step_is_counted_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    command.main(["--label", "tiny", *TINY])
    eager, compiled = [json.loads(line) for line in (tmp_path / "bytes.jsonl").read_text().splitlines()]
    assert eager["form"] == "eager"
    assert (
        compiled["parts"]["blocks, elementwise"]["launches"] < eager["parts"]["blocks, elementwise"]["launches"] / 1.5
    )
    for part in command.PARTS:
        assert compiled["parts"][part]["launches"] > 0, part
    assert "| tiny, eager | tiny, compiled |" in (tmp_path / "bytes.md").read_text()
    command.keep([eager])
    assert len((tmp_path / "bytes.jsonl").read_text().splitlines()) == 2
