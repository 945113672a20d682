"""The loss of hierarchical classifiers on pixel labels: every classifier on the way to a pixel's class, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import softmax

__all__ = ["ClassifierTargets", "conditional", "plain_conditional"]

_NOT_COUNTED = -1


@dataclass(frozen=True)
class ClassifierTargets:
    """What the classes of one dataset say to one classifier.

    Attributes:
        channels: (first, last + 1) of the classifier among all scores; the last one is void.
        child: (256,) int64: local id -> the child that is right; -1 where the class says nothing to this classifier, or
            that several are possible.
        among: (256, K + 1) bool: the children that are possible, for classes that are the union of several; all False
            for the others. None where there is no such class.
    """

    channels: tuple[int, int]
    child: Tensor
    among: Tensor | None = None

    def counted(self, target: Tensor) -> Tensor:
        """Number of pixels of (N, H, W) local ids that the classifier learns from."""
        counts = torch.bincount(target.flatten().long(), minlength=256)
        says = self.child >= 0
        if self.among is not None:
            says = says | self.among.any(dim=1)
        return (counts * says.to(counts.device)).sum()


def conditional(
    scores: Tensor, target: Tensor, *, classifiers: Sequence[ClassifierTargets], factors: Sequence[float | Tensor]
) -> tuple[Tensor, Tensor]:
    """Sum over classifiers of factor times cross-entropy over the pixels that say something to it, see :mod:`.kernels`.

    A class that is a union of children teaches -log of their summed probability.

    Args:
        scores: (n, S, r, c) scores of all classifiers side by side, overwritten.
        target: (n, r, c) local ids below 256.
        classifiers: one per classifier; channels that none of them has get no gradient.
        factors: one per classifier.

    Source: heterogeneous datasets (IV 2018): hierarchical classifiers.
    """
    target, scores = target.long(), scores.contiguous()
    total = scores.new_zeros(())
    free = torch.ones(scores.shape[1], dtype=torch.bool, device=scores.device)
    for one, factor in zip(classifiers, factors):
        own = scores[:, slice(*one.channels)]
        free[slice(*one.channels)] = False
        several = None if one.among is None else one.among[target].movedim(-1, 1)  # (n, K + 1, r, c)
        extra = _among(own, several) if several is not None and bool(several.any()) else None
        child = one.child.index_select(0, target.flatten()).view_as(target)  # (n, r, c)
        weight = torch.as_tensor(factor, dtype=scores.dtype, device=scores.device)
        total = total + sum(_hard(*pair, weight) for pair in zip(own, child))  # from here on, `own` holds the gradient
        if extra is not None:
            total = total + weight * extra[0]
            own += weight * extra[1]
    if bool(free.any()):
        scores[:, free] = 0
    return total, scores


def _hard(scores: Tensor, child: Tensor, weight: Tensor) -> Tensor:
    """Weighted cross-entropy of one classifier on one image; its gradient takes the place of the scores.

    Below the root most pixels of an image say nothing to a classifier: then only the others are looked at.

    Args:
        scores: (K + 1, r, c), contiguous.
        child: (r, c), -1 where a pixel says nothing.
        weight: scalar.
    """
    places = (child.flatten() >= 0).nonzero()[:, 0]  # (M,)
    if 2 * len(places) > child.numel():
        return softmax(scores[None], child[None], weight.view(1, 1, 1), ignore=_NOT_COUNTED)[0]
    flat = scores.view(len(scores), -1)
    few = flat.index_select(1, places)  # (K + 1, M), all of them counted
    flat.zero_()
    if not len(places):
        return flat.new_zeros(())
    right = child.flatten()[places][None]
    few -= few.amax(0)
    at_right = few.gather(0, right)
    norm = few.exp_().sum(0)
    few.mul_(weight / norm).scatter_add_(0, right, -weight.expand_as(right))
    flat.index_copy_(1, places, few)
    return weight * (norm.log() - at_right[0]).sum()


def _among(scores: Tensor, several: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log sum_{k possible} p_k over the pixels with something possible; gradient p - p given that."""
    counted = several.any(dim=1, keepdim=True)
    possible = scores.masked_fill(~several, -torch.inf).masked_fill(~counted, 0.0)
    loss = (scores.logsumexp(1, keepdim=True) - possible.logsumexp(1, keepdim=True)) * counted
    return loss.sum(), (scores.softmax(1) - possible.softmax(1)) * counted


def plain_conditional(
    scores: Tensor, target: Tensor, classifiers: Sequence[ClassifierTargets], factors: Sequence[float | Tensor]
) -> Tensor:
    """The same in plain PyTorch: the specification.

    Args:
        scores: (N, S, H, W) at full size.
        target: (N, H, W) local ids.
        classifiers: one per classifier.
        factors: one per classifier.
    """
    total = scores.new_zeros(())
    for one, factor in zip(classifiers, factors):
        log_p = scores[:, slice(*one.channels)].log_softmax(dim=1)
        width = log_p.shape[1]
        possible = torch.nn.functional.one_hot(one.child.clamp(min=0), width).bool() & (one.child >= 0)[:, None]
        if one.among is not None:
            possible = possible | one.among
        mask = possible[target.long()].movedim(-1, 1)  # (N, K + 1, H, W)
        chosen = log_p.masked_fill(~mask, -torch.inf).logsumexp(dim=1)
        total = total - factor * chosen[mask.any(dim=1)].sum()
    return total
