"""Detectron2's keys that have no effect here: who sets one should know, and know what to set instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode, get_cfg

__all__ = ["IDLE_KEYS", "idle_keys"]

_DETECTION = "nothing here detects objects"
#: Key, or section, and what takes its place.
IDLE_KEYS = {
    "DATALOADER.ASPECT_RATIO_GROUPING": "images are cropped to one size",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": "every image of a split is used",
    "DATALOADER.RANDOM_SUBSET_RATIO": "name a part of a split in DATASETS.TRAIN",
    "DATALOADER.REPEAT_SQRT": "DATALOADER.SCHEDULE and WEIGHTS say how often a dataset is seen",
    "DATALOADER.REPEAT_THRESHOLD": "DATALOADER.SCHEDULE and WEIGHTS say how often a dataset is seen",
    "DATALOADER.SAMPLER_TRAIN": "DATALOADER.SCHEDULE says what a step contains",
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": _DETECTION,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": _DETECTION,
    "DATASETS.PROPOSAL_FILES_TEST": _DETECTION,
    "DATASETS.PROPOSAL_FILES_TRAIN": _DETECTION,
    "INPUT.MASK_FORMAT": _DETECTION,
    "MODEL.ANCHOR_GENERATOR": _DETECTION,
    "MODEL.KEYPOINT_ON": _DETECTION,
    "MODEL.LOAD_PROPOSALS": _DETECTION,
    "MODEL.MASK_ON": _DETECTION,
    "MODEL.PANOPTIC_FPN": _DETECTION,
    "MODEL.PROPOSAL_GENERATOR": _DETECTION,
    "MODEL.RETINANET": _DETECTION,
    "MODEL.ROI_BOX_CASCADE_HEAD": _DETECTION,
    "MODEL.ROI_BOX_HEAD": _DETECTION,
    "MODEL.ROI_HEADS": _DETECTION,
    "MODEL.ROI_KEYPOINT_HEAD": _DETECTION,
    "MODEL.ROI_MASK_HEAD": _DETECTION,
    "MODEL.RPN": _DETECTION,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": "the decoder's features say how finely it scores",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": "unlabelled is 255",
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": "MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS has a weight per dataset",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "the datasets' label spaces say how many",
    "TEST.AUG.MAX_SIZE": "TEST.AUG.SCALES are factors of the image size",
    "TEST.AUG.MIN_SIZES": "TEST.AUG.SCALES are factors of the image size",
    "TEST.DETECTIONS_PER_IMAGE": _DETECTION,
    "TEST.KEYPOINT_OKS_SIGMAS": _DETECTION,
}


def idle_keys(cfg: CfgNode) -> list[str]:
    """One line for each idle key with another value than Detectron2's default: key, value, what to use instead."""
    own, found = dict(_values(cfg)), []
    for key, default in _values(get_cfg()):
        reason = next((why for idle, why in IDLE_KEYS.items() if f"{key}.".startswith(f"{idle}.")), None)
        if reason is not None and own.get(key, default) != default:
            found.append(f"{key} {own[key]!r}: {reason}")
    return found


def _values(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
