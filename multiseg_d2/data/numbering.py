"""Which numbering label files seem to use: label ids given for train ids are legal numbers and wrong classes."""

from __future__ import annotations

import numpy as np

from ..label_space import IGNORE, ILLEGAL
from .spec import DatasetSpec

__all__ = ["suspicion"]

#: Cityscapes' label ids, in the order of its 19 train ids; KITTI uses them as well.
_CITYSCAPES_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_NAMES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
#: Fewer pixels than these say nothing about a dataset.
_ENOUGH = 10_000
#: So many of the classes must be out of reach before "no pixel has them" is a sign, not chance.
_TELLING_SHARE = 0.2


def suspicion(spec: DatasetSpec, raw_counts: np.ndarray) -> str | None:
    """Says which other numbering the label files of a split seem to use, None where nothing looks odd.

    Args:
        spec: of the dataset; only encoding ``index`` can be confused.
        raw_counts: (65536,) number of pixels per raw id over the whole split.

    Returns:
        One sentence for people, with the shares that speak for it.
    """
    total = int(raw_counts.sum())
    if spec.encoding != "index" or total < _ENOUGH:
        return None
    positions = all(c.raw_ids == (i,) for i, c in enumerate(spec.classes))
    return _label_ids_for_positions(spec, raw_counts) if positions else _positions_for_label_ids(spec, raw_counts)


def _label_ids_for_positions(spec: DatasetSpec, raw_counts: np.ndarray) -> str | None:
    """Train ids are expected. Are there ids beyond them, and does Cityscapes' other numbering know them all?"""
    illegal = np.flatnonzero((raw_counts > 0) & (spec.raw_to_local == ILLEGAL))
    if spec.class_names != _CITYSCAPES_NAMES or not len(illegal) or illegal.max() > max(_CITYSCAPES_LABEL_IDS):
        return None
    other = _shares(raw_counts, _CITYSCAPES_NAMES, [(i,) for i in _CITYSCAPES_LABEL_IDS])
    return (
        f"the label files look like Cityscapes label ids (0 to 33), but this spec expects train ids (0 to 18 and 255); "
        f"read as label ids they show {other}, read as train ids {_own_shares(spec, raw_counts)}. Give it the files "
        "*_labelTrainIds.png, or use a spec for label ids (`cityscapes`, `kitti`)."
    )


def _positions_for_label_ids(spec: DatasetSpec, raw_counts: np.ndarray) -> str | None:
    """Other ids are expected. Do the pixels use 0 ... C-1 and 255 only, although many classes lie beyond?"""
    count = len(spec.classes)
    beyond = [c for c in spec.classes if min(c.raw_ids, default=0) >= count]
    used = np.flatnonzero(raw_counts)
    contiguous = used[used != IGNORE]
    if len(beyond) < _TELLING_SHARE * count or (len(contiguous) and contiguous.max() >= count):
        return None
    other = _shares(raw_counts, spec.class_names, [(i,) for i in range(count)])
    return (
        f"no pixel has an id of {len(beyond)} classes ({', '.join(c.name for c in beyond[:5])}, ...), all lie in 0 to "
        f"{count - 1} or are 255: these look like train ids (positions in the class list), but this spec expects the "
        f"dataset's own ids; read as train ids they show {other}, read as this spec says "
        f"{_own_shares(spec, raw_counts)}. Use the original label files, or a spec with `raw_ids: position`."
    )


def _own_shares(spec: DatasetSpec, raw_counts: np.ndarray) -> str:
    return _shares(raw_counts, spec.class_names, [c.raw_ids for c in spec.classes])


def _shares(raw_counts: np.ndarray, names: tuple[str, ...], raw_ids: list[tuple[int, ...]]) -> str:
    """The three largest classes under a numbering, for example ``"road 37 %, building 20 %, sky 5 %"``."""
    pixels = np.array([raw_counts[list(ids)].sum() for ids in raw_ids]) / raw_counts.sum()  # (C,)
    largest = np.argsort(-pixels)[:3]
    return ", ".join(f"{names[i]} {pixels[i]:.0%}" for i in largest if pixels[i] > 0) or "no class at all"
