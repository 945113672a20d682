"""The toy sets on disk: which splits there are, and a folder that is either whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..json_file import read_json
from ..user_error import UserError
from .encode import encode_image, encode_label, objects, toy_spec
from .looks import LOOKS, Look, blend
from .scene import Drawing, draw_scene

__all__ = ["FOLDER", "SPLITS", "ToyFilesError", "ToySplit", "draw_split_scene", "write_toy"]

#: Folder of the toy sets below the data root.
FOLDER = "toy"
#: Raise it when drawings change: folders of older versions are then not taken for current ones.
_VERSION = 2
_MANIFEST = "manifest.json"


class ToyFilesError(UserError, RuntimeError):
    """The toy folder holds other drawings than those asked for."""


@dataclass(frozen=True)
class ToySplit:
    """One split of one toy set.

    Attributes:
        folder: below the toy folder.
        name: of the split.
        share: number of images as a multiple of the number asked for.
        suffix: of the images.
        look: name in ``LOOKS``, or ``"mixed"``: between two random looks, with more of what is rare elsewhere.
        labels: spec whose encoding label files have, "" = none.
        weak: spec of the boxes or tags, "" = none.
        concepts: drawn concepts are written as well.
    """

    folder: str
    name: str
    share: float
    suffix: str
    look: str
    labels: str = ""
    weak: str = ""
    concepts: bool = False


SPLITS = (
    ToySplit("day", "train", 1, ".jpg", "day", labels="toy_day"),
    ToySplit("day", "val", 0.5, ".jpg", "day", labels="toy_day", concepts=True),
    ToySplit("dusk", "train", 1, ".png", "dusk", labels="toy_dusk"),
    ToySplit("dusk", "val", 0.5, ".png", "dusk", labels="toy_dusk", concepts=True),
    ToySplit("dusk", "unlabelled", 2, ".png", "dusk"),
    ToySplit("rain", "train", 1, ".jpg", "rain", labels="toy_rain"),
    ToySplit("rain", "val", 0.5, ".jpg", "rain", labels="toy_rain", concepts=True),
    ToySplit("night", "test", 0.5, ".png", "night", concepts=True),
    ToySplit("evening", "train", 2, ".jpg", "evening"),
    ToySplit("evening", "val", 0.5, ".jpg", "evening", labels="toy_evening"),
    ToySplit("nightfall", "train", 2, ".jpg", "night"),
    ToySplit("nightfall", "val", 0.5, ".jpg", "night", labels="toy_nightfall"),
    ToySplit("box", "train", 2, ".jpg", "mixed", weak="toy_box"),
    ToySplit("tag", "train", 2, ".jpg", "mixed", weak="toy_tag"),
)
_MIXED_RATES = dict(child=1.2, van=1.0, bus=0.5, ground_animal=0.9, traffic_cone=1.0, motorcycle=0.6)


def draw_split_scene(split: ToySplit, index: int, height: int, width: int, seed: int = 0) -> Drawing:
    """Scene number ``index`` of a split: a pure function of its arguments, whatever else is drawn."""
    name = zlib.crc32(f"{split.folder}/{split.name}".encode())
    look = _mixed_look(seed, name, index) if split.look == "mixed" else LOOKS[split.look]
    return draw_scene(look, height, width, (seed, name, index), index)


def _mixed_look(seed: int, name: int, index: int) -> Look:
    rng = np.random.default_rng([seed, name, index, 1])
    first, second = rng.choice(["day", "dusk", "rain", "evening"], 2, replace=False)
    look = blend(LOOKS[first], LOOKS[second], float(rng.random()))
    return replace(look, rates={**look.rates, **_MIXED_RATES}, every={})


def write_toy(
    root: str | os.PathLike[str],
    images: int = 48,
    size: tuple[int, int] = (96, 192),
    seed: int = 0,
    redraw: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draws all toy sets below a data root.

    The folder appears whole, by one rename; processes that draw the same at the same time do not disturb each other.

    Args:
        root: data root; the sets go to ``root/toy``.
        images: number of training images of each labelled set; other splits have a multiple, see ``SPLITS``.
        size: (height, width) of the images, pixels.
        seed: other seeds, other scenes.
        redraw: draw anew whatever toy sets are there; without it drawings of other parameters are an error.
        progress: called with (images done, images in all).

    Returns:
        The toy folder. If it holds these drawings already, nothing is done.

    Raises:
        ToyFilesError: the folder holds other drawings, or (whatever ``redraw`` says) files that are no toy sets.
        ValueError: parameters that cannot be drawn.
    """
    if images < 2 or not (32 <= size[0] <= 1024 and 32 <= size[1] <= 2048) or seed < 0:
        given = f"images={images}, size={tuple(size)}, seed={seed}"
        raise ValueError(f"{given}: needs at least 2 images, a size from 32x32 to 1024x2048 and a seed >= 0")
    folder = Path(root) / FOLDER
    asked = {"version": _VERSION, "images": images, "size": list(size), "seed": seed}
    if folder.exists():
        found = _read_manifest(folder)
        if not redraw:
            _check_same(folder, found, asked)
            return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=folder.parent))
    try:
        _draw_all(partial, asked, progress or (lambda done, total: None))
        _move(partial, folder, asked, redraw)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / _MANIFEST)
    except ValueError as problem:
        raise ToyFilesError(
            f"{folder} has no readable {_MANIFEST}, so these are no toy sets and are left alone. "
            "Move the folder away, or give another root."
        ) from problem


