"""A confusion matrix as a picture, readable from 2 to 250 classes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

__all__ = ["confusion_plot", "top_confusions"]

_NUMBERS_UP_TO = 32  # classes for which the cells carry numbers


def top_confusions(matrix: np.ndarray, classes: Sequence[str], number: int = 12) -> list[tuple[str, str, float]]:
    """The confusions that cost most.

    Args:
        matrix: (C, C + 1) counts, rows ground truth; the last column is void.
        classes: C names.
        number: how many.

    Returns:
        (true class, predicted class, share of the true class's pixels in [0, 1]), largest share first.
    """
    names = [*classes, "void"]
    shares = _shares(matrix)
    np.fill_diagonal(shares, np.nan)
    flat = np.nan_to_num(shares, nan=-1.0)
    order = np.argsort(-flat, axis=None, kind="stable")[:number]
    cells = [np.unravel_index(i, flat.shape) for i in order]
    return [(names[row], names[column], float(flat[row, column])) for row, column in cells if flat[row, column] > 0]


def confusion_plot(matrix: np.ndarray, classes: Sequence[str], title: str = "") -> np.ndarray:
    """Draws a matrix, each row divided by its sum; rows without ground truth are hatched.

    Of many classes, those that occur in neither ground truth nor prediction are left out.

    Args:
        matrix: (C, C + 1) counts, rows ground truth; the last column (void) is left out where it is empty.
        classes: C names.
        title: above the plot.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no display
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    worst = [f"{true} as {other}: {100 * share:.0f} %" for true, other, share in top_confusions(matrix, classes)]
    if len(classes) > _NUMBERS_UP_TO:
        matrix, classes = _occurring(matrix, classes)
    void = matrix[:, len(classes) :].any()
    shares = _shares(matrix)[:, : len(classes) + bool(void)]
    columns = [*classes, "void"] if void else list(classes)
    cell, font = _scale(len(classes))
    figure = Figure(figsize=(cell * len(columns) + 4.4, cell * len(classes) + 3.0), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.93")
    image = axes.imshow(shares, cmap="viridis", norm=PowerNorm(0.5, 0, 1), aspect="equal", interpolation="nearest")
    for row in np.flatnonzero(np.isnan(shares).all(1)):
        axes.axhspan(row - 0.5, row + 0.5, facecolor="none", edgecolor="0.7", hatch="////", linewidth=0)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=font)
    axes.set_yticks(range(len(classes)), classes, fontsize=font)
    axes.tick_params(length=0, labeltop=len(classes) > _NUMBERS_UP_TO, labelright=len(classes) > _NUMBERS_UP_TO)
    axes.set_xlabel("prediction")
    axes.set_ylabel("ground truth")
    for edge in np.arange(0.5, len(columns) - 1):
        axes.axvline(edge, color="white", linewidth=0.25)
    for edge in np.arange(0.5, len(classes) - 1):
        axes.axhline(edge, color="white", linewidth=0.25)
    if len(classes) <= _NUMBERS_UP_TO:
        _write_numbers(axes, shares)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="share of the true class (root scale)")
    ticks = (0, 1, 5, 10, 25, 50, 75, 100)
    bar.set_ticks([t / 100 for t in ticks], labels=[f"{t} %" for t in ticks])
    figure.suptitle("\n".join([title, *_lines(worst, max(60, int(7 * cell * len(columns)) + 40))]), fontsize=10)
    canvas = FigureCanvasAgg(figure)
    picture = io.BytesIO()
    canvas.print_png(picture)
    return np.asarray(Image.open(picture).convert("RGB"))


def _shares(matrix: np.ndarray) -> np.ndarray:
    """Rows divided by their sums, (C, C + 1) float64; nan in rows without ground truth."""
    total = matrix.sum(1, keepdims=True)
    return np.divide(matrix, total, out=np.full(matrix.shape, np.nan), where=total > 0)


def _occurring(matrix: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    kept = np.flatnonzero(matrix.sum(1) + matrix[:, : len(classes)].sum(0))
    return matrix[np.ix_(kept, [*kept, len(classes)])], [classes[c] for c in kept]


def _scale(num_classes: int) -> tuple[float, float]:
    """Inches per cell, and the font size of the names."""
    if num_classes <= _NUMBERS_UP_TO:
        return 0.36, 9
    return (0.15, 7.5) if num_classes <= 130 else (0.125, 6.5)


def _write_numbers(axes, shares: np.ndarray) -> None:
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            color = "black" if share > 0.35 else "white"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)


def _lines(items: Sequence[str], width: int) -> list[str]:
    """Items joined to lines of about ``width`` characters."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 4 <= width:
            lines[-1] += "    " + item
        else:
            lines.append(item)
    return lines
