"""Bilinear resizing of which any rectangle can be computed by itself: what lets scores be used without their full size.

Resizing is linear and separable, so a rectangle of the result is two products of small matrices, and its transpose,
which brings gradients back, is two more. Such products are several times faster than PyTorch's own bilinear kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Bilinear", "tiles"]

#: Columns of a tile. A product costs as many multiplications per pixel as the tile has source columns; below 64 columns
#: the calls themselves cost more (measured with AVX-512 for 19 to 263 classes).
_TILE_COLUMNS = 128


class Bilinear:
    """Resizes (..., h, w) to (..., H, W) as ``F.interpolate(mode="bilinear", align_corners=False)``, piece by piece.

    Equal to it but for the rounding of the sums. On a GPU the products follow PyTorch's setting for float32 matrix
    products: where a user allows TF32, resizing has its precision, too.

    Args:
        source: (h, w).
        size: (H, W); larger, smaller or the same.
        like: its device and dtype (float32 or float64) are those of the values.

    Attributes:
        weights: (H, h) and (W, w): the share of each source row or column; None where that axis is not resized.
    """

    def __init__(self, source: Sequence[int], size: Sequence[int], like: Tensor) -> None:
        self.source, self.size = tuple(source), tuple(size)
        self.weights = [_matrix(a, b, like) for a, b in zip(self.source, self.size)]  # (H, h) and (W, w)

    def tile(self, values: Tensor, rows: slice, columns: slice) -> Tensor:
        """The rectangle ``[..., rows, columns]`` of the resized values.

        Args:
            values: (..., h, w).
            rows: of the H rows, with start and stop.
            columns: of the W columns, likewise.

        Returns:
            (..., r, c); where nothing is resized a view of ``values``.
        """
        near_rows, near_columns = self.near(rows, columns)
        return self.combine(values[..., near_rows, near_columns], rows, columns)

    def near(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """The rows and columns of the values that a rectangle depends on."""
        (_, near_rows), (_, near_columns) = self._parts(rows, columns)
        return near_rows, near_columns

    def combine(self, values: Tensor, rows: slice, columns: slice) -> Tensor:
        """As :meth:`tile`, of only the values that the rectangle depends on."""
        (down, _), (right, _) = self._parts(rows, columns)
        with torch.autocast(values.device.type, enabled=False):
            if down is not None:
                values = torch.matmul(down, values)  # (..., r, w')
            return values if right is None else torch.matmul(values, right.T)  # (..., r, c)

    def transposed(self, gradient: Tensor, rows: slice, columns: slice) -> Tensor:
        """The gradient of the values that a rectangle depends on, see :meth:`near`, by its own, (..., r, c)."""
        (down, _), (right, _) = self._parts(rows, columns)
        if right is not None:
            gradient = torch.matmul(gradient, right)  # (..., r, w')
        return gradient if down is None else torch.matmul(down.T, gradient)  # (..., h', w')

    def _parts(self, *rectangle: slice) -> list[tuple[Tensor | None, slice]]:
        """For both axes: the weights of the wanted positions, and the source positions that they are over."""
        parts = []
        for wanted, weights, length, target in zip(rectangle, self.weights, self.source, self.size):
            if weights is None:
                parts.append((None, wanted))
                continue
            near = _source_range(wanted, length, target)
            parts.append((weights[wanted, near], near))
        return parts


def tiles(size: Sequence[int], pixels: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of about ``pixels`` pixels that cover (H, W), row by row; all of it if it is not larger than that."""
    height, width = size
    if height * width <= pixels and width <= 2 * _TILE_COLUMNS:
        yield slice(0, height), slice(0, width)
        return
    across = math.ceil(width / _TILE_COLUMNS)
    step = math.ceil(width / across)
    tall = max(1, min(pixels // step, height))
    for top in range(0, height, tall):
        for left in range(0, width, step):
            yield slice(top, min(top + tall, height)), slice(left, min(left + step, width))


def _matrix(length: int, target: int, like: Tensor) -> Tensor | None:
    """(target, length) weights of linear interpolation, as PyTorch has them; None where nothing is resized."""
    if length == target:
        return None
    unit = torch.eye(length, dtype=like.dtype, device=like.device)
    return F.interpolate(unit[None], size=target, mode="linear", align_corners=False)[0].T.contiguous()


def _source_range(wanted: slice, length: int, target: int) -> slice:
    """Source positions that the wanted ones depend on, with one to spare at both ends for the rounding of either."""
    first, last = ((i + 0.5) * length / target - 0.5 for i in (wanted.start, wanted.stop - 1))
    return slice(max(math.floor(first) - 1, 0), min(math.floor(last) + 3, length))
