"""Where the relations between a union's classes come from: measured, from the taxonomy, from a file, or none."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from ..class_relations import THRESHOLD, ClassResponses, no_relations, relations_text, taxonomy_relations
from ..label_space import IGNORE
from ..unified import NO_CLASS
from ..user_error import ConfigError
from .catalog import catalog_space, class_meanings
from .class_means import ClassMeans

if TYPE_CHECKING:
    from .heads.unified import UnifiedHead

__all__ = ["STATISTICS_FILE", "MeanResponses", "RelationSource"]

logger = logging.getLogger(__name__)

#: What was measured, in OUTPUT_DIR.
STATISTICS_FILE = "class_responses.npz"


@dataclass(frozen=True)
class RelationSource:
    """How the class-relational loss gets its relations.

    Attributes:
        statistics: ``""`` = measure them on ``entries``; ``"taxonomy"``; ``"none"``; else a file of class responses
            (``.npz``) or a checkpoint with whose weights they are measured.
        entries: labelled catalog entries of the training sets.
        meanings: dataset -> (C, L) bool, for ``"taxonomy"``; see :func:`.taxonomy_relations`.
        threshold: of measured relations; that of a file is its own.
        folder: where measured responses are written; "" = nowhere.
    """

    statistics: str = ""
    entries: Sequence[str] = ()
    meanings: Mapping[str, np.ndarray] = field(default_factory=dict)
    threshold: float = THRESHOLD
    folder: str = ""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> RelationSource:
        """By ``MODEL.SEM_SEG_HEAD.CLASS_STATISTICS`` and ``DATASETS.TRAIN``."""
        entries = [e for e in cfg.DATASETS.TRAIN if MetadataCatalog.get(e).get("annotation", "pixel") == "pixel"]
        statistics = cfg.MODEL.SEM_SEG_HEAD.CLASS_STATISTICS
        meanings = class_meanings(cfg) if statistics == "taxonomy" else {}
        return cls(statistics, tuple(entries), meanings, folder=cfg.OUTPUT_DIR)

    def find(self, head: UnifiedHead, run_over: Callable[..., Any] | None) -> np.ndarray:
        """(K, U, U) int8 relations for the head's datasets, in their order; says in the log what they are.

        Raises:
            ValueError: a file is of other classes.
        """
        union, measured = head.union, None
        if self.statistics == "none":
            relations = {d: no_relations(row) for d, row in zip(union.datasets, union.present)}
        elif self.statistics == "taxonomy":
            relations = taxonomy_relations(union, self.meanings)
        else:
            stored = self.statistics.endswith(".npz")
            measured = self._load(head) if stored else self.measure(head, run_over, self.statistics)
            relations = measured.relations()
        if self.statistics != "none":
            logger.info("class relations\n%s", relations_text(union.names, relations, measured))
        return np.stack([relations[dataset] for dataset in union.datasets])

    def measure(self, head: UnifiedHead, run_over: Callable[..., Any], weights: str = "") -> ClassResponses:
        """One pass over the training sets; with a cosine classifier responses are cosines.

        Args:
            head: whose scores are averaged.
            run_over: ``run_over(entry, evaluator, labels=True, embeddings=True, weights=weights)``.
            weights: checkpoint with whose weights the pass is made; "" = the model's own.
        """
        if not head.cosine_scale:
            logger.warning("relations are measured with a linear classifier: their threshold is one of cosines")
        union, scale = head.union, head.cosine_scale or 1.0
        sums = {d: np.zeros((union.size, union.size)) for d in union.datasets}
        pixels = {d: np.zeros(union.size, np.int64) for d in union.datasets}
        for entry in self.entries:
            dataset = catalog_space(entry)[0]
            evaluator = MeanResponses(head.classifier, union.tables[dataset], union.size)
            result = run_over(entry, evaluator, labels=True, embeddings=True, weights=weights)
            means, counts = result["responses"]
            sums[dataset] += np.nan_to_num(means) * counts[:, None] / scale
            pixels[dataset] += counts
        responses = {d: sums[d] / np.maximum(pixels[d], 1)[:, None] for d in sums}
        present = dict(zip(union.datasets, union.present))
        measured = ClassResponses(union.names, present, responses, pixels, self.threshold)
        if self.folder and comm.is_main_process():
            measured.save(os.path.join(self.folder, STATISTICS_FILE))
        return measured

    def _load(self, head: UnifiedHead) -> ClassResponses:
        measured = ClassResponses.load(self.statistics)
        if measured.classes != head.union.names or tuple(measured.present) != head.union.datasets:
            raise ConfigError(
                f"{self.statistics} was measured for {list(measured.present)} and their classes\n  "
                f"{list(measured.classes)}\nbut the model has {list(head.union.datasets)} and\n  "
                f"{list(head.union.names)}"
            )
        return measured


class MeanResponses(DatasetEvaluator):
    """Means of the scores of all classes of a union over the labelled pixels of each class.

    Args:
        classifier: (N, D, h, w) embeddings -> (N, U, h, w) scores.
        table: (C,) local id -> union id.
        size: U.
    """

    def __init__(self, classifier: nn.Module, table: np.ndarray, size: int) -> None:
        self._classifier, self._size = classifier, size
        self._table = torch.full((IGNORE + 1,), NO_CLASS)
        self._table[: len(table)] = torch.from_numpy(table.astype(np.int64))
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._means = ClassMeans(self._size, self._size)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Adds samples with ``sem_seg`` (H, W) local ids and what ``MultiDatasetSegmentor.embed`` says of them."""
        for sample, output in zip(inputs, outputs, strict=True):
            labels = torch.as_tensor(sample["sem_seg"])
            scores = self._classifier(output["embedding"][None])  # (1, U, h, w)
            # Labels have the size of the file, embeddings that of what the network was shown.
            covers = [
                round(pixels * full / shown)
                for pixels, full, shown in zip(output["covers"], labels.shape, sample["image"].shape[-2:])
            ]
            self._means.add(scores, self._table[labels.long()][None], covers)

    def evaluate(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """``{"responses": ((U, U) means, NaN without pixels, (U,) pixels)}`` over all processes."""
        means, counts = self._means.means()
        return {"responses": (means.cpu().numpy(), counts.cpu().numpy())}
