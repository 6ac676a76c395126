"""`attention=auto`: what it takes on a GPU for each length of crop, and that a processor's choice is as it was."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bytes.backward import in_python
from benchmarks.bytes.count import Counter
from benchmarks.bytes.device import described
from pretrain.models.layers.attention import Attention, make_layout

GROUPS = ((2, 201), (8, 41))


def mixed(backend: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two sizes of crops through the attention of ViT-S's heads, and the gradient by its input."""
    layer = Attention(128, 2, qkv_bias=False, mask_key_bias=False, backend=backend)
    layer.qkv = torch.nn.Identity()  # type: ignore[assignment]  # in place of a Linear
    layout = make_layout(GROUPS, backend, torch.device(device))
    rows = sum(layout.rows)
    x = torch.randn(rows, 384, generator=torch.Generator().manual_seed(0) if device == "cpu" else None, device=device)
    x = x.to(dtype).requires_grad_()
    out = layer.mix(x, layout, [None, None])
    out.sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def launched(dtype: torch.dtype) -> dict[str, int]:
    counter = Counter()
    with described(), in_python(counter.enter_node), FakeTensorMode(allow_non_fake_inputs=True), counter:
        out, _ = mixed("auto", "cuda", dtype)
        assert out.shape == (2 * 201 + 8 * 41, 128)
    return {name: found.launches for (_, name), found in counter.by_operator.items() if "attention" in name}


def test_on_a_gpu_short_crops_take_the_kernel_of_small_tiles() -> None:
    assert launched(torch.bfloat16) == {
        "_scaled_dot_product_flash_attention": 1,
        "_scaled_dot_product_efficient_attention": 1,
        "_scaled_dot_product_flash_attention_backward": 1,
        "_scaled_dot_product_efficient_attention_backward": 1,
    }
    assert not any("efficient" in name for name in launched(torch.float32))  # it is PyTorch's to choose


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_processor_it_is_as_without(dtype: torch.dtype) -> None:
    for ours, theirs in zip(mixed("auto", "cpu", dtype), mixed("sdpa", "cpu", dtype), strict=True):
        assert torch.equal(ours, theirs)
