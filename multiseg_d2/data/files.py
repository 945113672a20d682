"""The dataset dicts of a split, from its files on disk."""

from __future__ import annotations

import logging
import os
from typing import Any

from .annotations import add_boxes, add_segments, add_tags
from .pairing import DATA_ROOT_VARIABLE, DatasetFilesError, Pairing, fixed_folders, pair_files, place, some
from .spec import SplitSpec

__all__ = [
    "DATA_ROOT_VARIABLE",
    "DatasetFilesError",
    "Pairing",
    "data_root",
    "dataset_dicts",
    "list_pairs",
    "pair_files",
]

logger = logging.getLogger(__name__)


def data_root() -> str:
    """Folder below which datasets lie: environment variable ``DETECTRON2_DATASETS``, default ``datasets``."""
    return os.path.expanduser(os.environ.get(DATA_ROOT_VARIABLE) or "datasets")


def list_pairs(split: SplitSpec, root: str) -> list[dict[str, Any]]:
    """Dataset dicts of a split, in Detectron2's form.

    Args:
        split: from ``DatasetSpec.splits``.
        root: data root.

    Returns:
        One dict per image, in a stable order, with ``file_name``, ``image_id`` (the ``{id}``), ``dataset`` and
        ``entry``, and as the annotation has it: ``sem_seg_file_name``; ``pan_seg_file_name`` and ``segments_info``;
        ``annotations`` (boxes, local ids); ``image_tags`` (local ids).

    Raises:
        DatasetFilesError: nothing there, or an image without label, or a label without image; says which.
    """
    found = pair_files(split, root)
    if found.without_label or found.without_image:
        _refuse_strays(split, root, found)
    if found.unmatched:
        logger.warning(
            "%s: pictures beside the images that no pattern of the spec takes are left out: %d (%s)",
            split.entry,
            len(found.unmatched),
            some(found.unmatched),
        )
    if split.count is not None and len(found.images) != split.count:
        logger.warning("%s: %d images found, %d expected", split.entry, len(found.images), split.count)
    return dataset_dicts(found, split, root, whole=split.ids is None)


def dataset_dicts(found: Pairing, split: SplitSpec, root: str, whole: bool) -> list[dict[str, Any]]:
    """Dataset dicts of files that belong together, as :func:`list_pairs` returns them.

    Args:
        found: without strays.
        split: that the files were found for.
        root: data root.
        whole: an entry of a panoptic annotation file for which there is no file is an error.

    Raises:
        DatasetFilesError: the annotation file is missing, wrong, or of other files.
    """
    records = [
        {
            "file_name": path,
            "image_id": image_id,
            "dataset": split.spec.dataset,
            "entry": split.entry,
            "annotation": split.annotation,
        }
        for image_id, path in found.images.items()
    ]
    _add_annotations(records, found, split, root, whole)
    return records


def _add_annotations(records: list[dict[str, Any]], found: Pairing, split: SplitSpec, root: str, whole: bool) -> None:
    """Adds to the dicts, in place, what the split knows about each image."""
    json_file = os.path.join(root, split.annotation_file)
    try:
        if split.annotation == "box":
            add_boxes(records, json_file, split, fixed_folders(split.images, root))
        elif split.annotation == "tag":
            add_tags(records, json_file, split, fixed_folders(split.images, root))
        elif found.labels and split.spec.encoding == "panoptic":
            add_segments(records, found.labels, json_file, fixed_folders(split.labels, root), whole)
        elif found.labels:
            for record in records:
                record["sem_seg_file_name"] = found.labels[record["image_id"]]
        if split.soft_labels:
            for record in records:
                name = split.soft_labels.replace("{id}", record["image_id"])
                record["soft_label_file_name"] = os.path.join(root, name)
    except ValueError as problem:
        raise DatasetFilesError(f"{split.entry}: {problem}") from problem
    except (KeyError, TypeError, AttributeError) as problem:
        what = f"{type(problem).__name__}: {problem}"
        raise DatasetFilesError(f"{split.entry}: {json_file} is not in COCO's form ({what})") from problem


def _refuse_strays(split: SplitSpec, root: str, found: Pairing) -> None:
    sides = [("images without label", found.without_label), ("labels without image", found.without_image)]
    strays = "; ".join(f"{len(ids)} {what}: {some(ids)}" for what, ids in sides if ids)
    raise DatasetFilesError(
        f"{split.entry}: {strays}{place((*split.images, *split.labels), root)} "
        "Add what is missing, move the strays away, or choose files with `ids` in a spec."
    )
