"""Confusion matrices of label maps, and the scores that follow from them. numpy only.

A matrix here is (C, C + 1) int64: rows are ground truth, columns are predictions, the last column counts predictions of
no class at all ("void"). Pixels whose ground truth is ignored are in no cell. Matrices of images, ranks and runs can be
added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = [
    "IllegalIdError",
    "argmax",
    "class_accuracy",
    "class_iou",
    "count",
    "empty",
    "frequency_weighted_iou",
    "mean",
    "merge",
    "pixel_accuracy",
]

# Pixels per step: the codes and bincount's own copy of them stay in the cache, and the 65536 bins cost little beside.
_PIXELS = 1 << 18
# Values per channel and step of argmax, chosen likewise (1 MiB of float32).
_VALUES = 1 << 18


class IllegalIdError(ValueError):
    """A label map holds ids that are neither a class nor the ignore value.

    Attributes:
        side: ``"ground truth"`` or ``"prediction"``.
        counts: id -> number of pixels.
    """

    def __init__(self, side: str, counts: dict[int, int], num_classes: int, where: str = "") -> None:
        self.side, self.counts, self.num_classes = side, counts, num_classes
        listing = ", ".join(f"{i} ({n} pixels)" for i, n in sorted(counts.items())[:20])
        super().__init__(
            f"{where + ': ' if where else ''}{side} ids that are neither a class (0 to {num_classes - 1}) nor "
            f"the ignore value: {listing}"
        )

    def at(self, where: str) -> IllegalIdError:
        """The same error, saying in which file."""
        return IllegalIdError(self.side, self.counts, self.num_classes, where)


def empty(num_classes: int) -> np.ndarray:
    """A matrix of zeros, (C, C + 1) int64."""
    return np.zeros((num_classes, num_classes + 1), np.int64)


def argmax(logits: np.ndarray) -> np.ndarray:
    """The class with the largest score at each pixel; the first of several equal ones.

    The same as ``np.argmax(logits, axis=0)``, but an order of magnitude faster where the classes are not the last
    axis, which is how segmentation scores lie in memory: one running maximum per strip of rows, in byte operations.

    Args:
        logits: (C, H, W) floating point, 1 <= C <= 256.

    Returns:
        (H, W) uint8.

    Raises:
        ValueError: shapes, or a score that is not a number; such a pixel has no largest score.
    """
    if logits.ndim != 3 or not 1 <= len(logits) <= 256:
        raise ValueError(f"scores must be (C, H, W) with 1 to 256 classes, not {logits.shape}")
    num_classes, height, width = logits.shape
    best_class = np.zeros((height, width), np.uint8)
    rows = max(1, min(height, _VALUES // max(1, width)))
    best_row = np.empty((rows, width), logits.dtype)
    larger_row = np.empty((rows, width), bool)
    for top in range(0, height, rows):
        strip = logits[:, top : top + rows]  # (C, h, W)
        h = strip.shape[1]
        best, larger, out = best_row[:h], larger_row[:h], best_class[top : top + h]
        as_bytes = larger.view(np.uint8)  # 0 or 1
        best[...] = strip[0]
        for c in range(1, num_classes):
            np.greater(strip[c], best, out=larger)
            np.multiply(as_bytes, c, out=as_bytes, casting="unsafe")  # c where class c leads, else 0
            np.maximum(out, as_bytes, out=out)  # classes come in rising order, so the last leader wins
            np.maximum(best, strip[c], out=best)  # hands on nan
        if np.isnan(best).any():
            raise ValueError(f"{int(np.isnan(best).sum())} pixels from row {top} on have a score that is not a number")
    return best_class


def count(prediction: np.ndarray, ground_truth: np.ndarray, num_classes: int, ignore: int = 255) -> np.ndarray:
    """Counts the pixels of one image.

    Args:
        prediction: (H, W) integer local ids in [0, C), or ``ignore`` where no class is predicted.
        ground_truth: (H, W) integer local ids in [0, C), or ``ignore`` where nothing is scored.
        num_classes: C, at most 255.
        ignore: the value of ignored pixels, in [C, 255].

    Returns:
        (C, C + 1) int64.

    Raises:
        ValueError: shapes differ, or an argument is out of range.
        IllegalIdError: an id is neither a class nor ``ignore``, be it on an ignored pixel or not.
    """
    if prediction.shape != ground_truth.shape:
        raise ValueError(f"the prediction is {prediction.shape}, the ground truth {ground_truth.shape}: sizes differ")
    if not 1 <= num_classes <= ignore <= 255:
        raise ValueError(f"1 <= num_classes <= ignore <= 255 must hold, not {num_classes} and {ignore}")
    prediction = _bytes(prediction, "prediction", num_classes)
    ground_truth = _bytes(ground_truth, "ground truth", num_classes)
    # All 256 x 256 pairs are counted and the wanted cells cut out: no pass over the pixels for a range check, and no
    # illegal id can fall into another cell.
    pairs = np.zeros(1 << 16, np.int64)
    for start in range(0, prediction.size, _PIXELS):
        codes = ground_truth[start : start + _PIXELS].astype(np.uint16)
        codes <<= 8
        codes |= prediction[start : start + _PIXELS]
        pairs += np.bincount(codes, minlength=1 << 16)
    table = pairs.reshape(256, 256)  # (ground truth, prediction)
    _check_ids(table.sum(1), "ground truth", num_classes, ignore)
    _check_ids(table.sum(0), "prediction", num_classes, ignore)
    return np.concatenate([table[:num_classes, :num_classes], table[:num_classes, ignore, None]], axis=1)


def class_iou(matrix: np.ndarray) -> np.ndarray:
    """Intersection over union of each class: TP / (TP + FP + FN).

    A void prediction is a false negative. What is predicted on ignored pixels is not counted.

    Args:
        matrix: (C, C + 1) counts.

    Returns:
        (C,) float64 in [0, 1]; nan ("n/a") for a class without ground truth.
    """
    hits, labelled, predicted = _margins(matrix)
    return _ratio(hits, labelled + predicted - hits, labelled > 0)


def class_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Share of the pixels of each class that are predicted right (recall), (C,) float64; nan without ground truth."""
    hits, labelled, _ = _margins(matrix)
    return _ratio(hits, labelled, labelled > 0)


