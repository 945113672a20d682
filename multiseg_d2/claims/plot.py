"""The table as a picture."""

from __future__ import annotations

import io
import math

from .table import Table

__all__ = ["to_png"]


def to_png(table: Table) -> bytes:
    """Bars of means with standard deviations, one group per column; dots are seeds, short lines published numbers.

    What a run took is not a score, and left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row.label for row in table.claim.rows]
    columns = [column.label for column in table.claim.columns if column.dataset != "cost"]
    figure = Figure(figsize=(2 + max(1.0, 0.35 * len(rows)) * len(columns), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, width = figure.add_subplot(), 0.8 / len(rows)
    for r, row in enumerate(rows):
        cells = [table.cells[row, column] for column in columns]
        places = [c + (r - (len(rows) - 1) / 2) * width for c in range(len(columns))]
        means = [0.0 if math.isnan(cell.mean) else cell.mean for cell in cells]
        spreads = [0.0 if math.isnan(cell.std) else cell.std for cell in cells]
        axes.bar(places, means, width * 0.9, yerr=spreads, capsize=3, label=row, color=f"C{r % 10}", alpha=0.75)
        for place, cell in zip(places, cells):
            axes.plot([place] * len(cell.values), list(cell.values.values()), "k.", markersize=4)
            if cell.published is not None:
                axes.hlines(cell.published, place - width / 2, place + width / 2, colors="k", linestyles="dashed")
    shown = [
        v
        for (_, column), c in table.cells.items()
        if column in columns
        for v in (*c.values.values(), *filter(None, [c.published]))
    ]
    if shown:  # a difference of one point shall be seen
        low, high = min(shown), max(shown)
        axes.set_ylim(max(0.0, low - 0.3 * (high - low) - 1), high + 0.15 * (high - low) + 1)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_title(table.claim.title)
    axes.set_ylabel(table.claim.columns[0].metric.rsplit(".", 1)[-1])
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
