"""The peer: DINO as lightly's example trains it (examples/pytorch/dino.py): the loss on CLS tokens alone, softmax
centring. What it takes from our config is said in lightly_vit.py."""

from collections.abc import Sequence

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from torch import Tensor, nn

from benchmarks.peers.lightly_vit import LightlyVit, check_head, encode


class LightlyDino(LightlyVit):
    """See `LightlyVit`. Its prototypes have length 1, as in the example."""

    def build_heads(self, in_dim: int) -> dict[str, nn.Module]:
        head = self.config.heads.dino
        check_head(head, "DINO")
        return {"dino_head": DINOProjectionHead(in_dim, head.hidden_dim, head.bottleneck_dim, head.num_prototypes)}

    def build_losses(self) -> nn.ModuleDict:
        momentum = self.config.loss.center_momentum
        return nn.ModuleDict({"dino": DINOLoss(self.config.heads.dino.num_prototypes, center_momentum=momentum)})

    def loss(self, views: Sequence[Tensor], block_mask: Tensor, temperature: float) -> Tensor:
        with self.autocast():
            with torch.no_grad():
                cls = encode(self.teacher, torch.cat(list(views[:2])))[:, 0]
                teacher_out = self.teacher["dino_head"](cls)
            # Crops of one size at once, as the wrapper of the published code does it.
            cls = encode(self.student, torch.cat(list(views[:2])))[:, 0]
            if len(views) > 2:
                cls = torch.cat([cls, encode(self.student, torch.cat(list(views[2:])))[:, 0]])
            student_out = self.student["dino_head"](cls)
        return self.losses["dino"](
            teacher_out=teacher_out.float().chunk(2),
            student_out=student_out.float().chunk(len(views)),
            teacher_temp=temperature,
        )
