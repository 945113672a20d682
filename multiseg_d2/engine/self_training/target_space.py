"""Which classes the pseudo-labels of a target may have, where its label space is not that of the scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from detectron2.data import MetadataCatalog

from ...label_space import DISJOINT, LabelSpace, relation
from ...modeling.heads import Head
from ...user_error import ConfigError

__all__ = ["TargetClasses"]


@dataclass(frozen=True)
class TargetClasses:
    """The classes that a target is labelled with.

    Attributes:
        space: of the scores, in which labels are written and trained on.
        allowed: (C,) bool, which of its classes have something in common with a class of the target by the taxonomy;
            None where the space is the target's own.
        unnameable: classes of the target that have nothing in common with a class of the space: no label names them.
    """

    space: LabelSpace
    allowed: np.ndarray | None = None
    unnameable: tuple[str, ...] = ()

    @classmethod
    def of(cls, head: Head, sources: Iterable[str], target: str) -> TargetClasses:
        """What a head can label a target with.

        Args:
            head: of the model that labels.
            sources: catalog entries that it learns from.
            target: catalog entry that is labelled.

        Raises:
            ConfigError: nothing teaches the head the classes in which it scores the target, or none of them is a class
                of the target.
        """
        metadata = MetadataCatalog.get(target)
        space, own = head.own_space(metadata.dataset), metadata.label_space
        datasets = [MetadataCatalog.get(entry).dataset for entry in sources]
        if not any(head.teaches(dataset, space) for dataset in datasets):
            raise ConfigError(
                f"self-training: no labelled entry teaches the classes of {space.name!r}, in which {target} would be "
                f"labelled. Set DATASETS.REMAP_TO to the dataset of the source ({', '.join(sorted(set(datasets)))}): "
                "labels are then limited to the classes that the target has by the taxonomy"
            )
        if space.name == own.name and space.classes == own.classes:
            return cls(space)
        common = relation(space, own) != DISJOINT  # (C, C of the target)
        if not common.any():
            raise ConfigError(f"self-training: no class of {space.name!r} is one of {target} by the taxonomy")
        return cls(space, common.any(1), tuple(np.array(own.classes)[~common.any(0)].tolist()))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Classes of the space that the target does not have."""
        if self.allowed is None:
            return ()
        return tuple(name for name, allowed in zip(self.space.classes, self.allowed) if not allowed)
