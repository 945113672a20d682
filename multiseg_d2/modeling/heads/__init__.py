"""Heads: a head is a method. It owns the shared decoder, the classifiers and the losses."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ...label_space import LabelSpace
from ..batch import Batch
from .per_dataset import PerDatasetHead

__all__ = ["Head", "PerDatasetHead"]


@runtime_checkable
class Head(Protocol):
    """The shape that :class:`~multiseg_d2.modeling.MultiDatasetSegmentor` needs; no base class.

    Register a head in Detectron2's ``SEM_SEG_HEADS_REGISTRY``; it is built as ``head(cfg, backbone.output_shape())``
    and chosen by ``MODEL.SEM_SEG_HEAD.NAME``. It gets its label spaces from
    :func:`multiseg_d2.modeling.catalog.training_spaces`.

    Attributes:
        datasets: the datasets that it can be trained on, in the order of ``DATASETS.TRAIN``.
        spaces: label spaces that it can be asked for, by name.
        activation: optional; "softmax" (default) or "sigmoid": what turns its logits into probabilities. Averages over
            scales and flips are taken over these.
    """

    datasets: tuple[str, ...]
    spaces: dict[str, LabelSpace]

    def losses(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Scalars to be summed, under names ``loss_...``; anything else goes to Detectron2's event storage.

        Each is the local sum over pixels divided by a count averaged over processes (``batch.num_valid``), and is zero
        but attached to the graph where nothing is labelled.
        """

    def logits(self, features: dict[str, Tensor], space: LabelSpace) -> Tensor:
        """(N, C, h, w) scores in the C classes of ``space``, at any resolution.

        Raises:
            UnknownLabelSpaceError: the head cannot name these classes.
        """
