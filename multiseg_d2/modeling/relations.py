"""Where the relations between a union's classes come from: measured, from the taxonomy, from a file, or none."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from ..class_relations import THRESHOLD, ClassResponses, no_relations, relations_text, taxonomy_relations
from ..label_space import IGNORE
from ..unified import NO_CLASS
from .catalog import catalog_space, class_meanings

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
        statistics: ``""`` = measure them on ``entries``; ``"taxonomy"``; ``"none"``; else a file of class responses.
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
            measured = self._load(head) if self.statistics else self.measure(head, run_over)
            relations = measured.relations()
        if self.statistics != "none":
            logger.info("class relations\n%s", relations_text(union.names, relations, measured))
        return np.stack([relations[dataset] for dataset in union.datasets])

    def measure(self, head: UnifiedHead, run_over: Callable[..., Any]) -> ClassResponses:
        """One pass over the training sets; with a cosine classifier responses are cosines.

        Args:
            head: whose scores are averaged.
            run_over: ``run_over(entry, evaluator, labels=True, views=False)``.
        """
        if not head.cosine_scale:
            logger.warning("relations are measured with a linear classifier: their threshold is one of cosines")
        union, scale = head.union, head.cosine_scale or 1.0
        responses, pixels = {}, {}
        with _scoring_union(head):
            for entry in self.entries:
                dataset = catalog_space(entry)[0]
                table = union.tables[dataset]
                sums, counts = run_over(entry, MeanResponses(table, union.size), labels=True, views=False)["responses"]
                responses[dataset] = responses.get(dataset, 0) + sums / scale
                pixels[dataset] = pixels.get(dataset, 0) + counts
        means = {d: responses[d] / np.maximum(pixels[d], 1)[:, None] for d in responses}
        present = dict(zip(union.datasets, union.present))
        measured = ClassResponses(union.names, present, means, pixels, self.threshold)
        if self.folder and comm.is_main_process():
            measured.save(os.path.join(self.folder, STATISTICS_FILE))
        return measured

    def _load(self, head: UnifiedHead) -> ClassResponses:
        measured = ClassResponses.load(self.statistics)
        if measured.classes != head.union.names or tuple(measured.present) != head.union.datasets:
            raise ValueError(
                f"{self.statistics} was measured for {list(measured.present)} and their classes\n  "
                f"{list(measured.classes)}\nbut the model has {list(head.union.datasets)} and\n  "
                f"{list(head.union.names)}"
            )
        return measured


class MeanResponses(DatasetEvaluator):
    """Sums the scores of all classes of a union over the labelled pixels of each class.

    Args:
        table: (C,) local id -> union id.
        size: U.
    """

    def __init__(self, table: np.ndarray, size: int) -> None:
        self._table = np.full(IGNORE + 1, NO_CLASS, np.int64)
        self._table[: len(table)] = table
        self._size = size
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._sums = torch.zeros(self._size, self._size, dtype=torch.float64)
        self._counts = torch.zeros(self._size, dtype=torch.int64)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Adds samples with ``sem_seg`` (H, W) local ids and their (U, H, W) scores."""
        for sample, output in zip(inputs, outputs, strict=True):
            scores = output["sem_seg"].flatten(1)  # (U, P)
            target = torch.from_numpy(self._table[np.asarray(sample["sem_seg"])]).flatten().to(scores.device)  # (P,)
            for u in target.unique().tolist():
                if u != NO_CLASS:
                    chosen = target == u
                    self._sums[u] += scores[:, chosen].double().sum(1).cpu()
                    self._counts[u] += int(chosen.sum())

    def evaluate(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """``{"responses": ((U, U) sums, (U,) pixels)}`` over all processes."""
        parts = comm.all_gather((self._sums.numpy(), self._counts.numpy()))
        return {"responses": (sum(part[0] for part in parts), sum(part[1] for part in parts))}


@contextmanager
def _scoring_union(head: UnifiedHead):
    head.scoring_union(True)
    try:
        yield
    finally:
        head.scoring_union(False)
