"""Softmax cross-entropy over one label space, as plain as its definition.

These functions see scores of full size. Training computes the same from scores at low resolution
(:mod:`multiseg_d2.modeling.losses.pieces`); they are what that is tested against.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["pixel_cross_entropy", "soft_pixel_cross_entropy"]


def pixel_cross_entropy(logits: Tensor, targets: Tensor, num_valid: Tensor | None = None, ignore: int = 255) -> Tensor:
    """Cross-entropy, mean over the labelled pixels.

    Args:
        logits: (N, C, H, W) raw scores, float32 or wider (half precision is summed in float32).
        targets: (N, H, W) int64 local ids in [0, C) or ``ignore``.
        num_valid: scalar by which the sum over pixels is divided, clamped to at least 1; None counts the labelled
            pixels of ``targets``. With several processes it is the mean count over processes.
        ignore: id of pixels without a label.

    Returns:
        Scalar, nats per labelled pixel; zero, and still attached to the graph, when no pixel is labelled.

    Source: CDCL (AAAI 2022), loss of one dataset in a round; the mean over labelled pixels is our reading.
    """
    if num_valid is None:
        num_valid = (targets != ignore).sum()
    total = F.cross_entropy(logits.float(), targets, ignore_index=ignore, reduction="sum")
    return total / num_valid.clamp(min=1)


def soft_pixel_cross_entropy(logits: Tensor, targets: Tensor, num_valid: Tensor | None = None) -> Tensor:
    """Cross-entropy of soft labels, -sum_k q_k log p_k, mean over the labelled pixels.

    Args:
        logits: (N, C, H, W) raw scores.
        targets: (N, C, H, W) shares q of the classes, all zero where a pixel has no label.
        num_valid: as in :func:`pixel_cross_entropy`.

    Returns:
        Scalar, nats per labelled pixel.

    Source: CRST (ICCV 2019), training with soft pseudo-labels.
    """
    if num_valid is None:
        num_valid = (targets.sum(1) > 0).sum()
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum() / num_valid.clamp(min=1)
