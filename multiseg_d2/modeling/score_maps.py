"""Scores at the wanted size that need not exist: any rectangle of them can be computed by itself.

A network's scores have an eighth or a quarter of the image's resolution. All that follows (resizing, cropping, mirrors,
the mean over windows, scales and mirrored images) is defined at full size; here each of these is a :class:`ScoreMap`
around others, and only the rectangles that are looked at are computed. The values are those of the full-size way but
for the rounding of sums. :mod:`.inference` makes labels of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from .interpolation import Bilinear, tiles

__all__ = ["MeanOverViews", "MeanOverWindows", "Mirrored", "Resized", "Restricted", "ScoreMap", "piece_pixels"]

#: Scores of one piece: a CPU core's cache (2 MiB of float32), or enough to keep another device busy (128 MiB).
_CPU_SCORES, _DEVICE_SCORES = 1 << 19, 1 << 25
#: How far below the lowest score of a pixel a channel is that is left out: exp(-30) = 1e-13.
_NEVER = 30.0


class ScoreMap(ABC):
    """(C, H, W) scores of one image, computed where they are looked at.

    Attributes:
        channels: C, with that of void where the head has one.
        size: (H, W).
        activation: "softmax" or "sigmoid": what turns scores into probabilities.
    """

    channels: int
    size: tuple[int, int]
    activation: str

    @property
    @abstractmethod
    def parts(self) -> list[Tensor | ScoreMap]:
        """The maps and logits that it is made of."""

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.parts[0].device

    @abstractmethod
    def tile(self, rows: slice, columns: slice) -> Tensor:
        """(C, r, c) float32 logits of a rectangle; the caller may overwrite them."""

    def probabilities(self, rows: slice, columns: slice) -> Tensor:
        """(C, r, c) float32 probabilities of a rectangle."""
        scores = self.tile(rows, columns)
        if self.activation == "sigmoid":
            return scores.sigmoid_()
        exponentials = scores.sub_(scores.amax(0)).exp_()
        return exponentials.div_(exponentials.sum(0))

    def comparable(self, rows: slice, columns: slice) -> Tensor:
        """(C, r, c) numbers of which the largest is the largest logit's, as cheap as can be."""
        return self.tile(rows, columns)

    def full(self) -> Tensor:
        """(C, H, W) float32 logits."""
        scores = torch.empty(self.channels, *self.size, device=self.device)
        for rows, columns in tiles(self.size, piece_pixels(self.channels, self.device)):
            scores[:, rows, columns] = self.tile(rows, columns)
        return scores


class Resized(ScoreMap):
    """Scores resized bilinearly.

    Args:
        source: (C, h, w) logits of any floating type, or a map of them.
        size: (H, W) to which they are resized.
        crop: (H', W') of which only the first rows and columns are used; None: all.
        activation: see :class:`ScoreMap`; that of ``source`` where this is a map.
    """

    def __init__(
        self,
        source: Tensor | ScoreMap,
        size: Sequence[int],
        crop: Sequence[int] | None = None,
        activation: str = "softmax",
    ) -> None:
        self.source = source.detach().float() if isinstance(source, Tensor) else source
        self.activation = activation if isinstance(source, Tensor) else source.activation
        self.channels = len(source) if isinstance(source, Tensor) else source.channels
        self.size = tuple(size if crop is None else crop)
        shape = self.source.shape[-2:] if isinstance(source, Tensor) else source.size
        self.resize = Bilinear(shape, size, torch.empty(0, device=source.device))

    @property
    def parts(self) -> list[Tensor | ScoreMap]:
        """See :class:`ScoreMap`."""
        return [self.source]

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See :class:`ScoreMap`."""
        if isinstance(self.source, ScoreMap):
            return self.resize.combine(self.source.tile(*self.resize.near(rows, columns)), rows, columns)
        values = self.resize.tile(self.source, rows, columns)
        return values.clone() if self.resize.source == self.resize.size else values


class Mirrored(ScoreMap):
    """Scores with left and right exchanged."""

    def __init__(self, inner: ScoreMap) -> None:
        self.inner, self.channels, self.size, self.activation = inner, inner.channels, inner.size, inner.activation

    @property
    def parts(self) -> list[Tensor | ScoreMap]:
        """See :class:`ScoreMap`."""
        return [self.inner]

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See :class:`ScoreMap`."""
        return self.inner.tile(rows, self._mirrored(columns)).flip(-1)

    def probabilities(self, rows: slice, columns: slice) -> Tensor:
        """See :class:`ScoreMap`."""
        return self.inner.probabilities(rows, self._mirrored(columns)).flip(-1)

    def _mirrored(self, columns: slice) -> slice:
        return slice(self.size[1] - columns.stop, self.size[1] - columns.start)


