#!/usr/bin/env python
"""Shows the labels of registered datasets, and a model's predictions beside them, as PNGs with a legend.

    python tools/visualize.py camvid_train --output out
    python tools/visualize.py bdd100k_val kitti_train --number 20 --output out
    python tools/visualize.py mine_train --specs mine.yaml --images 0001 0007 --output out
    python tools/visualize.py camvid_val --config-file cfg.yaml --weights model.pth --output out

Pictures go to OUTPUT/<entry>/<position>_<name>.png: label maps in class colours, boxes on the image, tags in the title.
A file that cannot be read, or an id that the label space does not know, is named; the others are done, and the exit
code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import multiseg_d2  # noqa: F401  isort: skip  (first: it lets Detectron2 be imported)
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from multiseg_d2.data.decode import read_image
from multiseg_d2.data.labels import label_path, read_local_label
from multiseg_d2.data.register import register_dataset
from multiseg_d2.data.views import register_views
from multiseg_d2.engine import Predictor, load_config, register_config
from multiseg_d2.evaluation import pictures
from multiseg_d2.evaluation.prediction_files import InputError, check_targets
from multiseg_d2.label_space import LabelSpace
from multiseg_d2.progress import CONSOLE, progress
from multiseg_d2.user_error import UserError, run_script
from multiseg_d2.view_name import ViewNameError
from multiseg_d2.yaml_file import did_you_mean


def choose(entry: str, number: int, wanted: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """(position, dataset dict) of what is shown: the images named in ``wanted``, else ``number`` spread evenly."""
    try:
        register_views([entry])
    except ViewNameError as problem:
        raise InputError(str(problem)) from None
    if entry not in DatasetCatalog.list():
        raise InputError(f"{entry!r} is not registered{did_you_mean(entry, DatasetCatalog.list())}")
    records = DatasetCatalog.get(entry)
    if not wanted:
        return [(i, records[i]) for i in pictures.spread(len(records), number or len(records))]
    by_name = {name: i for i, r in enumerate(records) for name in (Path(r["file_name"]).stem, str(r["image_id"]))}
    missing = [name for name in wanted if name not in by_name]
    if missing:
        raise InputError(f"{entry} has no image {missing[0]!r}{did_you_mean(missing[0], by_name)}")
    return [(by_name[name], records[by_name[name]]) for name in wanted]


def draw_boxes(image: np.ndarray, annotations: Sequence[dict[str, Any]], space: LabelSpace) -> np.ndarray:
    """Draws boxes with their class names.

    Args:
        image: (H, W, 3) uint8 RGB.
        annotations: Detectron2's, ``category_id`` is a local id.
        space: names and colours.

    Returns:
        (h, w, 3) uint8 RGB, a whole multiple of the image's size.
    """
    factor = -(-760 // max(image.shape[:2]))  # small pictures are enlarged, so that names can be read
    canvas = Image.fromarray(image).resize((factor * image.shape[1], factor * image.shape[0]), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    colors = pictures.distinct_colors(space.colors)
    thickness = max(2, round(max(canvas.size) / 400))
    for annotation in annotations:
        box = BoxMode.convert(list(annotation["bbox"]), BoxMode(annotation["bbox_mode"]), BoxMode.XYXY_ABS)
        x0, y0, x1, y1 = (round(factor * float(v)) for v in box)
        category = annotation["category_id"]
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=tuple(colors[category]), width=thickness)
        draw.text((x0 + 3, y0 + 2), space.classes[category], (255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
    return np.asarray(canvas)


def draw(record: dict[str, Any], entry: str, predictor: Predictor | None) -> np.ndarray:
    """The picture of one dataset dict."""
    space = MetadataCatalog.get(entry).label_space
    image = read_image(record["file_name"], "RGB")
    title = f"{entry}   {record['image_id']}"
    maps: dict[str, np.ndarray] = {}
    if label_path(record) is not None:
        maps["ground truth"] = read_local_label(record)
        if maps["ground truth"].shape != image.shape[:2]:
            sizes = [f"{w}x{h}" for h, w in (image.shape[:2], maps["ground truth"].shape)]
            raise ValueError(f"{record['file_name']} is {sizes[0]}, its label {label_path(record)} is {sizes[1]}")
    if predictor is not None:
        pixels = image if predictor.image_format == "RGB" else image[..., ::-1]
        maps["prediction"] = predictor(pixels, record["file_name"])
    if "image_tags" in record:
        title += "   tags: " + (", ".join(space.classes[tag] for tag in record["image_tags"]) or "none")
    if "annotations" in record:
        image = draw_boxes(image, record["annotations"], space)
    return pictures.comparison(image, maps, space.classes, space.colors, title)


def visualize(entry: str, args: argparse.Namespace, cfg: CfgNode | None) -> int:
    """Writes the pictures of one entry; returns how many could not be drawn."""
    chosen = choose(entry, args.number, args.images)
    targets = {i: args.output / entry / f"{i:06d}_{Path(record['file_name']).stem}.png" for i, record in chosen}
    read = [path for _, record in chosen for path in (record["file_name"], label_path(record)) if path]
    check_targets({targets[i]: record["file_name"] for i, record in chosen}, read)
    predictor = None if cfg is None else Predictor(cfg, MetadataCatalog.get(entry).dataset, args.norm)
    failed = 0
    with progress(entry, len(chosen), "pictures") as step:
        for position, record in chosen:
            step()
            try:
                picture = draw(record, entry, predictor)
            except ValueError as error:  # of the reader: the message names the file
                CONSOLE.print(f"not drawn: {error}", style="red", markup=False, soft_wrap=True)
                failed += 1
                continue
            pictures.save(picture, targets[position])
    CONSOLE.print(f"{len(chosen) - failed} pictures in {args.output / entry}", markup=False, soft_wrap=True)
    return failed


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="+", help="registered splits, for example camvid_train")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--number", type=int, default=8, help="pictures per entry, spread evenly; 0 = all")
    parser.add_argument("--images", nargs="+", default=[], help="only these, by image id or file name without suffix")
    parser.add_argument("--specs", nargs="+", default=[], help="dataset spec files to register")
    parser.add_argument("--config-file", default="", help="config of a trained model, whose predictions are shown")
    parser.add_argument("--weights", default="", help="its weights; default: MODEL.WEIGHTS of the config")
    parser.add_argument("--norm", default="", help="trained dataset whose batch norm is used; default: the entry's own")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = parse(argv)
    try:
        cfg = None
        if args.config_file:  # before any entry is looked up: it may name the specs
            cfg = load_config(args.config_file)
            cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
            register_config(cfg)
        for spec in args.specs:
            register_dataset(spec)
        return int(sum(visualize(entry, args, cfg) for entry in args.entries) > 0)
    except UserError as error:
        CONSOLE.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(run_script(main))
