"""Losses over the union of several datasets' classes, as plain as their definitions.

They see scores at full size. Training computes the same values from scores at low resolution, row block by row block
(:mod:`multiseg_d2.modeling.losses.pieces`); these functions are what that is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["null_bce_loss", "plain_bce_loss", "relational_bce_loss"]


def null_bce_loss(
    logits: Tensor, target: Tensor, present: Tensor, num_valid: Tensor | None = None, ignore: int = 255
) -> Tensor:
    """Binary cross-entropy over the classes that a pixel's dataset can name, and no others.

    Args:
        logits: (N, U, H, W) raw scores of the U classes of the union.
        target: (N, H, W) int64, union ids in [0, U) or ``ignore``.
        present: (N, U) bool, True where the image's dataset has the class.
        num_valid: scalar by which the sum over pixels is divided, clamped to at least 1; None counts the valid pixels
            of ``target``. With several processes it is the mean count over processes, of all datasets together.
        ignore: id of the pixels that are not scored; negative where U > 255.

    Returns:
        Scalar, nats per valid pixel, summed over present classes; zero, and still attached to the graph, when no pixel
        is valid.

    Raises:
        ValueError: ``ignore`` is the id of a class.

    Source: UniSeg (ECCV 2022), class-independent loss with null classes.
    """
    valid = _valid(target, logits.shape[1], ignore)
    weights = valid[:, None] & present[:, :, None, None]  # (N, U, H, W) bool
    chosen = _at(logits, target, valid) * _at(weights, target, valid)  # (N, H, W): a target that is not present is null
    # bce(z, t) = softplus(z) - t z
    return _mean((F.softplus(logits.float()) * weights).sum(), chosen.sum(), valid, num_valid)


def plain_bce_loss(logits: Tensor, target: Tensor, num_valid: Tensor | None = None, ignore: int = 255) -> Tensor:
    """:func:`null_bce_loss` without the mask: what a dataset cannot name is a negative. UniSeg's ablation."""
    everything = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return null_bce_loss(logits, target, everything, num_valid, ignore)


def relational_bce_loss(
    logits: Tensor, target: Tensor, relations: Tensor, num_valid: Tensor | None = None, ignore: int = 255
) -> Tensor:
    """Binary cross-entropy with several positives per pixel: the label's class and those that contain it.

    Args:
        logits: as in :func:`null_bce_loss`.
        target: likewise.
        relations: (N, U, U) int8, row = labelled class, of each image's dataset: 1 positive, 0 negative, -1 no loss.
        num_valid: as in :func:`null_bce_loss`.
        ignore: likewise.

    Returns:
        Scalar, nats per valid pixel. A pixel whose row has no positive is not valid.

    Source: UniSeg (ECCV 2022), class-relational loss.
    """
    valid = _valid(target, logits.shape[1], ignore)
    images = torch.arange(len(target), device=target.device)[:, None, None]
    rows = relations[images, target.where(valid, target.new_zeros(()))].permute(0, 3, 1, 2)  # (N, U, H, W) int8
    valid = valid & (rows == 1).any(1)
    counted = (rows != -1) & valid[:, None]
    positive = (rows == 1) & valid[:, None]
    return _mean((F.softplus(logits.float()) * counted).sum(), (logits.float() * positive).sum(), valid, num_valid)


def _valid(target: Tensor, classes: int, ignore: int) -> Tensor:
    if 0 <= ignore < classes:
        raise ValueError(f"the id {ignore} of ignored pixels is one of the {classes} classes: take a negative one")
    return target != ignore


def _at(values: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """(N, H, W): values (N, U, H, W) at the target of each pixel, 0 where it is not valid."""
    indices = target.where(valid, target.new_zeros(()))[:, None]
    return values.gather(1, indices)[:, 0].float() * valid


def _mean(softplus: Tensor, chosen: Tensor, valid: Tensor, num_valid: Tensor | None) -> Tensor:
    return (softplus - chosen) / (valid.sum() if num_valid is None else num_valid).clamp(min=1)
