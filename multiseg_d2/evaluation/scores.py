"""Scores of an evaluation sorted by what they are: what a report is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from . import confusion
from .knowledgeability import known_concepts
from .official import rule_of

__all__ = [
    "Coverage",
    "DatasetScores",
    "OfficialScores",
    "collect",
    "harmonic_mean",
    "knowledgeability",
    "means",
    "with_means",
]


@dataclass(frozen=True)
class Coverage:
    """What a model has to do with a catalog entry.

    Attributes:
        seen: whether it was trained on the entry's dataset.
        unnameable: classes of the entry's label space that it can never predict; they score 0.
    """

    seen: bool = True
    unnameable: tuple[str, ...] = ()


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
        entry: name of the entry, for example ``"camvid_val"``.
        dataset: name of its label space.
        images: number of images scored.
        classes_scored: number of classes with ground truth.
        overall: ``mIoU``, ``fwIoU``, ``mACC`` and ``pACC``.
        iou: class -> value, in local order.
        accuracy: likewise.
        colors: class -> RGB.
        official: None where the plain scores are the dataset's own.
        coverage: whether the model was trained on the dataset, and which classes it cannot name.
    """

    entry: str
    dataset: str
    images: int
    classes_scored: int
    overall: Mapping[str, float]
    iou: Mapping[str, float]
    accuracy: Mapping[str, float]
    colors: Mapping[str, tuple[int, int, int]]
    official: OfficialScores | None
    coverage: Coverage = Coverage()

    @property
    def nameable_miou(self) -> float:
        """Mean IoU over the classes that have ground truth and that the model can name; nan if there is none."""
        return confusion.mean([value for name, value in self.iou.items() if name not in self.coverage.unnameable])

    @property
    def concepts(self) -> float:
        """Mean number of the entry's classes that the model recognises, see :func:`.known_concepts`."""
        return known_concepts(np.array(list(self.iou.values())) / 100)


def collect(results: Mapping[str, Mapping[str, Any]]) -> list[DatasetScores]:
    """Sorts the flat scores of evaluators by what they are, with names and colours from the catalog.

    Args:
        results: catalog entry -> what its evaluator returned. Entries without ``"sem_seg"`` (of other ranks, or of
            evaluators that count something else) are passed over.

    Raises:
        KeyError: an entry is not registered, or a score is missing.
    """
    return [
        _of_entry(entry, result["sem_seg"], result.get("coverage", Coverage()))
        for entry, result in results.items()
        if result and "sem_seg" in result
    ]


def with_means(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results of an evaluation with ``"mean"``, see :func:`means`, for the event storage; empty ones stay so."""
    scores = collect(results)
    return {**results, "mean": means(scores)} if scores else dict(results)


def means(scores: Sequence[DatasetScores]) -> dict[str, Any]:
    """Means over the entries, each counted once: of all, and of those that the model was trained on or not.

    Returns:
        ``mIoU``, ``harmonic_mIoU`` and the same over the classes that the model can name, ``nameable_mIoU`` and
        ``harmonic_nameable_mIoU``; in ``seen`` and ``unseen`` the same four of these entries. nan where there is none.
        ``knowledgeability``, see there.
    """
    seen = [one for one in scores if one.coverage.seen]
    unseen = [one for one in scores if not one.coverage.seen]
    means_of = {**_four_means(scores), "seen": _four_means(seen), "unseen": _four_means(unseen)}
    return {**means_of, "knowledgeability": knowledgeability(scores)}


def knowledgeability(scores: Sequence[DatasetScores]) -> float:
    """Known concepts of a model: those of the entry that asks for most classes, the mean where several ask for as many.

    Our reading: a model is asked in the widest vocabulary that it is tested in; comparable are models that were tested
    on the same entries. nan without entries.
    """
    widest = max((len(one.iou) for one in scores), default=0)
    return confusion.mean([one.concepts for one in scores if len(one.iou) == widest])


def _four_means(scores: Sequence[DatasetScores]) -> dict[str, float]:
    plain, nameable = [one.overall["mIoU"] for one in scores], [one.nameable_miou for one in scores]
    return {
        "mIoU": confusion.mean(plain),
        "harmonic_mIoU": harmonic_mean(plain),
        "nameable_mIoU": confusion.mean(nameable),
        "harmonic_nameable_mIoU": harmonic_mean(nameable),
    }


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of the values that are numbers; 0 if one of them is 0, nan if there is none."""
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers or min(numbers) <= 0:
        return 0.0 if numbers else math.nan
    return len(numbers) / sum(1 / value for value in numbers)


def _of_entry(entry: str, flat: Mapping[str, float], coverage: Coverage) -> DatasetScores:
    metadata = MetadataCatalog.get(entry)
    space = metadata.label_space
    return DatasetScores(
        entry=entry,
        dataset=metadata.dataset,
        images=int(flat["images"]),
        classes_scored=int(flat["classes"]),
        overall={key: flat[key] for key in ("mIoU", "fwIoU", "mACC", "pACC")},
        iou={name: flat[f"IoU-{name}"] for name in space.classes},
        accuracy={name: flat[f"ACC-{name}"] for name in space.classes},
        colors=dict(zip(space.classes, map(tuple, space.colors.tolist()))),
        official=_official(metadata, flat),
        coverage=coverage,
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
