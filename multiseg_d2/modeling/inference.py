"""Labels, and how sure they are, from scores that are never brought to the size of the image.

The largest of the scores of all classes is taken piece by piece (:class:`.ScoreMap`). Where scores are resized to
labels only, most of the work is not even needed: between four neighbouring positions at which the same class has the
largest score, bilinear interpolation cannot make another one larger, so only the cells whose corners disagree are
computed, unless nearly all do. The labels are those of the full-size way but for ties within rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..label_space import IGNORE
from .interpolation import tiles
from .score_maps import Resized, ScoreMap, piece_pixels

__all__ = ["Prediction", "confident_labels", "label_map"]

#: Cells whose corners disagree are computed in batches of about so many scores (512 KiB).
_BATCH_SCORES = 1 << 17
#: Where the corners of more cells than this share disagree, pieces are the faster way (measured for 19 to 171 classes).
_MOST_DIFFERENT = 0.6


class Prediction(Mapping):
    """What a segmentor answers for one image: a mapping whose values are computed when they are asked for.

    * ``"sem_seg"``: (C, H, W) float32 logits, as every Detectron2 segmentor has them (with void one channel more)
    * ``"sem_seg_labels"``: (H, W) uint8 local ids, 255 where void wins: far cheaper, in memory as well

    Nothing is kept: asking twice computes twice.

    Args:
        scores: the scores behind it.
        void: whether their last channel is that of no class at all.
    """

    def __init__(self, scores: ScoreMap, void: bool = False) -> None:
        self.scores, self.void = scores, void

    @property
    def num_classes(self) -> int:
        """C, without void."""
        return self.scores.channels - self.void

    def __getitem__(self, key: str) -> Tensor:
        if key == "sem_seg":
            return self.scores.full()
        if key == "sem_seg_labels":
            return label_map(self.scores, self.void)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(("sem_seg", "sem_seg_labels"))

    def __len__(self) -> int:
        return 2


def label_map(scores: ScoreMap, void: bool = False) -> Tensor:
    """The class with the largest score at each pixel; the first of several equal ones.

    Args:
        scores: of at most 255 channels.
        void: whether the last channel is that of no class at all.

    Returns:
        (H, W) uint8 local ids on the scores' device; 255 where void has the largest score.

    Raises:
        ValueError: too many channels, or a score that is not a finite number.
    """
    _check(scores)
    labels = _labels_between_corners(scores) if _between_corners_pays(scores) else None
    if labels is None:
        labels = torch.empty(scores.size, dtype=torch.uint8, device=scores.device)
        for rows, columns in tiles(scores.size, piece_pixels(scores.channels, scores.device)):
            labels[rows, columns], _ = _winner(scores.comparable(rows, columns))
    return labels.masked_fill_(labels == scores.channels - 1, IGNORE) if void else labels


def confident_labels(scores: ScoreMap, void: bool = False, thresholds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Labels as :func:`label_map`, with their probability.

    Args:
        scores: as in :func:`label_map`.
        void: likewise.
        thresholds: (C,) > 0 for class-balanced labels: the class with the largest probability / threshold wins, and
            this ratio takes the place of its probability.

    Returns:
        (H, W) uint8 local ids; (H, W) float32 probabilities, or ratios.

    Raises:
        ValueError: as in :func:`label_map`, or thresholds that do not fit.

    Source: CBST (ECCV 2018) for the ratio.
    """
    _check(scores)
    if thresholds is not None:
        if tuple(thresholds.shape) != (scores.channels,) or not bool((thresholds > 0).all()):
            raise ValueError(f"one threshold > 0 for each of the {scores.channels} channels is needed")
        thresholds = thresholds.to(scores.device, torch.float32).view(-1, 1, 1)
    labels = torch.empty(scores.size, dtype=torch.uint8, device=scores.device)
    confidence = torch.empty(scores.size, device=scores.device)
    for rows, columns in tiles(scores.size, piece_pixels(scores.channels, scores.device)):
        if thresholds is not None:
            labels[rows, columns], confidence[rows, columns] = _winner(scores.probabilities(rows, columns) / thresholds)
        elif scores.activation == "sigmoid":  # several classes may have a probability that is rounded to 1
            labels[rows, columns], largest = _winner(scores.tile(rows, columns))
            confidence[rows, columns] = largest.sigmoid()
        else:
            labels[rows, columns], confidence[rows, columns] = _winner(scores.probabilities(rows, columns))
    return labels.masked_fill_(labels == scores.channels - 1, IGNORE) if void else labels, confidence


def _winner(values: Tensor) -> tuple[Tensor, Tensor]:
    """(r, c) uint8 index of the first largest of (C, r, c) values, and its value."""
    if values.device.type != "cpu":
        largest, index = values.max(0)
        return index.to(torch.uint8), largest
    index, largest = _argmax(values.numpy())
    return torch.from_numpy(index), torch.from_numpy(largest)


