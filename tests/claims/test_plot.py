"""The plot of a table whose columns are variants of its rows."""

from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure

from multiseg_d2.claims import plot
from multiseg_d2.claims.claim import Claim, Column, Row
from multiseg_d2.claims.table import Cell, Table


def table(*columns: Column) -> Table:
    rows = tuple(Row(label, (), {}) for label in ("short", "long"))
    claim = Claim("toy", "Toy", columns, rows, (0, 1, 2))
    cells = {(row.label, column.label): Cell() for row in rows for column in columns}
    cells["short", "one"] = Cell({0: 30.0, 1: 40.0})
    cells["short", "own"] = Cell({0: 33.0, 1: 44.0, 2: 70.0})
    cells["long", "own"] = Cell({0: 60.0})
    return Table(claim, cells, [])


@pytest.fixture
def drawn(monkeypatch):
    """Figures that were made."""
    figures = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(plot, "Figure", Kept)
    return figures


def means(axes) -> list[float]:
    drawn = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    return [value for value in drawn if not math.isnan(value)]


def test_variants_are_compared_in_one_panel_by_row_and_seed(drawn):
    variants = Column("one", "mean", "mIoU"), Column("own", "mean", "mIoU", ("MODEL.DATASET_NORM.ENABLED", "True"))
    assert plot.to_png(table(*variants)).startswith(b"\x89PNG")
    scores, gains = drawn[0].axes
    assert sorted(means(scores)) == [35.0, 49.0, 60.0]
    assert means(gains) == [3.5]  # seeds 0 and 1 only: 3 and 4; the other row has nothing to be compared with
    assert {text.get_text() for text in drawn[0].legends[0].texts} == {"one", "own"}


def test_other_columns_have_a_panel_each(drawn):
    columns = Column("one", "toy_day_val"), Column("own", "toy_dusk_val"), Column("s/step", "cost", "seconds")
    result = table(*columns)
    plot.to_png(result)
    assert [axes.get_title() for axes in drawn[0].axes] == ["one", "own"]
