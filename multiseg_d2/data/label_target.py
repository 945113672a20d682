"""In whose classes the labels of a catalog entry come out: its own, or those of another dataset."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.data import MetadataCatalog

from ..label_space import IGNORE, LabelSpace, remap
from ..yaml_file import did_you_mean
from .label_reader import LabelReader

__all__ = ["LabelTarget", "label_targets"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelTarget:
    """How the labels of one catalog entry are read and in whose classes they come out.

    Attributes:
        dataset: whose label space the samples are in.
        reader: translates stored pixels into that space.
        translation: (C,) uint8, local id of the entry's own space -> local id of ``dataset``'s or ``IGNORE``, for boxes
            and tags; None where they are the same.
    """

    dataset: str
    reader: LabelReader
    translation: np.ndarray | None = None


def label_targets(catalogs: Sequence[str], remap_to: str = "") -> dict[str, LabelTarget]:
    """The label targets of catalog entries.

    Args:
        catalogs: names in ``MetadataCatalog``.
        remap_to: dataset whose classes all labels are translated into, "" = each entry keeps its own.

    Raises:
        ValueError: ``remap_to`` is not registered.
    """
    target = _space_of(remap_to) if remap_to else None
    targets = {}
    for catalog in catalogs:
        metadata = MetadataCatalog.get(catalog)
        if target is None or metadata.dataset == remap_to:
            targets[catalog] = LabelTarget(metadata.dataset, LabelReader.from_catalog(catalog))
            continue
        translation = remap(metadata.label_space, target)  # (C,)
        dropped = ", ".join(c for c, t in zip(metadata.label_space.classes, translation) if t == IGNORE)
        _logger.info("%s in the classes of %s; without a counterpart: %s", catalog, remap_to, dropped or "none")
        composed = _compose(metadata.label_space.raw_to_local, translation)
        targets[catalog] = LabelTarget(remap_to, LabelReader.from_catalog(catalog, composed), translation)
    return targets


def _compose(raw_to_local: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """One table for both look-ups, so that no label map is ever translated twice."""
    of_local = np.arange(256, dtype=np.uint8)  # IGNORE and ILLEGAL stay what they are
    of_local[: len(translation)] = translation
    return of_local[raw_to_local]


def _space_of(dataset: str) -> LabelSpace:
    entries = (MetadataCatalog.get(catalog) for catalog in MetadataCatalog.list())
    spaces = {entry.dataset: entry.label_space for entry in entries if entry.get("label_space") is not None}
    if dataset not in spaces:
        raise ValueError(f"DATASETS.REMAP_TO: no dataset {dataset!r} is registered{did_you_mean(dataset, spaces)}.")
    return spaces[dataset]
