"""Dataset dict -> sample: what Detectron2's ``DatasetMapper`` does, for label maps of any encoding.

The order is what makes it fast: the window is drawn from the sizes in the file headers, only the rows that it needs are
decoded where the format allows that, only the window is resized, and only the crop is translated to local ids. A
rotation needs the whole image, and local ids before it turns them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, BoxMode, Instances

from ..label_space import IGNORE
from ..sample import DatasetDict, Sample
from ..user_error import ConfigError
from .augment import (
    CropWindow,
    RotatedWindow,
    draw_blur,
    draw_color_jitter,
    draw_crop,
    draw_rotation,
    draw_scale,
    shortest_edge_scale,
)
from .cache import IMAGE, open_through_cache
from .decode import EncodedFile, check_sizes, decode_color
from .labels import LabelTarget, label_path, label_targets, read_local_label
from .soft_labels import read_soft_label

__all__ = ["EvaluationMapper", "TrainMapper"]

#: Where a crop is centred: gets the whole label map (H, W) of local ids, the dataset dict and the generator, and says a
#: pixel (y, x), or None for a random crop. Picklable where worker processes are spawned.
Centre = Callable[[np.ndarray, DatasetDict, np.random.Generator], tuple[float, float] | None]
_PASSED_ON = ("entry", "file_name", "image_id", "sem_seg_file_name", "pan_seg_file_name")


class TrainMapper:
    """Reads, augments and translates one training image.

    Args:
        targets: per catalog entry, from :func:`label_targets`.
        image_format: ``"BGR"`` or ``"RGB"``.
        crop_size: (height, width) of the samples, None = whole images at the drawn scale.
        min_sizes: per catalog entry the lengths that the shorter side is resized to before the random scale; entries
            without any, and the length 0, keep their size.
        min_size_sampling: ``"choice"`` of one of them, or ``"range"`` from the first to the second.
        max_size: limit of the longer side in that resizing, 0 = none.
        scale_range: (low, high) or (low, high, step), see :func:`draw_scale`.
        rotation: largest angle in degrees; 0 = off.
        flip_probability: of a horizontal flip.
        single_category_max_area: a crop in which one class holds more than this share of the labelled pixels, or that
            has none, is drawn again, 10 tries in all; 1 = off.
        color_jitter: strength of brightness, contrast and saturation jitter in [0, 1).
        blur: largest radius of a Gaussian blur in pixels; 0 = off.
        pad_value: three numbers in the order of ``image_format``, what crops beyond the image hold.
        centre: for mining of rare classes: where the crops of images with a label map are centred.
    """

    @configurable
    def __init__(
        self,
        targets: Mapping[str, LabelTarget],
        *,
        image_format: str = "BGR",
        crop_size: tuple[int, int] | None = None,
        min_sizes: Mapping[str, Sequence[int]] | None = None,
        min_size_sampling: str = "choice",
        max_size: int = 0,
        scale_range: Sequence[float] = (1.0, 1.0),
        rotation: float = 0.0,
        flip_probability: float = 0.0,
        single_category_max_area: float = 1.0,
        color_jitter: float = 0.0,
        blur: int = 0,
        pad_value: Sequence[float] = (0.0, 0.0, 0.0),
        centre: Centre | None = None,
    ) -> None:
        self.targets = dict(targets)
        self.image_format = image_format
        self.crop_size = None if crop_size is None else tuple(crop_size)
        self.min_sizes = dict(min_sizes or {})
        self.min_size_sampling = min_size_sampling
        self.max_size = max_size
        self.scale_range = tuple(scale_range)
        self.rotation = rotation
        self.flip_probability = flip_probability
        self.single_category_max_area = single_category_max_area
        self.color_jitter = color_jitter
        self.blur = blur
        self.pad_value = np.rint(pad_value).astype(np.uint8)
        self.centre = centre

    @classmethod
    def from_config(
        cls, cfg: CfgNode, *, entries: Sequence[str] | None = None, centre: Centre | None = None
    ) -> dict[str, Any]:
        """Arguments from INPUT, MODEL.PIXEL_MEAN and DATASETS.REMAP_TO, for ``entries``, default DATASETS.TRAIN."""
        entries = tuple(cfg.DATASETS.TRAIN if entries is None else entries)
        return {
            "targets": label_targets(entries, cfg.DATASETS.REMAP_TO),
            "image_format": cfg.INPUT.FORMAT,
            "crop_size": _crop_size(cfg),
            "min_sizes": _min_sizes(cfg, entries),
            "min_size_sampling": "range" if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" else "choice",
            "max_size": cfg.INPUT.MAX_SIZE_TRAIN,
            "scale_range": _scale_range(cfg),
            "rotation": _in_range(cfg, "ROTATION", 180, "the largest angle in degrees"),
            "flip_probability": _flip_probability(cfg),
            "single_category_max_area": _single_category_max_area(cfg),
            "color_jitter": _color_jitter(cfg),
            "blur": _in_range(cfg, "BLUR", 100, "the largest radius in pixels"),
            "pad_value": cfg.MODEL.PIXEL_MEAN,
            "centre": centre,
        }

    def __call__(self, dataset_dict: DatasetDict, rng: np.random.Generator) -> Sample:
        """Maps one dataset dict; the dict itself is not changed.

        Args:
            dataset_dict: as registered.
            rng: the only source of randomness.

        Returns:
            A sample, see :class:`multiseg_d2.sample.Sample`.

        Raises:
            BadFileError: a file is missing, broken, or does not fit the spec or the other one's size.
            IllegalLabelError: the crop holds ids that the label space does not know.
        """
        target = self.targets[dataset_dict["entry"]]
        file = open_through_cache(dataset_dict["file_name"], IMAGE)
        label = _LabelMap(target, dataset_dict) if label_path(dataset_dict) else None
        check_sizes(file, label and label.file, dataset_dict)

        window = self._draw_window(rng, file, label, dataset_dict)
        rows = window.y0 + window.h if isinstance(window, CropWindow) else None
        pixels = window.apply_image(decode_color(file, self.image_format, rows))  # (h, w, 3)
        pixels = draw_color_jitter(rng, self.color_jitter, self.image_format).apply_image(pixels)
        pixels = draw_blur(rng, self.blur).apply_image(pixels)

        size = self.crop_size or pixels.shape[:2]
        sample = {key: dataset_dict[key] for key in _PASSED_ON if key in dataset_dict}
        sample.update(dataset=target.dataset, annotation=_annotation(dataset_dict))
        sample.update(height=file.height, width=file.width)
        sample["image"] = torch.from_numpy(_to_planes(pixels, size, self.pad_value))  # (3, H, W)
        content = _content(window, size)
        if content is not None:
            sample["content"] = torch.from_numpy(content)  # (H, W)
        if label is not None:
            sample["sem_seg"] = torch.from_numpy(_padded(label.cropped(window), size, IGNORE))  # (H, W)
        if "soft_label_file_name" in dataset_dict:
            _add_soft_label(sample, dataset_dict["soft_label_file_name"], target, window, size)
        _add_weak_labels(sample, dataset_dict, target, window, size)
        return sample

    def _draw_window(
        self, rng: np.random.Generator, file: EncodedFile, label: _LabelMap | None, dataset_dict: DatasetDict
    ) -> CropWindow | RotatedWindow:
        """Draws scale, rotation, crop and flip."""
        scale = self._draw_min_size_scale(rng, file, dataset_dict["entry"]) * draw_scale(rng, self.scale_range)
        angle = draw_rotation(rng, self.rotation)
        balance = label is not None and self.crop_size is not None and self.single_category_max_area < 1

        def turned(window: CropWindow) -> CropWindow | RotatedWindow:
            if not self.rotation:
                return window
            return RotatedWindow(window, angle, file.height, file.width, self.pad_value)

        def is_balanced(window: CropWindow) -> bool:
            counts = np.bincount(label.cropped(turned(window), whole=True).reshape(-1), minlength=256)[:IGNORE]
            return 0 < counts.max() <= self.single_category_max_area * counts.sum()

        place = None if self.centre is None or label is None else self.centre(label.whole(), dataset_dict, rng)
        if place is not None:
            everything = turned(CropWindow(0, 0, file.width, file.height, file.width, file.height))
            place = tuple(everything.apply_coords(np.array([[place[1] + 0.5, place[0] + 0.5]]))[0, ::-1])
        draw = (self.crop_size, self.flip_probability, is_balanced if balance else None)
        return turned(draw_crop(rng, file.height, file.width, scale, *draw, centre=place))

    def _draw_min_size_scale(self, rng: np.random.Generator, file: EncodedFile, entry: str) -> float:
        sizes = self.min_sizes.get(entry, (0,))
        if self.min_size_sampling == "range" and len(sizes) == 2:
            size = int(sizes[0] + rng.random() * (sizes[1] - sizes[0] + 1))
        else:  # nothing is drawn where there is no choice
            size = sizes[0] if len(sizes) == 1 else sizes[int(rng.random() * len(sizes))]
        return shortest_edge_scale(file.height, file.width, size, self.max_size)


class _LabelMap:
    """The label map of one image: decoded as far as it is needed, translated once."""

    def __init__(self, target: LabelTarget, dataset_dict: DatasetDict) -> None:
        self.file = open_through_cache(label_path(dataset_dict), target.reader.encoding)
        self._target, self._dict = target, dataset_dict
        self._stored: np.ndarray | None = None
        self._local: np.ndarray | None = None

    def whole(self) -> np.ndarray:
        """(H, W) uint8 local ids of the whole image."""
        if self._local is None:
            self._local = self._target.reader.to_local(self._decoded(self.file.height), self._dict)
        return self._local

    def cropped(self, window: CropWindow | RotatedWindow, whole: bool = False) -> np.ndarray:
        """(h, w) uint8 local ids; ``whole``: other windows follow, so that all rows are decoded."""
        if self._local is not None or isinstance(window, RotatedWindow):
            return window.apply_segmentation(self.whole())
        stored = self._decoded(self.file.height if whole else window.y0 + window.h)
        return self._target.reader.to_local(window.apply_segmentation(stored), self._dict)

    def _decoded(self, rows: int) -> np.ndarray:
        if self._stored is None or len(self._stored) < rows:
            self._stored = self._target.reader.decode(self.file, rows if rows < self.file.height else None)
        return self._stored


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
        file = open_through_cache(dataset_dict["file_name"], IMAGE)
        check_sizes(file, None, dataset_dict)
        scale = shortest_edge_scale(file.height, file.width, self.min_size, self.max_size)
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


def _padded(pixels: np.ndarray, size: tuple[int, int], fill: int) -> np.ndarray:
    """(..., h, w) -> (..., H, W), padded at the bottom and right."""
    height, width = pixels.shape[-2:]
    if (height, width) == tuple(size):
        return pixels
    padded = np.full((*pixels.shape[:-2], *size), fill, pixels.dtype)
    padded[..., :height, :width] = pixels
    return padded


def _content(window: CropWindow | RotatedWindow, size: tuple[int, int]) -> np.ndarray | None:
    """(H, W) bool, True where the sample shows the image; None where that is everywhere."""
    content = window.content()
    if content is None:
        if (window.out_h, window.out_w) == tuple(size):
            return None
        content = np.ones((window.out_h, window.out_w), bool)
    content = _padded(content, size, False)
    return None if content.all() else content


def _add_soft_label(
    sample: dict[str, Any], path: str, target: LabelTarget, window: CropWindow | RotatedWindow, size: tuple[int, int]
) -> None:
    soft = read_soft_label(path, sample["height"], sample["width"], target.own_classes)
    if target.translation is not None:
        soft = soft.translated(target.translation, target.num_classes)
    shares, confidence = soft.cropped(window)
    sample["soft_label"] = torch.from_numpy(_padded(shares, size, 0))  # (C, H, W)
    if confidence is not None:
        sample["confidence"] = torch.from_numpy(_padded(confidence, size, 0))  # (H, W)


def _add_weak_labels(
    sample: dict[str, Any],
    dataset_dict: DatasetDict,
    target: LabelTarget,
    window: CropWindow | RotatedWindow,
    size: tuple[int, int],
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
        raise ConfigError(f"INPUT.CROP.TYPE is {cfg.INPUT.CROP.TYPE!r}; only 'absolute' (SIZE in pixels) is known.")
    height, width = cfg.INPUT.CROP.SIZE
    if height != int(height) or width != int(width) or min(height, width) < 1:
        raise ConfigError(f"INPUT.CROP.SIZE is {cfg.INPUT.CROP.SIZE}; it must be (height, width) in pixels.")
    return int(height), int(width)


def _min_sizes(cfg: CfgNode, entries: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Lengths of the shorter side per entry, from Detectron2's keys."""
    sampling, given = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING, cfg.INPUT.MIN_SIZE_TRAIN
    sizes = (given,) if isinstance(given, int) else tuple(given)
    if not sizes or min(sizes) < 0 or cfg.INPUT.MAX_SIZE_TRAIN < 0:
        raise ConfigError(f"INPUT.MIN_SIZE_TRAIN is {given}; it must be lengths in pixels; 0 keeps the size.")
    if sampling not in ("choice", "range", "per_dataset"):
        raise ConfigError(f"INPUT.MIN_SIZE_TRAIN_SAMPLING is {sampling!r}, not one of choice, range, per_dataset.")
    if sampling == "range" and (len(sizes) > 2 or sizes[0] > sizes[-1]):
        raise ConfigError(f"INPUT.MIN_SIZE_TRAIN is {given}; INPUT.MIN_SIZE_TRAIN_SAMPLING 'range' needs (low, high).")
    if sampling != "per_dataset":
        return dict.fromkeys(entries, sizes)
    if len(sizes) != len(entries):
        raise ConfigError(
            f"INPUT.MIN_SIZE_TRAIN has {len(sizes)} lengths for {len(entries)} training sets: with "
            "INPUT.MIN_SIZE_TRAIN_SAMPLING 'per_dataset' give one per entry of DATASETS.TRAIN, in its order."
        )
    return {entry: (size,) for entry, size in zip(entries, sizes)}


