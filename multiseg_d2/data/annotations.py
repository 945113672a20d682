"""What the JSON files of panoptic, box and tag annotations say, added to dataset dicts."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.structures import BoxMode

from ..json_file import read_json
from ..label_space import IGNORE, ILLEGAL, TABLE_SIZE
from .pairing import composed, some
from .spec import SplitSpec

__all__ = ["add_boxes", "add_segments", "add_tags", "whole"]

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def add_segments(
    records: list[Record], labels: dict[str, str], path: str, folders: Sequence[str], whole: bool = True
) -> None:
    """Adds ``pan_seg_file_name`` and ``segments_info`` (raw category ids) from a COCO panoptic JSON.

    Args:
        records: dataset dicts, changed in place.
        labels: id -> label file.
        path: of the JSON file.
        folders: what the PNG names in it start from; they are matched by name, the order means nothing.
        whole: the records are the whole set, so an entry without file is an error.

    Raises:
        ValueError: a label file without entry, or an entry without label file.
    """
    entries = {
        name: _segments(e["segments_info"], f"{path}: {name}")
        for name, e in _by_file_name(_read(path, "annotations")["annotations"], path).items()
    }
    names = _match(labels.values(), entries, folders, path, whole)
    for record in records:
        record["pan_seg_file_name"] = labels[record["image_id"]]
        record["segments_info"] = entries[names[record["pan_seg_file_name"]]]


def _segments(items: list[dict], where: str) -> list[dict]:
    """``segments_info`` of one label file with whole numbers, every segment once."""
    segments = [
        {**item, **{key: whole(item[key], f"{where}: {key}") for key in ("id", "category_id")}} for item in items
    ]
    doubled = sorted(i for i, n in Counter(segment["id"] for segment in segments).items() if n > 1)
    if doubled:
        raise ValueError(f"{where}: `segments_info` lists twice: segment {some([str(i) for i in doubled])}")
    return segments


def whole(value: Any, what: str) -> int:
    """A whole number from a JSON file, which some programs write as 3.0.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value % 1 != 0:
        raise ValueError(f"{what} is {value!r}, not a whole number")
    return int(value)