def _check_same(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    if found != asked:
        raise ToyFilesError(
            f"{folder} holds drawings of {found}, asked are {asked}. "
            "Use the parameters of the folder, give another root, or replace the folder (redraw)."
        )


def _move(partial: Path, folder: Path, asked: dict[str, Any], redraw: bool) -> None:
    """Gives the finished folder its name; another process may have been first, which is fine if it drew the same."""
    if redraw and folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=folder.parent))
        os.replace(folder, old / FOLDER)
        shutil.rmtree(old)
    try:
        os.replace(partial, folder)
    except OSError:
        if not folder.exists():
            raise
        _check_same(folder, _read_manifest(folder), asked)


def _draw_all(folder: Path, asked: dict[str, Any], progress: Callable[[int, int], None]) -> None:
    folder.chmod(0o755)
    counts = [max(2, round(asked["images"] * split.share)) for split in SPLITS]
    done = 0
    for split, count in zip(SPLITS, counts):
        found = []
        for index in range(count):
            drawing = draw_split_scene(split, index, *asked["size"], asked["seed"])
            _write_scene(folder / split.folder, split, f"{index:04d}", drawing)
            if split.weak:
                found.append(objects(drawing, toy_spec(split.weak)))
            progress(done := done + 1, sum(counts))
        if split.weak:
            content = _coco(split, found, asked["size"])
            _write(folder / split.folder / "annotations" / f"{split.name}.json", json.dumps(content, indent=1).encode())
    _write(folder / _MANIFEST, json.dumps(asked, indent=1).encode())


def _write_scene(folder: Path, split: ToySplit, stem: str, drawing: Drawing) -> None:
    _write(folder / "images" / split.name / f"{stem}{split.suffix}", encode_image(drawing.image, split.suffix))
    if split.labels:
        _write(folder / "labels" / split.name / f"{stem}.png", encode_label(drawing.concept, split.labels))
    if split.concepts:
        _write(folder / "concepts" / split.name / f"{stem}.png", encode_label(drawing.concept, "toy_concepts"))


def _coco(split: ToySplit, found: list[list[dict[str, Any]]], size: list[int]) -> dict[str, Any]:
    """COCO instance JSON; of tag sets only which categories an image has, once each."""
    spec = toy_spec(split.weak)
    images, annotations = [], []
    for index, items in enumerate(found):
        name = f"{index:04d}{split.suffix}"
        images.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
        if spec.splits[split.name].annotation == "tag":
            items = [{"category_id": c} for c in sorted({item["category_id"] for item in items})]
        for item in items:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "iscrowd": 0, **item})
    categories = [{"id": cls.raw_ids[0], "name": cls.name} for cls in spec.classes]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
