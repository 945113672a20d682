"""Self-training in every step: a teacher labels the target's images, and classes of the source are pasted into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor

from ...data.labels import label_targets
from ...label_space import IGNORE
from ...user_error import ConfigError
from ..ranks import unwrapped
from .collapse import CollapseWatch
from .data import check_target_is_not_scored, source_and_target
from .mining import MiningRule
from .rare_images import RareImages, class_pixels
from .teacher import NO_TEACHER, real_pixels, teach

__all__ = ["OnlineSelfTrainingHook", "class_mix", "quality"]

#: Probability above which the teacher counts as sure of a pixel (DACS, DAFormer).
SURE = 0.968

Sample = dict[str, Any]


class OnlineSelfTrainingHook(HookBase):
    """Mixes every unlabelled image of a step with a labelled one, and trains on the mixture.

    The teacher has the averaged weights (``MODEL.EMA_DECAY``). Of a source image, half of the classes (rounded up) are
    cut out and laid over the target image, with their labels; everywhere else the label is the teacher's, and weighs as
    much as the share of the image's pixels that the teacher is sure of. What is drawn depends on seed and step alone.
    With ``SELF_TRAINING.MINING``, source images (and crops) with classes that are rare in the source come more often.

    Args:
        cfg: ``DATASETS``, ``SELF_TRAINING.MINING`` and ``MODEL.EMA_DECAY`` are used.

    Attributes:
        watch: of the teacher's labels, a hook as well.

    Raises:
        ValueError: there is no teacher, no source or no target.

    Source: DACS (WACV 2021): ClassMix over domains; DAFormer (CVPR 2022): weight by the share of sure pixels.
    """

    def __init__(self, cfg: CfgNode) -> None:
        if cfg.MODEL.EMA_DECAY <= 0:
            raise ConfigError(NO_TEACHER.format(policy="online"))
        self.cfg = cfg
        self.source, self.target = source_and_target(cfg)
        self.watch = CollapseWatch()
        self.mining = MiningRule.of("SELF_TRAINING.MINING", cfg.SELF_TRAINING.MINING)

    def before_train(self) -> None:
        """Puts itself between loader and model; looks for rare classes in the source."""
        if not self.cfg.SELF_TRAINING.LABEL_SCORED:
            check_target_is_not_scored(self.cfg)
        self._check_spaces()
        self.trainer.transforms.append(self.mix)
        if self.mining.probability > 0:
            self._sample_rare_classes()

    def mix(self, samples: Sequence[Sample]) -> list[Sample]:
        """The step's samples with labelled mixtures in place of the unlabelled ones."""
        labelled = [s for s in samples if s["entry"] in self.source]
        unlabelled = [s for s in samples if s["entry"] in self.target]
        if not unlabelled or not labelled:
            return list(samples)
        mixed = iter(self._mixtures(labelled, unlabelled))
        return [next(mixed) if s["entry"] in self.target else s for s in samples]

    def _mixtures(self, labelled: Sequence[Sample], unlabelled: Sequence[Sample]) -> list[Sample]:
        result = []
        for i, (target, (labels, confidence)) in enumerate(zip(unlabelled, teach(self.trainer, unlabelled))):
            source = labelled[i % len(labelled)]
            real = real_pixels(target)
            weight = quality(confidence, real)
            labels = torch.where(real, labels, IGNORE)
            self.watch.see(target["dataset"], labels, float(weight))
            image, labels, pasted = class_mix(source["image"], source["sem_seg"], target["image"], labels)
            result.append(
                {
                    **target,
                    "image": image,
                    "sem_seg": labels,
                    "confidence": torch.where(pasted, 1.0, weight),
                    "content": real | pasted,
                    "annotation": "pixel",
                    "pseudo": True,
                }
            )
        return result

    def _sample_rare_classes(self) -> None:
        entries = self.cfg.DATASETS.TRAIN
        targets = label_targets(self.source, self.cfg.DATASETS.REMAP_TO)
        pixels = [class_pixels(entry, targets[entry]) if entry in targets else None for entry in entries]
        crops = self.mining.crops(np.sum([counts.sum(0) for counts in pixels if counts is not None], axis=0))
        if crops is not None:
            self.trainer.crop_centre = crops
            self.trainer.choose_image = RareImages.of(pixels, crops.classes, crops.probability)

    def _check_spaces(self) -> None:
        from detectron2.data import MetadataCatalog

        head = unwrapped(self.trainer.model).sem_seg_head
        spaces = {e: head.own_space(MetadataCatalog.get(e).dataset).classes for e in (*self.source, *self.target)}
        if len(set(spaces.values())) > 1:
            raise ConfigError(
                "SELF_TRAINING.POLICY 'online' pastes labels of the source into the target, so all entries must have "
                f"the same classes: set DATASETS.REMAP_TO. Now: { ({e: len(c) for e, c in spaces.items()}) }"
            )


def quality(confidence: Tensor, content: Tensor) -> Tensor:
    """Scalar in [0, 1]: share of an image's real pixels with a probability above :data:`SURE`."""
    return ((confidence > SURE) & content).sum() / content.sum().clamp(min=1)


def class_mix(image: Tensor, label: Tensor, under: Tensor, under_label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lays half of the classes of one image over another; which ones is drawn from torch's generator.

    Args:
        image: (3, H, W), from which is cut.
        label: (H, W) uint8 ids of it; pixels with ``IGNORE`` are never cut.
        under: (3, H, W), over which is laid.
        under_label: (H, W) uint8 ids of it.

    Returns:
        (3, H, W) mixture, (H, W) its ids, (H, W) bool: where it comes from ``image``.

    Raises:
        ValueError: the two have different sizes.

    Source: ClassMix (WACV 2021).
    """
    if image.shape != under.shape:
        raise ConfigError(
            f"images of {tuple(image.shape[-2:])} and {tuple(under.shape[-2:])} pixels cannot be mixed: give all "
            "entries one size with INPUT.CROP"
        )
    classes = label.unique()
    classes = classes[classes != IGNORE]
    chosen = classes[torch.randperm(len(classes))[: (len(classes) + 1) // 2]]
    pasted = torch.isin(label, chosen)
    return torch.where(pasted, image, under), torch.where(pasted, label, under_label), pasted
