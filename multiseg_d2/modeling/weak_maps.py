"""Weak annotations as per-pixel targets: boxes and image tags become shares of the channels of one classifier.

The maps are made on the device, from the boxes and tags that a sample carries, and for one classifier at a time: a map
over all classes of a weak dataset would take hundreds of megabytes per image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["box_map", "hard_box_map", "tag_map"]


def box_map(boxes: Tensor, channels: Tensor, num_channels: int, size: Sequence[int]) -> Tensor:
    """Shares of the boxes that cover each pixel: two cars and a person give 2/3 and 1/3.

    Args:
        boxes: (n, 4) left, top, right, bottom in pixels; a pixel is covered where its centre lies inside.
        channels: (n,) int64 channel in [0, num_channels) of each box, or -1: it counts, but for the void.
        num_channels: K.
        size: (H, W).

    Returns:
        (K + 1, H, W) float32, summing to 1 over the channels; the last is void, all of it where no box lies.

    Source: boosting semantic segmentation with weak labels (IV 2019), count-normalised boxes.
    """
    counts = torch.zeros(num_channels + 1, *size, device=boxes.device)
    for (rows, columns), channel in zip(_covered(boxes, size), channels.tolist()):
        counts[channel if channel >= 0 else num_channels, rows, columns] += 1
    total = counts.sum(dim=0)  # (H, W)
    counts[num_channels] += total == 0
    return counts / total.clamp(min=1)


def hard_box_map(boxes: Tensor, channels: Tensor, size: Sequence[int]) -> Tensor:
    """Every pixel takes the channel of its box, the older variant; of several boxes the smallest (our choice).

    Args:
        boxes: (n, 4) left, top, right, bottom in pixels.
        channels: (n,) int64 channel of each box, or -1 (void).
        size: (H, W).

    Returns:
        (H, W) int64 channels; -1 where no box lies, or only one of the void.

    Source: heterogeneous datasets (IV 2018), coarse maps of boxes.
    """
    result = torch.full(tuple(size), -1, dtype=torch.int64, device=boxes.device)
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
    windows, names = _covered(boxes, size), channels.tolist()
    for i in torch.argsort(areas, descending=True, stable=True).tolist():
        rows, columns = windows[i]
        result[rows, columns] = names[i]
    return result


def tag_map(channels: Tensor, num_channels: int, content: Tensor) -> Tensor:
    """The tags of an image, spread evenly over its pixels: each of t tags has the share 1 / t everywhere.

    Args:
        channels: (t,) int64 channel in [0, num_channels) of each tag, or -1 (void).
        num_channels: K.
        content: (H, W) bool, False on padding.

    Returns:
        (K + 1, H, W) float32, summing to 1 over the channels; the last is void, all of it on padding and where there is
        no tag.

    Source: boosting semantic segmentation with weak labels (IV 2019), image-level labels.
    """
    shares = torch.zeros(num_channels + 1, device=content.device)
    if len(channels):
        places = torch.where(channels < 0, num_channels, channels).to(content.device)
        shares.index_add_(0, places, torch.full_like(places, 1, dtype=shares.dtype) / len(channels))
    else:
        shares[num_channels] = 1
    void = torch.zeros_like(shares)
    void[num_channels] = 1
    return torch.where(content, shares.view(-1, 1, 1), void.view(-1, 1, 1))


def _covered(boxes: Tensor, size: Sequence[int]) -> list[tuple[slice, slice]]:
    """Rows and columns of the pixels whose centres each box covers."""
    limits = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float32)
    edges = torch.minimum((boxes.detach().cpu().float() - 0.5).ceil().clamp(min=0), limits).long().tolist()
    return [(slice(top, bottom), slice(left, right)) for left, top, right, bottom in edges]
