#!/usr/bin/env python3
r"""Makes boxes or image tags out of the pixel or panoptic labels of a catalog entry, and the spec that reads them.

    python datasets/boxes_from_labels.py cityscapes_train --classes person car bus --min-size 64
    python datasets/boxes_from_labels.py coco128_panoptic_train --specs datasets/samples/coco128_panoptic.yaml --tags

writes ENTRY_box.json (COCO's form of instance annotations) and ENTRY_box.yaml, a spec with `annotation: box`, into the
folder --output; with --tags ENTRY_tag.json and ENTRY_tag.yaml. A box is a panoptic segment, or, where there are no
segments, a connected component (8 neighbours) of a class: two cars that touch are one box then. Smaller ones than
--min-size pixels are left out. A view takes a part of the images (cityscapes_train[:200]).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

import multiseg_d2  # noqa: F401  (stand-ins come before detectron2)

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog

from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.data import register
from multiseg_d2.data.files import DATA_ROOT_VARIABLE
from multiseg_d2.data.labels import LabelReader
from multiseg_d2.data.pairing import fixed_folders
from multiseg_d2.data.parallel import default_workers, map_files
from multiseg_d2.data.views import register_views
from multiseg_d2.user_error import UserError, run_script
from multiseg_d2.yaml_file import did_you_mean

_KINDS = {"box": "boxes", "tag": "image tags"}
#: (local id, x, y, width, height, number of pixels)
Box = tuple[int, int, int, int, int, int]


class BoxesError(UserError, ValueError):
    """What is asked for cannot be made; the message says why."""


@dataclass(frozen=True)
class Boxed:
    """Boxes of one image, or what is wrong with it."""

    size: tuple[int, int] = (0, 0)
    boxes: tuple[Box, ...] = ()
    problem: str = ""


def boxes_of_components(labels: np.ndarray, classes: Sequence[int], min_size: int) -> list[Box]:
    """Bounding boxes of the connected components (8 neighbours) of some classes.

    Args:
        labels: (H, W) uint8 local ids.
        classes: local ids that are boxed.
        min_size: smallest number of pixels of a component.
    """
    boxes: list[Box] = []
    present = set(np.unique(labels).tolist())
    for local_id in classes:
        if local_id in present:
            mask = (labels == local_id).astype(np.uint8)
            _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
            boxes += [(local_id, *map(int, row)) for row in stats[1:] if row[cv2.CC_STAT_AREA] >= min_size]
    return boxes


def boxes_of_segments(
    segments: np.ndarray, class_of: dict[int, int], classes: Sequence[int], min_size: int
) -> list[Box]:
    """Bounding boxes of panoptic segments.

    Args:
        segments: (H, W) segment ids.
        class_of: segment id -> local id.
        classes: local ids that are boxed.
        min_size: smallest number of pixels of a segment.
    """
    boxes: list[Box] = []
    ids, flat = np.unique(segments, return_inverse=True)
    flat = flat.reshape(segments.shape)
    for index, segment in enumerate(ids.tolist()):
        if class_of.get(segment) in classes:
            rows, columns = np.nonzero(flat == index)
            if len(rows) >= min_size:
                left, top = int(columns.min()), int(rows.min())
                width, height = int(columns.max()) + 1 - left, int(rows.max()) + 1 - top
                boxes.append((class_of[segment], left, top, width, height, len(rows)))
    return boxes


def boxes_of_image(record: dict[str, Any], reader: LabelReader, classes: Sequence[int], min_size: int) -> Boxed:
    """Boxes of a dataset dict; an unreadable or odd label file is a problem that names it."""
    try:
        stored = reader.read(record)
        labels = reader.to_local(stored, record)
        if "segments_info" not in record:
            return Boxed(labels.shape, tuple(boxes_of_components(labels, classes, min_size)))
        segments = stored.astype(np.int64) @ np.array([1, 256, 65536])
        class_of = {s["id"]: int(reader.raw_to_local[s["category_id"]]) for s in record["segments_info"]}
        return Boxed(labels.shape, tuple(boxes_of_segments(segments, class_of, classes, min_size)))
    except (ValueError, OSError) as problem:
        return Boxed(problem=str(problem))


def coco_json(names: Sequence[str], boxed: Sequence[Boxed], classes: dict[int, str]) -> dict[str, Any]:
    """COCO's form of instance annotations: category i + 1 is the i-th of the classes.

    Args:
        names: of the image files, as the spec finds them.
        boxed: of each image.
        classes: local id -> name of the classes that are boxed.
    """
    category = {local_id: i for i, local_id in enumerate(classes, 1)}
    images, annotations = [], []
    for number, (name, one) in enumerate(zip(names, boxed), 1):
        images.append({"id": number, "file_name": name, "height": one.size[0], "width": one.size[1]})
        for local_id, x, y, width, height, area in one.boxes:
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category[local_id]}
            annotations.append({**entry, "bbox": [x, y, width, height], "area": area, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes.values(), 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def spec_yaml(name: str, kind: str, entry: str, local_ids: Sequence[int], image_ids: Sequence[str]) -> str:
    """The spec that reads NAME.json: the chosen classes with their colours and their place in the taxonomy."""
    metadata, taxonomy = MetadataCatalog.get(entry), register.current_taxonomy()
    space, split = metadata.label_space, metadata.spec.splits[metadata.split]
    classes = []
    for number, i in enumerate(local_ids, 1):
        color, covers = space.colors[i].tolist(), list(taxonomy.concepts_of(metadata.dataset, space.classes[i]))
        classes.append({"name": space.classes[i], "color": color, "raw": [number], "covers": covers})
    where: dict[str, Any] = {"images": list(split.images), "annotation_file": f"./{name}.json"}
    if split.ids is not None or entry != split.entry:
        where["ids"] = list(image_ids)
    title = f"{metadata.spec.title or metadata.spec.name}: {_KINDS[kind]} made of its labels"
    content = {"name": name, "title": title, "annotation": kind, "classes": classes, "splits": {"train": where}}
    text = yaml.safe_dump(content, sort_keys=False, width=120, default_flow_style=None, allow_unicode=True)
    return f"# {_KINDS[kind].capitalize()} of {entry}, made by datasets/boxes_from_labels.py.\n{text}"


def chosen_classes(entry: str, names: Sequence[str]) -> list[int]:
    """Local ids of the named classes, all where none is named, in local order.

    Raises:
        BoxesError: a name that the dataset does not have.
    """
    classes = MetadataCatalog.get(entry).label_space.classes
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise BoxesError(f"{entry} has no class {unknown[0]!r}{did_you_mean(unknown[0], classes)}")
    return [i for i, name in enumerate(classes) if not names or name in names]


def records_of(entry: str) -> list[dict[str, Any]]:
    """The dataset dicts of an entry or a view of one.

    Raises:
        BoxesError: no such entry, or one without pixel labels.
    """
    register_views([entry])
    if entry not in DatasetCatalog.list():
        raise BoxesError(f"no dataset is registered as {entry!r}{did_you_mean(entry, DatasetCatalog.list())}")
    if MetadataCatalog.get(entry).annotation != "pixel":
        raise BoxesError(f"{entry} has no pixel labels to make boxes of")
    return DatasetCatalog.get(entry)


def make(entry: str, kind: str, classes: Sequence[str], min_size: int, workers: int) -> tuple[dict[str, Any], str, str]:
    """Boxes or tags of an entry: content of the JSON, text of the spec, and their common name.

    Raises:
        BoxesError: see the message; an unreadable label file ends it, as half a set would look like a whole one.
    """
    records = records_of(entry)
    metadata = MetadataCatalog.get(entry)
    local_ids = chosen_classes(entry, classes)
    reader = LabelReader.from_entry(entry)
    work = partial(boxes_of_image, reader=reader, classes=local_ids, min_size=min_size)
    boxed = list(map_files(work, records, workers, f"{_KINDS[kind]} of {entry}"))
    problems = [one.problem for one in boxed if one.problem]
    if problems:
        raise BoxesError(f"{len(problems)} label files cannot be used, nothing is written: {'; '.join(problems[:5])}")
    folders = fixed_folders(metadata.spec.splits[metadata.split].images, register.data_root())
    name = f"{re.sub(r'[^A-Za-z0-9]+', '_', entry).strip('_')}_{kind}"
    names = [_below(record["file_name"], folders) for record in records]
    content = coco_json(names, boxed, {i: metadata.label_space.classes[i] for i in local_ids})
    if kind == "tag":
        content["annotations"] = _first_of_each(content["annotations"])
    return content, spec_yaml(name, kind, entry, local_ids, [r["image_id"] for r in records]), name


def _first_of_each(annotations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry, without a box, for each class that an image shows."""
    seen = dict.fromkeys((one["image_id"], one["category_id"]) for one in annotations)
    return [{"id": i, "image_id": image, "category_id": category} for i, (image, category) in enumerate(seen, 1)]


