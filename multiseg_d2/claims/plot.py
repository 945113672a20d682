"""The table as a picture."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .table import Cell, Table

__all__ = ["to_png"]

_MEAN, _BEST = "C0", "C3"
_TITLE_WIDTH = 18  # characters of a panel's title in a line


def to_png(table: Table) -> bytes:
    """The scores of a table; what a run took is not one, and left out.

    A panel per column with a scale of its own, a line per row: means with standard deviations, the best one in red.
    Dots are seeds, hollow diamonds published numbers. Where the columns are variants of the rows, scored alike, they
    are colours of one panel, and a second one has what each gains over the first in the same row and seed.
    """
    rows = [row.label for row in table.claim.rows]
    columns = [column for column in table.claim.columns if column.dataset != "cost"]
    scores = {(column.dataset, column.metric) for column in columns}
    variants = len(columns) > 1 and len(scores) == 1 and any(column.overrides for column in columns)
    number = 2 if variants else len(columns)
    width = 4.0 if variants else 1.7
    size = (1 + 0.075 * max(map(len, rows)) + width * number, 1.2 + (0.4 if variants else 0.28) * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, number, sharey=True, squeeze=False)[0]
    labels = [column.label for column in columns]
    if variants:
        _draw_variants(panels, table, rows, labels)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    else:
        for axes, label in zip(panels, labels):
            _draw(axes, [table.cells[row, label] for row in rows])
            axes.set_title(textwrap.fill(label, _TITLE_WIDTH), fontsize="medium")
    for axes in panels:
        _dress(axes)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    figure.suptitle(table.claim.title, fontsize="medium")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def gain(cell: Cell, over: Cell) -> Cell:
    """The differences of two cells in the seeds that both have."""
    return Cell({seed: cell.values[seed] - over.values[seed] for seed in cell.values if seed in over.values})


def _draw_variants(panels: Sequence[Axes], table: Table, rows: Sequence[str], labels: Sequence[str]) -> None:
    """Scores, and gains over the first column, a colour per column; colours of a row stand below each other."""
    scores, gains = panels
    for number, label in enumerate(labels):
        shift = 0.6 * (number / (len(labels) - 1) - 0.5)
        for place, row in enumerate(rows):
            cell = table.cells[row, label]
            name = label if place == 0 else None
            _point(scores, cell, place + shift, f"C{number}", name)
            if number:
                _point(gains, gain(cell, table.cells[row, labels[0]]), place + shift, f"C{number}")
    gains.axvline(0, color="C0", linewidth=1)
    scores.set_title("score", fontsize="medium")
    gains.set_title(f"gain over: {labels[0]}", fontsize="medium")


def _draw(axes: Axes, cells: Sequence[Cell]) -> None:
    """One column: ``cells`` from top to bottom."""
    best = max((cell.mean for cell in cells if cell.values), default=math.nan)
    for place, cell in enumerate(cells):
        _point(axes, cell, place, _BEST if cell.mean == best else _MEAN)
        if cell.published is not None:
            axes.plot(cell.published, place, "D", markerfacecolor="none", markeredgecolor="k", markersize=6)


def _point(axes: Axes, cell: Cell, place: float, color: str, name: str | None = None) -> None:
    """Mean with standard deviation, and the seeds; where there are none, the ``name`` alone (for the legend)."""
    seeds = np.array(list(cell.values.values()))
    spread = 0.0 if math.isnan(cell.std) else cell.std
    axes.errorbar(cell.mean, place, xerr=spread, fmt="o", color=color, capsize=3, markersize=6, label=name)
    axes.plot(seeds, np.full(len(seeds), place), "k.", markersize=3)


def _dress(axes: Axes) -> None:
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize="small", length=0)
    axes.margins(x=0.15)
