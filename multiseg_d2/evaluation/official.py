"""The rules by which benchmarks score, where they differ from the plain mean IoU.

A rule is a class in :data:`OFFICIAL_RULES` under the name that a dataset spec gives as ``evaluation.official``. Its
scores come from confusion matrices alone, so evaluation stays streaming. What the plain scores do is in
:mod:`multiseg_d2.evaluation.confusion`: a class without ground truth has no IoU and is left out of the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from detectron2.data.catalog import Metadata
from PIL import Image

from ..data.files import data_root
from . import confusion

__all__ = ["OFFICIAL_RULES", "OfficialRule", "build_rule", "rule_of"]

Groupings = Mapping[str, Mapping[str, Sequence[str]]]


class OfficialRule:
    """Scores of one benchmark; as it stands, by the Cityscapes rule, which most follow.

    Args:
        classes: C class names in local order.
        groupings: coarser scores of the dataset: grouping -> group -> class names.

    Attributes:
        title: what the report calls the rule.
        difference: one line on how it differs from the plain scores.
        extra_matrices: names of further matrices that the rule counts, each (C, C + 1).
    """

    title = ""
    difference = "a class that is predicted but has no ground truth scores 0 and is part of the mean"
    extra_matrices: tuple[str, ...] = ()

    def __init__(self, classes: Sequence[str], groupings: Groupings) -> None:
        self.classes = tuple(classes)
        local_ids = {name: c for c, name in enumerate(self.classes)}
        unknown = {n for groups in groupings.values() for names in groups.values() for n in names} - set(local_ids)
        if unknown:
            raise ValueError(f"the groupings name classes that do not exist: {sorted(unknown)}")
        self.groupings = {
            grouping: {group: [local_ids[name] for name in names] for group, names in groups.items()}
            for grouping, groups in groupings.items()
        }

    def count(
        self, sample: Mapping, prediction: np.ndarray, ground_truth: np.ndarray, matrix: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Counts of one image for ``extra_matrices``.

        Args:
            sample: the mapped dataset dict.
            prediction: (H, W) uint8 local ids.
            ground_truth: (H, W) uint8 local ids.
            matrix: (C, C + 1) the plain counts of this image.
        """
        return {}

    def class_iou(self, matrix: np.ndarray) -> np.ndarray:
        """IoU of each row of a matrix in [0, 1], (C,) float64; nan where the rule leaves a class out.

        A class that is predicted but has no ground truth scores 0; one that is neither is left out.
        """
        num_classes = len(matrix)
        hits = matrix.diagonal().astype(np.float64)
        union = matrix.sum(1) + matrix[:, :num_classes].sum(0) - matrix.diagonal()
        return np.divide(hits, union, out=np.full(num_classes, np.nan), where=union > 0)

    def mean_iou(self, iou: np.ndarray, matrix: np.ndarray) -> float:
        """The mean of the classes' scores."""
        return confusion.mean(iou)

    def group_matrix(self, matrix: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
        """The matrix by which a grouping is scored, (G, G + 1)."""
        return confusion.merge(matrix, groups)

    def group_iou(self, matrix: np.ndarray, groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """IoU of each group, (G,), and the matrix that its mean is taken over."""
        merged = self.group_matrix(matrix, groups)
        return self.class_iou(merged), merged

    def score(self, matrices: Mapping[str, np.ndarray]) -> dict[str, float]:
        """All scores of the rule.

        Args:
            matrices: ``"plain"`` and each of ``extra_matrices``, summed over all images and ranks.

        Returns:
            Fractions in [0, 1] or nan: ``mIoU``, ``IoU-<class>``, and per grouping ``<grouping>_mIoU``,
            ``<grouping>_IoU-<group>``.
        """
        return self._scores(self.scored_matrix(matrices))

    def scored_matrix(self, matrices: Mapping[str, np.ndarray]) -> np.ndarray:
        """The matrix that the rule scores."""
        return matrices["plain"]

    def _scores(self, matrix: np.ndarray) -> dict[str, float]:
        iou = self.class_iou(matrix)
        scores = {"mIoU": self.mean_iou(iou, matrix)}
        scores.update({f"IoU-{name}": float(v) for name, v in zip(self.classes, iou, strict=True)})
        for grouping, groups in self.groupings.items():
            iou, merged = self.group_iou(matrix, list(groups.values()))
            scores[f"{grouping}_mIoU"] = self.mean_iou(iou, merged)
            scores.update({f"{grouping}_IoU-{name}": float(v) for name, v in zip(groups, iou, strict=True)})
        return scores


class CityscapesRule(OfficialRule):
    """``cityscapesscripts``' pixel-level evaluation: class IoU and category IoU (its iIoU needs instance maps).

    The script's matrix is over all label ids, but ignored rows are dropped, and every column that is no evaluated
    class only adds false negatives, so the void column holds all that it needs.
    """

    title = "cityscapesscripts"


class KittiRule(OfficialRule):
    """KITTI's semantic benchmark: the Cityscapes script (its iIoU needs instance maps)."""

    title = "KITTI (Cityscapes script)"


class WildDashRule(OfficialRule):
    """WildDash's "classic" IoU, Cityscapes style, with its rule for negative images. Its script is not public.

    Negative images lie outside what a driving system is made for. On them *void* is right wherever the best-effort
    class is, by what public texts say of the rule; everywhere else it is an error. No public list says which images
    these are: their ids, one per line, in ``<data root>/wilddash2/negative.txt``. Without that file there are none.
    """

    title = "WildDash classic (script not public)"
    extra_matrices = ("lenient", "negative")
    #: Below the data root.
    LIST = "wilddash2/negative.txt"

    @cached_property
    def negative(self) -> frozenset[str]:
        """Ids of the negative images."""
        path = Path(data_root(), self.LIST)
        return frozenset(path.read_text().split()) if path.is_file() else frozenset()

    def count(
        self, sample: Mapping, prediction: np.ndarray, ground_truth: np.ndarray, matrix: np.ndarray
    ) -> dict[str, np.ndarray]:
        if str(sample.get("image_id")) not in self.negative:
            return {"lenient": matrix, "negative": np.zeros_like(matrix)}
        lenient = matrix.copy()
        lenient[np.diag_indices(len(matrix))] += matrix[:, -1]  # what was predicted void is right
        lenient[:, -1] = 0
        return {"lenient": lenient, "negative": lenient}

    def scored_matrix(self, matrices: Mapping[str, np.ndarray]) -> np.ndarray:
        return matrices["lenient"]

    def score(self, matrices: Mapping[str, np.ndarray]) -> dict[str, float]:
        """As :meth:`OfficialRule.score`, and ``negative_mIoU``, that of the negative images, where there are any."""
        scores = super().score(matrices)
        if matrices["negative"].any():
            iou = self.class_iou(matrices["negative"])
            scores["negative_mIoU"] = self.mean_iou(iou, matrices["negative"])
        return scores


class BddRule(OfficialRule):
    """``bdd100k.eval.seg``: an extra column for out-of-range predictions; classes of the ground truth are averaged."""

    title = "bdd100k.eval.seg"
    difference = "classes without ground truth are printed as 0 but left out of the mean; its 'Acc' is precision"

    def class_iou(self, matrix: np.ndarray) -> np.ndarray:
        return np.nan_to_num(super().class_iou(matrix))

    def mean_iou(self, iou: np.ndarray, matrix: np.ndarray) -> float:
        return confusion.mean(iou[matrix.sum(1) > 0])

    def score(self, matrices: Mapping[str, np.ndarray]) -> dict[str, float]:
        """As :meth:`OfficialRule.score`, and ``mAcc`` as the script defines it: the mean precision."""
        matrix = self.scored_matrix(matrices)
        predicted = matrix[:, : len(matrix)].sum(0)
        precision = np.divide(matrix.diagonal(), predicted, out=np.zeros(len(matrix)), where=predicted > 0)
        return {**self._scores(matrix), "mAcc": self.mean_iou(precision, matrix)}


class IddRule(OfficialRule):
    """IDD's ``evaluate_mIoU.py`` at the leaderboard's resolution.

    Level 3 has a 27th column "misc", which is the void column here. The coarser levels leave that column out, so a void
    prediction is no error there. The published script builds level 1 from level-2 indices but applies them to the
    level-3 matrix; here level 1 is what its name says.
    """

    title = "IDD evaluate_mIoU.py at 1920x1080"
    difference = (
        "maps are resized to 1920x1080; a class that is predicted but has no ground truth scores 0, "
        "one that is neither makes the mean n/a; coarser levels drop void predictions"
    )
    extra_matrices = ("resized",)
    size = (1920, 1080)

    def count(
        self, sample: Mapping, prediction: np.ndarray, ground_truth: np.ndarray, matrix: np.ndarray
    ) -> dict[str, np.ndarray]:
        if prediction.shape[::-1] != self.size:
            resized = [
                np.asarray(Image.fromarray(ids).resize(self.size, Image.Resampling.NEAREST))
                for ids in (prediction, ground_truth)
            ]
            matrix = confusion.count(*resized, len(self.classes))
        return {"resized": matrix}

    def scored_matrix(self, matrices: Mapping[str, np.ndarray]) -> np.ndarray:
        return matrices["resized"]

    def mean_iou(self, iou: np.ndarray, matrix: np.ndarray) -> float:
        return float(iou.mean())

    def group_matrix(self, matrix: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
        return _without_void(super().group_matrix(matrix, groups))


class MapillaryRule(OfficialRule):
    """Mapillary's evaluation: rows and columns of labels that are not evaluated are removed."""

    title = "mapillary_vistas"
    difference = "a void prediction is dropped, not a false negative; a class predicted without ground truth scores 0"

    def scored_matrix(self, matrices: Mapping[str, np.ndarray]) -> np.ndarray:
        return _without_void(matrices["plain"])


class CocoStuffRule(OfficialRule):
    """The COCO-Stuff evaluation of deeplab-pytorch: the mean over the classes that occur in the ground truth.

    The ids that were never annotated (11 of 182) are no classes here, and would be left out of the mean if they were.
    """

    title = "COCO-Stuff (deeplab-pytorch)"
    difference = "none: classes without ground truth, and so the 11 empty ids of 182, are left out of the mean"

    def class_iou(self, matrix: np.ndarray) -> np.ndarray:
        return confusion.class_iou(matrix)


class SynthiaRule(OfficialRule):
    """SYNTHIA to Cityscapes: 16 classes, and the mean over some of them (mIoU* over 13) by the same matrix.

    Unlike other groupings, whose classes in no group are left out, each group here is one class with its score among
    all: wall taken for building stays an error of building. Source: CBST's and CRST's evaluation.
    """

    title = "SYNTHIA to Cityscapes"

    def group_iou(self, matrix: np.ndarray, groups: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        chosen = [c for (c,) in groups]
        return self.class_iou(matrix)[chosen], matrix[chosen]


class Ade20kRule(OfficialRule):
    """The scene parsing benchmark: a class that is neither predicted nor there counts as 0; a score with accuracy.

    ``pAcc`` is the share of labelled pixels that are right, ``score`` the mean of it and the mean IoU.
    """

    title = "ADE20K scene parsing"
    difference = "classes without ground truth score 0 and are part of the mean; score = (mIoU + pixel accuracy) / 2"

    def class_iou(self, matrix: np.ndarray) -> np.ndarray:
        return np.nan_to_num(super().class_iou(matrix))

    def score(self, matrices: Mapping[str, np.ndarray]) -> dict[str, float]:
        """As :meth:`OfficialRule.score`, with ``pAcc`` and ``score``; nan where no pixel is labelled."""
        matrix = self.scored_matrix(matrices)
        scores, pixels = self._scores(matrix), matrix.sum()
        accuracy = float(matrix.diagonal().sum() / pixels) if pixels else float("nan")
        return {**scores, "pAcc": accuracy, "score": (scores["mIoU"] + accuracy) / 2}


#: By the name that dataset specs use.
OFFICIAL_RULES: dict[str, type[OfficialRule]] = {
    "cityscapes": CityscapesRule,
    "kitti": KittiRule,
    "wilddash2": WildDashRule,
    "bdd100k": BddRule,
    "idd": IddRule,
    "mapillary": MapillaryRule,
    "coco_stuff": CocoStuffRule,
    "synthia": SynthiaRule,
    "ade20k": Ade20kRule,
}


def build_rule(name: str, classes: Sequence[str], groupings: Groupings) -> OfficialRule | None:
    """Builds the rule that a spec names; None for ``"none"``, where the plain scores are the dataset's own.

    Raises:
        KeyError: there is no such rule.
        ValueError: a grouping names an unknown class.
    """
    return None if name == "none" else OFFICIAL_RULES[name](classes, groupings)


def rule_of(metadata: Metadata) -> OfficialRule | None:
    """The official rule of a catalog entry; None where the plain scores are its own."""
    spec = metadata.spec.evaluation
    return build_rule(spec.official, metadata.label_space.classes, spec.groupings)


def _without_void(matrix: np.ndarray) -> np.ndarray:
    return np.concatenate([matrix[:, :-1], np.zeros_like(matrix[:, -1:])], axis=1)
