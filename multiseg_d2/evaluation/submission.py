"""Local ids -> the ids and file names that a benchmark server expects."""

from __future__ import annotations

import os
from pathlib import PurePath

import numpy as np

from ..data.spec import DatasetSpec
from ..label_space import IGNORE
from ..user_error import UserError

__all__ = ["SubmissionError", "image_id_of", "submission_ids", "submission_name"]


class SubmissionError(UserError, ValueError):
    """Labels cannot be written as a server wants them."""


def submission_ids(
    labels: np.ndarray, spec: DatasetSpec, first_id: int | None = None, void_id: int | None = None
) -> np.ndarray:
    """Translates a predicted label map.

    Two benchmarks contradict themselves. IDD's leaderboard page speaks of ids 1 to 27, its script of 0 to 25 (above, or
    255: misc); Mapillary's server of 1 to 65, its public script of 0 to 65. The specs follow the scripts; ``first_id``
    1 (with ``void_id`` 27, or 0) follows the pages.

    Args:
        labels: (H, W) uint8 local ids, 255 where nothing is predicted.
        spec: of the dataset; its ``evaluation.submission_ids`` (default: local ids) and ``submission_void``.
        first_id: id of the first class, the others follow; None: as the spec has it.
        void_id: id of pixels without a class; None: as the spec has it.

    Returns:
        (H, W) ids of the server, uint8 where they all fit.

    Raises:
        SubmissionError: the dataset has no server (``submission_void`` is not given), an id is no class, the id of
            void is one of a class, or ``first_id`` is given where the server's ids do not follow each other.
    """
    num_classes = len(spec.classes)
    ids, void = _numbering(spec, first_id, void_id)
    table = np.full(256, -1, np.int64)
    table[:num_classes] = ids
    table[IGNORE] = void
    translated = table[labels]
    if translated.min(initial=0) < 0:
        raise SubmissionError(
            f"{spec.name}: ids beyond its {num_classes} classes: {np.unique(labels[translated < 0])[:10]}"
        )
    return translated.astype(np.uint8 if table.max() < 256 else np.uint16)


def _numbering(spec: DatasetSpec, first_id: int | None, void_id: int | None) -> tuple[list[int], int]:
    """The server's ids of the classes, and of void."""
    rules = spec.evaluation
    if rules.submission_void is None:
        raise SubmissionError(f"{spec.name}: its spec names no submission ids (evaluation.submission_void is missing)")
    if first_id is not None and rules.submission_ids is not None:
        raise SubmissionError(
            f"{spec.name}: the ids of its server are a list of their own; they cannot begin at {first_id}"
        )
    ids = [(first_id or 0) + i for i in range(len(spec.classes))]
    if rules.submission_ids is not None:
        ids = list(rules.submission_ids)
    void = rules.submission_void if void_id is None else void_id
    if void in ids and (first_id is not None or void_id is not None):
        raise SubmissionError(f"{spec.name}: void {void} is the id of a class, too; ids are {ids[0]} to {ids[-1]}")
    return ids, void


def image_id_of(file_name: str, spec: DatasetSpec, folder: str = "") -> str:
    """The ``{id}`` of an image file, as if it had been found by the patterns of its dataset's spec.

    The folders that stand before ``{id}`` in a pattern are looked for in the path, the longest such part that is there
    counts (so it does not matter where the dataset lies, or whether one folder or a tree of folders was given). Without
    any, the path below ``folder`` counts.

    Args:
        file_name: of the image.
        spec: of the dataset.
        folder: that the image was looked for in.
    """
    path = PurePath(os.path.abspath(file_name)).with_suffix("").as_posix()
    matched, found, tails = 0, "", [""]
    for pattern in (pattern for split in spec.splits.values() for pattern in split.images):
        before, after = pattern.split("{id}")
        after = after.rpartition(".")[0]  # whatever the suffix
        if not path.endswith(after):
            continue
        tails.append(after)
        *folders, prefix = before.split("/")
        for start in range(len(folders)):  # the longest part first
            _, there, rest = path[: len(path) - len(after)].rpartition(f"/{'/'.join(folders[start:])}/{prefix}")
            if there and rest and len(folders) - start > matched:
                matched, found = len(folders) - start, rest
    below = os.path.relpath(file_name, folder) if folder else os.path.basename(file_name)
    return found or PurePath(below).with_suffix("").as_posix().removesuffix(max(tails, key=len))


def submission_name(file_name: str, spec: DatasetSpec, image_id: str = "") -> str:
    """File name of a prediction, relative to the folder that is sent.

    Args:
        file_name: of the image.
        spec: of the dataset; its ``evaluation.submission_name``.
        image_id: the ``{id}`` of the image; default: see :func:`image_id_of`.
    """
    stem = os.path.splitext(os.path.basename(file_name))[0]
    return spec.evaluation.submission_name.format(stem=stem, id=image_id or image_id_of(file_name, spec))
