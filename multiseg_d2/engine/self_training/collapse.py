"""When pseudo-labels have collapsed: one rule for rounds, and for teachers that label in every step."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

from ..ranks import unwrapped
from .folder import PseudoLabelError

__all__ = ["CollapseError", "CollapseWatch", "has_collapsed"]

logger = logging.getLogger(__name__)

#: Labels of which one class has more than this share have collapsed.
MAX_SHARE = 0.99
#: Steps over which a teacher's labels are added up, and how many such windows in succession stop the run.
WINDOW, PATIENCE = 100, 10


class CollapseError(PseudoLabelError):
    """The pseudo-labels would teach one class only, or nothing."""


def has_collapsed(kept: np.ndarray) -> bool:
    """Whether nothing is kept, or (of several classes) more than :data:`MAX_SHARE` of it is one class.

    Args:
        kept: (C,) pixels of each class that are learnt from.
    """
    return bool(kept.sum() == 0 or (len(kept) > 1 and kept.max() > MAX_SHARE * kept.sum()))


class CollapseWatch(HookBase):
    """Watches the labels that a teacher gives in every step.

    The labels of :data:`WINDOW` steps are judged together, each dataset for itself and all processes as one. If they
    have collapsed, that is a warning: a young teacher is sure of nothing for a while, or of one class. After
    :data:`PATIENCE` times in succession the run stops. That number is part of the checkpoint; of the window in which a
    run was stopped, the resumed one judges the rest.
    """

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}
        self._in_succession: dict[str, int] = {}

    def see(self, dataset: str, labels: Tensor, weight: float = 1.0) -> None:
        """Adds up the labels of an image.

        Args:
            dataset: of the image.
            labels: (H, W) uint8 local ids or ``IGNORE``.
            weight: of its pixels in the loss.
        """
        counts = np.bincount(labels.numpy().ravel(), minlength=256)
        self._kept[dataset] = self._kept.get(dataset, 0) + weight * counts

    def after_step(self) -> None:
        """Judges after the last step of a window.

        Raises:
            CollapseError: on all processes.
        """
        step = self.trainer.iter + 1
        if step % WINDOW:
            return
        kept: dict[str, np.ndarray] = {}
        for part in comm.all_gather(self._kept):
            for dataset, counts in part.items():
                kept[dataset] = kept.get(dataset, 0) + counts
        self._kept = {}
        for dataset, counts in sorted(kept.items()):
            self._judge(step, dataset, counts)

    def _judge(self, step: int, dataset: str, counts: np.ndarray) -> None:
        classes = unwrapped(self.trainer.model).sem_seg_head.own_space(dataset).classes
        counts = counts[: len(classes)]
        number = self._in_succession.get(dataset, 0) + 1 if has_collapsed(counts) else 0
        self._in_succession[dataset] = number
        if not number:
            return
        listing = {name: round(float(pixels)) for name, pixels in zip(classes, counts)}
        problem = (
            f"the teacher's labels of {dataset} have collapsed: in the last {WINDOW} of {step} steps as many pixels "
            f"count: {listing}"
        )
        if number >= PATIENCE:
            raise CollapseError(
                f"{problem}; so it was {number} times in succession. Begin with better weights (MODEL.WEIGHTS), or "
                "with more labelled images."
            )
        logger.warning("%s (%d of %d times in succession that stop the run)", problem, number, PATIENCE)

    def state_dict(self) -> dict[str, Any]:
        """How many windows in succession have collapsed, by dataset."""
        return {"in_succession": dict(self._in_succession)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._in_succession = dict(state["in_succession"])
