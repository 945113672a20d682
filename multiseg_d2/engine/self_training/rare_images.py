"""Images with rare classes, drawn more often: rare-class sampling of the source for the online policy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from ...data.labels import LabelTarget, read_local_label
from ...data.schedule import Draw
from ...progress import progress

__all__ = ["RareImages", "class_pixels"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RareImages:
    """Puts an image that shows a rare class in the place of a drawn one: ``choose`` of a training loader.

    What is chosen depends on the draw alone, so a resumed run chooses the same.

    Args:
        images: for each training entry the images that show each rare class, (n,) positions in the entry; none for
            entries whose draws stay what they are.
        probability: of looking for one.
    """

    images: tuple[tuple[np.ndarray, ...], ...]
    probability: float

    @classmethod
    def of(cls, pixels: Sequence[np.ndarray | None], classes: Sequence[int], probability: float) -> RareImages:
        """From what the images hold.

        Args:
            pixels: per training entry (images, C) pixels of each class, see :func:`class_pixels`, or None.
            classes: the rare ones.
            probability: see the class.
        """
        shown = []
        for counts in pixels:
            found = [] if counts is None else [np.flatnonzero(counts[:, c]) for c in classes]
            shown.append(tuple(images for images in found if len(images)))
        return cls(tuple(shown), probability)

    def __call__(self, draw: Draw) -> int:
        """Position of the image: one of the rare classes, then one of the images that show it, each drawn uniformly.

        Source: DAFormer (CVPR 2022), rare-class sampling; there all classes are drawn, by a softmax of their rarity.
        """
        rng = np.random.default_rng([draw.seed, 1])  # not the stream of its crop
        lists = self.images[draw.dataset]
        if not lists or rng.random() >= self.probability:
            return draw.index
        images = lists[rng.integers(len(lists))]
        return int(images[rng.integers(len(images))])


def class_pixels(entry: str, target: LabelTarget) -> np.ndarray:
    """Reads all label maps of an entry, each process its share.

    Args:
        entry: catalog entry with pixel labels.
        target: into which classes they are translated, see :func:`multiseg_d2.data.labels.label_targets`.

    Returns:
        (images, C) int64 pixels of each class in each image; the same on all processes.
    """
    records = DatasetCatalog.get(entry)
    counts = np.zeros((len(records), target.num_classes), np.int64)
    translation = np.arange(target.own_classes) if target.translation is None else target.translation
    kept = translation < target.num_classes
    share = range(comm.get_rank(), len(records), comm.get_world_size())
    title = f"{entry}: counting classes for SELF_TRAINING.MINING"
    with progress(title, len(share), "label maps", logger, bar=comm.is_main_process()) as step:
        for i in share:
            own = np.bincount(read_local_label(records[i]).ravel(), minlength=256)[: target.own_classes]
            np.add.at(counts[i], translation[kept], own[kept])
            step()
    return np.sum(comm.all_gather(counts), axis=0)
