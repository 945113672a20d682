"""The report of an evaluation: a table per dataset, a summary, and the same as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..atomic_file import write_atomically
from .report_tables import dataset_tables, markdown, model_table, summary_table
from .scores import DatasetScores, collect, means

__all__ = ["as_csv", "as_json", "write_report"]

logger = logging.getLogger(__name__)


def write_report(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    output_dir: str | Path,
    console: Console | None = None,
) -> dict[str, Any]:
    """Prints the tables of an evaluation and writes ``report.json``, ``report.csv`` and ``report.md``.

    Args:
        results: catalog entry -> what its evaluator returned, see :func:`.scores.collect`.
        output_dir: folder of the files.
        console: where to print; default: standard output.

    Returns:
        The content of ``report.json``: percent, not rounded, None where a class has no ground truth.
    """
    scores = collect(results)
    content = as_json(scores)
    if not scores:
        return content
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 132)  # a log file has no narrow window
    swatches = console.is_terminal and console.encoding.startswith("utf")
    for one in scores:
        console.print(dataset_tables(one, swatches))
    console.print(summary_table(scores))
    console.print(model_table(scores))
    folder = Path(output_dir)
    write_atomically(folder / "report.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_atomically(folder / "report.csv", as_csv(scores))
    write_atomically(folder / "report.md", markdown(scores))
    logger.info("Wrote the report of %d datasets to %s/report.{json,csv,md}", len(scores), folder)
    return content


def as_json(scores: Sequence[DatasetScores]) -> dict[str, Any]:
    """The report as plain JSON values; nan becomes None."""
    datasets = {}
    for one in scores:
        datasets[one.entry] = {
            "dataset": one.dataset,
            "images": one.images,
            "classes": len(one.iou),
            "classes_scored": one.classes_scored,
            "seen": one.coverage.seen,
            "unnameable": list(one.coverage.unnameable),
            **_plain({**one.overall, "nameable_mIoU": one.nameable_miou, "concepts": one.concepts}),
            "IoU": _plain(one.iou),
            "ACC": _plain(one.accuracy),
            "official": None,
        }
        if one.official:
            datasets[one.entry]["official"] = {
                "rule": one.official.rule,
                "title": one.official.title,
                "difference": one.official.difference,
                **_plain(one.official.overall),
                "IoU": _plain(one.official.iou),
                "groupings": {name: _plain(groups) for name, groups in one.official.groupings.items()},
            }
    return {"unit": "percent", "datasets": datasets, "mean": _plain(means(scores))}


def as_csv(scores: Sequence[DatasetScores]) -> str:
    """One value per row: entry, dataset, rule (plain or official), metric, class or group, value; empty = n/a.

    The last rows are the means, in place of a catalog entry ``mean``, ``mean/seen`` and ``mean/unseen``.
    """
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n")
    write.writerow(["entry", "dataset", "rule", "metric", "class", "value"])

    def rows(one: DatasetScores, rule: str, metric: str | None, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            names = (metric, key) if metric else (key, "")
            write.writerow([one.entry, one.dataset, rule, *names, "" if math.isnan(value) else repr(value)])

    for one in scores:
        counts = {"images": one.images, "classes_scored": one.classes_scored, "seen": int(one.coverage.seen)}
        counts["classes_unnameable"] = len(one.coverage.unnameable)
        own = {"nameable_mIoU": one.nameable_miou, "concepts": one.concepts}
        rows(one, "plain", None, {**one.overall, **own, **counts})
        rows(one, "plain", "IoU", one.iou)
        rows(one, "plain", "ACC", one.accuracy)
        if one.official:
            rows(one, one.official.rule, None, one.official.overall)
            rows(one, one.official.rule, "IoU", one.official.iou)
            for grouping, groups in one.official.groupings.items():
                rows(one, one.official.rule, f"{grouping} IoU", groups)
    mean = means(scores)
    for group, values in (("mean", mean), ("mean/seen", mean["seen"]), ("mean/unseen", mean["unseen"])):
        for key in ("mIoU", "harmonic_mIoU", "nameable_mIoU", "harmonic_nameable_mIoU"):
            write.writerow([group, "", "plain", key, "", "" if math.isnan(values[key]) else repr(values[key])])
    write.writerow(["mean", "", "plain", "knowledgeability", "", repr(mean["knowledgeability"]) if scores else ""])
    return text.getvalue()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested numbers with None for nan."""
    return {
        key: _plain(value) if isinstance(value, Mapping) else None if math.isnan(value) else float(value)
        for key, value in values.items()
    }
