"""Entropy of the similarity between pixels and the prototypes of a label space's classes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from .confidence import confidence_kernel
from .pieces import loss_in_pieces

__all__ = ["prototype_entropy", "prototype_scores"]


def prototype_scores(embedding: Tensor, prototypes: Tensor, scale: float = 0.0) -> Tensor:
    """Similarity of every pixel to every class: that of the most similar of the class's prototypes.

    Args:
        embedding: (N, d, h, w), of any length.
        prototypes: (C, d), or (C, K, d) for K centroids of each class; their lengths do not count.
        scale: 0 = dot product with prototypes of length 1 (USSS); else the cosine times this.

    Returns:
        (N, C, h, w); the product as autocast has it.
    """
    directions = F.normalize(prototypes.view(len(prototypes), -1, prototypes.shape[-1]), dim=2)  # (C, K, d)
    pixels = embedding if embedding.element_size() >= 4 else embedding.float()
    if scale:
        pixels = scale * F.normalize(pixels, dim=1)
    kernel = directions.flatten(0, 1)[:, :, None, None].to(pixels.dtype)  # (C * K, d, 1, 1)
    scores = F.conv2d(pixels, kernel)
    return scores.unflatten(1, directions.shape[:2]).amax(2)


def prototype_entropy(
    scores: Tensor,
    size: Sequence[int],
    content: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    confident: bool = False,
) -> Tensor:
    """Entropy of the softmax over classes at full size, mean over the pixels that show an image.

    Args:
        scores: (N, C, h, w) similarities, see :func:`prototype_scores`.
        size: (H, W) at which it is taken; the scores are resized to it bilinearly, in pieces.
        content: (N, H, W) bool, True where a pixel is real; None: everywhere. The mean is over these pixels.
        weights: (N, h', w') floating, of any resolution: factors of the summands; the mean is not weighted by them.
        confident: only pixels whose entropy is below half of its maximum, log(C) / 2, count as summands, so that what
            resembles no class is not pulled to one.

    Returns:
        Scalar, nats per pixel; zero, and still attached to the graph, where no pixel counts.

    Source: USSS (ICCV 2019), entropy module; the threshold log(C) / 2 is that of DANCE (NeurIPS 2020).
    """
    pixels = [t for t in (content, weights) if t is not None]
    total = loss_in_pieces(scores, size, functools.partial(_kernel, confident=confident), pixels)
    count = len(scores) * size[0] * size[1] if content is None else content.sum().clamp(min=1)
    return total / max(count, 1)


def _kernel(scores: Tensor, *masks: Tensor, confident: bool) -> tuple[Tensor, Tensor]:
    """Sum over a piece and its gradient with respect to the scores, see :mod:`.kernels`."""
    keep = None
    for mask in masks:
        keep = mask if keep is None else keep * mask
    if confident:
        log_p = scores.log_softmax(dim=1)
        sure = -(log_p.exp() * log_p).sum(dim=1) < math.log(max(scores.shape[1], 2)) / 2  # (n, r, c)
        keep = sure if keep is None else keep * sure
    return confidence_kernel(scores, keep, name="entropy")
