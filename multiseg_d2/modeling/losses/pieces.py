"""Losses at the size of the labels from scores at a lower resolution, computed in pieces.

The usual way resizes the scores of all classes to the size of the labels and keeps several such arrays until the
gradient has been computed: 4 GB for 171 classes and 8 crops of 512x512. Resizing is linear, so a rectangle of the image
can be resized, its loss and gradient computed by hand, and the gradient brought back to the low resolution, before the
next rectangle is looked at. Nothing of full size is ever kept.

    cross_entropy(logits, target, *, divisor=None, ignore=255, weights=None)
    soft_cross_entropy(logits, target, *, size=None, divisor=None, weights=None)
    binary_loss(logits, target, present=None, relations=None, *, divisor=None, ignore=255, weights=None)

are the usual losses; :func:`loss_in_pieces` makes such a function of any kernel (see :mod:`.kernels`), for example one
with a regulariser. What they mean is said by the functions of :mod:`.cross_entropy` and :mod:`.unified`, on scores of
full size.

In all of them: logits (N, C, h, w) of any floating type, also non-contiguous, whose resolution differs from the
labels' or not; half precision is computed and accumulated in float32, under autocast too, and float64 in float64. There
is a gradient for the logits only, of first order only. With several processes, the caller gives ``divisor``: a count
averaged over processes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..interpolation import Bilinear, tiles
from ..threads import map_pieces
from . import kernels

__all__ = ["binary_loss", "cross_entropy", "loss_in_pieces", "soft_cross_entropy"]

Kernel = Callable[..., tuple[Tensor, Tensor]]

#: Scores of one piece, with soft targets counted as well. On a CPU it stays in a core's cache (2 MiB of float32; half
#: or twice of it costs 5 to 10 % more); on other devices it is large enough to keep them busy (128 MiB).
_CPU_SCORES, _DEVICE_SCORES = 1 << 19, 1 << 25


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    divisor: Tensor | float | None = None,
    ignore: int = 255,
    weights: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy of hard labels, mean over the labelled pixels.

    Args:
        logits: (N, C, h, w) raw scores.
        target: (N, H, W) ids in [0, C) or ``ignore``, of any integer type.
        divisor: what the sum over pixels is divided by, clamped to at least 1; None: number of labelled pixels.
        ignore: id of pixels without a label, outside [0, C).
        weights: (N, H, W) per pixel or (N,) per image: factors of the summands; the divisor is not weighted.

    Returns:
        Scalar, nats per labelled pixel; zero, and still attached to the graph, when no pixel is labelled.

    Raises:
        ValueError: shapes or types do not fit, ``ignore`` is a class, or (on a CPU) an id is neither.
    """
    _check_target(logits, target, ignore)
    pixels, images = _weights(logits, target.shape, weights)
    kernel = functools.partial(kernels.softmax, ignore=ignore)
    with _naming_illegal_ids(target, logits.shape[1], ignore):
        total = loss_in_pieces(logits, target.shape[-2:], kernel, (target, *pixels), images)
    return _divide(total, (target != ignore).sum() if divisor is None else divisor)


