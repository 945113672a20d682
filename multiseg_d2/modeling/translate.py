"""Scores in the classes of an unseen dataset, out of a trained one's: the only place where scores are translated."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..label_space import IGNORE, LabelSpace, remap
from .catalog import UnknownLabelSpaceError
from .heads import Head

__all__ = ["StandIn", "translate_scores", "unreached"]

logger = logging.getLogger(__name__)

#: How far below the lowest score of a pixel a class is that the classifier cannot name; finite, so that scores can be
#: interpolated and averaged, and small enough never to win (exp(-30) = 1e-13).
_NEVER = 30.0


def translate_scores(logits: Tensor, table: np.ndarray, num_classes: int) -> Tensor:
    """Scores of a source's classes as scores of a target's.

    Probabilities of source classes that become the same target class are added up. Source classes without a target
    class drop out; target classes without a source class never win.

    Args:
        logits: (N, Cs, h, w).
        table: (Cs,) target local id of each source class, or ``IGNORE``; see :func:`multiseg_d2.label_space.remap`.
        num_classes: Ct.

    Returns:
        (N, Ct, h, w) logits.
    """
    result = (logits.amin(1, keepdim=True) - _NEVER).repeat(1, num_classes, 1, 1)
    for target in np.unique(table[table != IGNORE]).tolist():
        sources = np.flatnonzero(table == target).tolist()
        result[:, target] = torch.logsumexp(logits[:, sources], 1)
    return result


@dataclass(frozen=True)
class StandIn:
    """What scores the images of a dataset that a model was not trained on.

    Attributes:
        donor: label space of the model whose scores are translated where the head cannot name the wanted classes.
        branches: norm layer -> the branch that it uses; empty where all datasets share the norms.
    """

    donor: LabelSpace
    branches: Mapping[nn.Module, nn.Module] = field(default_factory=dict)
    _tables: dict[str, np.ndarray] = field(default_factory=dict)

    def logits(self, head: Head, features: dict[str, Tensor], space: LabelSpace) -> Tensor:
        """A head's scores in ``space``: its own where it has them, else those of the donor, translated.

        Returns:
            (N, C, h, w) logits of the C classes of ``space``, C + 1 where the head scores void.

        Raises:
            UnknownLabelSpaceError: no class of the donor is one of ``space``.
        """
        if space.name not in self._tables:
            try:
                return head.logits(features, space)
            except UnknownLabelSpaceError:
                self._tables[space.name] = _table(self.donor, space)
        logits, table = head.logits(features, self.donor), self._tables[space.name]
        if not head.scores_void:
            return translate_scores(logits, table, space.num_classes)
        table = np.append(table, np.uint8(space.num_classes))  # void stays the last channel
        return translate_scores(logits, table, space.num_classes + 1)

    def unnameable(self, head: Head, space: LabelSpace) -> tuple[str, ...]:
        """Classes of ``space`` that :meth:`logits` never gives the best score."""
        if head.scores_any_space or head.knows(space):
            return head.unnameable(space)
        return unreached(self.donor, space)


def unreached(donor: LabelSpace, target: LabelSpace) -> tuple[str, ...]:
    """Classes of ``target`` that no class of ``donor`` is translated to."""
    reached = set(remap(donor, target).tolist())
    return tuple(name for i, name in enumerate(target.classes) if i not in reached)


def _table(donor: LabelSpace, target: LabelSpace) -> np.ndarray:
    table = remap(donor, target)
    missing = unreached(donor, target)
    if len(missing) == target.num_classes:
        raise UnknownLabelSpaceError(
            f"no class of {donor.name!r} is one of {target.name!r} by the taxonomy (`python tools/label_space.py remap "
            f"{donor.name} {target.name}` shows it)"
        )
    unused = [name for name, i in zip(donor.classes, table) if i == IGNORE]
    if missing:
        logger.warning(
            "classifier of %s: %d of %d classes of %s cannot be predicted and will score 0: %s",
            donor.name,
            len(missing),
            target.num_classes,
            target.name,
            ", ".join(missing),
        )
    if unused:
        logger.info("classifier of %s: without a class in %s: %s", donor.name, target.name, ", ".join(unused))
    return table