class Restricted(ScoreMap):
    """Scores of which some channels can never win; the probabilities of the others sum to 1 again.

    Args:
        inner: all scores.
        allowed: (C,) bool, False where a channel is left out.
    """

    def __init__(self, inner: ScoreMap, allowed: Tensor) -> None:
        self.inner, self.channels, self.size, self.activation = inner, inner.channels, inner.size, inner.activation
        self.left_out = ~allowed.to(inner.device)

    @property
    def parts(self) -> list[Tensor | ScoreMap]:
        """See :class:`ScoreMap`."""
        return [self.inner]

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See :class:`ScoreMap`."""
        scores = self.inner.tile(rows, columns)
        scores[self.left_out] = scores.amin(0) - _NEVER
        return scores


class MeanOverWindows(ScoreMap):
    """Mean logits of the windows that cover a pixel.

    Args:
        windows: (top, left, scores) of each; together they cover the image.
        size: of the image.
    """

    def __init__(self, windows: Sequence[tuple[int, int, ScoreMap]], size: Sequence[int]) -> None:
        first = windows[0][2]
        self.windows, self.size = list(windows), tuple(size)
        self.channels, self.activation = first.channels, first.activation

    @property
    def parts(self) -> list[Tensor | ScoreMap]:
        """See :class:`ScoreMap`."""
        return [scores for _, _, scores in self.windows]

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """See :class:`ScoreMap`."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        total = torch.zeros(self.channels, height, width, device=self.device)
        passes = torch.zeros(height, width, device=self.device)
        for top, left, scores in self.windows:
            y, inner_rows = _overlap(rows, top, scores.size[0])
            x, inner_columns = _overlap(columns, left, scores.size[1])
            if y.start < y.stop and x.start < x.stop:
                total[:, y, x] += scores.tile(inner_rows, inner_columns)
                passes[y, x] += 1
        return total.div_(passes)


class MeanOverViews(ScoreMap):
    """Mean of the probabilities of several maps of one size, as logits.

    The mean is taken at the wanted size, piece by piece: the same as of full-size probabilities.
    """

    def __init__(self, views: Sequence[ScoreMap]) -> None:
        first = views[0]
        self.views = list(views)
        self.channels, self.size, self.activation = first.channels, first.size, first.activation

    @property
    def parts(self) -> list[Tensor | ScoreMap]:
        """See :class:`ScoreMap`."""
        return list(self.views)

    def probabilities(self, rows: slice, columns: slice) -> Tensor:
        """See :class:`ScoreMap`."""
        first, *others = self.views
        mean = first.probabilities(rows, columns)
        for view in others:
            mean += view.probabilities(rows, columns)
        return mean.div_(len(self.views))

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """The log (for "sigmoid" the log-odds) of the mean, so that the activation gives the mean back."""
        mean = self.probabilities(rows, columns)
        info = torch.finfo(mean.dtype)
        if self.activation == "softmax":
            return mean.clamp_(min=info.tiny).log_()
        return torch.logit_(mean, eps=info.eps / 2)

    def comparable(self, rows: slice, columns: slice) -> Tensor:
        """The mean probabilities."""
        return self.probabilities(rows, columns)


def piece_pixels(channels: int, device: torch.device) -> int:
    """Pixels of a piece of as many channels."""
    scores = _CPU_SCORES if device.type == "cpu" else _DEVICE_SCORES
    return max(scores // max(channels, 1), 1)


def _overlap(wanted: slice, start: int, length: int) -> tuple[slice, slice]:
    """What a window covers of a range: counted from the range's start, and from the window's own."""
    first, last = max(wanted.start, start), min(wanted.stop, start + length)
    return slice(first - wanted.start, last - wanted.start), slice(first - start, last - start)
