"""One shared decoder, one classifier and cross-entropy per dataset: CDCL's head, and that of most baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ...label_space import IGNORE, LabelSpace
from ...user_error import ConfigError
from ..batch import Batch
from ..catalog import UnknownLabelSpaceError, training_datasets, training_spaces
from ..losses import cross_entropy, soft_cross_entropy
from ..losses.confidence import CONFIDENCE_LOSSES, confidence_loss
from .head import Head
from .trunk import Trunk

__all__ = ["REGULARIZERS", "PerDatasetHead", "SoftmaxLoss"]

#: Values of SELF_TRAINING.REGULARIZER that are a term of the loss ("lrent" changes the labels instead).
REGULARIZERS = tuple(name for name in CONFIDENCE_LOSSES if name != "entropy")


@SEM_SEG_HEADS_REGISTRY.register()
class PerDatasetHead(Head):
    """Scores each dataset's images in its own label space by a 1x1 classifier of its own.

    Losses: ``loss_<dataset>`` and, with an auxiliary branch, ``loss_aux_<dataset>`` for every dataset of the batch.

    Args:
        trunk: decoder, dropout and auxiliary branch, shared by all datasets.
        label_spaces: for each dataset the space that its labels are in, in the order of training.
        loss_weights: w^i of each dataset; 1 where missing.
        share_classifiers: datasets with equal class lists have one classifier.
        loss: of each dataset's images; default: cross-entropy.

    Source: CDCL (AAAI 2022): loss and alternation.
    """

    @configurable
    def __init__(
        self,
        *,
        trunk: Trunk,
        label_spaces: Mapping[str, LabelSpace],
        loss_weights: Mapping[str, float] | None = None,
        share_classifiers: bool = False,
        loss: SoftmaxLoss | None = None,
    ) -> None:
        super().__init__(label_spaces)
        self.loss = loss or SoftmaxLoss()
        self.classifier_of = _classifier_keys(self.spaces, share_classifiers)
        self.loss_weights = {dataset: float((loss_weights or {}).get(dataset, 1.0)) for dataset in self.datasets}
        self.trunk = trunk
        self.classifiers = self._classifiers(trunk.out_channels)
        side = trunk.auxiliary
        self.auxiliary_classifiers = None if side is None else self._classifiers(side.out_channels)

    @classmethod
    def weighs_pixels(cls, cfg: CfgNode) -> bool:
        """They do, see :class:`.Head`."""
        return True

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments by ``MODEL.SEM_SEG_HEAD`` and the label spaces of ``DATASETS.TRAIN``."""
        keys = cfg.MODEL.SEM_SEG_HEAD
        return {
            "trunk": Trunk(cfg, input_shape),
            "label_spaces": training_spaces(cfg),
            "loss_weights": _loss_weights(training_datasets(cfg), keys.DATASET_LOSS_WEIGHTS),
            "share_classifiers": keys.SHARE_CLASSIFIERS,
            "loss": SoftmaxLoss.from_config(cfg),
        }

    def losses(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """L = sum_i w^i (CE_i + a CE_i^aux), each a mean over dataset i's labelled pixels; see :class:`.Head`."""
        return self.decoded_losses(self.trunk(features), features, batch)

    def decoded_losses(self, decoded: Tensor, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The same where the trunk's output is there already."""
        losses = self._losses("loss_", decoded, self.classifiers, batch, 1.0)
        if self.auxiliary_classifiers is not None:
            side, weight = self.trunk.auxiliary_features(features), self.trunk.auxiliary_weight
            losses |= self._losses("loss_aux_", side, self.auxiliary_classifiers, batch, weight)
        return losses

    def _losses(
        self, prefix: str, decoded: Tensor, classifiers: nn.ModuleDict, batch: Batch, factor: float
    ) -> dict[str, Tensor]:
        losses = {}
        for dataset, images in batch.slices().items():
            classifier = classifiers[self.classifier_of[self.space_of[dataset]]]
            logits, targets = classifier(decoded[images]), batch.targets[images]  # (N_i, C_i, h, w), (N_i, H, W)
            loss = self.loss(logits, targets, batch, images, batch.num_valid.get(dataset))
            losses[prefix + dataset] = loss * (factor * self.loss_weights[dataset])
        return losses

    def logits(self, features: dict[str, Tensor], space: LabelSpace) -> Tensor:
        """Scores by the classifier of a label space, see :class:`.Head`."""
        classifier = self.classifiers[self.classifier_key(space)]
        return classifier(self.trunk(features))

    def teaches(self, dataset: str, space: LabelSpace) -> bool:
        """Whether the two have one classifier, see :class:`.Head`."""
        return self.classifier_of[self.space_of[dataset]] == self.classifier_of[space.name]

    def classifier_key(self, space: LabelSpace) -> str:
        """Which classifier scores in a label space. Override it to let unseen datasets in.

        Raises:
            UnknownLabelSpaceError: none does, or the one of this name was built for other classes.
        """
        known = self.spaces.get(space.name)
        if known is None:
            raise UnknownLabelSpaceError(
                f"the model has no classifier for the label space {space.name!r}; it knows {sorted(self.spaces)}. "
                "Ask for one of these with the sample's `label_space`."
            )
        if known.classes != space.classes:
            raise UnknownLabelSpaceError(
                f"the model's label space {space.name!r} has other classes than the one asked for.\n  model: "
                f"{list(known.classes)}\n  asked: {list(space.classes)}"
            )
        return self.classifier_of[space.name]

    def _classifiers(self, channels: int) -> nn.ModuleDict:
        classifiers = nn.ModuleDict()
        for key in dict.fromkeys(self.classifier_of.values()):
            conv = nn.Conv2d(channels, self.spaces[key].num_classes, kernel_size=1)
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
            classifiers[key] = conv
        return classifiers


def _classifier_keys(spaces: Mapping[str, LabelSpace], share: bool) -> dict[str, str]:
    """Label space -> name of its classifier: its own, or that of the first space with the same class list."""
    owners: dict[tuple[str, ...], str] = {}
    return {name: owners.setdefault(space.classes, name) if share else name for name, space in spaces.items()}


def _loss_weights(datasets: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    if not weights:
        return {}
    if len(weights) != len(datasets):
        raise ConfigError(
            f"MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS has {len(weights)} entries, but DATASETS.TRAIN has "
            f"{len(datasets)} ({list(datasets)}): give one weight per entry, in its order, or none"
        )
    result: dict[str, float] = {}
    for dataset, weight in zip(datasets, weights):
        if not weight >= 0:
            raise ConfigError(f"MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS: the weight of {dataset!r} is {weight}")
        if result.setdefault(dataset, float(weight)) != weight:
            raise ConfigError(f"MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS: {dataset!r} has two different weights")
    return result


class SoftmaxLoss:
    """Cross-entropy over the images of one label space, mean over the labelled pixels of the step.

    Samples with ``soft_label`` are scored by these, pixels with ``confidence`` weigh as much, and pseudo-labelled
    samples (``pseudo``) may get CRST's regulariser, mean over their labelled pixels on this process.

    Args:
        regularizer: one of :data:`REGULARIZERS`, or another name for none.
        weight: its factor alpha.

    Source: CRST (ICCV 2019): soft labels and regularisers.
    """

    def __init__(self, regularizer: str = "none", weight: float = 0.0) -> None:
        self.regularizer = regularizer if weight > 0 and regularizer in REGULARIZERS else ""
        self.weight = float(weight)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SoftmaxLoss:
        """By ``SELF_TRAINING.REGULARIZER``, where there is self-training."""
        return cls(*cfg.SELF_TRAINING.REGULARIZER) if cfg.SELF_TRAINING.ROUNDS > 0 else cls()

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        batch: Batch,
        images: slice,
        divisor: Tensor | None,
        ignore: int = IGNORE,
        columns: Tensor | None = None,
    ) -> Tensor:
        """Scalar; zero, and still attached to the graph, where nothing is labelled.

        Args:
            logits: (M, C, h, w) scores of the images.
            target: (M, H, W) ids in [0, C) or ``ignore``.
            batch: that the images are part of.
            images: which part.
            divisor: count of the step that sums over pixels are divided by, mean over the processes.
            ignore: id of pixels without a label.
            columns: (C',) channel of each class of the soft labels, negative for none; None: class c has channel c.
        """
        samples = batch.inputs[images]
        weights = batch.stack("confidence", 1.0, images) if any("confidence" in s for s in samples) else None
        soft = [i for i, sample in enumerate(samples) if "soft_label" in sample]
        if not soft:
            loss = cross_entropy(logits, target, divisor=divisor, ignore=ignore, weights=weights)
        else:
            shares = batch.stack("soft_label", 0.0, images)
            shares = shares if columns is None else _in_columns(shares, columns, logits.shape[1])
            loss = _mixed(logits, target, shares, soft, weights, divisor, ignore)
        return loss + self._regularization(logits, target, samples, ignore) if self.regularizer else loss

    def _regularization(self, logits: Tensor, target: Tensor, samples: Sequence[dict], ignore: int) -> Tensor:
        pseudo = torch.tensor([bool(s.get("pseudo")) for s in samples], device=target.device)
        mask = (target != ignore) & pseudo.view(-1, 1, 1)  # (M, H, W)
        return self.weight * confidence_loss(logits, target.shape[-2:], self.regularizer, mask)


def _in_columns(shares: Tensor, columns: Tensor, channels: int) -> Tensor:
    """(M, C', H, W) shares of a dataset's classes -> (M, C, H, W) of the channels."""
    known = columns >= 0
    spread = shares.new_zeros(len(shares), channels, *shares.shape[-2:])
    return spread.index_add_(1, columns[known], shares[:, known])


def _mixed(
    logits: Tensor,
    target: Tensor,
    shares: Tensor,
    soft: Sequence[int],
    weights: Tensor | None,
    divisor: Tensor | None,
    ignore: int,
) -> Tensor:
    """Cross-entropy of images of which those in ``soft`` have soft labels, with one divisor for all."""
    hard = [i for i in range(len(logits)) if i not in set(soft)]
    divisor = (target != ignore).sum() if divisor is None else divisor

    def part(tensor: Tensor | None, chosen: Sequence[int]) -> Tensor | None:
        return None if tensor is None else tensor[list(chosen)]

    loss = soft_cross_entropy(part(logits, soft), part(shares, soft), divisor=divisor, weights=part(weights, soft))
    if hard:
        loss = loss + cross_entropy(
            part(logits, hard), part(target, hard), divisor=divisor, ignore=ignore, weights=part(weights, hard)
        )
    return loss
