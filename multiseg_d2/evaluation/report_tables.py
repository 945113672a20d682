"""Tables of a report for people: on a terminal (rich) and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .scores import DatasetScores, means

__all__ = ["dataset_tables", "markdown", "model_table", "number", "summary_table"]

_ROWS, _FOLDS = 40, 3  # classes below each other, more go into further columns; three fit on a screen
#: Knowledgeability is our reading, see known_concepts.
_MODEL = ("performance: trained datasets (mIoU)", "generalisation: others (mIoU)", "knowledgeability (concepts)")
_OVERALL = {"mIoU": "mIoU", "fwIoU": "frequency-weighted IoU", "pACC": "pixel accuracy", "mACC": "mean class accuracy"}


def number(value: float) -> str:
    """A score for people: two decimals, ``n/a`` for nan."""
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def dataset_tables(scores: DatasetScores, swatches: bool = False) -> RenderableType:
    """The table of a dataset's classes, those of its official groupings, and all other scores below.

    Args:
        scores: of one dataset.
        swatches: whether each class gets a block of its colour.
    """
    images = "1 image" if scores.images == 1 else f"{scores.images} images"
    heading = f"{scores.entry}: {images}, {scores.classes_scored} of {len(scores.iou)} classes scored"
    parts: list[RenderableType] = [Text(f"\n{heading} (percent)", "bold"), _class_table(scores, swatches)]
    for grouping, groups in scores.official.groupings.items() if scores.official else ():
        parts.append(_group_table(grouping, groups))
    return Group(*parts, Text(_footer(scores)))


def summary_table(scores: Sequence[DatasetScores]) -> RenderableType:
    """One row per dataset, and their means."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    rows, group = _summary_rows(scores), _mean_rows(scores)
    table.add_column("dataset", no_wrap=True)
    for heading in _summary_heading(scores)[1:-1]:
        table.add_column(heading, justify="right")
    table.add_column("official rule")
    for row in rows:
        table.add_row(*row)
    if group:
        table.add_section()
    for row in group:
        table.add_row(*row)
    return Group(Text("\nSummary (percent)", "bold"), table)


