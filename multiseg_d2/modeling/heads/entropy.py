"""Unlabelled images learn from their similarity to the classes of every dataset: universal semi-supervision's head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ...label_space import IGNORE, LabelSpace
from ...user_error import ConfigError
from ..batch import Batch
from ..class_means import ClassMeans
from ..losses import prototype_entropy, prototype_scores
from ..prototypes import Prototypes, PrototypeSource
from .head import Head
from .per_dataset import PerDatasetHead

__all__ = ["ENTROPY_TYPES", "EntropyHead", "EntropyModule"]

#: Values of MODEL.SEM_SEG_HEAD.LOSS_TYPE: which pixels and classes the cross-dataset term takes.
ENTROPY_TYPES = ("entropy", "entropy_shared", "entropy_confident")


class EntropyModule(nn.Module):
    """The shared embedding, and the prototypes of each dataset's classes; used in training only.

    Args:
        channels: D of the features.
        classes: dataset -> C.
        dim: d of the embedding; not more than D, as prototypes are projections of features.
        centroids: K prototypes of each class.
        momentum: share that prototypes keep when they follow the labelled pixels of a step; 1 = they are frozen.
        pca_start: the embedding starts as the projection that the prototypes were made with, where they were measured
            with the weights that training starts from. False: from random weights, as in USSS.

    Raises:
        ValueError: moving prototypes with several centroids.
    """

    def __init__(
        self,
        channels: int,
        classes: dict[str, int],
        *,
        dim: int = 100,
        centroids: int = 1,
        momentum: float = 1.0,
        pca_start: bool = True,
    ) -> None:
        super().__init__()
        if momentum < 1 and centroids > 1:
            raise ConfigError("prototypes that follow the labelled pixels are means: take centroids=1, or momentum=1")
        self.dim, self.centroids, self.momentum, self.pca_start = min(dim, channels), centroids, momentum, pca_start
        self.embedding = nn.Conv2d(channels, self.dim, kernel_size=1)
        self.prototypes = nn.Module()
        for dataset, number in classes.items():  # a class without prototypes is all zero
            self.prototypes.register_buffer(dataset, torch.zeros(number, centroids, self.dim))

    def of(self, dataset: str) -> Tensor:
        """(C, K, d) prototypes of a dataset's classes."""
        return getattr(self.prototypes, dataset)

    @torch.no_grad()
    def set(self, found: Prototypes, same_weights: bool) -> None:
        """Takes over measured prototypes.

        Args:
            found: of the same datasets.
            same_weights: they were measured with the weights that training starts from.
        """
        for dataset, vectors in found.vectors.items():
            self.of(dataset).copy_(torch.from_numpy(vectors))
        if same_weights and self.pca_start and found.projection is not None:
            projection = torch.from_numpy(found.projection)  # (d, D)
            self.embedding.weight.copy_(projection[:, :, None, None])
            self.embedding.bias.copy_(-projection @ torch.from_numpy(found.centre))

    @torch.no_grad()
    def follow(self, dataset: str, embedding: Tensor, targets: Tensor) -> None:
        """Moves prototypes towards the means of labelled pixels over all processes; all of them must call it.

        Args:
            dataset: whose classes.
            embedding: (N, d, h, w); N may be 0.
            targets: (N, H, W) local ids or ``IGNORE``.
        """
        own = self.of(dataset)  # (C, 1, d)
        running = ClassMeans(len(own), self.dim, embedding.device)
        if len(embedding):
            running.add(embedding, targets)
        means, counts = running.means()
        seen = (counts > 0) & own.flatten(1).any(1)
        moved = self.momentum * own[seen, 0] + (1 - self.momentum) * F.normalize(means[seen], dim=1).to(own.dtype)
        own[seen, 0] = F.normalize(moved, dim=1)