def _scale_range(cfg: CfgNode) -> tuple[float, ...]:
    values = tuple(cfg.INPUT.SCALE_RANGE)
    if len(values) not in (2, 3) or not 0 < values[0] <= values[1] or (len(values) == 3 and values[2] < 0):
        raise ConfigError(f"INPUT.SCALE_RANGE is {values}; it must be (low, high[, step]) with 0 < low <= high.")
    return values


def _flip_probability(cfg: CfgNode) -> float:
    if cfg.INPUT.RANDOM_FLIP not in ("horizontal", "none"):
        raise ConfigError(f"INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP!r}; only 'horizontal' and 'none' are known.")
    return 0.5 if cfg.INPUT.RANDOM_FLIP == "horizontal" else 0.0


def _single_category_max_area(cfg: CfgNode) -> float:
    share = cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA
    if not 0 < share <= 1:
        raise ConfigError(f"INPUT.CROP.SINGLE_CATEGORY_MAX_AREA is {share}; it must be a share in (0, 1], 1 = off.")
    return share


def _color_jitter(cfg: CfgNode) -> float:
    if not 0 <= cfg.INPUT.COLOR_JITTER < 1:
        raise ConfigError(f"INPUT.COLOR_JITTER is {cfg.INPUT.COLOR_JITTER}; it must lie in [0, 1), 0 = off.")
    return cfg.INPUT.COLOR_JITTER


def _in_range(cfg: CfgNode, key: str, largest: float, what: str) -> float:
    if not 0 <= cfg.INPUT[key] <= largest:
        raise ConfigError(f"INPUT.{key} is {cfg.INPUT[key]}; it is {what}, from 0 = off to {largest}.")
    return cfg.INPUT[key]
