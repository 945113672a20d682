"""The table as a picture."""

from __future__ import annotations

import io
import math

from .table import Cell, Table

__all__ = ["to_png"]

_MEAN, _BEST = "C0", "C3"


def to_png(table: Table) -> bytes:
    """A panel per column with a scale of its own, a line per row: means with standard deviations, the best one in red.

    Dots are seeds, hollow diamonds published numbers. What a run took is not a score, and left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row.label for row in table.claim.rows]
    columns = [column.label for column in table.claim.columns if column.dataset != "cost"]
    size = (1 + 0.075 * max(map(len, rows)) + 1.7 * len(columns), 1.2 + 0.28 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns):
        _draw(axes, [table.cells[row, column] for row in rows])
        axes.set_title(column, fontsize="medium")
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    figure.suptitle(table.claim.title, fontsize="medium")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _draw(axes, cells: list[Cell]) -> None:
    """One column: ``cells`` from top to bottom."""
    best = max((cell.mean for cell in cells if cell.values), default=math.nan)
    for place, cell in enumerate(cells):
        seeds = list(cell.values.values())
        if seeds:
            spread = 0.0 if math.isnan(cell.std) else cell.std
            color = _BEST if cell.mean == best else _MEAN
            axes.errorbar(cell.mean, place, xerr=spread, fmt="o", color=color, capsize=3, markersize=6)
        axes.plot(seeds, [place] * len(seeds), "k.", markersize=3)
        if cell.published is not None:
            axes.plot(cell.published, place, "D", markerfacecolor="none", markeredgecolor="k", markersize=6)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize="small", length=0)
    axes.margins(x=0.15)
