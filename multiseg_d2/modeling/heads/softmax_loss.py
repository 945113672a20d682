"""The loss of softmax heads: cross-entropy, with what self-training adds to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ...label_space import IGNORE
from ..batch import Batch
from ..losses import cross_entropy, soft_cross_entropy
from ..losses.confidence import CONFIDENCE_LOSSES, confidence_loss

__all__ = ["REGULARIZERS", "SoftmaxLoss"]

#: Values of SELF_TRAINING.REGULARIZER that are a term of the loss ("lrent" changes the labels instead).
REGULARIZERS = tuple(name for name in CONFIDENCE_LOSSES if name != "entropy")


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
        self, logits: Tensor, target: Tensor, batch: Batch, images: slice, divisor: Tensor | None, ignore: int = IGNORE
    ) -> Tensor:
        """Scalar; zero, and still attached to the graph, where nothing is labelled.

        Args:
            logits: (M, C, h, w) scores of the images.
            target: (M, H, W) ids in [0, C) or ``ignore``.
            batch: that the images are part of.
            images: which part.
            divisor: count of the step that sums over pixels are divided by, mean over the processes.
            ignore: id of pixels without a label.
        """
        samples = batch.inputs[images]
        weights = batch.stack("confidence", 1.0, images) if any("confidence" in s for s in samples) else None
        soft = [i for i, sample in enumerate(samples) if "soft_label" in sample]
        if not soft:
            loss = cross_entropy(logits, target, divisor=divisor, ignore=ignore, weights=weights)
        else:
            loss = _mixed(logits, target, batch.stack("soft_label", 0.0, images), soft, weights, divisor, ignore)
        return loss + self._regularization(logits, target, samples, ignore) if self.regularizer else loss

    def _regularization(self, logits: Tensor, target: Tensor, samples: Sequence[dict], ignore: int) -> Tensor:
        pseudo = torch.tensor([bool(s.get("pseudo")) for s in samples], device=target.device)
        mask = (target != ignore) & pseudo.view(-1, 1, 1)  # (M, H, W)
        return self.weight * confidence_loss(logits, target.shape[-2:], self.regularizer, mask)


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