def _below(path: str, folders: Sequence[str]) -> str:
    """The path as seen from the folder of the pattern that it matches."""
    inside = [os.path.relpath(path, folder) for folder in folders]
    return min((name for name in inside if not name.startswith(os.pardir)), key=len, default=os.path.abspath(path))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", help="catalog entry with pixel labels, or a view of one")
    parser.add_argument("--specs", nargs="*", default=[], metavar="YAML", help="dataset specs to register first")
    parser.add_argument("--root", help=f"data root (default: ${DATA_ROOT_VARIABLE}, else ./datasets)")
    parser.add_argument("--tags", action="store_true", help="image tags in place of boxes")
    parser.add_argument("--classes", nargs="*", default=[], metavar="NAME", help="default: all classes of the dataset")
    parser.add_argument("--min-size", type=int, default=16, help="pixels of the smallest box (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder (default: this one)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.root:
        os.environ[DATA_ROOT_VARIABLE] = args.root
    kind = "tag" if args.tags else "box"
    try:
        for spec in args.specs:
            register.register_dataset(spec)
        content, spec, name = make(args.entry, kind, args.classes, args.min_size, args.workers)
    except (UserError, ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output / f"{name}.json", json.dumps(content))
    write_atomically(args.output / f"{name}.yaml", spec)
    bare = len(content["images"]) - len({one["image_id"] for one in content["annotations"]})
    print(f"{args.output / name}.json: {len(content['annotations'])} {_KINDS[kind]} in {len(content['images'])} images")
    print(f"{bare} images without any; register {args.output / name}.yaml (DATASETS.SPECS) as {name}_train")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
