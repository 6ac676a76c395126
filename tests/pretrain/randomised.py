"""Models with every parameter random: at initialisation LayerScale hides the blocks, and any mapping would pass."""

import torch
from torch import nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, matrices by their fan-in, so that activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim >= 2 and not name.endswith(("token", "tokens", "embed")):
                noise *= parameter[0].numel() ** -0.5
            elif "norm" in name and name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise *= 0.3
            parameter.copy_(noise)
    return model
