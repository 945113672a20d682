"""Scores in the classes of an unseen dataset, out of the classifier of a trained one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..label_space import IGNORE, LabelSpace, remap
from .catalog import UnknownLabelSpaceError

__all__ = ["best_covering", "translate_scores", "translated_scores"]

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


@contextmanager
def translated_scores(head: nn.Module, donor: LabelSpace) -> Iterator[None]:
    """Lets a head score label spaces that it does not know, by one that it knows.

    What the head can score by itself stays as it is.

    Args:
        head: changed inside the context.
        donor: label space of the head that stands in.
    """
    own, tables = head.logits, {}

    def logits(features: dict[str, Tensor], space: LabelSpace) -> Tensor:
        if space.name not in tables:
            try:
                return own(features, space)
            except UnknownLabelSpaceError:
                tables[space.name] = _table(donor, space)
        return translate_scores(own(features, donor), tables[space.name], space.num_classes)

    head.logits = logits
    try:
        yield
    finally:
        del head.logits  # the class's own shows again


def best_covering(spaces: Mapping[str, LabelSpace], target: LabelSpace) -> str:
    """The dataset whose classes reach most classes of ``target``; the first of equally good ones."""
    return max(spaces, key=lambda name: len(_reached(remap(spaces[name], target))))


def _reached(table: np.ndarray) -> set[int]:
    return set(table[table != IGNORE].tolist())


def _table(donor: LabelSpace, target: LabelSpace) -> np.ndarray:
    table = remap(donor, target)
    reached = _reached(table)
    if not reached:
        raise UnknownLabelSpaceError(
            f"no class of {donor.name!r} is one of {target.name!r} by the taxonomy (`python tools/label_space.py remap "
            f"{donor.name} {target.name}` shows it)"
        )
    missing = [name for i, name in enumerate(target.classes) if i not in reached]
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
