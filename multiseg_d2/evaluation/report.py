"""The report of an evaluation: a table per dataset, a summary, and the same as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from rich.console import Console

from ..atomic_file import write_atomically
from . import confusion
from .evaluator import rule_of
from .report_tables import dataset_tables, markdown, summary_table

__all__ = ["DatasetScores", "OfficialScores", "collect", "write_report"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OfficialScores:
    """Scores by a dataset's official rule, in percent; nan = n/a.

    Attributes:
        rule: name in specs, for example ``"cityscapes"``.
        title: of the rule.
        difference: from the plain rule, one line.
        overall: metric -> value.
        iou: class -> value.
        groupings: grouping -> group -> IoU.
    """

    rule: str
    title: str
    difference: str
    overall: Mapping[str, float]
    iou: Mapping[str, float]
    groupings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetScores:
    """Scores on one catalog entry, in percent; nan = n/a.

    Attributes:
        catalog: name of the entry, for example ``"camvid_val"``.
        dataset: name of its label space.
        images: number of images scored.
        classes_scored: number of classes with ground truth.
        overall: ``mIoU``, ``fwIoU``, ``mACC`` and ``pACC``.
        iou: class -> value, in local order.
        accuracy: likewise.
        colors: class -> RGB.
        official: None where the plain scores are the dataset's own.
    """

    catalog: str
    dataset: str
    images: int
    classes_scored: int
    overall: Mapping[str, float]
    iou: Mapping[str, float]
    accuracy: Mapping[str, float]
    colors: Mapping[str, tuple[int, int, int]]
    official: OfficialScores | None


def write_report(
    results: Mapping[str, Mapping[str, Mapping[str, float]]], output_dir: str | Path, console: Console | None = None
) -> dict[str, Any]:
    """Prints the tables of an evaluation and writes ``report.json``, ``report.csv`` and ``report.md``.

    Args:
        results: catalog entry -> what its evaluator returned. Empty ones (of other ranks) are passed over.
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
    folder = Path(output_dir)
    write_atomically(folder / "report.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_atomically(folder / "report.csv", as_csv(scores))
    write_atomically(folder / "report.md", markdown(scores))
    logger.info("Wrote the report of %d datasets to %s/report.{json,csv,md}", len(scores), folder)
    return content


def collect(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[DatasetScores]:
    """Sorts the flat scores of evaluators by what they are, with names and colours from the catalog.

    Raises:
        KeyError: an entry is not registered, or a score is missing.
    """
    return [_of_entry(catalog, result["sem_seg"]) for catalog, result in results.items() if result]


def mean_miou(scores: Sequence[DatasetScores]) -> float:
    """Mean of the datasets' mIoU, each counted once; nan if there is none."""
    return confusion.mean([one.overall["mIoU"] for one in scores])


def as_json(scores: Sequence[DatasetScores]) -> dict[str, Any]:
    """The report as plain JSON values; nan becomes None."""
    datasets = {}
    for one in scores:
        datasets[one.catalog] = {
            "dataset": one.dataset,
            "images": one.images,
            "classes": len(one.iou),
            "classes_scored": one.classes_scored,
            **_plain(one.overall),
            "IoU": _plain(one.iou),
            "ACC": _plain(one.accuracy),
            "official": None,
        }
        if one.official:
            datasets[one.catalog]["official"] = {
                "rule": one.official.rule,
                "title": one.official.title,
                "difference": one.official.difference,
                **_plain(one.official.overall),
                "IoU": _plain(one.official.iou),
                "groupings": {name: _plain(groups) for name, groups in one.official.groupings.items()},
            }
    return {"unit": "percent", "datasets": datasets, "mean": _plain({"mIoU": mean_miou(scores)})}


def as_csv(scores: Sequence[DatasetScores]) -> str:
    """One value per row: catalog, dataset, rule (plain or official), metric, class or group, value; empty = n/a."""
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n")
    write.writerow(["catalog", "dataset", "rule", "metric", "class", "value"])

    def rows(one: DatasetScores, rule: str, metric: str | None, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            names = (metric, key) if metric else (key, "")
            write.writerow([one.catalog, one.dataset, rule, *names, "" if math.isnan(value) else repr(value)])

    for one in scores:
        rows(one, "plain", None, {**one.overall, "images": one.images, "classes_scored": one.classes_scored})
        rows(one, "plain", "IoU", one.iou)
        rows(one, "plain", "ACC", one.accuracy)
        if one.official:
            rows(one, one.official.rule, None, one.official.overall)
            rows(one, one.official.rule, "IoU", one.official.iou)
            for grouping, groups in one.official.groupings.items():
                rows(one, one.official.rule, f"{grouping} IoU", groups)
    return text.getvalue()


def _of_entry(catalog: str, flat: Mapping[str, float]) -> DatasetScores:
    metadata = MetadataCatalog.get(catalog)
    space = metadata.label_space
    return DatasetScores(
        catalog=catalog,
        dataset=metadata.dataset,
        images=int(flat["images"]),
        classes_scored=int(flat["classes"]),
        overall={key: flat[key] for key in ("mIoU", "fwIoU", "mACC", "pACC")},
        iou={name: flat[f"IoU-{name}"] for name in space.classes},
        accuracy={name: flat[f"ACC-{name}"] for name in space.classes},
        colors=dict(zip(space.classes, map(tuple, space.colors.tolist()))),
        official=_official(metadata, flat),
    )


def _official(metadata: Any, flat: Mapping[str, float]) -> OfficialScores | None:
    rule = rule_of(metadata)
    if rule is None:
        return None
    groupings = {
        name: {group: flat[f"official_{name}_IoU-{group}"] for group in groups}
        for name, groups in rule.groupings.items()
    }
    iou = {name: flat[f"official_IoU-{name}"] for name in rule.classes}
    single = {f"official_IoU-{name}" for name in iou}
    single |= {f"official_{name}_IoU-{group}" for name, groups in groupings.items() for group in groups}
    prefix = "official_"
    overall = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix) and k not in single}
    name = metadata.spec.evaluation.official
    return OfficialScores(name, rule.title, rule.difference, overall, iou, groupings)


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {key: None if math.isnan(value) else float(value) for key, value in values.items()}
