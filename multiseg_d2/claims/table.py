"""The measured table: means with spread beside the published numbers, as Markdown, CSV and a block of the README."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .claim import Claim, ClaimError, Column
from .jobs import Job

__all__ = ["Cell", "Table", "collect", "replace_block", "to_csv", "to_markdown"]


@dataclass
class Cell:
    """One row's numbers in one column.

    Attributes:
        values: seed -> score, finished runs only.
        published: the source's number, None where it has none.
        planned: number of seeds asked for.
    """

    values: dict[int, float] = field(default_factory=dict)
    published: float | None = None
    planned: int = 0

    @property
    def mean(self) -> float:
        """Mean over seeds, nan if there is none."""
        return float(np.mean(list(self.values.values()))) if self.values else math.nan

    @property
    def std(self) -> float:
        """Sample standard deviation (n - 1) over seeds, nan for fewer than two."""
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else math.nan

    def text(self) -> str:
        """``72.31 ± 0.42 (3)``; ``(2 of 3)`` while seeds are missing; an en dash where nothing was measured."""
        if not self.values:
            return "–"
        missing = f" of {self.planned}" if len(self.values) < self.planned else ""
        spread = f" ± {self.std:.2f}" if len(self.values) > 1 else ""
        return f"{self.mean:.2f}{spread} ({len(self.values)}{missing})"


@dataclass
class Table:
    """All cells by (row label, column label), and what went wrong."""

    claim: Claim
    cells: dict[tuple[str, str], Cell]
    failures: list[str]
    other_sources: bool = False


def collect(claim: Claim, jobs: Sequence[Job], failures: Mapping[str, str] | None = None) -> Table:
    """Puts the records of jobs into a table.

    Args:
        claim: its rows and columns.
        jobs: with records where they have finished.
        failures: message by key of a job.

    Raises:
        ClaimError: a record lacks a column's metric.
    """
    failures = failures or {}
    cells = {
        (row.label, column.label): Cell(published=row.published.get(column.label))
        for row in claim.rows
        for column in claim.columns
    }
    for job in jobs:
        for row, labels in job.cells:
            for label in labels:
                cell = cells[row, label]
                if not claim.column(label).dataset:
                    continue
                cell.planned += 1
                if job.record is not None:
                    cell.values[job.seed] = score(job.record.results, claim.column(label), str(job.record.folder))
    lines = [f"{job.title}: {failures[job.identity.key]}" for job in jobs if job.identity.key in failures]
    sources = {job.record.source for job in jobs if job.record is not None}
    return Table(claim, cells, lines, len(sources) > 1)


def score(results: Mapping[str, Any], column: Column, where: str) -> float:
    """The number of a column in a run's scores.

    Raises:
        ClaimError: there is none; the message lists what there is.
    """
    node: Any = results
    for key in (column.dataset, *column.metric.split(".")):
        if not isinstance(node, Mapping) or key not in node:
            known = sorted(node)[:20] if isinstance(node, Mapping) else node
            raise ClaimError(f"{where}: no {key!r} for {column.dataset} {column.metric}; there is {known}")
        node = node[key]
    return math.nan if node is None else float(node)


def to_markdown(table: Table) -> str:
    """The table in Markdown, with what its numbers are below it. Published and measured numbers stand side by side."""
    claim, with_published = table.claim, any(cell.published is not None for cell in table.cells.values())
    heads = ["Method"]
    for column in claim.columns:
        if not with_published:
            heads.append(column.label)
        else:
            heads += [f"{column.label}, published"] + [f"{column.label}, ours"] * bool(column.dataset)
    lines = [f"**{claim.title}**", "", _line(heads), _line(["---"] + ["---:"] * (len(heads) - 1))]
    for row in claim.rows:
        texts = [row.label]
        for column in claim.columns:
            cell = table.cells[row.label, column.label]
            published = "" if cell.published is None else f"{cell.published:.2f}"
            texts += [published] * with_published + [cell.text()] * bool(column.dataset or not with_published)
        lines.append(_line(texts))
    return "\n".join([*lines, "", *_notes(table, with_published)]) + "\n"


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


def _notes(table: Table, with_published: bool) -> list[str]:
    claim = table.claim
    metrics = dict.fromkeys(column.metric.rsplit(".", 1)[-1] for column in claim.columns)
    notes = [f"{', '.join(metrics)}; mean ± standard deviation over seeds (number of runs); – not measured."]
    if with_published and claim.source:
        notes.append(f"Published: {claim.source}.")
    notes += [claim.note] if claim.note else []
    notes += [f"{row.label}: {row.note}" for row in claim.rows if row.note]
    if table.other_sources:
        notes.append("Not all runs were made by the same version of the code.")
    text = [" ".join(notes)]
    if table.failures:
        text += ["", "Failed:", "", *(f"- {failure.splitlines()[0]}" for failure in table.failures)]
    return text


def to_csv(table: Table) -> str:
    """One line per cell, with the score of every seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["row", "column", "dataset", "metric", "published", "mean", "std", "n", "planned", "by_seed"])
    for (row, label), cell in table.cells.items():
        column = table.claim.column(label)
        by_seed = " ".join(f"{seed}:{value:.4f}" for seed, value in sorted(cell.values.items()))
        numbers = ["" if math.isnan(number) else f"{number:.4f}" for number in (cell.mean, cell.std)]
        published = "" if cell.published is None else cell.published
        writer.writerow(
            [row, label, column.dataset, column.metric, published, *numbers, len(cell.values), cell.planned, by_seed]
        )
    return out.getvalue()


def replace_block(path: Path, name: str, text: str) -> str:
    """The content of a file with the block ``<!-- claims:NAME begin/end -->`` replaced.

    Raises:
        ClaimError: the file has no such block, or an unfinished one.
    """
    content = Path(path).read_text(encoding="utf-8")
    begin, end = f"<!-- claims:{name} begin -->", f"<!-- claims:{name} end -->"
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ClaimError(f"{path} needs one pair of lines\n{begin}\n{end}\nwhere the table shall stand")
    head, rest = content.split(begin)
    return f"{head}{begin}\n{text.rstrip()}\n{end}{rest.split(end)[1]}"
