"""One classifier over the union of all datasets' classes: UniSeg's head, and the multi-dataset baselines beside it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ...class_relations import no_relations
from ...label_space import IGNORE, LabelSpace
from ...unified import NO_CLASS, UnifiedClasses
from ...user_error import ConfigError
from ..batch import Batch
from ..catalog import UnknownLabelSpaceError, training_spaces
from ..losses import binary_loss
from ..relations import RelationSource
from .head import Head
from .per_dataset import SoftmaxLoss
from .trunk import Trunk

__all__ = ["LOSS_TYPES", "CosineClassifier", "UnifiedHead"]

logger = logging.getLogger(__name__)

LOSS_TYPES = ("cross_entropy", "bce", "null_bce", "relational_bce")
#: How far below the lowest score of a pixel a class is that the union cannot name; finite, so that scores can be
#: interpolated and averaged, and small enough never to win (exp(-30) = 1e-13).
_NEVER = 30.0


@SEM_SEG_HEADS_REGISTRY.register()
class UnifiedHead(Head):
    """Scores every image in the union of the training sets' classes (see :class:`.UnifiedClasses`).

    Losses: ``loss_<dataset>`` and, with an auxiliary branch, ``loss_aux_<dataset>``. Their sum is *one* mean over the
    labelled pixels of all datasets of the step, as in a single dataset that holds all images.

    The classes of a label space are scored by the union classes that it consists of, by their maximum where these are
    several. Classes that no union class names never win; they are listed once, and in :meth:`unnameable`.

    Args:
        trunk: decoder, dropout and auxiliary branch.
        label_spaces: for each dataset the space that its labels are in, in the order of training.
        loss_type: ``"cross_entropy"`` (softmax over the union), ``"bce"`` (what a dataset cannot name is a negative),
            ``"null_bce"`` (it is left out) or ``"relational_bce"`` (it is what the relations say).
        softmax_loss: what ``"cross_entropy"`` is computed by.
        cosine_scale: factor of the cosine between feature and class vector; 0 = a linear classifier.
        relations: where the relations of ``"relational_bce"`` come from; until :meth:`prepare` has asked for them,
            there are none.

    Raises:
        ValueError: an unknown loss.

    Source: UniSeg (ECCV 2022). Its losses are per-GPU means; ours are means over all processes.
    """

    scores_any_space = True
    measures_with = ("trunk", "classifier")

    @configurable
    def __init__(
        self,
        *,
        trunk: Trunk,
        label_spaces: Mapping[str, LabelSpace],
        loss_type: str = "null_bce",
        softmax_loss: SoftmaxLoss | None = None,
        cosine_scale: float = 0.0,
        relations: RelationSource | None = None,
    ) -> None:
        super().__init__(label_spaces)
        if loss_type not in LOSS_TYPES:
            raise ConfigError(f"MODEL.SEM_SEG_HEAD.LOSS_TYPE: {loss_type!r} is none of {', '.join(LOSS_TYPES)}")
        self.union = UnifiedClasses.of(label_spaces)
        self.universal = self.union.names
        self.loss_type, self.cosine_scale = loss_type, float(cosine_scale)
        self.softmax_loss = softmax_loss or SoftmaxLoss()
        self.activation = "softmax" if loss_type == "cross_entropy" else "sigmoid"
        self.trunk = trunk
        self.classifier = self._classifier(trunk.out_channels)
        side = trunk.auxiliary
        self.auxiliary_classifier = None if side is None else self._classifier(side.out_channels)
        self.register_buffer("union_ids", _tables(self.union), persistent=False)  # (K, 256) int64
        self.register_buffer("present", torch.from_numpy(self.union.present), persistent=False)  # (K, U) bool
        self.relation_source = relations or RelationSource()
        if loss_type == "relational_bce":
            unrelated = np.stack([no_relations(row) for row in self.union.present])
            self.register_buffer("relations", torch.from_numpy(unrelated))  # (K, U, U) int8
        self._columns: dict[tuple, list[list[int]]] = {}

    @classmethod
    def weighs_pixels(cls, cfg: CfgNode) -> bool:
        """Only the cross-entropy does, see :class:`.Head`."""
        return cfg.MODEL.SEM_SEG_HEAD.LOSS_TYPE == "cross_entropy"

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments by ``MODEL.SEM_SEG_HEAD`` and the label spaces of ``DATASETS.TRAIN``.

        Raises:
            ValueError: a key that this head has no use for is set.
        """
        keys = cfg.MODEL.SEM_SEG_HEAD
        if keys.DATASET_LOSS_WEIGHTS:
            raise ConfigError(
                "MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS: UnifiedHead has one mean over the pixels of all datasets and "
                "no weights; DATALOADER.WEIGHTS says how often each is seen"
            )
        relational = keys.LOSS_TYPE == "relational_bce"
        return {
            "trunk": Trunk(cfg, input_shape),
            "label_spaces": training_spaces(cfg),
            "loss_type": keys.LOSS_TYPE or "null_bce",
            "softmax_loss": SoftmaxLoss.from_config(cfg),
            "cosine_scale": keys.COSINE_SCALE,
            "relations": RelationSource.from_config(cfg) if relational else None,
        }

    def label_meanings(self) -> dict[str, list[str]]:
        """The union class of each class, see :class:`.Head`."""
        names = dict(enumerate(self.union.names)) | {NO_CLASS: "nothing"}
        return {
            dataset: [f"{name} = {names[u]}" for name, u in zip(self.own_space(dataset).classes, table.tolist())]
            for dataset, table in self.union.tables.items()
        }

    def prepare(self, run_over: Callable[..., Any]) -> None:
        """Finds the relations, by a pass over the training sets if they are to be measured; see :class:`.Head`."""
        if self.loss_type == "relational_bce":
            found = torch.from_numpy(self.relation_source.find(self, run_over))
            self.relations.copy_(found)

    def losses(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """One mean over all labelled pixels, by dataset; see :class:`.Head`."""
        losses = self._losses("loss_", self.classifier(self.trunk(features)), batch)
        if self.auxiliary_classifier is not None:
            side = self.auxiliary_classifier(self.trunk.auxiliary_features(features))
            weight = self.trunk.auxiliary_weight
            losses |= {name: weight * loss for name, loss in self._losses("loss_aux_", side, batch).items()}
        return losses

    def _losses(self, prefix: str, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        losses, divisor = {}, batch.total_valid
        for dataset, images in batch.slices().items():
            k = self.datasets.index(dataset)
            target = self.union_ids[k][batch.targets[images].long()]  # (N_k, H, W) union ids or NO_CLASS
            own, options = scores[images], {"divisor": divisor, "ignore": NO_CLASS}  # (N_k, U, h, w)
            if self.loss_type == "cross_entropy":
                columns = self.union_ids[k, : self.own_space(dataset).num_classes]
                loss = self.softmax_loss(own, target, batch, images, columns=columns, **options)
            elif self.loss_type == "bce":
                loss = binary_loss(own, target, **options)
            elif self.loss_type == "null_bce":
                loss = binary_loss(own, target, present=self.present[k].expand(len(own), -1), **options)
            else:
                loss = binary_loss(own, target, relations=self.relations[k].expand(len(own), -1, -1), **options)
            losses[prefix + dataset] = loss
        return losses

    def logits(self, features: dict[str, Tensor], space: LabelSpace) -> Tensor:
        """Scores of the classes of any label space, see :class:`.Head`.

        Raises:
            UnknownLabelSpaceError: the union names none of its classes.
        """
        scores = self.classifier(self.trunk(features))  # (N, U, h, w)
        columns = self._columns_of(space)
        never = scores.amin(1) - _NEVER
        return torch.stack([scores[:, ids].amax(1) if ids else never for ids in columns], 1)

    def unnameable(self, space: LabelSpace) -> tuple[str, ...]:
        """Classes of a label space that no class of the union names."""
        return tuple(space.classes[c] for c in self.union.columns_of(space)[1])

    def _columns_of(self, space: LabelSpace) -> list[list[int]]:
        key = (space.name, space.classes)
        if key not in self._columns:
            self._columns[key] = self._new_columns(space)
        return self._columns[key]

    def _new_columns(self, space: LabelSpace) -> list[list[int]]:
        columns, missing = self.union.columns_of(space)
        if len(missing) == space.num_classes:
            raise UnknownLabelSpaceError(f"none of the {self.union.size} classes of the union is one of {space.name!r}")
        if missing:
            names = ", ".join(space.classes[c] for c in missing)
            logger.warning("%s: the union of %s cannot name %s", space.name, ", ".join(self.datasets), names)
        for name, ids in zip(space.classes, columns):
            if len(ids) > 1:
                logger.info("%s: %s is the maximum of %s", space.name, name, ", ".join(self.universal[u] for u in ids))
        return columns

    def _classifier(self, channels: int) -> nn.Module:
        if self.cosine_scale:
            return CosineClassifier(channels, self.union.size, self.cosine_scale)
        classifier = nn.Conv2d(channels, self.union.size, kernel_size=1)
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)
        return classifier


class CosineClassifier(nn.Module):
    """Cosine between each pixel's feature and each class's vector, times a factor.

    Args:
        channels: D.
        classes: U.
        scale: s, above 0.

    Raises:
        ValueError: the factor is not positive.

    Source: UniSeg (ECCV 2022), second stage; s = 20.
    """

    def __init__(self, channels: int, classes: int, scale: float) -> None:
        super().__init__()
        if not scale > 0:
            raise ConfigError(f"MODEL.SEM_SEG_HEAD.COSINE_SCALE is {scale}: it must be positive (0: linear classifier)")
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(classes, channels, 1, 1))
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, h, w) -> (N, U, h, w) in [-s, s]; lengths in float32 or wider, the product as autocast has it."""
        directions = F.normalize(x.float() if x.dtype != torch.float64 else x, dim=1)
        return F.conv2d(directions, self.scale * F.normalize(self.weight, dim=1))


def _tables(union: UnifiedClasses) -> Tensor:
    """(K, 256) int64: local id of each dataset -> union id; ``NO_CLASS`` for ``IGNORE`` and what is not a class."""
    tables = np.full((len(union.datasets), IGNORE + 1), NO_CLASS, np.int64)
    for row, table in zip(tables, union.tables.values()):
        row[: len(table)] = table
    return torch.from_numpy(tables)
