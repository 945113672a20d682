"""What self-training trains on: labelled source, unlabelled target, and the share of each in a round."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...data.views import register_views
from ...user_error import ConfigError
from ...view_name import parse_view

__all__ = ["check_target_is_not_scored", "first_images", "most_confident", "source_and_target"]


def source_and_target(cfg: CfgNode) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Entries of ``DATASETS.TRAIN`` with pixel labels, and those without any.

    Raises:
        ValueError: one of the two is empty.
    """
    kinds = {entry: MetadataCatalog.get(entry).get("annotation", "pixel") for entry in cfg.DATASETS.TRAIN}
    source = tuple(entry for entry, kind in kinds.items() if kind == "pixel")
    target = tuple(entry for entry, kind in kinds.items() if kind == "none")
    if not source or not target:
        raise ConfigError(
            "self-training needs a labelled source and an unlabelled target in DATASETS.TRAIN, for example "
            f"('gta5_train', 'cityscapes_train/unlabelled'); it has {kinds}"
        )
    return source, target


def check_target_is_not_scored(cfg: CfgNode) -> None:
    """Refuses pseudo-labels of images that ``DATASETS.TEST`` scores, also where links lead to them.

    Raises:
        ValueError: names the entries and how many images they share.
    """
    _, target = source_and_target(cfg)
    for test in cfg.DATASETS.TEST:
        scored = {os.path.realpath(record["file_name"]) for record in DatasetCatalog.get(test)}
        for entry in target:
            shared = sum(os.path.realpath(record["file_name"]) in scored for record in DatasetCatalog.get(entry))
            if shared:
                raise ConfigError(
                    f"{shared} images of the target {entry} are scored in DATASETS.TEST ({test}): a score on images "
                    "that were labelled says little of others. Take another split, or set SELF_TRAINING.LABEL_SCORED "
                    "to True."
                )


def first_images(entry: str, share: float) -> str:
    """View of the first images of an entry: nested from round to round, as the order of views is fixed.

    Args:
        entry: catalog entry or view.
        share: in (0, 1], rounded up to whole images; 1 is the entry itself.

    Returns:
        Name of a registered entry.
    """
    if share >= 1:
        return entry
    number = max(math.ceil(share * len(DatasetCatalog.get(entry)) - 1e-9), 1)
    view = parse_view(entry)
    base, start = (entry, 0) if view is None else (view.entry, view.start or 0)
    suffix = "" if view is None or view.labelled else "/unlabelled"
    name = f"{base}[{start or ''}:{start + number}]{suffix}"
    register_views([name])
    return name


def most_confident(images: Mapping[str, float], share: float) -> tuple[str, ...]:
    """Ids of the images with the highest confidence, sorted by id.

    Args:
        images: image id -> confidence.
        share: in (0, 1], rounded up to whole images.

    Source: CBST's authors chose their target images by the mean over classes of the confidence in an image; that the
    choice is made anew in each round is ours.
    """
    number = max(math.ceil(share * len(images) - 1e-9), 1)
    return tuple(sorted(sorted(images, key=lambda image_id: (-images[image_id], image_id))[:number]))
