"""The projection head against `lightly`'s, and its initialisation."""

import pytest
import torch
from lightly.models.modules.heads import DINOProjectionHead
from torch import nn

from pretrain.models.projection_head import ProjectionHead
from tests.pretrain.randomised import randomise


def test_logits_equal_those_of_lightly() -> None:
    head = ProjectionHead(12, 24, 8, 40, weight_norm=True)
    randomise(head)
    theirs = DINOProjectionHead(12, 24, 8, 40, norm_last_layer=False).double()
    linears = [module for module in theirs.layers if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for own, other in zip(head.mlp[::2], linears, strict=True):
            other.load_state_dict(own.state_dict())
        directions = head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
        for name, parameter in theirs.last_layer.named_parameters():
            kind = "g" if name.endswith(("_g", "original0")) else "v"
            parameter.copy_(head.last_layer.weight_g if kind == "g" else directions)
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
    features, prototypes = head(x)
    assert (features.norm(dim=1) - 1).abs().max() < 1e-6
    torch.testing.assert_close((features @ prototypes.T).double(), theirs(x.double()), atol=1e-5, rtol=1e-5)


def test_plain_prototypes_are_the_parameter_and_get_its_gradient() -> None:
    head = ProjectionHead(6, 10, 4, 7)
    randomise(head)
    features, prototypes = head(torch.ones(2, 6))
    assert torch.equal(prototypes, head.last_layer.weight)
    (features @ prototypes.T).sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("weight_norm", [False, True])
def test_initialisation_leaves_no_gap(weight_norm: bool) -> None:
    with torch.device("meta"):
        head = ProjectionHead(64, 128, 256, 300, weight_norm=weight_norm)
    head.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(torch.nan)
    head.init_weights(torch.Generator().manual_seed(0))
    assert all(parameter.isfinite().all() for parameter in head.parameters())
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    norms = head.last_layer().norm(dim=1)
    if weight_norm:
        torch.testing.assert_close(norms, torch.ones(300))
    else:
        assert norms.mean().item() == pytest.approx(0.02 * 16, rel=0.05)


def test_released_names() -> None:
    names = {name for name, _ in ProjectionHead(4, 8, 4, 5, weight_norm=True).named_parameters()}
    layers = {f"mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert names == layers | {"last_layer.weight_g", "last_layer.weight_v"}
    assert {name for name, _ in ProjectionHead(4, 8, 4, 5, num_layers=1).named_parameters()} == {
        "mlp.weight",
        "mlp.bias",
        "last_layer.weight",
    }
    with pytest.raises(ValueError, match="num_layers=0"):
        ProjectionHead(4, 8, 4, 5, num_layers=0)


def test_features_are_float32_under_autocast() -> None:
    head = ProjectionHead(6, 10, 4, 7)
    randomise(head)
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = head(torch.ones(2, 6))
    assert features.dtype == torch.float32
    assert (features.norm(dim=1) - 1).abs().max() < 1e-6
