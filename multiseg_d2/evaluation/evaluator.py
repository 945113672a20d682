"""The evaluator of one catalog entry, in its own label space: streaming, range-checked, constant in memory."""

from __future__ import annotations

import io
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..atomic_file import write_atomically
from ..data.decode import read_image
from ..data.labels import label_path, read_local_label
from ..data.views import register_views
from ..label_space import IGNORE
from ..user_error import UserError
from . import confusion, pictures
from .confusion_plot import confusion_plot
from .official import rule_of
from .scores import Coverage

__all__ = ["EvaluationError", "MultiDatasetEvaluator", "build_evaluator", "predicted_labels"]

logger = logging.getLogger(__name__)


class EvaluationError(UserError, ValueError):
    """Something cannot be scored. The message names the catalog entry and the file."""


def build_evaluator(cfg: CfgNode, entry: str, output_dir: str | None = None) -> MultiDatasetEvaluator:
    """Builds the evaluator of an entry of ``DATASETS.TEST``.

    Args:
        cfg: for ``OUTPUT_DIR`` and ``TEST.NUM_PICTURES``.
        entry: for example ``"camvid_val"``.
        output_dir: folder of the results; the evaluator writes to the folder ``entry`` in it.
            Default: ``OUTPUT_DIR/inference``.
    """
    output_dir = output_dir or os.path.join(cfg.OUTPUT_DIR, "inference")
    return MultiDatasetEvaluator(entry, output_dir=output_dir, num_pictures=cfg.TEST.NUM_PICTURES)


class MultiDatasetEvaluator(DatasetEvaluator):
    """Scores predictions on one catalog entry by the plain rule and, where it differs, by the dataset's official one.

    Used as any of Detectron2's evaluators. Only confusion matrices are kept, whatever the number of images.

    Args:
        entry: entry with pixel labels.
        output_dir: folder of the results, None: nothing is written.
        num_pictures: pictures (image, ground truth, prediction, errors) that are written, spread evenly over the entry,
            always of the same images; if there are any, the confusion matrix is drawn, too.
        distributed: whether the counts of all ranks are added up.

    Attributes:
        coverage: whether the model was trained on the dataset and which classes it cannot name; set by who knows the
            model, before :meth:`evaluate`. Nothing is scored differently for it, but the report says it.

    Raises:
        EvaluationError: the entry has no pixel labels.
    """

    def __init__(
        self, entry: str, *, output_dir: str | None = None, num_pictures: int = 0, distributed: bool = True
    ) -> None:
        self._name = entry
        register_views((entry,))
        self._metadata = MetadataCatalog.get(entry)
        if self._metadata.annotation != "pixel":
            raise EvaluationError(
                f"{entry} has no pixel labels (annotation {self._metadata.annotation!r}), so it cannot be "
                "scored. Take it out of DATASETS.TEST; tools/predict.py predicts images without labels."
            )
        self._space = self._metadata.label_space
        self._rule = rule_of(self._metadata)
        self._folder = os.path.join(output_dir, entry) if output_dir else None
        self._num_pictures = num_pictures if output_dir else 0
        self._distributed = distributed
        self.coverage = Coverage()
        self.reset()

    def reset(self) -> None:
        """Forgets all counts."""
        names = ("plain", *(self._rule.extra_matrices if self._rule else ()))
        self._matrices = {name: confusion.empty(self._space.num_classes) for name in names}
        self._images = 0
        self._pictured = self._choose_pictures()

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Counts one batch.

        Args:
            inputs: samples of the test loader, with ``file_name`` and what names the label.
            outputs: per sample ``{"sem_seg": (C, H, W) scores}``, (C + 1, H, W) where the last one is that of *void*,
                or ``{"sem_seg_labels": (H, W) local ids}`` with 255 where nothing is predicted; tensors on any device.
                H and W are the label's.

        Raises:
            EvaluationError: no label, another size or number of classes, scores that are not numbers, illegal ids.
        """
        for sample, output in zip(inputs, outputs, strict=True):
            where = f"{self._name}: {sample['file_name']}"
            if label_path(sample) is None:
                raise EvaluationError(f"{where} has no label (a hidden test split?): it can be predicted, not scored")
            try:
                prediction = predicted_labels(output, self._space.num_classes)
                ground_truth = read_local_label(sample)
                matrix = confusion.count(prediction, ground_truth, self._space.num_classes)
            except ValueError as error:
                raise EvaluationError(f"{where}: {error}") from error
            self._matrices["plain"] += matrix
            if self._rule:
                for name, more in self._rule.count(sample, prediction, ground_truth, matrix).items():
                    self._matrices[name] += more
            self._images += 1
            if sample["file_name"] in self._pictured:
                self._write_picture(sample, prediction, ground_truth, matrix)

    def evaluate(self) -> OrderedDict[str, Any] | None:
        """The scores, in percent, under the names that Detectron2's ``SemSegEvaluator`` uses.

        Returns:
            ``{"sem_seg": scores, "coverage": coverage}`` on the main process, None on the others. The scores are
            ``mIoU`` (mean over the classes with ground truth), ``fwIoU``, ``mACC``, ``pACC``, ``IoU-<class>``,
            ``ACC-<class>`` (nan: n/a, the class has no ground truth), ``classes`` (number of classes scored),
            ``images``, and with the prefix ``official_`` what :meth:`OfficialRule.score` returns.

        Raises:
            EvaluationError: no image was processed.
        """
        parts = [(self._matrices, self._images)]
        if self._distributed:
            comm.synchronize()
            parts = comm.gather(parts[0])
            if not comm.is_main_process():
                return None
        images = sum(count for _, count in parts)
        if not images:
            raise EvaluationError(f"{self._name}: no image was evaluated")
        matrices = {name: sum(part[name] for part, _ in parts) for name in self._matrices}
        self._write_matrix(matrices["plain"])
        return OrderedDict(sem_seg=self._scores(matrices, images), coverage=self.coverage)

    def _scores(self, matrices: Mapping[str, np.ndarray], images: int) -> OrderedDict[str, float]:
        matrix, classes = matrices["plain"], self._space.classes
        iou, accuracy = confusion.class_iou(matrix), confusion.class_accuracy(matrix)
        scores = OrderedDict(
            mIoU=100 * confusion.mean(iou),
            fwIoU=100 * confusion.frequency_weighted_iou(matrix),
            mACC=100 * confusion.mean(accuracy),
            pACC=100 * confusion.pixel_accuracy(matrix),
            classes=int((~np.isnan(iou)).sum()),
            images=images,
        )
        official = self._rule.score(matrices) if self._rule else {}
        by_kind = [(f"official_{key}", value) for key, value in official.items()]
        scores.update((key, 100 * value) for key, value in by_kind if "-" not in key)
        scores.update((f"IoU-{name}", 100 * float(value)) for name, value in zip(classes, iou, strict=True))
        scores.update((f"ACC-{name}", 100 * float(value)) for name, value in zip(classes, accuracy, strict=True))
        scores.update((key, 100 * value) for key, value in by_kind if "-" in key)
        return scores

    def _choose_pictures(self) -> dict[str, int]:
        """File name -> position in the entry, of the images that are drawn."""
        if not self._num_pictures:
            return {}
        records = DatasetCatalog.get(self._name)
        chosen = pictures.spread(len(records), self._num_pictures)
        return {records[i]["file_name"]: i for i in chosen}

    def _write_picture(
        self, sample: Mapping[str, Any], prediction: np.ndarray, ground_truth: np.ndarray, matrix: np.ndarray
    ) -> None:
        picture = pictures.comparison(
            read_image(sample["file_name"], "RGB"),
            {"ground truth": ground_truth, "prediction": prediction},
            self._space.classes,
            self._space.colors,
            title=f"{self._name}   {os.path.basename(sample['file_name'])}   "
            f"pixel accuracy {100 * confusion.pixel_accuracy(matrix):.1f} %   "
            f"mIoU {100 * confusion.mean(confusion.class_iou(matrix)):.1f} %",
        )
        stem = os.path.splitext(os.path.basename(sample["file_name"]))[0]
        position = self._pictured[sample["file_name"]]
        pictures.save(picture, os.path.join(self._folder, "pictures", f"{position:06d}_{stem}.png"))
        _show(f"evaluation/{self._name}/{stem}", picture)

    def _write_matrix(self, matrix: np.ndarray) -> None:
        if self._folder is None:
            return
        arrays = io.BytesIO()
        np.savez_compressed(arrays, matrix=matrix, classes=np.array(self._space.classes))
        write_atomically(os.path.join(self._folder, "confusion_matrix.npz"), arrays.getvalue())
        if self._num_pictures:
            picture = confusion_plot(matrix, self._space.classes, title=self._name)
            pictures.save(picture, os.path.join(self._folder, "confusion_matrix.png"))


def _show(name: str, picture: np.ndarray) -> None:
    """Puts a picture into Detectron2's event storage, for TensorBoard; outside a training run there is none."""
    try:
        storage = get_event_storage()
    except AssertionError:
        return
    storage.put_image(name, picture.transpose(2, 0, 1))  # (3, h, w)


