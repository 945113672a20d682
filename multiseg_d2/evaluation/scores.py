"""Scores of an evaluation sorted by what they are: what a report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.data import MetadataCatalog

from . import confusion
from .official import rule_of

__all__ = ["DatasetScores", "OfficialScores", "collect", "mean_miou"]


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


def collect(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[DatasetScores]:
    """Sorts the flat scores of evaluators by what they are, with names and colours from the catalog.

    Raises:
        KeyError: an entry is not registered, or a score is missing.
    """
    return [_of_entry(catalog, result["sem_seg"]) for catalog, result in results.items() if result]


def mean_miou(scores: Sequence[DatasetScores]) -> float:
    """Mean of the datasets' mIoU, each counted once; nan if there is none."""
    return confusion.mean([one.overall["mIoU"] for one in scores])


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
