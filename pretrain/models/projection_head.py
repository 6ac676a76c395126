"""The projection head of DINO and iBOT, up to but not including its logits; or of SimDINO, without prototypes."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.initial import LINEAR, Initial, initialise, prefixed


class Prototypes(nn.Module):
    """The last layer: K directions, plain (DINOv3) or weight-normed, lengths trained (DINOv2) or fixed (DINO)."""

    def __init__(self, dim: int, num_prototypes: int, weight_norm: bool, train_lengths: bool) -> None:
        super().__init__()
        self.dim, self.num_prototypes = dim, num_prototypes
        self.weight_norm = weight_norm
        if weight_norm:
            self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1), requires_grad=train_lengths)
            self.weight_v = nn.Parameter(torch.empty(num_prototypes, dim))
        else:
            self.weight = nn.Parameter(torch.empty(num_prototypes, dim))

    def forward(self) -> Tensor:
        """The effective weight [K, dim]."""
        if self.weight_norm:
            return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        # Under FSDP a parameter is not to leave its module; its alias carries the gradient hooks.
        return self.weight.view_as(self.weight)

    def initials(self) -> dict[str, Initial]:
        if self.weight_norm:
            return {"weight_v": Initial("uniform", self.dim**-0.5), "weight_g": Initial("constant", 1.0)}
        return {"weight": Initial("normal", 0.02)}


class ProjectionHead(nn.Module):
    """MLP with GELU, L2 normalisation, prototypes.

    The logits are `features @ prototypes.T`; they are the largest tensor of a step, and the losses stream over them.
    Without prototypes the unit rows are the answer (SimDINO, arXiv:2502.10385).

    Args:
        num_prototypes: 0: none.
        num_layers: linear layers of the MLP, at least 1; the last has `bottleneck_dim` outputs.
        weight_norm: the last layer of DINOv2, else that of DINOv3.
        train_lengths: of weight-normed prototypes. Lengths that stay 1, as in DINO (arXiv:2104.14294), keep a short run
            at a small batch from shrinking its logits until all targets are uniform.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        num_prototypes: int,
        num_layers: int = 3,
        weight_norm: bool = False,
        train_lengths: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers}: a head has at least one linear layer.")
        self.bottleneck_dim = bottleneck_dim
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            layers += [nn.Linear(width, following), nn.GELU()]
        # One layer alone has the released name `mlp.weight`, not `mlp.0.weight`.
        self.mlp = nn.Sequential(*layers[:-1]) if num_layers > 1 else layers[0]
        self.last_layer = (
            Prototypes(bottleneck_dim, num_prototypes, weight_norm, train_lengths) if num_prototypes else None
        )
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter anew, also one that `to_empty` left undefined."""
        initialise(self, self.initials(), generator)

    def initials(self) -> dict[str, Initial]:
        """What each parameter starts from, by its name."""
        found = prefixed("last_layer", self.last_layer.initials()) if self.last_layer is not None else {}
        for name, module in self.mlp.named_modules(prefix="mlp"):
            if isinstance(module, nn.Linear):
                found |= prefixed(name, LINEAR)
        return found

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [N, D] to unit-norm features [N, bottleneck], float32 or wider, and prototypes [K, bottleneck]."""
        x = self.mlp(x)
        # In bfloat16 the norm of a row would be off by up to 0.4%, and the temperature multiplies that by 10 to 25.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.normalize(x, dim=-1), None if self.last_layer is None else self.last_layer()