def _finite(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{what} is {value!r}, not a number")
    return float(value)


def add_boxes(records: list[Record], path: str, split: SplitSpec, folders: Sequence[str]) -> None:
    """Adds ``annotations`` (local ids, ``BoxMode.XYXY_ABS``) from a COCO instance JSON, and ``width``, ``height``.

    Boxes of ignored categories and boxes without area are left out.

    Raises:
        ValueError: an image without entry or the reverse, a category that the spec does not list, an odd box.
    """
    empty = 0
    for record, objects, image in _instances(records, path, split, folders):
        for key in ("width", "height"):
            if key in image:
                record[key] = whole(image[key], f"{path}: {key} of {image['file_name']}")
        record["annotations"] = []
        for item, local_id in objects:
            where = f"{path}: annotation {item.get('id')} of {image['file_name']}"
            box = item.get("bbox", ())
            if not isinstance(box, list) or len(box) != 4:
                raise ValueError(f"{where}: bbox is {box!r}, not [x, y, w, h]")
            x, y, w, h = (_finite(value, f"{where}: bbox {box!r}: {value!r}") for value in box)
            if w <= 0 or h <= 0:
                empty += 1
                continue
            crowd = whole(float(item["iscrowd"]) if item.get("iscrowd") is True else item.get("iscrowd") or 0, where)
            boxed = {
                "bbox": [x, y, x + w, y + h],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": local_id,
                "iscrowd": crowd,
            }
            record["annotations"].append(boxed)
    if empty:
        logger.warning("%s: %d boxes without area left out", path, empty)


def add_tags(records: list[Record], path: str, split: SplitSpec, folders: Sequence[str]) -> None:
    """Adds ``image_tags``, the sorted local ids of the categories that a COCO instance JSON gives an image.

    Raises:
        ValueError: an image without entry or the reverse, a category that the spec does not list.
    """
    for record, objects, _ in _instances(records, path, split, folders):
        record["image_tags"] = sorted({local_id for _, local_id in objects})


def _instances(records: list[Record], path: str, split: SplitSpec, folders: Sequence[str]):
    """Yields (record, [(annotation, local id)], image entry) for every record."""
    content = _read(path, "images", "annotations")
    images = _by_file_name(content["images"], path)
    names = _match([r["file_name"] for r in records], images, folders, path, split.ids is None)
    categories = _local_ids(content["annotations"], split, path)
    by_image: dict[str, list[tuple[dict, int]]] = {key: [] for key in _image_keys(content["images"], path)}
    homeless: Counter[str] = Counter()
    for item, local_id in zip(content["annotations"], categories):
        key = _key(item["image_id"])
        if key not in by_image:
            homeless[key] += 1
        elif local_id != IGNORE:
            by_image[key].append((item, local_id))
    if homeless:
        listing = some([f"{key} ({n} annotations)" for key, n in sorted(homeless.items())])
        raise ValueError(f"{path}: annotations of images that `images` does not list: image_id {listing}")
    for record in records:
        image = images[names[record["file_name"]]]
        yield record, by_image[_key(image["id"])], image


def _key(image_id: Any) -> str:
    """Image ids are numbers or text, and some programs write the one here and the other there."""
    return image_id if isinstance(image_id, str) else str(whole(image_id, "an image id"))


def _image_keys(images: list[dict], path: str) -> list[str]:
    counts = Counter(_key(image["id"]) for image in images)
    doubled = sorted(key for key, n in counts.items() if n > 1)
    if doubled:
        raise ValueError(f"{path}: several images have the id {some(doubled)}")
    return list(counts)


def _local_ids(items: list[dict], split: SplitSpec, path: str) -> list[int]:
    """Local id of each annotation's category, ``IGNORE`` where it is not used."""
    categories = [
        whole(item["category_id"], f"{path}: category_id of annotation {item.get('id')} (image {item.get('image_id')})")
        for item in items
    ]
    table = split.spec.raw_to_local
    unknown = {c: n for c, n in Counter(categories).items() if not 0 <= c < TABLE_SIZE or table[c] == ILLEGAL}
    if unknown:
        listing = ", ".join(f"{c} ({n} annotations)" for c, n in sorted(unknown.items())[:20])
        raise ValueError(f"{path}: category ids that the spec does not list: {listing}")
    return [int(table[category]) for category in categories]


def _match(
    files: Iterable[str], entries: Iterable[str], folders: Sequence[str], path: str, whole: bool
) -> dict[str, str]:
    """File on disk -> name of its entry in the JSON; every file needs one, and every entry a file if ``whole``."""
    files = {composed(file): file for file in files}  # JSON and file system may encode accents differently
    names = {composed(os.path.join(folder, name)): name for name in entries for folder in dict.fromkeys(folders)}
    names = {files[file]: name for file, name in names.items() if file in files}
    files = set(files.values())
    missing = sorted(files - names.keys())
    if missing:
        raise ValueError(f"{path} has no entry for {some(missing)}")
    strays = sorted(set(entries) - set(names.values()))
    if strays and whole:
        raise ValueError(f"{path} has entries for which there is no file in {', '.join(folders)}: {some(strays)}")
    return names


def _by_file_name(items: list[dict], path: str) -> dict[str, dict]:
    by_name = {item["file_name"]: item for item in items}
    if len(by_name) < len(items):
        doubled = sorted(name for name, n in Counter(item["file_name"] for item in items).items() if n > 1)
        raise ValueError(f"{path} has several entries for {some(doubled)}")
    return by_name


def _read(path: str, *keys: str) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise ValueError(f"{path} is not in COCO's form: it needs the keys {', '.join(keys)}")
    return content
