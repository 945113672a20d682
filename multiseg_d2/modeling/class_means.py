"""Sums and means of per-pixel values by class: prototypes (of features) and relations of classes (of scores)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ClassMeans", "class_sums"]


def class_sums(
    values: Tensor, targets: Tensor, num_classes: int, covers: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of values over the pixels of each class.

    Values of a lower resolution count as resized to the targets' (bilinear, ``align_corners=False``). They are not
    resized, though: the resized value is a weighted mean of values, so a class's weights are summed first, which takes
    memory for C maps of the *low* resolution, whatever D.

    Args:
        values: (N, D, h, w), of any floating type.
        targets: (N, H, W) integer class ids. Ids outside [0, C) do not count: 255 for at most 255 classes, or -1.
        num_classes: C.
        covers: (height, width) that the values span from the upper left corner, where they were computed of padded
            images (:meth:`.MultiDatasetSegmentor.embed` says so); default: (H, W).

    Returns:
        (C, D) float64 sums and (C,) int64 numbers of pixels, on the values' device.
    """
    channels, height, width = values.shape[1:]
    area = targets.shape[-2:]
    rows, columns = (
        [(position[:side], weight[:side]) for position, weight in _taps(source, covered, values.device)]
        for source, covered, side in zip((height, width), covers or area, area)
    )
    sums = values.new_zeros((num_classes, channels), dtype=torch.float64)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=values.device)
    for value, target in zip(values.double(), targets.to(values.device)):
        known = (target >= 0) & (target < num_classes)
        ids = target[known].long()  # (P,)
        counts += torch.bincount(ids, minlength=num_classes)
        weights = sums.new_zeros(num_classes * height * width)
        for row, row_weight in rows:
            for column, column_weight in columns:
                cells = (row[:, None] * width + column[None])[known]  # (P,) where the pixel takes its value from
                weights.index_add_(0, ids * (height * width) + cells, (row_weight[:, None] * column_weight)[known])
        sums += weights.view(num_classes, -1) @ value.flatten(1).T  # (C, h * w) x (h * w, D)
    return sums, counts


def _taps(source: int, size: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The two source positions of each of ``size`` positions in bilinear resizing, (size,) int64, and their weights."""
    position = (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * source / size - 0.5
    position = position.clamp(min=0)
    first = position.long().clamp(max=source - 1)
    second = (first + 1).clamp(max=source - 1)
    share = (position - first).clamp(max=1)
    return [(first, 1 - share), (second, share)]


class ClassMeans:
    """Means by class over any number of batches and all processes.

    Args:
        num_classes: C.
        channels: D; a process that sees no image takes part as well.
        device: where the sums are kept.
    """

    def __init__(self, num_classes: int, channels: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros((num_classes, channels), dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def add(self, values: Tensor, targets: Tensor, covers: Sequence[int] | None = None) -> None:
        """Counts a batch, see :func:`class_sums`."""
        sums, counts = class_sums(values, targets, len(self._counts), covers)
        self._sums += sums.to(self._sums.device)
        self._counts += counts.to(self._counts.device)

    def means(self) -> tuple[Tensor, Tensor]:
        """Means over all processes: (C, D) float64, NaN for a class without pixels, and (C,) numbers of pixels.

        All processes must call it; each gets the same answer.
        """
        sums, counts = self._sums.clone(), self._counts.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        return sums / counts[:, None], counts
