"""How certain a softmax is, as a loss: entropy, and the regularisers that keep self-training from being too sure."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from .pieces import loss_in_pieces

__all__ = ["CONFIDENCE_LOSSES", "confidence_kernel", "confidence_loss", "plain_confidence"]

#: Name -> what is summed over a pixel's K classes, p its softmax.
#:
#: * "entropy": -sum_k p_k log p_k (USSS, ICCV 2019, entropy module)
#: * "mrent": its negative, sum_k p_k log p_k (CRST, ICCV 2019)
#: * "mrkld": -1/K sum_k log p_k, the divergence from the uniform distribution up to a constant (CRST)
#: * "mrl2": sum_k p_k ** 2 (CRST)
CONFIDENCE_LOSSES = ("entropy", "mrent", "mrkld", "mrl2")


def confidence_loss(
    logits: Tensor,
    size: Sequence[int],
    name: str,
    mask: Tensor | None = None,
    *,
    divisor: Tensor | float | None = None,
) -> Tensor:
    """One of :data:`CONFIDENCE_LOSSES` at full size, mean over the pixels that count.

    Args:
        logits: (N, C, h, w) raw scores, of any floating type.
        size: (H, W) at which it is taken; the scores are resized to it bilinearly, in pieces.
        name: which.
        mask: (N, H, W) bool, True where a pixel counts; None: everywhere.
        divisor: what the sum over pixels is divided by, clamped to at least 1; None: number of pixels that count.

    Returns:
        Scalar, per pixel; zero, and still attached to the graph, when no pixel counts.

    Raises:
        ValueError: there is no loss of this name.
    """
    if name not in CONFIDENCE_LOSSES:
        raise ValueError(f"there is no loss {name!r}: choose one of {', '.join(CONFIDENCE_LOSSES)}")
    pixels = () if mask is None else (mask,)
    total = loss_in_pieces(logits, size, functools.partial(confidence_kernel, name=name), pixels)
    if divisor is None:
        divisor = len(logits) * size[0] * size[1] if mask is None else mask.sum()
    return total / (divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1))


def confidence_kernel(scores: Tensor, mask: Tensor | None = None, *, name: str) -> tuple[Tensor, Tensor]:
    """Sum over a piece and its gradient with respect to the scores, see :mod:`.kernels`.

    Args:
        scores: (n, C, r, c).
        mask: (n, r, c) bool, or None.
        name: one of :data:`CONFIDENCE_LOSSES`.
    """
    log_p = scores.log_softmax(dim=1)
    p = log_p.exp()
    if name == "mrkld":
        value = -log_p.mean(dim=1, keepdim=True)  # (n, 1, r, c)
        gradient = p - 1 / scores.shape[1]
    elif name == "mrl2":
        value = p.square().sum(dim=1, keepdim=True)
        gradient = 2 * p * (p - value)
    else:
        value = (p * log_p).sum(dim=1, keepdim=True)
        gradient = p * (log_p - value)
        if name == "entropy":
            value, gradient = -value, -gradient
    if mask is not None:
        value, gradient = value * mask.unsqueeze(1), gradient * mask.unsqueeze(1)
    return value.sum(), gradient


def plain_confidence(logits: Tensor, name: str) -> Tensor:
    """The same in plain PyTorch, per pixel: the specification.

    Args:
        logits: (N, C, ...).
        name: one of :data:`CONFIDENCE_LOSSES`.

    Returns:
        (N, ...).
    """
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    return {
        "entropy": lambda: -(p * log_p).sum(dim=1),
        "mrent": lambda: (p * log_p).sum(dim=1),
        "mrkld": lambda: -log_p.mean(dim=1),
        "mrl2": lambda: p.square().sum(dim=1),
    }[name]()