@SEM_SEG_HEADS_REGISTRY.register()
class EntropyHead(Head):
    """Holds a :class:`.PerDatasetHead`, and adds an entropy of unlabelled images to its losses.

    Losses: those of the per-dataset head for labelled images, and for the unlabelled ones of each dataset
    ``loss_within_<dataset>`` (its own classes) and ``loss_cross_<dataset>`` (mean over the other datasets' classes).
    Where an image is padded or was rotated away nothing is counted. The entropies are means over the unlabelled pixels
    of a pass on this process.

    Parameters and buffers have the names that the per-dataset head gives them; what is added lies below ``entropy``. So
    either head loads the other one's checkpoints, and evaluation needs nothing of ``entropy``.

    Args:
        base: classifiers, trunk and supervised loss.
        entropy: embedding and prototypes.
        loss_type: one of :data:`ENTROPY_TYPES`. ``"entropy"`` takes all pixels and classes into the cross-dataset term;
            ``"entropy_shared"`` leaves out the other dataset's classes that no class here shares a leaf of the taxonomy
            with, and the pixels that the classifier holds for a class that no class there does;
            ``"entropy_confident"`` leaves out the pixels that resemble no class of the other dataset.
        weights: (alpha, beta) of the cross-dataset and of the within-dataset term; 0 = off.
        cosine_scale: see :func:`.prototype_scores`.
        source: where :meth:`prepare` gets the prototypes.

    Raises:
        ValueError: an unknown loss, a negative weight.

    Source: USSS (ICCV 2019). For more than two datasets the mean over the others is ours.
    """

    annotation_types = ("pixel", "none")

    @configurable
    def __init__(
        self,
        *,
        base: PerDatasetHead,
        entropy: EntropyModule,
        loss_type: str = "entropy",
        weights: Sequence[float] = (1.0, 1.0),
        cosine_scale: float = 0.0,
        source: PrototypeSource | None = None,
    ) -> None:
        super().__init__({dataset: base.own_space(dataset) for dataset in base.datasets})
        if loss_type not in ENTROPY_TYPES:
            raise ConfigError(f"MODEL.SEM_SEG_HEAD.LOSS_TYPE: {loss_type!r} is none of {', '.join(ENTROPY_TYPES)}")
        if len(weights) != 2 or min(weights) < 0 or cosine_scale < 0:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.ENTROPY_WEIGHTS (alpha, beta) and COSINE_SCALE must not be negative: "
                f"{tuple(weights)}, {cosine_scale}"
            )
        if weights[0] and len(base.datasets) == 1:
            raise ConfigError(
                "a cross-dataset term needs two datasets: set MODEL.SEM_SEG_HEAD.ENTROPY_WEIGHTS to (0, 1)"
            )
        self._base = (base,)  # in a tuple, so that its parameters have one name: as if it stood alone
        self.trunk, self.classifiers = base.trunk, base.classifiers
        self.auxiliary_classifiers = base.auxiliary_classifiers
        self.entropy = entropy
        self.loss_type, self.cosine_scale = loss_type, float(cosine_scale)
        self.alpha, self.beta = (float(weight) for weight in weights)
        self.source = source or PrototypeSource()

    @classmethod
    def weighs_pixels(cls, cfg: CfgNode) -> bool:
        """They do, see :class:`.Head`."""
        return True

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments by ``MODEL.SEM_SEG_HEAD`` and the label spaces of ``DATASETS.TRAIN``."""
        keys = cfg.MODEL.SEM_SEG_HEAD
        base = PerDatasetHead(cfg, input_shape)
        classes = {dataset: base.own_space(dataset).num_classes for dataset in base.datasets}
        source = PrototypeSource.from_config(cfg)
        return {
            "base": base,
            "entropy": EntropyModule(base.trunk.out_channels, classes, **source.module_settings()),
            "loss_type": keys.LOSS_TYPE or "entropy",
            "weights": keys.ENTROPY_WEIGHTS,
            "cosine_scale": keys.COSINE_SCALE,
            "source": source,
        }

    @property
    def base(self) -> PerDatasetHead:
        """The head that is left when training is over."""
        return self._base[0]

    def prepare(self, run_over: Callable[..., Any]) -> None:
        """Finds the prototypes, see :class:`.PrototypeSource`."""
        if self.alpha or self.beta:
            found = self.source.find(self, run_over, self.entropy.dim, self.entropy.centroids)
            self.entropy.set(found, same_weights=self.source.statistics == "")

    def label_meanings(self) -> dict[str, list[str]]:
        """Which classes each dataset shares with another one, where only these take part; see :class:`.Head`."""
        if self.loss_type != "entropy_shared":
            return {}
        spaces = {dataset: self.own_space(dataset) for dataset in self.datasets}
        return {
            dataset: [
                f"{name} is in {other}"
                for other in spaces
                if other != dataset
                for name, shared in zip(space.classes, shared_classes(space, spaces[other]))
                if shared
            ]
            for dataset, space in spaces.items()
        }

    def teaches(self, dataset: str, space: LabelSpace) -> bool:
        """As the per-dataset head, see :class:`.Head`."""
        return self.base.teaches(dataset, space)

    def logits(self, features: dict[str, Tensor], space: LabelSpace) -> Tensor:
        """Scores by the per-dataset head, see :class:`.Head`."""
        return self.base.logits(features, space)

    def losses(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """L = L_S + alpha * L_cross + beta * L_within; see :class:`.Head`."""
        decoded, unlabelled = self.trunk(features), [i for i, s in enumerate(batch.inputs) if _is_unlabelled(s)]
        losses = {}
        if len(unlabelled) < len(batch) or not (self.alpha or self.beta):
            losses |= self.base.decoded_losses(decoded, features, batch)
        if self.entropy.momentum < 1:
            self._follow(decoded, batch)
        if unlabelled and (self.alpha or self.beta):
            content = batch.content()
            for dataset, images in batch.slices().items():
                own = [i for i in range(images.start, images.stop) if i in set(unlabelled)]
                if own:
                    losses |= self._entropies(dataset, decoded[own], content[own])
        return losses

    def _entropies(self, dataset: str, decoded: Tensor, content: Tensor) -> dict[str, Tensor]:
        embedding, size, losses = self.entropy.embedding(decoded), content.shape[-2:], {}
        if self.beta:
            scores = self._scores(embedding, dataset, slice(None))
            losses[f"loss_within_{dataset}"] = self.beta * prototype_entropy(scores, size, content)
        if self.alpha:
            terms = [
                prototype_entropy(
                    self._scores(embedding, other, classes),
                    size,
                    content,
                    weights=self._shared_pixels(dataset, other, decoded),
                    confident=self.loss_type == "entropy_confident",
                )
                for other, classes in self._others(dataset)
            ]
            nothing = decoded.sum() * 0.0  # attached, where no class is shared
            losses[f"loss_cross_{dataset}"] = self.alpha * sum(terms, nothing) / max(len(terms), 1)
        return losses

    def _scores(self, embedding: Tensor, dataset: str, classes: slice | Tensor) -> Tensor:
        prototypes = self.entropy.of(dataset)[classes]
        prototypes = prototypes[prototypes.flatten(1).any(1)]
        if not len(prototypes):
            raise RuntimeError(
                f"there are no prototypes of {dataset}: they are measured before the first step of a new run. A "
                "checkpoint to start from goes into MODEL.WEIGHTS, without --resume"
            )
        return prototype_scores(embedding, prototypes, self.cosine_scale)

    def _others(self, dataset: str) -> Iterator[tuple[str, slice | Tensor]]:
        """The other datasets, and which of their classes take part."""
        for other in self.datasets:
            if other == dataset:
                continue
            if self.loss_type != "entropy_shared":
                yield other, slice(None)
            elif (shared := shared_classes(self.own_space(other), self.own_space(dataset))).any():
                yield other, torch.from_numpy(shared).to(self.entropy.embedding.weight.device)

    @torch.no_grad()
    def _shared_pixels(self, dataset: str, other: str, decoded: Tensor) -> Tensor | None:
        """(N, h, w) 1 where the classifier sees a class that the other dataset has as well; None: everywhere."""
        if self.loss_type != "entropy_shared":
            return None
        space = self.own_space(dataset)
        shared = torch.from_numpy(shared_classes(space, self.own_space(other))).to(decoded.device)
        seen = self.classifiers[self.base.classifier_key(space)](decoded).argmax(1)  # (N, h, w)
        return shared[seen].float()

    def _follow(self, decoded: Tensor, batch: Batch) -> None:
        """Moves the prototypes of all datasets, in the same order on all processes."""
        embedding, slices = self.entropy.embedding(decoded).detach(), batch.slices()
        pseudo = torch.tensor([bool(s.get("pseudo")) for s in batch.inputs], device=embedding.device)
        targets = batch.targets.masked_fill(pseudo.view(-1, 1, 1), IGNORE)
        for dataset in self.datasets:
            images = slices.get(dataset, slice(0, 0))
            self.entropy.follow(dataset, embedding[images], targets[images])


def shared_classes(space: LabelSpace, other: LabelSpace) -> np.ndarray:
    """(C,) bool: classes of a label space that share a leaf of the taxonomy with some class of another one."""
    return (space.membership @ other.membership.T).any(1)


def _is_unlabelled(sample: dict) -> bool:
    return "sem_seg" not in sample
