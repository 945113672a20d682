"""Labels for the images of a step by the averaged weights: what online self-training and consistency share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...modeling.inference import confident_labels
from ..dataset_pass import evaluating
from ..ranks import unwrapped

__all__ = ["NO_TEACHER", "real_pixels", "teach"]

Sample = dict[str, Any]

#: Error where there are no averaged weights; names the policy.
NO_TEACHER = "SELF_TRAINING.POLICY {policy!r} needs a teacher: set MODEL.EMA_DECAY, for example to 0.99"


@torch.no_grad()
def teach(trainer: Any, samples: Sequence[Sample]) -> list[tuple[Tensor, Tensor]]:
    """The teacher's labels, (H, W) uint8, and their probabilities, (H, W), at the size of each sample.

    Args:
        trainer: with the model and its averaged weights (``ema``).
        samples: each is labelled in the space of its dataset.
    """
    model = unwrapped(trainer.model)
    head, asked = model.sem_seg_head, []
    for sample in samples:
        height, width = sample["image"].shape[-2:]
        space = head.own_space(sample["dataset"])
        asked.append({**sample, "height": height, "width": width, "label_space": space})
    taught = []
    with trainer.ema.averaged(), evaluating(model):
        for output in model(asked):
            labels, confidence = confident_labels(output.scores, void=head.scores_void)
            taught.append((labels.cpu(), confidence.cpu()))
    return taught


def real_pixels(sample: Sample) -> Tensor:
    """(H, W) bool: where a sample shows its image."""
    return sample.get("content", torch.ones(sample["image"].shape[-2:], dtype=torch.bool))
