"""Which pixels become pseudo-labels, and what they say: the closed form of CBST's and CRST's labelling step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...label_space import IGNORE

__all__ = ["hard_labels", "soft_labels"]


def hard_labels(probabilities: Tensor, thresholds: Tensor, ignore: int = IGNORE) -> Tensor:
    """Class-balanced labels: the class with the largest ratio of probability to threshold, kept from a ratio of 1 on.

    The label may differ from the most probable class. With equal thresholds it is plain self-training.

    Args:
        probabilities: (N, C, H, W) in [0, 1]; with spatial priors already multiplied by them.
        thresholds: (C,) in (0, 1].
        ignore: id of the pixels that are not kept.

    Returns:
        (N, H, W) uint8 local ids or ``ignore``.

    Source: CBST (ECCV 2018), solution of the labelling step; the paper keeps a ratio above 1, the released code (and
    this function) one of exactly 1 as well.
    """
    ratio, labels = (probabilities / thresholds.view(1, -1, 1, 1)).max(dim=1)  # (N, H, W)
    return torch.where(ratio >= 1, labels, torch.full_like(labels, ignore)).to(torch.uint8)


def soft_labels(probabilities: Tensor, thresholds: Tensor, alpha: float, ignore: int = IGNORE) -> tuple[Tensor, Tensor]:
    """Labels that are regularised by their entropy (CRST's LRENT): a softened distribution instead of one class.

    Args:
        probabilities: (N, C, H, W) in [0, 1].
        thresholds: (C,) in (0, 1].
        alpha: strength of the regulariser, the temperature: towards 0 one-hot labels, 1 the normalised ratios, towards
            infinity uniform ones.
        ignore: id of the pixels that are not kept.

    Returns:
        (N, C, H, W) distributions of every pixel, kept or not, and (N, H, W) uint8: their largest class, or ``ignore``
        where the regularised cost of the label is not below that of none, that is where sum_k (p_k / threshold_k) ^
        (1 / alpha) <= 1.

    Raises:
        ValueError: ``alpha`` is not positive.

    Source: CRST (ICCV 2019), label entropy regulariser.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0, not {alpha}; hard labels are its limit towards 0")
    ratio = probabilities / thresholds.view(1, -1, 1, 1)
    log_power = ratio.log() / alpha  # in logarithms: ratio ** (1 / alpha) overflows for a small alpha
    total = log_power.logsumexp(dim=1)  # (N, H, W)
    kept = total > 0
    labels = ratio.argmax(dim=1)
    return log_power.softmax(dim=1), torch.where(kept, labels, torch.full_like(labels, ignore)).to(torch.uint8)