def _argmax(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_winner`: two reductions and a comparison over floats and bytes, 4 to 10 times as fast as argmax."""
    channels = len(values)
    largest = values.max(0)
    codes = np.arange(channels, 0, -1, dtype=np.uint8).reshape(-1, *(1,) * largest.ndim)  # the first has the largest
    leads = np.equal(values, largest).view(np.uint8)  # 0 or 1
    leads *= codes
    return channels - leads.max(0), largest


def _check(scores: ScoreMap) -> None:
    if not 1 <= scores.channels <= IGNORE:
        raise ValueError(f"scores must have 1 to {IGNORE} channels, not {scores.channels}")
    pending = [scores]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            if not torch.isfinite(item.sum()):  # a number for the price of one addition per score
                bad = int((~torch.isfinite(item)).any(0).sum())
                raise ValueError(f"{bad} of {item[0].numel()} positions have a score that is not a finite number")
        else:
            pending += item.parts


def _between_corners_pays(scores: ScoreMap) -> bool:
    """Whether the map is nothing but a map of logits on a CPU, resized to at least twice its size."""
    if not isinstance(scores, Resized) or not isinstance(scores.source, Tensor) or scores.device.type != "cpu":
        return False
    return all(size >= 2 * source for size, source in zip(scores.resize.size, scores.resize.source))


def _labels_between_corners(scores: Resized) -> Tensor | None:
    """(H, W) uint8 labels by full work in the cells whose corners disagree; None where there are too many of these."""
    source = scores.source.contiguous()
    winners = np.pad(_argmax(source.numpy())[0], 1, mode="edge")  # (h + 2, w + 2)
    corner = winners[1:, 1:]
    differs = (winners[:-1, :-1] != corner) | (winners[:-1, 1:] != corner) | (winners[1:, :-1] != corner)
    if differs.mean() > _MOST_DIFFERENT:
        return None
    down, across = (_Axis(weights, length) for weights, length in zip(scores.resize.weights, scores.size))
    labels = np.ascontiguousarray(winners[:, across.cells + 1][down.cells + 1])  # as if no cell had two winners
    rows, columns = np.nonzero(differs & (down.counts > 0)[:, None] & (across.counts > 0))  # of (h + 1, w + 1) cells
    step = max(_BATCH_SCORES // (len(source) * across.longest), 1)
    flat = labels.reshape(-1)
    for start in range(0, len(rows), step):
        y, x = rows[start : start + step], columns[start : start + step]
        _fill_cells(flat, source, down, across, y, x)
    return torch.from_numpy(labels)


class _Axis:
    """Where the pixels of one axis lie between the source positions.

    Cell g lies between source positions g - 1 and g; the first and last cell are the margins.

    Args:
        weights: (H, h), see :class:`.Bilinear`.
        length: the first so many of the H pixels are used.
    """

    def __init__(self, weights: Tensor, length: int) -> None:
        table, last = weights[:length].numpy(), weights.shape[1] - 1
        first = (table != 0).argmax(1)
        self.cells = first + 1
        self.cells[(first == 0) & (table[:, 0] == 1)] = 0  # (H,)
        self.low, self.high = np.maximum(np.arange(last + 2) - 1, 0), np.minimum(np.arange(last + 2), last)
        share = table[np.arange(length), self.high[self.cells]]  # of the second position
        self.share = torch.from_numpy(np.where(self.low[self.cells] == self.high[self.cells], 0, share))
        starts = np.searchsorted(self.cells, np.arange(last + 3))
        self.starts, self.counts = starts[:-1], np.diff(starts)
        self.longest = int(self.counts.max())

    def pixels(self, cells: np.ndarray) -> np.ndarray:
        """(m, longest) pixels of cells; shorter cells repeat their last one."""
        steps = np.minimum(np.arange(self.longest), self.counts[cells][:, None] - 1)
        return self.starts[cells][:, None] + steps


def _fill_cells(
    labels: np.ndarray, source: Tensor, down: _Axis, across: _Axis, rows: np.ndarray, columns: np.ndarray
) -> None:
    """Writes the labels of all pixels of m cells."""
    values, width = source.flatten(1), source.shape[2]
    corners = torch.stack(
        [
            values.index_select(1, torch.from_numpy(at_rows[rows] * width + at_columns[columns]))
            for at_rows in (down.low, down.high)
            for at_columns in (across.low, across.high)
        ]
    )  # (4, C, m)
    # Inside a cell a class lies between its corners: one whose best is below another's worst cannot win.
    candidates = (corners.amax(0) >= corners.amin(0).amax(0)).any(1).nonzero()[:, 0]
    corners = corners[:, candidates].unsqueeze(3)  # (4, C', m, 1)
    names = candidates.numpy().astype(np.uint8)
    y, x = down.pixels(rows), across.pixels(columns)  # (m, K), (m, L)
    right = across.share[torch.from_numpy(x)]  # (m, L)
    top = torch.lerp(corners[0], corners[1], right).flatten(1)  # (C', m L)
    bottom = torch.lerp(corners[2], corners[3], right).flatten(1)
    share, total_width = down.share[torch.from_numpy(y)], len(across.cells)  # (m, K)
    for k in range(down.longest):
        weights = share[:, k : k + 1].expand(-1, across.longest).reshape(-1)  # one run of memory for all classes
        index, _ = _argmax(torch.lerp(top, bottom, weights).numpy())
        labels[y[:, k : k + 1] * total_width + x] = names[index].reshape(x.shape)
