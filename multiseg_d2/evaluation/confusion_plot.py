"""A confusion matrix as a picture, readable from 2 to 250 classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
    from matplotlib.figure import Figure

    confused = [item for item in top_confusions(matrix, classes) if item[2] >= 0.005]  # those that are not "0 %"
    worst = [f"{true} as {other}: {100 * share:.0f} %" for true, other, share in confused]
    if len(classes) > _NUMBERS_UP_TO and matrix.any():
        matrix, classes = _occurring(matrix, classes)
    void = matrix[:, len(classes) :].any()
    shares = _shares(matrix)[:, : len(classes) + bool(void)]
    columns = [*classes, "void"] if void else list(classes)
    cell, font = _scale(len(classes))
    # In inches, placed by hand: matplotlib's own layout takes many seconds for hundreds of names.
    names = 0.1 + _longest(columns, font) / 72
    left, bottom, width, height = names + 0.4, names + 0.4, cell * len(columns), cell * len(classes)
    lines = _lines(worst, max(60, int(12 * width)))
    mirrored = names * (len(classes) > _NUMBERS_UP_TO)  # names on all four sides
    full_width = max(left + width + mirrored + 1.3, 5.6)
    full_height = bottom + height + mirrored + 0.4 + 0.19 * len(lines)
    figure = Figure(figsize=(full_width, full_height), dpi=100)

    def place(x: float, y: float, w: float, h: float):
        return figure.add_axes((x / full_width, y / full_height, w / full_width, h / full_height))

    image = _draw_cells(place(left, bottom, width, height), shares, classes, columns, font)
    bar_height = min(height, 4.0)
    bar = figure.colorbar(
        image, cax=place(left + width + mirrored + 0.3, bottom + (height - bar_height) / 2, 0.2, bar_height)
    )
    ticks = (0, 1, 5, 10, 25, 50, 75, 100)
    bar.set_ticks([t / 100 for t in ticks], labels=[f"{t} %" for t in ticks])
    x = 0.12 / full_width
    figure.text(x, (bottom + height / 2) / full_height, "ground truth", rotation=90, va="center")
    figure.text((left + width / 2) / full_width, 0.1 / full_height, "prediction", ha="center")
    figure.text(x, 1 - 0.1 / full_height, title, va="top", weight="bold")
    figure.text(x, 1 - 0.33 / full_height, "\n".join(lines), va="top", fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_cells(axes, shares: np.ndarray, rows: Sequence[str], columns: Sequence[str], font: float):
    """The matrix with its names; returns the image that the colour bar explains."""
    from matplotlib.colors import PowerNorm

    image = axes.imshow(shares, cmap="viridis", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    axes.set_facecolor("0.93")
    for row in np.flatnonzero(np.isnan(shares).all(1)):
        axes.axhspan(row - 0.5, row + 0.5, facecolor="none", edgecolor="0.7", hatch="////", linewidth=0)
    axes.hlines(np.arange(0.5, len(rows) - 1), -0.5, len(columns) - 0.5, color="white", linewidth=0.25)
    axes.vlines(np.arange(0.5, len(columns) - 1), -0.5, len(rows) - 0.5, color="white", linewidth=0.25)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=font)
    axes.set_yticks(range(len(rows)), rows, fontsize=font)
    many = len(rows) > _NUMBERS_UP_TO
    axes.tick_params(length=0, labeltop=many, labelright=many)
    if not many:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                color = "black" if share > 0.35 else "white"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
    return image


def _shares(matrix: np.ndarray) -> np.ndarray:
    """Rows divided by their sums, (C, C + 1) float64; nan in rows without ground truth."""
    total = matrix.sum(1, keepdims=True)
    return np.divide(matrix, total, out=np.full(matrix.shape, np.nan), where=total > 0)


def _occurring(matrix: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    kept = np.flatnonzero(matrix.sum(1) + matrix[:, : len(classes)].sum(0))
    return matrix[np.ix_(kept, [*kept, len(classes)])], [classes[c] for c in kept]


def _longest(names: Sequence[str], size: float) -> float:
    """Width of the longest name in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    measure, font = TextToPath().get_text_width_height_descent, FontProperties(size=size)
    return max(measure(name, font, False)[0] for name in names)


def _scale(num_classes: int) -> tuple[float, float]:
    """Inches per cell, and the font size of the names."""
    if num_classes <= _NUMBERS_UP_TO:
        return max(0.36, 2.5 / num_classes), 9
    return (0.15, 7.5) if num_classes <= 130 else (0.125, 6.5)


def _lines(items: Sequence[str], width: int) -> list[str]:
    """Items joined to lines of about ``width`` characters."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 4 <= width:
            lines[-1] += "    " + item
        else:
            lines.append(item)
    return lines