def model_table(scores: Sequence[DatasetScores]) -> RenderableType:
    """Three numbers of the model: performance, generalisation, knowledgeability."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in _MODEL:
        table.add_column(heading, justify="right")
    table.add_row(*_model_row(scores))
    return Group(Text("\nThe model", "bold"), table)


def _model_row(scores: Sequence[DatasetScores]) -> list[str]:
    mean, classes = means(scores), max(len(one.iou) for one in scores)
    values = (mean["seen"]["mIoU"], mean["unseen"]["mIoU"])
    return [*map(number, values), f"{number(mean['knowledgeability'])} of {classes}"]


def markdown(scores: Sequence[DatasetScores]) -> str:
    """Summary and class tables in Markdown, two decimals."""
    lines = ["# Evaluation", "", "Percent; n/a: the class has no ground truth and is not part of the mean.", ""]
    lines += _markdown_table(_summary_heading(scores), [*_summary_rows(scores), *_mean_rows(scores)])
    lines += ["", *_markdown_table(_MODEL, [_model_row(scores)])]
    for one in scores:
        lines += ["", f"## {one.entry}", "", _footer(one).replace("\n", "  \n"), ""]
        columns = ["class", "IoU", "accuracy", *(["official IoU"] if _differs(one) else [])]
        lines += _markdown_table(columns, [[name, *_class_row(one, name)] for name in one.iou])
        for grouping, groups in one.official.groupings.items() if one.official else ():
            rows = [[group, number(value)] for group, value in groups.items()]
            lines += ["", *_markdown_table([grouping, "official IoU"], rows)]
    return "\n".join(lines) + "\n"


def _class_table(one: DatasetScores, swatches: bool) -> Table:
    folds = min(_FOLDS, math.ceil(len(one.iou) / _ROWS))
    rows = math.ceil(len(one.iou) / folds)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    numbers = ["IoU", "accuracy", *(["official IoU"] if _differs(one) else [])]
    for _ in range(folds):
        table.add_column("class", no_wrap=True)
        for heading in numbers:
            table.add_column(heading, justify="right")
    cells = [[_swatch(one, name) if swatches else name, *_class_row(one, name)] for name in one.iou]
    empty = [""] * (1 + len(numbers))
    for row in range(rows):
        parts = [cells[i] if i < len(cells) else empty for i in range(row, folds * rows, rows)]
        table.add_row(*(cell for part in parts for cell in part))
    return table


def _group_table(grouping: str, groups: Mapping[str, float]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(grouping, no_wrap=True)
    table.add_column("official IoU", justify="right")
    for group, value in groups.items():
        table.add_row(group, number(value))
    return table


def _swatch(one: DatasetScores, name: str) -> Text:
    red, green, blue = one.colors[name]
    return Text.assemble(("██ ", f"rgb({red},{green},{blue})"), name)


def _class_row(one: DatasetScores, name: str) -> list[str]:
    row = [number(one.iou[name]), number(one.accuracy[name])]
    return [*row, number(one.official.iou[name])] if _differs(one) else row


def _differs(one: DatasetScores) -> bool:
    """Whether the official rule gives a class another score than the plain one."""
    if one.official is None:
        return False
    return any(number(one.official.iou[name]) != number(value) for name, value in one.iou.items())


def _footer(one: DatasetScores) -> str:
    overall = ", ".join(f"{title} {number(one.overall[key])}" for key, title in _OVERALL.items())
    lines = [f"plain, {one.classes_scored} classes with ground truth: {overall}"]
    if one.coverage.unnameable:
        scored = sum(not math.isnan(one.iou[name]) for name in one.coverage.unnameable)
        lines.append(
            f"the model cannot name {len(one.coverage.unnameable)} of {len(one.iou)} classes ({scored} of them scored, "
            f"as 0): {', '.join(one.coverage.unnameable)}"
        )
        lines.append(f"mIoU {number(one.overall['mIoU'])} with them, {number(one.nameable_miou)} without them")
    if one.official:
        values = ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in one.official.overall.items())
        lines += [f"official, {one.official.title}: {values}", f"difference: {one.official.difference}"]
    else:
        lines.append("official: the plain rule is the dataset's own")
    return "\n".join(lines)


def _gaps(scores: Sequence[DatasetScores]) -> bool:
    """Whether there are classes that the model cannot name: then two columns say how many, and the mean without."""
    return any(one.coverage.unnameable for one in scores)


def _summary_heading(scores: Sequence[DatasetScores]) -> list[str]:
    named = ["can name", "mIoU of these"] if _gaps(scores) else []
    return [
        *["dataset", "images", "classes scored", "mIoU", *named, "concepts"],
        *["official mIoU", "fwIoU", "pixel acc.", "mean acc.", "official rule"],
    ]


def _summary_rows(scores: Sequence[DatasetScores]) -> list[list[str]]:
    rows = []
    for one in scores:
        official = number(one.official.overall["mIoU"]) if one.official else "as plain"
        overall = {key: number(value) for key, value in one.overall.items()}
        can_name = f"{len(one.iou) - len(one.coverage.unnameable)} of {len(one.iou)}"
        rows.append(
            [one.entry if one.coverage.seen else f"{one.entry} (unseen)"]
            + [str(one.images), f"{one.classes_scored} of {len(one.iou)}", overall["mIoU"]]
            + ([can_name, number(one.nameable_miou)] if _gaps(scores) else [])
            + [number(one.concepts), official, *(overall[key] for key in ("fwIoU", "pACC", "mACC"))]
            + [one.official.title if one.official else ""]
        )
    return rows


def _mean_rows(scores: Sequence[DatasetScores]) -> list[list[str]]:
    """Arithmetic and harmonic mean of several entries; of seen and unseen ones apart where there are both."""
    if len(scores) < 2:
        return []
    mean, gaps = means(scores), _gaps(scores)
    both = len({one.coverage.seen for one in scores}) == 2
    rows = []
    for group, values in {"": mean, **({", seen": mean["seen"], ", unseen": mean["unseen"]} if both else {})}.items():
        for kind, prefix in (("mean", ""), ("harmonic mean", "harmonic_")):
            named = ["", number(values[f"{prefix}nameable_mIoU"])] if gaps else []
            rows.append([kind + group, "", "", number(values[f"{prefix}mIoU"]), *named, *[""] * 6])
    return rows


def _markdown_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    right = ["---" if i == 0 else "--:" for i in range(len(heading))]
    return [line(heading), "|" + "|".join(right) + "|", *map(line, rows)]
