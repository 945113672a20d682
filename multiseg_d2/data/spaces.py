"""Label spaces of dataset specs: their classes, their look-up table and their place in a taxonomy."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ..label_space import LabelSpace
from ..taxonomy import Taxonomy, TaxonomyError
from .spec import DatasetSpec

__all__ = ["label_spaces"]

logger = logging.getLogger(__name__)


def label_spaces(
    specs: Iterable[DatasetSpec], base: Taxonomy, taxonomy: Taxonomy, used: tuple[str, ...] | None = None
) -> tuple[dict[str, LabelSpace], Taxonomy]:
    """Builds the label space of each spec.

    Args:
        specs: in the order in which datasets that the taxonomy does not list are added to it.
        base: the taxonomy as chosen.
        taxonomy: ``base`` and what has been added to it.
        used: the datasets whose `covers` must fit the taxonomy, None for all; others get classes of their own instead.

    Returns:
        Spec name -> label space; the taxonomy, grown at its end.

    Raises:
        TaxonomyError: a class is not listed, or covers a concept that does not exist; names the spec file.
    """
    spaces = {}
    for spec in specs:
        try:
            spaces[spec.name], taxonomy = _label_space(spec, base, taxonomy, used)
        except TaxonomyError as problem:
            raise TaxonomyError(f"{spec.path}: {problem}") from None
    return spaces, taxonomy


def _label_space(
    spec: DatasetSpec, base: Taxonomy, taxonomy: Taxonomy, used: tuple[str, ...] | None
) -> tuple[LabelSpace, Taxonomy]:
    """The label space of one spec, and the taxonomy, grown if it did not list the dataset."""
    dataset, classes = spec.dataset, spec.class_names
    if dataset not in taxonomy.datasets():
        concepts = {concept for c in spec.classes for concept in c.covers or ()}
        fits = used is None or dataset in used or concepts <= set(taxonomy.concepts)
        taxonomy = taxonomy.extend(dataset, {c.name: c.covers if fits else None for c in spec.classes})
    elif dataset in base.datasets() and not base.by_name and any(c.covers for c in spec.classes):
        logger.warning("%s: `covers` is not used: the taxonomy file lists the classes of %r", spec.path, dataset)
    membership, main = taxonomy.membership(dataset, classes), taxonomy.main_universal(dataset, classes)
    return LabelSpace(dataset, classes, spec.colors, spec.raw_to_local, membership, main), taxonomy
