"""Class-balanced thresholds over any number of images, exact, in bounded memory.

CBST sorts the confidences of all pixels that are predicted as a class and takes the value at a portion of the list.
Sorting wants them all in memory. Here they are written to one file as they come (four bytes each) while their upper 16
bits are counted; the count tells in which bin the wanted value lies, and one more reading of the file counts the lower
16 bits of that bin's values. Two counts of a float32's halves give the value at a rank exactly (a radix selection).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

__all__ = ["ConfidenceSamples", "UNSET"]

#: Threshold of a class from which nothing was kept: a probability reaches it only by being certain.
UNSET = np.float32(1.0)

_UPPER_BINS = (0x3F800000 >> 16) + 1  # float32 bit patterns of [0, 1], their upper half: 1.0 is 0x3F800000
_LOWER_BINS = 1 << 16
_GROUP = 64  # classes whose lower halves are counted in one reading: 32 MiB of counts
_CHUNK = 1 << 20  # values read at a time: 4 MiB


class ConfidenceSamples:
    """Confidences of the pixels predicted as each class, and the threshold at a portion of each list.

    Memory: 127 KiB per class for the first count and at most 32 MiB for the second, whatever the number of images.
    Disk: 4 bytes per kept confidence (1 byte per pixel at ``stride`` 4), in a file that :meth:`close` removes.

    Args:
        num_classes: C.
        folder: where the file of confidences is made; None = the system's folder for temporary files.
        stride: every ``stride``-th confidence of a class is kept, per image, in raster order, beginning with the first.
        all_sum: sums an int64 array over processes; the default is for one process. All processes must then call
            :meth:`thresholds` together.

    Source: CBST (ECCV 2018), section on self-paced learning policy; every fourth value as in the released code.
    """

    def __init__(
        self,
        num_classes: int,
        folder: str | Path | None = None,
        stride: int = 4,
        all_sum: Callable[[np.ndarray], np.ndarray] = lambda counts: counts,
    ) -> None:
        if stride < 1:
            raise ValueError(f"stride is {stride}: 1 keeps every confidence, 4 every fourth")
        self.num_classes, self.stride, self._all_sum = num_classes, stride, all_sum
        #: Pixels predicted as each class so far, in this process: (C,) int64.
        self.predicted = np.zeros(num_classes, np.int64)
        self._upper = np.zeros((num_classes, _UPPER_BINS), np.int64)
        self._runs: list[np.ndarray] = []  # per image: (C,) how many of its kept confidences are of each class
        self._file = tempfile.TemporaryFile(prefix="confidences-", dir=folder)  # noqa: SIM115 (closed by close())

    def add(self, confidence: np.ndarray, labels: np.ndarray) -> None:
        """Takes in one image.

        Args:
            confidence: (H, W) float32 in [0, 1], probability of the predicted class.
            labels: (H, W) predicted local ids in [0, C); pixels with other ids (void) are left out.

        Raises:
            ValueError: a confidence is not in [0, 1] (the scores are no probabilities, or not finite).
        """
        confidence = np.ascontiguousarray(confidence, np.float32).ravel()
        labels = np.asarray(labels).ravel()
        known = labels < self.num_classes
        if not known.all():
            confidence, labels = confidence[known], labels[known]
        if confidence.size and not (confidence.min() >= 0 and confidence.max() <= 1):  # also true for NaN
            raise ValueError(
                f"confidences must be probabilities in [0, 1]; these lie in [{confidence.min()}, {confidence.max()}]"
            )
        counts = np.bincount(labels, minlength=self.num_classes)
        self.predicted += counts
        order = np.argsort(labels, kind="stable")  # by class, in raster order within a class
        starts = np.cumsum(counts) - counts
        place = np.arange(labels.size) - np.repeat(starts, counts)  # place in the class's list
        kept = confidence[order[place % self.stride == 0]] + np.float32(0)  # -0.0 becomes 0.0
        runs = -(-counts // self.stride)
        bits = kept.view(np.uint32)
        bins = np.repeat(np.arange(self.num_classes), runs) * _UPPER_BINS + (bits >> 16)
        self._upper += np.bincount(bins, minlength=self._upper.size).reshape(self._upper.shape)
        self._runs.append(runs.astype(np.int64))
        self._file.write(bits.tobytes())

    def thresholds(self, portion: float, per_class: bool = True) -> np.ndarray:
        """The confidence at rank floor(portion * length) of each class's list, sorted in descending order.

        Args:
            portion: share of the kept confidences that shall reach the threshold, in [0, 1].
            per_class: one list per class (CBST); False: one list for all classes (ST, the global policy).

        Returns:
            (C,) float32 thresholds; 1 where the rank is 0 (the class is never predicted, or by too few pixels).
        """
        if not 0 <= portion <= 1:
            raise ValueError(f"the portion must lie in [0, 1], not {portion}")
        upper = self._all_sum(self._upper)  # (C, bins)
        if not per_class:
            upper = upper.sum(axis=0, keepdims=True)
        lengths = upper.sum(axis=1)
        ranks = np.floor(lengths * portion).astype(np.int64)  # 1 = the largest value
        bins, ranks_in_bin = _locate(upper, ranks)
        result = np.full(len(ranks), UNSET, np.float32)
        wanted = np.flatnonzero(ranks > 0)
        for start in range(0, len(wanted), _GROUP):
            group = wanted[start : start + _GROUP]
            lower = self._all_sum(self._count_lower(group, bins, per_class))
            low, _ = _locate(lower, ranks_in_bin[group])
            result[group] = ((bins[group].astype(np.uint32) << 16) | low.astype(np.uint32)).view(np.float32)
        return result if per_class else np.repeat(result, self.num_classes)

    def close(self) -> None:
        """Removes the file of confidences."""
        self._file.close()

    def _count_lower(self, group: np.ndarray, bins: np.ndarray, per_class: bool) -> np.ndarray:
        """(len(group), 65536) counts of the lower 16 bits of the values that lie in their list's bin."""
        counts = np.zeros((len(group), _LOWER_BINS), np.int64)
        row_of = np.full(len(bins), -1)
        row_of[group] = np.arange(len(group))
        for classes, bits in self._read():
            lists = classes if per_class else np.zeros_like(classes)
            rows = row_of[lists]
            hit = (rows >= 0) & ((bits >> 16) == bins[lists])
            flat = rows[hit] * _LOWER_BINS + (bits[hit] & 0xFFFF)
            counts += np.bincount(flat, minlength=counts.size).reshape(counts.shape)
        return counts

    def _read(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Class and bit pattern of every kept confidence, some million at a time."""
        self._file.seek(0)
        runs = iter(self._runs)
        pending, size = [], 0
        for run in runs:
            pending.append(run)
            size += int(run.sum())
            if size >= _CHUNK:
                yield self._take(pending, size)
                pending, size = [], 0
        if pending:
            yield self._take(pending, size)
        self._file.seek(0, os.SEEK_END)

    def _take(self, runs: list[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray]:
        bits = np.frombuffer(self._file.read(4 * size), np.uint32)
        classes = np.concatenate([np.repeat(np.arange(self.num_classes), run) for run in runs])
        return classes, bits


def _locate(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bin that holds the ``rank``-th largest value of each row (rank from 1), and its rank within that bin."""
    from_top = counts[:, ::-1].cumsum(axis=1)
    position = (from_top < np.maximum(ranks, 1)[:, None]).sum(axis=1)
    position = np.minimum(position, counts.shape[1] - 1)
    before = np.where(position > 0, np.take_along_axis(from_top, np.maximum(position - 1, 0)[:, None], 1)[:, 0], 0)
    return counts.shape[1] - 1 - position, ranks - before
