"""Rows taken out of the token matrix and added back: against plain indexing, run and traced; what is kept of them."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bytes.device import described
from pretrain.models.layers.attention import Layout
from pretrain.models.layers.rows import Kept, add_rows, take_rows
from pretrain.models.vision_transformer import VisionTransformer

ROWS, WIDTH, KEPT = 12, 5, 7


def kept() -> Kept:
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))[:KEPT].sort().values
    place = torch.full((ROWS,), -1).scatter_(0, rows, torch.arange(KEPT))
    return Kept(rows, place, torch.linspace(1, 2, KEPT)[:, None], Layout(((KEPT, 1),)))


def ours(x: Tensor, w: Tensor, k: Kept) -> Tensor:
    some, x = take_rows(x, k)
    return add_rows(x, (some @ w).sin(), k)


def plain(x: Tensor, w: Tensor) -> Tensor:
    k = kept()
    return x.index_add(0, k.rows, (x.index_select(0, k.rows) @ w).sin() * k.scale.to(x.dtype))


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for n in (ROWS, WIDTH))
    return x.requires_grad_(), w.requires_grad_()


@pytest.mark.parametrize("traced", [False, True])
def test_equals_plain_indexing_with_gradients(traced: bool) -> None:
    """Traced, rows are looked up where they are written, as for the compiler; 0 rows left out would show too."""
    form = torch.compile(ours, backend="aot_eager", fullgraph=True) if traced else ours
    x, w = inputs(torch.float64)
    found = form(x, w, kept())
    expected = plain(x, w)
    torch.testing.assert_close(found, expected)
    given = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    before = given.clone()
    gradients = torch.autograd.grad(found, (x, w), given)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (x, w), given))
    assert torch.equal(given, before)  # a gradient that somebody else may hold


def test_a_float32_stream_takes_a_bfloat16_branch() -> None:
    x, _ = inputs(torch.float32)
    some, x = take_rows(x, kept())
    branch = some.detach().bfloat16().requires_grad_()
    add_rows(x, branch, kept()).sum().backward()
    assert branch.grad is not None
    assert branch.grad.dtype == torch.bfloat16
    torch.testing.assert_close(branch.grad.float(), kept().scale.expand(-1, WIDTH).bfloat16().float())


def test_no_float32_branch_is_kept_for_the_backward() -> None:
    """Of a block's 2 T' D float32 values that plain indexing keeps; here there are those that go into the norms."""
    images, width = 8, 64
    with torch.device("meta"):
        network = VisionTransformer(embed_dim=width, depth=1, num_heads=2, patch_size=8, drop_path=0.5).train()
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float32 and tensor.shape == (images // 2 * 17, width):
            sizes[tensor.untyped_storage()._cdata] = tensor.numel()
        return tensor

    with described(), FakeTensorMode(allow_non_fake_inputs=True):
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, device="cuda"))
        crops = torch.empty(images, 3, 32, 32, device="cuda")
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cuda", torch.bfloat16),
        ):
            network([crops], generator=torch.Generator().manual_seed(0))
    assert len(sizes) == 2