def soft_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    size: Sequence[int] | None = None,
    divisor: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy of soft labels, -sum_k q_k log p_k, mean over the labelled pixels.

    Args:
        logits: (N, C, h, w) raw scores.
        target: (N, C, H', W') floating, non-negative; all zero where there is no label. Where they sum to another
            number than 1, the pixel weighs as much. No gradient reaches them.
        size: (H, W) at which the loss is taken; targets of another resolution are resized to it bilinearly, piece by
            piece. None: that of the targets.
        divisor: what the sum over pixels is divided by, clamped to at least 1; None: number of pixels of ``target``
            with a label, brought to ``size``.
        weights: (N, H, W) per pixel or (N,) per image: factors of the summands; the divisor is not weighted.

    Returns:
        Scalar, nats per labelled pixel; zero, and still attached to the graph, when no pixel is labelled.

    Raises:
        ValueError: shapes or types do not fit.
    """
    if target.ndim != 4 or target.shape[:2] != logits.shape[:2] or not target.is_floating_point():
        raise ValueError(
            f"soft targets must be floating (N, C, H, W) with the logits' N and C, {tuple(logits.shape[:2])}; they are "
            f"{target.dtype} {tuple(target.shape)}"
        )
    size = tuple(target.shape[-2:] if size is None else size)
    pixels, images = _weights(logits, (len(logits), *size), weights)
    total = loss_in_pieces(logits, size, kernels.soft_softmax, (target, *pixels), images)
    if divisor is None:
        share = size[0] * size[1] / (target.shape[-2] * target.shape[-1])
        divisor = (target.sum(1) > 0).sum() * share
    return _divide(total, divisor)


def binary_loss(
    logits: Tensor,
    target: Tensor,
    present: Tensor | None = None,
    relations: Tensor | None = None,
    *,
    divisor: Tensor | float | None = None,
    ignore: int = 255,
    weights: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of each class for itself: sum over the classes that count, mean over the labelled pixels.

    Without ``present`` and ``relations`` all classes count. Classes that count for no image are not even resized.

    Args:
        logits: (N, U, h, w) raw scores.
        target: (N, H, W) ids in [0, U) or ``ignore``, of any integer type.
        present: (N, U) bool, True where the image's dataset can name the class; the others do not count for it.
        relations: (N, U, U) in {-1, 0, 1}, instead of ``present``: row = the pixel's class, column = class that is
            scored; 1 is positive, 0 negative, -1 does not count. A row without 1 is not labelled.
        divisor: what the sum over pixels is divided by, clamped to at least 1; None: number of labelled pixels.
        ignore: id of pixels without a label, outside [0, U); give -1 or another one where there are more than 255
            classes.
        weights: (N, H, W) per pixel or (N,) per image: factors of the summands; the divisor is not weighted.

    Returns:
        Scalar, nats per labelled pixel; zero, and still attached to the graph, when no pixel is labelled.

    Raises:
        ValueError: shapes or types do not fit, ``ignore`` is a class, both or neither mask fits, or (on a CPU) an id is
            neither a class nor ``ignore``.

    Source: UniSeg (ECCV 2022): losses with null classes and with class relations.
    """
    _check_target(logits, target, ignore)
    _check_masks(logits, present, relations)
    pixels, images = _weights(logits, target.shape, weights)
    total = logits.new_zeros((), dtype=_compute_dtype(logits))
    with _naming_illegal_ids(target, logits.shape[1], ignore):
        for chosen, channels, kernel in _binary_groups(logits, present, relations, ignore):
            scores = logits[chosen] if channels is None else logits[chosen].index_select(1, channels)
            parts = [[tensor[chosen] for tensor in tensors] for tensors in ((target, *pixels), images)]
            total = total + loss_in_pieces(scores, target.shape[-2:], kernel, *parts)
    if divisor is None:
        divisor = _labelled(target, relations, ignore).sum()
    return _divide(total, divisor)


def loss_in_pieces(
    logits: Tensor, size: Sequence[int], kernel: Kernel, pixels: Sequence[Tensor] = (), images: Sequence[Tensor] = ()
) -> Tensor:
    """Sum of a per-pixel loss over scores that are brought to another size, without ever holding them at that size.

    Args:
        logits: (N, C, h, w) raw scores.
        size: (H, W) at which the loss is taken.
        kernel: see :mod:`.kernels`; called with the scores of a piece and the matching parts of ``pixels`` and
            ``images``, in this order.
        pixels: tensors (N, ..., H, W). Floating ones reach the kernel in the type of the computation, and are resized
            bilinearly where they have another resolution; all others as they are.
        images: tensors (N, ...), likewise.

    Returns:
        Scalar, float32 (float64 for float64 logits), attached to the graph of ``logits`` and of nothing else.

    Raises:
        ValueError: a tensor does not fit the size.
        RuntimeError: in the backward pass, when a gradient of second order is wanted.
    """
    for tensor in pixels:
        if len(tensor) != len(logits) or (tensor.shape[-2:] != tuple(size) and not tensor.is_floating_point()):
            raise ValueError(
                f"a per-pixel tensor is {tensor.dtype} {tuple(tensor.shape)}, the loss is taken over {len(logits)} "
                f"images of {tuple(size)}; only floating ones may have another resolution"
            )
    return _LossInPieces.apply(logits, tuple(size), kernel, tuple(pixels), tuple(images))


