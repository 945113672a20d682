"""Dataset dict -> sample: what Detectron2's ``DatasetMapper`` does, for label maps of any encoding.

The order is what makes it fast: the window is drawn from the sizes in the file headers, only the rows that it needs are
decoded where the format allows that, only the window is resized, and only the crop is translated to local ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, BoxMode, Instances

from ..label_space import IGNORE
from ..sample import DatasetDict, Sample
from .augment import CropWindow, draw_color_jitter, draw_crop, draw_scale
from .decode import check_sizes, decode_color, open_file
from .labels import LabelTarget, label_path, label_targets, read_local_label

__all__ = ["EvaluationMapper", "TrainMapper"]

_PASSED_ON = ("entry", "file_name", "image_id", "sem_seg_file_name", "pan_seg_file_name")


class TrainMapper:
    """Reads, augments and translates one training image.

    Args:
        targets: per catalog entry, from :func:`label_targets`.
        image_format: ``"BGR"`` or ``"RGB"``.
        crop_size: (height, width) of the samples, None = whole images at the drawn scale.
        scale_range: (low, high) or (low, high, step), see :func:`draw_scale`.
        flip_probability: of a horizontal flip.
        single_category_max_area: a crop in which one class holds more than this share of the labelled pixels, or that
            has none, is drawn again, 10 tries in all; 1 = off.
        color_jitter: strength of brightness, contrast and saturation jitter in [0, 1).
        pad_value: three numbers in the order of ``image_format``, what crops beyond the image hold.
    """

    @configurable
    def __init__(
        self,
        targets: Mapping[str, LabelTarget],
        *,
        image_format: str = "BGR",
        crop_size: tuple[int, int] | None = None,
        scale_range: Sequence[float] = (1.0, 1.0),
        flip_probability: float = 0.0,
        single_category_max_area: float = 1.0,
        color_jitter: float = 0.0,
        pad_value: Sequence[float] = (0.0, 0.0, 0.0),
    ) -> None:
        self.targets = dict(targets)
        self.image_format = image_format
        self.crop_size = None if crop_size is None else tuple(crop_size)
        self.scale_range = tuple(scale_range)
        self.flip_probability = flip_probability
        self.single_category_max_area = single_category_max_area
        self.color_jitter = color_jitter
        self.pad_value = np.rint(pad_value).astype(np.uint8)

    @classmethod
    def from_config(cls, cfg: CfgNode, entries: Sequence[str] | None = None) -> dict[str, Any]:
        """Arguments from INPUT, MODEL.PIXEL_MEAN and DATASETS.REMAP_TO, for ``entries``, default DATASETS.TRAIN."""
        entries = cfg.DATASETS.TRAIN if entries is None else entries
        return {
            "targets": label_targets(entries, cfg.DATASETS.REMAP_TO),
            "image_format": cfg.INPUT.FORMAT,
            "crop_size": _crop_size(cfg),
            "scale_range": _scale_range(cfg),
            "flip_probability": _flip_probability(cfg),
            "single_category_max_area": _single_category_max_area(cfg),
            "color_jitter": _color_jitter(cfg),
            "pad_value": cfg.MODEL.PIXEL_MEAN,
        }

    def __call__(self, dataset_dict: DatasetDict, rng: np.random.Generator) -> Sample:
        """Maps one dataset dict; the dict itself is not changed.

        Args:
            dataset_dict: as registered.
            rng: the only source of randomness.

        Returns:
            A sample: ``image`` (3, H, W) uint8; ``sem_seg`` (H, W) uint8 local ids, if there is a label; ``dataset``,
            ``entry``, ``file_name``, ``image_id``; ``height`` and ``width`` of the original; ``instances`` and
            ``image_tags`` if the dict has boxes or tags, boxes in the sample's coordinates.

        Raises:
            BadFileError: a file is missing, broken, or does not fit the spec or the other one's size.
            IllegalLabelError: the crop holds ids that the label space does not know.
        """
        target = self.targets[dataset_dict["entry"]]
        file = open_file(dataset_dict["file_name"])
        label_file = open_file(label_path(dataset_dict)) if label_path(dataset_dict) else None
        check_sizes(file, label_file, dataset_dict)

        scale = draw_scale(rng, self.scale_range)
        choose = label_file is not None and self.crop_size is not None and self.single_category_max_area < 1
        stored = target.reader.decode(label_file) if choose else None

        def is_balanced(window: CropWindow) -> bool:
            local = target.reader.to_local(window.apply_segmentation(stored), dataset_dict)
            counts = np.bincount(local.reshape(-1), minlength=256)[:IGNORE]
            return 0 < counts.max() <= self.single_category_max_area * counts.sum()

        window = draw_crop(
            rng, file.height, file.width, scale, self.crop_size, self.flip_probability, is_balanced if choose else None
        )
        rows = window.y0 + window.h
        pixels = window.apply_image(decode_color(file, self.image_format, rows))  # (h, w, 3)
        pixels = draw_color_jitter(rng, self.color_jitter, self.image_format).apply_image(pixels)

        size = self.crop_size or pixels.shape[:2]
        sample = {key: dataset_dict[key] for key in _PASSED_ON if key in dataset_dict}
        sample.update(dataset=target.dataset, annotation=_annotation(dataset_dict))
        sample.update(height=file.height, width=file.width)
        sample["image"] = torch.from_numpy(_to_planes(pixels, size, self.pad_value))  # (3, H, W)
        if label_file is not None:
            stored = target.reader.decode(label_file, rows) if stored is None else stored
            local = target.reader.to_local(window.apply_segmentation(stored), dataset_dict)  # (h, w)
            sample["sem_seg"] = torch.from_numpy(_pad_label(local, size))  # (H, W)
        _add_weak_labels(sample, dataset_dict, target, window, size)
        return sample


class EvaluationMapper:
    """Reads one image for inference; labels are usually read by the evaluator (``read_local_label``).

    Args:
        image_format: ``"BGR"`` or ``"RGB"``.
        min_size: the shorter side is resized to this; 0 = the image keeps its size.
        max_size: limit of the longer side, if ``min_size`` is not 0.
        labels: whether ``sem_seg`` (H, W) uint8 local ids of the original size is added, for passes that measure
            something per class.
    """

    @configurable
    def __init__(
        self, *, image_format: str = "BGR", min_size: int = 0, max_size: int = 0, labels: bool = False
    ) -> None:
        self.image_format = image_format
        self.min_size = min_size
        self.max_size = max_size
        self.labels = labels

    @classmethod
    def from_config(cls, cfg: CfgNode, *, labels: bool = False) -> dict[str, Any]:
        """Arguments from INPUT.FORMAT, INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST."""
        return {
            "labels": labels,
            "image_format": cfg.INPUT.FORMAT,
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
        }

    def __call__(self, dataset_dict: DatasetDict) -> Sample:
        """Returns the dataset dict with ``image`` (3, H, W) uint8 and the original ``height`` and ``width`` added.

        Raises:
            BadFileError: the image is missing, broken, or not of the size that the dict states.
        """
        file = open_file(dataset_dict["file_name"])
        check_sizes(file, None, dataset_dict)
        scale = self.min_size / min(file.height, file.width) if self.min_size else 1.0
        if self.min_size and self.max_size:
            scale = min(scale, self.max_size / max(file.height, file.width))
        out_h, out_w = (max(1, int(side * scale + 0.5)) for side in (file.height, file.width))
        window = CropWindow(0, 0, file.width, file.height, out_w, out_h)
        pixels = window.apply_image(decode_color(file, self.image_format))
        image = torch.from_numpy(_to_planes(pixels, (out_h, out_w), None))  # (3, H, W)
        sample = {**dataset_dict, "image": image, "height": file.height, "width": file.width}
        if self.labels:
            sample["sem_seg"] = torch.from_numpy(read_local_label(dataset_dict))  # (H, W)
        return sample


def _annotation(dataset_dict: dict[str, Any]) -> str:
    """What is known of an image; dataset dicts of other code do not say it."""
    kinds = {"sem_seg_file_name": "pixel", "pan_seg_file_name": "pixel", "annotations": "box", "image_tags": "tag"}
    return dataset_dict.get("annotation") or next((kind for key, kind in kinds.items() if key in dataset_dict), "none")


def _to_planes(pixels: np.ndarray, size: tuple[int, int], pad_value: np.ndarray | None) -> np.ndarray:
    """(h, w, 3) -> (3, H, W), padded at the bottom and right."""
    height, width = pixels.shape[:2]
    planes = np.empty((3, *size), np.uint8)
    if (height, width) == tuple(size):
        cv2.split(np.ascontiguousarray(pixels), list(planes))  # six times faster than a transposed copy
        return planes
    planes[:] = pad_value[:, None, None]
    planes[:, :height, :width] = pixels.transpose(2, 0, 1)
    return planes


def _pad_label(local: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if local.shape == tuple(size):
        return local
    padded = np.full(size, IGNORE, np.uint8)
    padded[: local.shape[0], : local.shape[1]] = local
    return padded


def _add_weak_labels(
    sample: dict[str, Any], dataset_dict: dict[str, Any], target: LabelTarget, window: CropWindow, size: tuple[int, int]
) -> None:
    def translate(local_id: int) -> int:
        return local_id if target.translation is None else int(target.translation[local_id])

    if "annotations" in dataset_dict:
        kept = [(a, translate(a["category_id"])) for a in dataset_dict["annotations"] if a.get("iscrowd", 0) == 0]
        kept = [(a, category) for a, category in kept if category != IGNORE]
        boxes = [BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a, _ in kept]
        boxes = window.apply_box(np.array(boxes, np.float64).reshape(-1, 4))  # (B, 4)
        instances = Instances(tuple(size))
        instances.gt_boxes = Boxes(torch.from_numpy(boxes.astype(np.float32)))
        instances.gt_boxes.clip((window.out_h, window.out_w))
        instances.gt_classes = torch.tensor([category for _, category in kept], dtype=torch.int64)
        sample["instances"] = instances[instances.gt_boxes.nonempty(threshold=1e-5)]
    if "image_tags" in dataset_dict:
        tags = {translate(tag) for tag in dataset_dict["image_tags"]} - {IGNORE}
        sample["image_tags"] = sorted(tags)


def _crop_size(cfg: CfgNode) -> tuple[int, int] | None:
    if not cfg.INPUT.CROP.ENABLED:
        return None
    if cfg.INPUT.CROP.TYPE != "absolute":
        raise ValueError(f"INPUT.CROP.TYPE is {cfg.INPUT.CROP.TYPE!r}; only 'absolute' (SIZE in pixels) is known.")
    height, width = cfg.INPUT.CROP.SIZE
    if height != int(height) or width != int(width) or min(height, width) < 1:
        raise ValueError(f"INPUT.CROP.SIZE is {cfg.INPUT.CROP.SIZE}; it must be (height, width) in pixels.")
    return int(height), int(width)


def _scale_range(cfg: CfgNode) -> tuple[float, ...]:
    values = tuple(cfg.INPUT.SCALE_RANGE)
    if len(values) not in (2, 3) or not 0 < values[0] <= values[1] or (len(values) == 3 and values[2] < 0):
        raise ValueError(f"INPUT.SCALE_RANGE is {values}; it must be (low, high[, step]) with 0 < low <= high.")
    return values


def _flip_probability(cfg: CfgNode) -> float:
    if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
        raise ValueError(f"INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP!r}; only 'horizontal' and 'none' are known.")
    return 0.5 if cfg.INPUT.RANDOM_FLIP == "horizontal" else 0.0


def _single_category_max_area(cfg: CfgNode) -> float:
    share = cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA
    if not 0 < share <= 1:
        raise ValueError(f"INPUT.CROP.SINGLE_CATEGORY_MAX_AREA is {share}; it must be a share in (0, 1], 1 = off.")
    return share


def _color_jitter(cfg: CfgNode) -> float:
    if not 0 <= cfg.INPUT.COLOR_JITTER < 1:
        raise ValueError(f"INPUT.COLOR_JITTER is {cfg.INPUT.COLOR_JITTER}; it must lie in [0, 1), 0 = off.")
    return cfg.INPUT.COLOR_JITTER