def predicted_labels(output: Mapping[str, Any], num_classes: int) -> np.ndarray:
    """The label map of one output of a model.

    Args:
        output: see :meth:`MultiDatasetEvaluator.process`.
        num_classes: C.

    Returns:
        (H, W) local ids, uint8 where they come from scores; 255 where *void* has the largest score.

    Raises:
        ValueError: the scores are of another number of classes, or not numbers.
    """
    if getattr(output, "num_classes", num_classes) != num_classes:
        raise ValueError(
            f"the scores are of {output.num_classes} classes, but {num_classes} are needed: did the model answer in "
            "another label space?"
        )
    if "sem_seg_labels" in output:
        return torch.as_tensor(output["sem_seg_labels"]).cpu().numpy()
    scores = output["sem_seg"].detach()
    if scores.ndim != 3 or len(scores) not in (num_classes, num_classes + 1):
        raise ValueError(
            f"the scores are {tuple(scores.shape)}, but (C, H, W) with C = {num_classes} classes is needed (or one "
            "more for void): did the model answer in another label space?"
        )
    if scores.device.type != "cpu":
        labels = _argmax_on_device(scores)
    else:  # numpy has no bfloat16, and its float16 is slow
        labels = confusion.argmax((scores if scores.dtype == torch.float64 else scores.float()).numpy())
    if len(scores) > num_classes:
        labels[labels == num_classes] = IGNORE
    return labels


def _argmax_on_device(scores: torch.Tensor) -> np.ndarray:
    """As :func:`confusion.argmax`; of a GPU's tensor only the result, a byte per pixel, is copied."""
    best, labels = scores.max(dim=0)
    if torch.isnan(best).any():
        raise ValueError(f"{int(torch.isnan(best).sum())} pixels have a score that is not a number")
    return labels.to(torch.uint8).cpu().numpy()
