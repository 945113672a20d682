"""One step's images as the heads see them: a stack of images, sorted by dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..label_space import IGNORE
from ..sample import Sample

__all__ = ["Batch", "count_valid", "group_by_dataset", "pad_and_stack", "runs"]


@dataclass
class Batch:
    """A batch in which the images of one dataset are contiguous.

    Attributes:
        images: (N, 3, H, W) normalised images, 0 where padded.
        targets: (N, H, W) int64 local ids, ``IGNORE`` where padded or unlabelled; None at test time.
        groups: (dataset, number of images) runs in batch order; every dataset once.
        image_sizes: (height, width) of each image before padding.
        inputs: the samples in batch order; weak labels and names ride along in them.
        num_valid: labelled pixels per dataset in the whole step (in all its passes), scalar float tensors, *averaged
            over the processes*: the local sum of a per-pixel loss divided by it has, after the mean of gradients over
            processes, the gradient of the mean over all labelled pixels of all processes.
    """

    images: Tensor
    targets: Tensor | None
    groups: tuple[tuple[str, int], ...]
    image_sizes: list[tuple[int, int]]
    inputs: list[Sample]
    num_valid: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def total_valid(self) -> Tensor:
        """Labelled pixels of all datasets of the step, mean over the processes: for losses pooled over datasets."""
        return torch.stack(list(self.num_valid.values())).sum()

    def slices(self) -> dict[str, slice]:
        """Where each dataset's images lie in the batch."""
        slices, start = {}, 0
        for name, count in self.groups:
            slices[name] = slice(start, start + count)
            start += count
        return slices

    def content(self) -> Tensor:
        """(N, H, W) bool: where the images are real, not padding of the batch or of the samples."""
        result = torch.zeros(len(self), *self.images.shape[-2:], dtype=torch.bool, device=self.images.device)
        for mask, (height, width), sample in zip(result, self.image_sizes, self.inputs):
            real = sample.get("content")
            mask[:height, :width] = True if real is None else real.to(mask.device, non_blocking=True)
        return result

    def stack(self, key: str, fill: float, images: slice = slice(None)) -> Tensor:
        """Stacks a further per-pixel tensor of the samples (soft labels, confidences) like the images.

        Args:
            key: a key of samples, each value (..., h, w) with the size of that sample's image.
            fill: value of the padding, and of the whole of samples that do not have the key.
            images: part of the batch, for example one dataset's by :meth:`slices`: class axes of different lengths
                cannot be stacked.

        Returns:
            (M, ..., H, W) of the M chosen images, on the images' device.

        Raises:
            KeyError: none of the chosen samples has the key.
            ValueError: the values' leading axes differ, or one has another size than its image.
        """
        samples = cast("list[dict[str, Any]]", self.inputs[images])  # any key will do
        sizes = self.image_sizes[images]
        given = [sample[key] for sample in samples if key in sample]
        if not given:
            raise KeyError(f"no sample has {key!r}: {[sample.get('file_name') for sample in samples]}")
        shapes = {tuple(value.shape[:-2]) for value in given}
        if len(shapes) > 1:
            found = {sample["dataset"]: tuple(sample[key].shape) for sample in samples if key in sample}
            raise ValueError(f"{key!r} has different axes in {found}: stack each dataset's images by themselves")
        tensors = []
        for sample, size in zip(samples, sizes):
            value = sample.get(key)
            if value is None:
                value = torch.full((*given[0].shape[:-2], *size), fill, dtype=given[0].dtype)
            elif tuple(value.shape[-2:]) != size:
                where = sample.get("file_name")
                raise ValueError(f"{where}: {key!r} is {tuple(value.shape[-2:])} pixels, the image {size}")
            tensors.append(value.to(self.images.device, non_blocking=True))
        return pad_and_stack(tensors, self.images.shape[-2:], fill)


def runs(names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Runs of equal names: ``["a", "a", "b"]`` gives ``(("a", 2), ("b", 1))``."""
    counts: list[list] = []
    for name in names:
        if counts and counts[-1][0] == name:
            counts[-1][1] += 1
        else:
            counts.append([name, 1])
    return tuple((name, count) for name, count in counts)


def group_by_dataset(samples: Sequence[Sample], order: Sequence[str] = ()) -> tuple[list[Sample], list[int]]:
    """Sorts samples by dataset, keeping their order within each.

    Args:
        samples: each with the key ``dataset``.
        order: datasets that come first, in this order (the same on all processes, so that collective operations of
            their norm layers meet); others follow as they occur.

    Returns:
        The sorted samples, and for each of them its index in ``samples``.

    Raises:
        KeyError: a sample does not say which dataset it belongs to.
    """
    rank = {name: i for i, name in enumerate(order)}
    for sample in samples:
        if "dataset" not in sample:
            raise KeyError(
                f"the sample of {sample.get('file_name', '(no file name)')} has no key 'dataset': every sample says "
                "which dataset it belongs to (the mapper copies it from the dataset dict)"
            )
        rank.setdefault(sample["dataset"], len(rank))
    indices = sorted(range(len(samples)), key=lambda i: rank[samples[i]["dataset"]])
    return [samples[i] for i in indices], indices


def pad_and_stack(tensors: Sequence[Tensor], size: Sequence[int], fill: float) -> Tensor:
    """Stacks (..., h, w) tensors, padded at the bottom and on the right to ``size``.

    Returns:
        (N, ..., H, W); no copy beyond the stack itself where all have that size already.
    """
    height, width = size
    if all(t.shape[-2:] == (height, width) for t in tensors):
        return torch.stack(list(tensors))
    return torch.stack(
        [F.pad(t, (0, width - t.shape[-1], 0, height - t.shape[-2]), value=fill) for t in tensors]  # (left, right, ...)
    )


def count_valid(
    targets: Tensor, slices: dict[str, slice], names: Sequence[str], ignore: int = IGNORE
) -> dict[str, Tensor]:
    """Labelled pixels of each dataset, averaged over the processes.

    One collective operation over all names, whether present here or not, so that processes that hold different datasets
    still meet.

    Args:
        targets: (N, H, W) local ids.
        slices: where each dataset's images lie.
        names: the datasets counted, the same list on every process.
        ignore: id of pixels that do not count.

    Returns:
        Scalar float tensor per name, >= 0.
    """
    counts = targets.new_zeros(len(names), dtype=torch.int64)
    for i, name in enumerate(names):
        if name in slices:
            counts[i] = (targets[slices[name]] != ignore).sum()
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes > 1:
        dist.all_reduce(counts)
    return dict(zip(names, (counts / processes).unbind()))
