"""What the JSON files of panoptic, box and tag annotations say, added to dataset dicts."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.structures import BoxMode

from ..label_space import IGNORE, ILLEGAL, TABLE_SIZE
from .pairing import some
from .spec import SplitSpec

__all__ = ["add_boxes", "add_segments", "add_tags"]

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
        name: e["segments_info"] for name, e in _by_file_name(_read(path, "annotations")["annotations"], path).items()
    }
    names = _match(labels.values(), entries, folders, path, whole)
    for record in records:
        record["pan_seg_file_name"] = labels[record["image_id"]]
        record["segments_info"] = entries[names[record["pan_seg_file_name"]]]


def add_boxes(records: list[Record], path: str, split: SplitSpec, folders: Sequence[str]) -> None:
    """Adds ``annotations`` (local ids, ``BoxMode.XYXY_ABS``) from a COCO instance JSON, and ``width``, ``height``.

    Boxes of ignored categories and boxes without area are left out.

    Raises:
        ValueError: an image without entry or the reverse, a category that the spec does not list, an odd box.
    """
    empty = 0
    for record, objects, image in _instances(records, path, split, folders):
        record.update({key: image[key] for key in ("width", "height") if key in image})
        record["annotations"] = []
        for item, local_id in objects:
            box = item.get("bbox", ())
            if len(box) != 4:
                raise ValueError(
                    f"{path}: annotation {item.get('id')} of {image['file_name']}: bbox is {box!r}, not [x, y, w, h]"
                )
            x, y, w, h = map(float, box)
            if w <= 0 or h <= 0:
                empty += 1
                continue
            crowd = int(item.get("iscrowd", 0))
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
    _check_categories(content["annotations"], split, path)
    by_image = defaultdict(list)
    for item in content["annotations"]:
        local_id = int(split.spec.raw_to_local[item["category_id"]])
        if local_id != IGNORE:
            by_image[item["image_id"]].append((item, local_id))
    for record in records:
        image = images[names[record["file_name"]]]
        yield record, by_image[image["id"]], image


def _check_categories(items: list[dict], split: SplitSpec, path: str) -> None:
    counts = Counter(item["category_id"] for item in items)
    table = split.spec.raw_to_local
    unknown = {c: n for c, n in counts.items() if not 0 <= c < TABLE_SIZE or table[c] == ILLEGAL}
    if unknown:
        listing = ", ".join(f"{c} ({n} annotations)" for c, n in sorted(unknown.items())[:20])
        raise ValueError(f"{path}: category ids that the spec does not list: {listing}")


def _match(
    files: Iterable[str], entries: Iterable[str], folders: Sequence[str], path: str, whole: bool
) -> dict[str, str]:
    """File on disk -> name of its entry in the JSON; every file needs one, and every entry a file if ``whole``."""
    files = set(files)
    names = {os.path.join(folder, name): name for name in entries for folder in dict.fromkeys(folders)}
    names = {file: name for file, name in names.items() if file in files}
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
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as problem:
        raise ValueError(f"the annotation file {path} cannot be read: {problem.strerror}") from problem
    except ValueError as problem:
        raise ValueError(f"{path} is not valid JSON: {problem}") from problem
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        raise ValueError(f"{path} is not in COCO's form: it needs the keys {', '.join(keys)}")
    return content
