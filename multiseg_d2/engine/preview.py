"""Training batches as pictures in TensorBoard: what goes in, what is wanted, what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context

from ..evaluation.evaluator import predicted_labels
from ..evaluation.pictures import comparison
from ..label_space import LabelSpace
from ..modeling.catalog import training_spaces
from .ranks import unwrapped

__all__ = ["PreviewHook"]


class PreviewHook(HookBase):
    """Shows the first image of each dataset of the batch, with labels and prediction: every ``period`` steps, and last.

    For the main process; nothing that is trained changes by it.

    Args:
        period: Detectron2's ``VIS_PERIOD``.
    """

    def __init__(self, period: int) -> None:
        self.period = period

    def after_step(self) -> None:
        """Draws where the step's number says so, and after the last step."""
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Puts one picture per dataset of the last batch into the event storage."""
        spaces, first = training_spaces(self.trainer.cfg), dict[str, Any]()
        for sample in self.trainer.last_batch:
            first.setdefault(sample["dataset"], sample)
        model = unwrapped(self.trainer.model)
        with inference_context(model):
            for dataset, sample in first.items():
                height, width = sample["image"].shape[-2:]  # of the crop; the sample's own are the whole image's
                asked = {**sample, "height": height, "width": width, "label_space": spaces[dataset]}
                (output,) = model([asked])
                picture = self._picture(sample, predicted_labels(output, spaces[dataset].num_classes), spaces[dataset])
                self.trainer.storage.put_image(f"training/{dataset}", picture.transpose(2, 0, 1))  # (3, h, w)

    def _picture(self, sample: dict, prediction: np.ndarray, space: LabelSpace) -> np.ndarray:
        image = sample["image"].numpy().transpose(1, 2, 0)  # (H, W, 3)
        if self.trainer.cfg.INPUT.FORMAT == "BGR":
            image = image[..., ::-1]
        maps = {"ground truth": sample["sem_seg"].numpy()} if "sem_seg" in sample else {}
        return comparison(np.ascontiguousarray(image), {**maps, "prediction": prediction}, space.classes, space.colors)
