"""Linear layers of 8-bit products: the rounding, the products and gradients against float64, and who gets them."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bytes.backward import in_python
from benchmarks.bytes.count import Counter
from benchmarks.bytes.device import described
from pretrain.config import TrainConfig
from pretrain.models.architectures import architecture
from pretrain.models.layers.fp8 import Fp8Linear, rounded_rows, scaled_product, use_fp8
from pretrain.models.layers.norm import LayerScale
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.settings import ModelConfig

HALF_STEP = 2**-4
"""relative, of a number with three bits behind the point"""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_is_relative_to_each_row() -> None:
    x = random(6, 64) * torch.logspace(-6, 6, 6)[:, None]
    x[3] = 0
    rounded, scale = rounded_rows(x.bfloat16())
    assert rounded.dtype == torch.float8_e4m3fn
    back = rounded.float() * scale
    largest = x.abs().amax(dim=1, keepdim=True)
    # Numbers below 2^-6 of the format (largest: 448) have a fixed step.
    assert ((back - x).abs() <= 1.1 * HALF_STEP * x.abs() + largest * 2**-10 / 448 * 2).all()
    assert (back[3] == 0).all()
    torch.testing.assert_close(back.abs().amax(dim=1, keepdim=True), largest, rtol=5e-3, atol=0)


def test_products_and_gradients_are_near() -> None:
    """Rounding errors of 2^-5 or so average out: a few percent in the Euclidean norm."""
    layer = nn.Linear(1024, 1040)
    assert use_fp8(layer) == 1
    x, gradient = random(32, 1024).requires_grad_(), random(32, 1040, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(gradient.bfloat16())
    exact = x.detach().double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in layer.parameters())
    expected = torch.nn.functional.linear(exact, weight, bias)
    expected.backward(gradient.double())
    pairs = [(y, expected, 0.04), (x.grad, exact.grad, 0.04), (layer.weight.grad, weight.grad, 0.01)]
    for found, right, tolerance in [*pairs, (layer.bias.grad, bias.grad, 0.01)]:
        error = (found.double() - right).norm() / right.norm()
        assert error < tolerance
    assert (y.double() - expected).norm() > 1e-3 * expected.norm()  # it is rounded


def test_an_outlier_costs_its_own_row_only() -> None:
    a, b = random(8, 1024), random(16, 1024, seed=1)
    spoiled = a.clone()
    spoiled[2, 5] = 1e4
    torch.testing.assert_close(scaled_product(spoiled, b)[3:], scaled_product(a, b)[3:], rtol=0, atol=0)


def test_layer_scale_goes_into_the_matrix() -> None:
    layer, scale, x = nn.Linear(1024, 1024), LayerScale(1024, 0.5), random(4, 1024)
    nn.init.constant_(scale.gamma, 0.5)
    use_fp8(layer)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(scale.after(layer, x), (0.5 * layer(x)).bfloat16(), rtol=1e-2, atol=1e-2)


def test_blocks_of_wide_models_get_it_and_nothing_else() -> None:
    with torch.device("meta"):
        wide = VisionTransformer(**architecture("dinov3_vitl16", depth=2, fp8=True))
    found = [name for name, module in wide.named_modules() if isinstance(module, Fp8Linear)]
    assert len(found) == 8
    assert all(name.startswith("blocks.") for name in found)
    with torch.device("meta"), pytest.raises(ValueError, match="no layer is wide enough: embed_dim=384, least 1024"):
        VisionTransformer(**architecture("dinov3_vits16", fp8=True))
    with pytest.raises(ValueError, match=r"model.fp8=true goes with precision=bfloat16, not float32"):
        TrainConfig(precision="float32", model=ModelConfig(fp8=True))


def test_on_a_gpu_both_products_of_the_activations_are_in_eight_bits() -> None:
    """The kernel of fake CUDA tensors checks shapes, strides and scales as the real one does."""
    counter = Counter()
    with torch.device("meta"):
        layer = nn.Linear(1024, 2048)
    use_fp8(layer)
    with described(), in_python(counter.enter_node), FakeTensorMode(allow_non_fake_inputs=True):
        for name, parameter in layer._parameters.items():
            assert parameter is not None
            layer._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
        x = torch.empty(64, 1024, device="cuda", requires_grad=True)
        with counter, torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
            assert y.dtype == torch.bfloat16
            y.sum().backward()
    launches = {operator: traffic.launches for (_, operator), traffic in counter.by_operator.items()}
    assert launches["_scaled_mm"] == 2
    assert launches["mm"] == 1
    assert layer.weight.grad is not None