class _LossInPieces(torch.autograd.Function):
    """The gradient is computed together with the loss, and kept, at the resolution of the logits, for backward."""

    @staticmethod
    def forward(ctx, logits: Tensor, size, kernel, pixels, images) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            total, gradient = _forward(logits.detach().to(_compute_dtype(logits)), size, kernel, pixels, images)
        ctx.save_for_backward(gradient, logits)
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        gradient, logits = ctx.saved_tensors
        return _Scaled.apply(grad_total, gradient, logits), None, None, None, None


class _Scaled(torch.autograd.Function):
    """The gradient times that of the loss; it depends on the logits, and says so where it is differentiated itself."""

    @staticmethod
    def forward(ctx, factor: Tensor, gradient: Tensor, logits: Tensor) -> Tensor:
        return (gradient * factor).to(logits.dtype)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "losses in pieces have no second-order gradient: resize the scores, and use pixel_cross_entropy, "
            "soft_pixel_cross_entropy, null_bce_loss or relational_bce_loss"
        )


def _forward(
    logits: Tensor, size: tuple[int, int], kernel: Kernel, pixels: tuple[Tensor, ...], images: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Loss and (N, C, h, w) gradient."""
    logits = logits.contiguous()
    resize = Bilinear(logits.shape[-2:], size, logits)
    pixel_sizes = {t.shape[-2:] for t in pixels if t.shape[-2:] != size}
    others = {other: Bilinear(other, size, logits) for other in pixel_sizes}

    def one(piece: tuple[slice, slice, slice]) -> tuple[Tensor, Tensor]:
        chosen, rows, columns = piece
        scores = resize.tile(logits[chosen], rows, columns)
        if resize.source == resize.size:
            scores = scores.clone()  # kernels may overwrite what they get
        further = [
            others[t.shape[-2:]].tile(_cast(t[chosen], logits), rows, columns)
            if t.shape[-2:] in others
            else _cast(t[chosen][..., rows, columns], logits)
            for t in pixels
        ]
        total, change = kernel(scores, *further, *(_cast(t[chosen], logits) for t in images))
        return total, resize.transposed(change, rows, columns)

    gradient, totals = torch.zeros_like(logits), []
    pieces = list(_pieces(logits, size, pixels))
    results: Iterator[tuple[Tensor, Tensor]] = map_pieces(one, pieces, logits.device)
    for (total, change), (chosen, rows, columns) in zip(results, pieces):
        near_rows, near_columns = resize.near(rows, columns)
        totals.append(total)
        gradient[chosen, :, near_rows, near_columns] += change
    return torch.stack(totals).sum() if totals else logits.new_zeros(()), gradient


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype) if tensor.is_floating_point() else tensor


def _pieces(logits: Tensor, size: tuple[int, int], pixels: Sequence[Tensor]) -> Iterator[tuple[slice, slice, slice]]:
    """Images, rows and columns of each piece; several images where these are small."""
    count, classes = logits.shape[:2]
    soft = sum(t.shape[1] for t in pixels if t.ndim == 4)  # numbers per pixel that are read beside the scores
    scores = _CPU_SCORES if logits.device.type == "cpu" else _DEVICE_SCORES
    area = max(scores // max(classes + soft, 1), 1)
    together = max(area // max(size[0] * size[1], 1), 1)
    for first in range(0, count, together):
        for rows, columns in tiles(size, area):
            yield slice(first, min(first + together, count)), rows, columns


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _divide(total: Tensor, divisor: Tensor | float) -> Tensor:
    return total / (divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1))


def _weights(
    logits: Tensor, shape: Sequence[int], weights: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights as further arguments of a kernel: (per pixel, per image), at most one of them."""
    if weights is None:
        return (), ()
    if weights.ndim == 1 and len(weights) == len(logits):
        return (), (weights.view(-1, 1, 1),)
    if tuple(weights.shape) == tuple(shape):
        return (weights,), ()
    raise ValueError(f"weights must be ({len(logits)},) or {tuple(shape)}, not {tuple(weights.shape)}")


def _check_target(logits: Tensor, target: Tensor, ignore: int) -> None:
    if logits.ndim != 4 or target.ndim != 3 or len(logits) != len(target):
        raise ValueError(
            f"logits (N, C, h, w) and targets (N, H, W) are needed, not {tuple(logits.shape)}, {tuple(target.shape)}"
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"targets must be integer ids, not {target.dtype}")
    limits = torch.iinfo(target.dtype)
    if 0 <= ignore < logits.shape[1] or not limits.min <= ignore <= limits.max:
        raise ValueError(
            f"ignore={ignore} must not be one of the {logits.shape[1]} classes, and {target.dtype} must be able to "
            "hold it: with more than 255 classes choose another id, and a wider type for the targets"
        )


def _check_masks(logits: Tensor, present: Tensor | None, relations: Tensor | None) -> None:
    if present is not None and relations is not None:
        raise ValueError("give present or relations: a relation of -1 says that a class is not present")
    images, classes = logits.shape[:2]
    if present is not None and (tuple(present.shape) != (images, classes) or present.dtype != torch.bool):
        raise ValueError(f"present must be bool ({images}, {classes}), not {present.dtype} {tuple(present.shape)}")
    if relations is not None and tuple(relations.shape) != (images, classes, classes):
        raise ValueError(f"relations must be ({images}, {classes}, {classes}), not {tuple(relations.shape)}")


def _binary_groups(
    logits: Tensor, present: Tensor | None, relations: Tensor | None, ignore: int
) -> Iterator[tuple[list[int] | slice, Tensor | None, Kernel]]:
    """Images with the same mask, the classes that count for any of their pixels (None: all), and their kernel."""
    masks = present if relations is None else relations
    if masks is None:
        yield slice(None), None, functools.partial(kernels.binary, ignore=ignore)
        return
    for images in _equal_rows(masks):
        mask = masks[images][0].to(logits.device)  # (U,) or (U, U)
        counts = mask if relations is None else (mask != -1).any(0)
        channels = counts.nonzero()[:, 0]
        if not len(channels):
            raise ValueError("a mask in which no class counts: its image cannot be trained on")
        if relations is None:
            table = torch.full_like(counts, -1, dtype=torch.int64)
            table[channels] = torch.arange(len(channels), device=table.device)
            yield images, channels, functools.partial(kernels.binary, ignore=ignore, channels=table)
            continue
        columns = mask[:, channels].T  # (C, U)
        counted, positive = (t.to(_compute_dtype(logits)) for t in (columns != -1, columns == 1))
        kernel = functools.partial(kernels.relational, ignore=ignore, counted=counted, positive=positive)
        yield images, channels, kernel


def _equal_rows(masks: Tensor) -> list[list[int] | slice]:
    """The images of each different mask; a slice where they are neighbours, which copies nothing."""
    groups: dict[int, list[int]] = {}
    for image, group in enumerate(torch.unique(masks.flatten(1), dim=0, return_inverse=True)[1].tolist()):
        groups.setdefault(group, []).append(image)
    return [
        slice(images[0], images[-1] + 1) if images[-1] - images[0] + 1 == len(images) else images
        for images in groups.values()
    ]


def _labelled(target: Tensor, relations: Tensor | None, ignore: int) -> Tensor:
    """(N, H, W) bool: pixels with a label whose class has a positive relation."""
    labelled = target != ignore
    if relations is None:
        return labelled
    positive = (relations == 1).any(2).to(target.device)  # (N, U)
    ids = target.masked_fill(~labelled, 0).flatten(1).long()
    return labelled & positive.gather(1, ids).view_as(labelled)


@contextlib.contextmanager
def _naming_illegal_ids(target: Tensor, classes: int, ignore: int) -> Iterator[None]:
    """PyTorch's "index out of bounds" as an error that names the ids; nothing is looked at unless there is one."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if target.is_cuda:  # after a failed assertion nothing on the device can be looked at
            raise
        illegal = target[(target != ignore) & ((target < 0) | (target >= classes))]
        if not len(illegal):
            raise
        ids, counts = illegal.unique(return_counts=True)
        listing = ", ".join(f"{i} ({n} pixels)" for i, n in zip(ids.tolist()[:20], counts.tolist()))
        raise ValueError(
            f"target ids that are neither a class (0 to {classes - 1}) nor ignore ({ignore}): {listing}"
        ) from error
