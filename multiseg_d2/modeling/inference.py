"""Labels, and how sure they are, from scores that are never brought to the size of the image.

The largest of the scores of all classes is taken piece by piece (:class:`.ScoreMap`). Where scores are resized to
labels only, most of the work is not even needed: between four neighbouring positions at which the same class has the
largest score, bilinear interpolation cannot make another one larger, so only the cells whose corners disagree are
computed, and of these only the classes that can win in them. The labels are those of the full-size way but for ties
within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..label_space import IGNORE
from .interpolation import tiles
from .score_maps import Resized, ScoreMap, piece_pixels
from .threads import map_pieces

__all__ = ["Prediction", "confident_labels", "label_map"]

#: Scores at the corners of the cells that are looked at together, and scores inside of those that are computed together
#: (1 MiB).
_CORNER_SCORES, _BATCH_SCORES = 1 << 19, 1 << 18
#: Where more than this share of all scores would be computed so, pieces of the image are the faster way (measured for
#: 19 and 65 classes); a sample of the cells tells.
_MOST_SCORES, _SAMPLE = 0.2, 16


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

        def fill(rectangle: tuple[slice, slice]) -> None:
            labels[rectangle] = _winner(scores.comparable(*rectangle))[0]

        _for_each_piece(fill, scores)
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

    def fill(rectangle: tuple[slice, slice]) -> None:
        if thresholds is not None:
            labels[rectangle], confidence[rectangle] = _winner(scores.probabilities(*rectangle) / thresholds)
        elif scores.activation == "sigmoid":  # several classes may have a probability that is rounded to 1
            labels[rectangle], largest = _winner(scores.tile(*rectangle))
            confidence[rectangle] = largest.sigmoid()
        else:
            labels[rectangle], confidence[rectangle] = _winner(scores.probabilities(*rectangle))

    _for_each_piece(fill, scores)
    return labels.masked_fill_(labels == scores.channels - 1, IGNORE) if void else labels, confidence


def _for_each_piece(fill: Callable[[tuple[slice, slice]], None], scores: ScoreMap) -> None:
    """Calls it with rectangles that cover the map."""
    rectangles = tiles(scores.size, piece_pixels(scores.channels, scores.device))
    for _ in map_pieces(fill, rectangles, scores.device):
        pass


def _winner(values: Tensor) -> tuple[Tensor, Tensor]:
    """(r, c) uint8 index of the first largest of (C, r, c) values, and its value."""
    if values.device.type != "cpu":
        largest, index = values.max(0)
        return index.to(torch.uint8), largest
    index, largest = _argmax(values.numpy())
    return torch.from_numpy(index), torch.from_numpy(largest)


def _argmax(values: np.ndarray, names: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_winner`: two reductions and a comparison over floats and bytes, 4 to 10 times as fast as argmax.

    ``names``: ids in place of the indices, rising along the first axis; any shape that fits by broadcasting.
    """
    if names is None:
        names = np.arange(len(values), dtype=np.uint8).reshape(-1, *(1,) * (values.ndim - 1))
    largest = values.max(0)
    leads = np.equal(values, largest).view(np.uint8)  # 0 or 1
    leads *= IGNORE - names  # the first has the largest
    return IGNORE - leads.max(0), largest


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
    """(H, W) uint8 labels by work in the cells whose corners disagree; None where that would be too much of it."""
    source = scores.source.contiguous()
    winners = np.pad(_argmax(source.numpy())[0], 1, mode="edge")  # (h + 2, w + 2)
    leads = np.stack([winners[:-1, :-1], winners[:-1, 1:], winners[1:, :-1], winners[1:, 1:]])  # (4, h + 1, w + 1)
    down, across = axes = tuple(_Axis(weights, length) for weights, length in zip(scores.resize.weights, scores.size))
    differs = (leads[:3] != leads[3]).any(0) & (down.counts > 0)[:, None] & (across.counts > 0)
    rows, columns = np.nonzero(differs)
    leads_there = leads[:, rows, columns]  # (4, m)
    sample = _corners(source, axes, rows[::_SAMPLE], columns[::_SAMPLE])
    if len(rows) and differs.mean() * _candidates(sample, leads_there[:, ::_SAMPLE]).mean() > _MOST_SCORES:
        return None
    labels = leads[3].take(across.cells, 1).take(down.cells, 0)  # as if no cell had two winners

    def fill(some: slice) -> None:
        corners = _corners(source, axes, rows[some], columns[some])
        candidates = _candidates(corners, leads_there[:, some])
        _fill_cells(labels, corners, candidates, axes, (rows[some], columns[some]))

    step = max(_CORNER_SCORES // (4 * len(source)), 1)
    for _ in map_pieces(fill, [slice(start, start + step) for start in range(0, len(rows), step)]):
        pass
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
        """(longest, m) pixels of cells; shorter cells repeat their last one."""
        steps = np.minimum(np.arange(self.longest)[:, None], self.counts[cells] - 1)
        return self.starts[cells] + steps


def _corners(source: Tensor, axes: tuple[_Axis, _Axis], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(4, C, m) scores at top left, top right, bottom left and bottom right of m cells."""
    (down, across), (channels, _, width) = axes, source.shape
    values, corners = source.flatten(1), torch.empty(4, channels, len(rows))
    places = [(y, x) for y in (down.low, down.high) for x in (across.low, across.high)]
    for corner, (y, x) in zip(corners, places):
        torch.index_select(values, 1, torch.from_numpy(y[rows] * width + x[columns]), out=corner)
    return corners.numpy()


def _fill_cells(
    labels: np.ndarray,
    corners: np.ndarray,
    candidates: np.ndarray,
    axes: tuple[_Axis, _Axis],
    cells: tuple[np.ndarray, np.ndarray],
) -> None:
    """Writes the labels of all pixels of m cells, first of those with the most candidates.

    Args:
        labels: (H, W) uint8, contiguous, written to.
        corners: (4, C, m) scores.
        candidates: (C, m) bool, the classes that can win.
        axes: down and across.
        cells: row and column of each.
    """
    (down, across), (rows, columns), flat = axes, cells, labels.reshape(-1)
    counts = candidates.sum(0)
    order, start, pixels = np.argsort(-counts, kind="stable"), 0, down.longest * across.longest
    while start < len(order):
        chosen = order[start : start + max(_BATCH_SCORES // (counts[order[start]] * pixels), 1)]
        start += len(chosen)
        names = _names(candidates[:, chosen])  # (K, n)
        y, x = down.pixels(rows[chosen]), across.pixels(columns[chosen])  # (r, n), (c, n)
        inside = _winners_inside(torch.from_numpy(corners[:, names, chosen]), names, down.share[y], across.share[x])
        flat[y[:, None] * labels.shape[1] + x] = inside


def _candidates(corners: np.ndarray, leads: np.ndarray) -> np.ndarray:
    """(C, m) bool: the classes that can win in a cell.

    A class that another one exceeds at all four corners is below it everywhere between them. Those that lead at a
    corner are tried as the other one, and the one whose lowest corner is the highest.
    """
    firm = _argmax(corners.min(0))[0]  # (m,)
    candidates = np.ones(corners.shape[1:], bool)
    for other in (firm, *leads):
        at_other = np.take_along_axis(corners, other[None, None].astype(np.int64), 1)  # (4, 1, m)
        candidates &= (corners >= at_other).any(0)
    return candidates


def _names(candidates: np.ndarray) -> np.ndarray:
    """(K, n) uint8, the classes that are True in (C, n), rising; where there are fewer than K the first is repeated."""
    counts = candidates.sum(0)
    cells, classes = np.nonzero(candidates.T)
    starts = np.cumsum(counts) - counts  # of each cell among all pairs
    names = np.tile(classes[starts].astype(np.uint8), (counts.max(), 1))
    names[np.arange(len(cells)) - starts[cells], cells] = classes
    return names


def _winners_inside(corners: Tensor, names: np.ndarray, down: Tensor, across: Tensor) -> np.ndarray:
    """(r, c, n) uint8 classes with the largest score at the pixels of n cells.

    Args:
        corners: (4, K, n) scores at top left, top right, bottom left, bottom right.
        names: (K, n) classes.
        down: (r, n) shares of the bottom.
        across: (c, n) shares of the right.
    """
    top, bottom = (torch.lerp(left[:, None], right[:, None], across) for left, right in (corners[:2], corners[2:]))
    values = torch.lerp(top[:, None], bottom[:, None], down[:, None])  # (K, r, c, n)
    return _argmax(values.numpy(), names[:, None, None])[0]
