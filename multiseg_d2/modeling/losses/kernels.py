"""Losses of one piece of full-size scores, with their gradients by hand: what :mod:`.pieces` puts together.

A kernel is a pure function ``kernel(scores, *further) -> (total, gradient)``:

* ``scores``: (n, C, r, c) float32 or float64 scores of a piece of n images; the kernel may overwrite them,
* ``further``: per pixel (n, ..., r, c) or per image (n, ...): targets, weights, ...,
* ``total``: scalar, the sum of the loss over the piece,
* ``gradient``: (n, C, r, c), that of ``total`` with respect to ``scores``.

:mod:`.cross_entropy` and :mod:`.unified` say what each of them means, in terms of PyTorch's own functions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["binary", "relational", "soft_softmax", "softmax"]

#: Beyond it softplus(x) is x, in float64 as well; PyTorch's own limit of 20 is right in float32 only.
_SOFTPLUS_LINEAR = 50.0


def softmax(scores: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of hard targets: sum of w (log sum_k exp z_k - z_t); gradient w (p - t).

    Args:
        scores: (n, C, r, c), overwritten.
        target: (n, r, c) integer ids in [0, C) or ``ignore``.
        weight: (n, r, c) or (n, 1, 1), or None.
        ignore: id of pixels that do not count.
    """
    factor, index = _factor_and_index(target, weight, ignore, scores)  # (n, 1, r, c) each
    scores -= scores.amax(1, keepdim=True)
    at_target = scores.gather(1, index)
    exponentials = scores.exp_()
    norm = exponentials.sum(1, keepdim=True)
    total = ((norm.log() - at_target) * factor).sum()
    return total, exponentials.mul_(factor / norm).scatter_add_(1, index, -factor)


def soft_softmax(scores: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of soft targets: sum of -w sum_k q_k log p_k; gradient w (p sum_k q_k - q).

    Args:
        scores: (n, C, r, c), overwritten.
        target: (n, C, r, c), any non-negative numbers; all zero where a pixel does not count.
        weight: (n, r, c) or (n, 1, 1), or None.
    """
    if weight is not None:
        target = target * weight.unsqueeze(1)
    mass = target.sum(1, keepdim=True)  # (n, 1, r, c)
    scores -= scores.amax(1, keepdim=True)
    at_target = (scores * target).sum()
    exponentials = scores.exp_()
    norm = exponentials.sum(1, keepdim=True)
    total = (norm.log() * mass).sum() - at_target
    return total, exponentials.mul_(mass / norm).sub_(target)


def binary(
    scores: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore: int, channels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, summed over the classes: sum of w (sum_k softplus(z_k) - z_t); gradient w (sigmoid(z) - t).

    Args:
        scores: (n, C, r, c) scores of some of the classes.
        target: (n, r, c) integer ids or ``ignore``.
        weight: (n, r, c) or (n, 1, 1), or None.
        ignore: id of pixels that do not count.
        channels: (U,) int64, the channel of each id; -1 where the scores have none, so that such a pixel is negative
            for all classes. None: the ids are the channels.
    """
    factor, index = _factor_and_index(target, weight, ignore, scores)  # (n, 1, r, c) each
    hit = factor
    if channels is not None:
        index = channels.index_select(0, index.flatten()).view_as(index)
        hit = factor * (index >= 0)
        index = index.clamp_(min=0)
    total = (F.softplus(scores, threshold=_SOFTPLUS_LINEAR).sum(1, keepdim=True) * factor).sum()
    total -= (scores.gather(1, index) * hit).sum()
    return total, scores.sigmoid_().mul_(factor).scatter_add_(1, index, -hit)


def relational(
    scores: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore: int, counted: Tensor, positive: Tensor
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy whose targets follow from the pixel's class: sum over the classes that count for it.

    Args:
        scores: (n, C, r, c) scores of some of the classes.
        target: (n, r, c) integer ids or ``ignore``.
        weight: (n, r, c) or (n, 1, 1), or None.
        ignore: id of pixels that do not count.
        counted: (C, U) of the scores' dtype, 1 where channel k counts for pixels of id u, else 0.
        positive: (C, U), likewise: 1 where its target is 1.
    """
    factor, index = _factor_and_index(target, weight, ignore, scores)  # (n, 1, r, c) each
    factor = factor * (positive.amax(0) > 0)[index]  # a class without any positive channel is not labelled
    shape = (len(scores), len(counted), *target.shape[1:])
    flat = index.flatten()
    counts = counted.index_select(1, flat).view(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    targets = positive.index_select(1, flat).view(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    loss = F.softplus(scores, threshold=_SOFTPLUS_LINEAR).mul_(counts).sub_(scores * targets)
    return (loss.sum(1, keepdim=True) * factor).sum(), scores.sigmoid_().mul_(counts).sub_(targets).mul_(factor)


def _factor_and_index(target: Tensor, weight: Tensor | None, ignore: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 1, r, c) weight of each pixel, 0 where ignored; and its id, int64, 0 where ignored."""
    ignored = target == ignore
    factor = (~ignored).to(scores.dtype)
    if weight is not None:
        factor = torch.where(ignored, factor, weight.to(scores.dtype))
    return factor.unsqueeze(1), target.masked_fill(ignored, 0).long().unsqueeze(1)