def frequency_weighted_iou(matrix: np.ndarray) -> float:
    """Mean IoU in which each class weighs as much as its share of the labelled pixels; nan without any."""
    _, labelled, _ = _margins(matrix)
    total = labelled.sum()
    return float(np.nansum(class_iou(matrix) * (labelled / total))) if total else float("nan")


def pixel_accuracy(matrix: np.ndarray) -> float:
    """Share of the labelled pixels that are predicted right; nan without any."""
    hits, labelled, _ = _margins(matrix)
    return float(hits.sum() / labelled.sum()) if labelled.sum() else float("nan")


def mean(values: np.ndarray) -> float:
    """Mean over the classes that have a value; nan if none has."""
    values = np.asarray(values, np.float64)
    scored = ~np.isnan(values)
    return float(values[scored].mean()) if scored.any() else float("nan")


def merge(matrix: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The matrix of coarser classes; confusions inside a group become hits.

    Args:
        matrix: (C, C + 1) counts.
        groups: for each of the G coarser classes, the local ids that it unites; no id twice. Rows of ids in no group
            are left out, predictions of them are void.

    Returns:
        (G, G + 1) counts.
    """
    num_classes = len(matrix)
    target = np.full(num_classes + 1, len(groups))
    for g, ids in enumerate(groups):
        if (target[list(ids)] != len(groups)).any():
            raise ValueError(f"local ids {list(ids)} of group {g} are in another group, too")
        target[list(ids)] = g
    select = np.eye(len(groups) + 1, dtype=matrix.dtype)[target]  # (C + 1, G + 1)
    return (select[:num_classes].T @ matrix @ select)[: len(groups)]


def _bytes(ids: np.ndarray, side: str, num_classes: int) -> np.ndarray:
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{side} ids must be integers, not {ids.dtype}")
    if ids.dtype != np.uint8:
        wide = ids[(ids < 0) | (ids > 255)]
        if wide.size:
            values, counts = np.unique(wide, return_counts=True)
            raise IllegalIdError(side, dict(zip(values.tolist(), counts.tolist())), num_classes)
        ids = ids.astype(np.uint8)
    return ids.reshape(-1)


def _check_ids(pixels: np.ndarray, side: str, num_classes: int, ignore: int) -> None:
    found = np.flatnonzero(pixels)
    illegal = found[(found >= num_classes) & (found != ignore)]
    if illegal.size:
        raise IllegalIdError(side, {int(i): int(pixels[i]) for i in illegal}, num_classes)


def _margins(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits, labelled pixels and predicted pixels of each class; (C,) each."""
    num_classes = len(matrix)
    return matrix.diagonal(), matrix.sum(1), matrix[:, :num_classes].sum(0)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, defined: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=defined)
