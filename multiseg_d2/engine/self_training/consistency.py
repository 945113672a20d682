"""Weak to strong: what a teacher is sure of in an image is learnt from a disturbed view of the same image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor

from ...data.augment import draw_blur, draw_color_jitter
from ...label_space import IGNORE
from ...modeling.heads import registered_heads
from ...user_error import ConfigError
from .collapse import CollapseWatch
from .data import check_target_is_not_scored, source_and_target
from .teacher import NO_TEACHER, real_pixels, teach

__all__ = ["ConsistencyHook", "strong_view"]

#: Probability from which on the teacher's label counts (FixMatch, UniMatch).
SURE = 0.95
#: Strength of the strong view: colour jitter, largest radius of the blur in pixels, sides of the hole relative to the
#: image's.
_JITTER, _BLUR, _HOLE = 0.5, 4, (0.2, 0.5)

Sample = dict[str, Any]


class ConsistencyHook(HookBase):
    """Labels every unlabelled image of a step by the teacher, and trains on a strong view of it.

    The teacher has the averaged weights (``MODEL.EMA_DECAY``) and sees the sample as the loader gives it. Pixels of
    which it is not sure are not labelled. Of each dataset the loss is the mean over its labelled pixels plus that over
    *all* real pixels of its unlabelled images, of which only the sure ones have a summand, as in FixMatch; the weights
    that the two need come as ``confidence`` of the samples. A head whose loss takes no weights (binary losses, a
    hierarchy) has one mean over its labelled pixels and the sure ones instead.
    Images keep the classes of their own dataset. What is drawn depends on seed and step alone.

    Args:
        cfg: ``DATASETS``, ``INPUT.FORMAT`` and ``MODEL.EMA_DECAY`` are used.

    Attributes:
        watch: of the teacher's labels, a hook as well.

    Raises:
        ValueError: there is no teacher, nothing labelled or nothing unlabelled.

    Source: FixMatch (NeurIPS 2020); UniMatch (CVPR 2023) for segmentation; the teacher's averaged weights as in Mean
    Teacher. UniMatch's feature perturbation and second strong view are left out.
    """

    def __init__(self, cfg: CfgNode) -> None:
        if cfg.MODEL.EMA_DECAY <= 0:
            raise ConfigError(NO_TEACHER.format(policy="consistency"))
        self.cfg = cfg
        self.weighs_pixels = registered_heads()[cfg.MODEL.SEM_SEG_HEAD.NAME].weighs_pixels(cfg)
        self.watch = CollapseWatch()
        self.source, self.target = source_and_target(cfg)

    def before_train(self) -> None:
        """Puts itself between loader and model."""
        if not self.cfg.SELF_TRAINING.LABEL_SCORED:
            check_target_is_not_scored(self.cfg)
        self.trainer.transforms.append(self.disturb)

    def disturb(self, samples: Sequence[Sample]) -> list[Sample]:
        """The step's samples, the unlabelled ones as strong views with the labels that the teacher is sure of."""
        unlabelled = [s for s in samples if s["entry"] in self.target]
        if not unlabelled:
            return list(samples)
        taught = iter(teach(self.trainer, unlabelled))
        labelled = [self._labelled(s, *next(taught)) if s["entry"] in self.target else s for s in samples]
        return weighted(labelled) if self.weighs_pixels else labelled

    def _labelled(self, sample: Sample, labels: Tensor, confidence: Tensor) -> Sample:
        labels = torch.where(real_pixels(sample) & (confidence >= SURE), labels, IGNORE)
        self.watch.see(sample["dataset"], labels)
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        image = strong_view(sample["image"], rng, self.cfg.INPUT.FORMAT)
        return {**sample, "image": image, "sem_seg": labels, "annotation": "pixel", "pseudo": True}


def weighted(samples: Sequence[Sample]) -> list[Sample]:
    """Gives samples the weights by which one mean over all labels of a dataset becomes a sum of two means.

    The loss of a dataset divides by all L + P labels of a step, L drawn by people and P by the teacher. Weights of
    (L + P) / L and (L + P) / R make it the mean over the former plus the sum over the latter divided by the R real
    pixels of their images.
    """
    result = []
    for sample in samples:
        own = [s for s in samples if s["dataset"] == sample["dataset"]]
        drawn, taught = (sum(_labels(s) for s in own if bool(s.get("pseudo")) == pseudo) for pseudo in (False, True))
        real = sum(int(real_pixels(s).sum()) for s in own if s.get("pseudo"))
        among = real if sample.get("pseudo") else drawn
        weight = torch.full(sample["image"].shape[-2:], (drawn + taught) / max(among, 1))
        result.append({**sample, "confidence": weight} if real else sample)
    return result


def _labels(sample: Sample) -> int:
    return int((sample["sem_seg"] != IGNORE).sum()) if "sem_seg" in sample else 0


def strong_view(image: Tensor, rng: np.random.Generator, image_format: str) -> Tensor:
    """Jitters colours, perhaps blurs, and cuts a hole; nothing is moved, so labels stay what they are.

    The hole is filled with the image's mean colour. Its pixels keep their labels: they must be told from what is around
    them.

    Args:
        image: (3, H, W) uint8.
        rng: source of randomness.
        image_format: ``"BGR"`` or ``"RGB"``.

    Returns:
        (3, H, W) uint8.
    """
    pixels = np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
    pixels = draw_color_jitter(rng, _JITTER, image_format).apply_image(pixels)
    pixels = draw_blur(rng, _BLUR).apply_image(pixels).copy()
    sides = [max(int(side * rng.uniform(*_HOLE)), 1) for side in pixels.shape[:2]]
    top, left = (int(rng.integers(full - side + 1)) for full, side in zip(pixels.shape, sides))
    pixels[top : top + sides[0], left : left + sides[1]] = pixels.mean((0, 1)).round()
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
