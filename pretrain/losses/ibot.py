"""iBOT: the student's token of a masked patch predicts the teacher's assignment of the patch itself.

In iBOT++ (arXiv:2604.12012) the patches that it sees too: which they are is the caller's choice.
"""

from torch import Tensor

from pretrain.losses.prototypes import Targets, prototype_cross_entropy


def ibot_loss(
    features: Tensor,
    prototypes: Tensor,
    targets: Targets,
    patch_weights: Tensor,
    num_images: int,
    temperature: float = 0.1,
    compiled: bool = False,
) -> Tensor:
    """Cross-entropy per predicted patch, averaged within an image, then over images: a scalar, in nats.

    An image without predicted patches counts in `num_images` and adds nothing, so with half of the images masked the
    loss starts near ln(K) / 2.

    Args:
        features: [M, d], the head's unit-norm output for the predicted patches; M may be 0.
        prototypes: [K, d] of the student's head.
        targets: M rows.
        patch_weights: [M], 1 / (number of predicted patches in that image); 0 for padding.
        num_images: global crops on this rank, masked or not.
        temperature: of the student.
        compiled: code may be compiled, see `prototype_cross_entropy`.

    Source: arXiv:2111.07832, weighted as released with DINOv2, arXiv:2304.07193.
    """
    weights = patch_weights / num_images
    loss, _ = prototype_cross_entropy(features, prototypes, targets, weights, temperature, compiled=compiled)
    return loss
