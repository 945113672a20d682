"""Local ids -> the ids and file names that a benchmark server expects."""

from __future__ import annotations

import os

import numpy as np

from ..data.spec import DatasetSpec
from ..label_space import IGNORE

__all__ = ["submission_ids", "submission_name"]


def submission_ids(labels: np.ndarray, spec: DatasetSpec) -> np.ndarray:
    """Translates a predicted label map.

    Args:
        labels: (H, W) uint8 local ids, 255 where nothing is predicted.
        spec: of the dataset; its ``evaluation.submission_ids`` (default: local ids) and ``submission_void``.

    Returns:
        (H, W) ids of the server, uint8 where they all fit.

    Raises:
        ValueError: the dataset has no server (``submission_void`` is not given), or an id is no class.
    """
    rules, num_classes = spec.evaluation, len(spec.classes)
    if rules.submission_void is None:
        raise ValueError(f"{spec.name}: its spec names no submission ids (evaluation.submission_void is missing)")
    ids = rules.submission_ids if rules.submission_ids is not None else range(num_classes)
    table = np.full(256, -1, np.int64)
    table[:num_classes] = ids
    table[IGNORE] = rules.submission_void
    translated = table[labels]
    if translated.min(initial=0) < 0:
        raise ValueError(f"{spec.name}: ids beyond its {num_classes} classes: {np.unique(labels[translated < 0])[:10]}")
    return translated.astype(np.uint8 if table.max() < 256 else np.uint16)


def submission_name(file_name: str, spec: DatasetSpec, image_id: str = "") -> str:
    """File name of a prediction, relative to the folder that is sent.

    Args:
        file_name: of the image.
        spec: of the dataset; its ``evaluation.submission_name``.
        image_id: the ``{id}`` of the image; default: its name without suffix.
    """
    stem = os.path.splitext(os.path.basename(file_name))[0]
    return spec.evaluation.submission_name.format(stem=stem, id=image_id or stem)
