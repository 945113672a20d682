"""What the toy sets' files hold: drawn concepts -> raw ids, colours, boxes and tags of a dataset spec."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ..data.spec import DatasetSpec, load_spec
from ..taxonomy import Taxonomy
from .canvas import CONCEPTS
from .scene import Drawing

__all__ = ["MIN_PIXELS", "concept_classes", "encode_image", "encode_label", "objects", "raw_label", "toy_spec"]

#: Objects of which fewer pixels are seen have no box and no tag.
MIN_PIXELS = 6
_TAXONOMY = Path(__file__).resolve().parents[1] / "data" / "taxonomy.yaml"


@lru_cache(maxsize=32)
def toy_spec(name: str) -> DatasetSpec:
    """A packaged spec, read once."""
    return load_spec(name)


@lru_cache(maxsize=1)
def _leaves() -> dict[str, frozenset[int]]:
    taxonomy = Taxonomy.load(_TAXONOMY)
    return {name: taxonomy.leaves(name) for name in taxonomy.concepts}


@lru_cache(maxsize=32)
def concept_classes(spec_name: str) -> np.ndarray:
    """Which class of a packaged toy spec covers each drawn concept, by the packaged taxonomy.

    Returns:
        (len(CONCEPTS),) int64 local ids, -1 where no class covers the concept.

    Raises:
        ValueError: two classes cover one concept, or a class covers only a part of it.
    """
    leaves, spec = _leaves(), toy_spec(spec_name)
    classes = [frozenset().union(*(leaves[c] for c in cls.covers)) for cls in spec.classes]
    table = np.full(len(CONCEPTS), -1, np.int64)
    for concept, name in enumerate(CONCEPTS[1:], start=1):
        owners = [local_id for local_id, covered in enumerate(classes) if covered & leaves[name]]
        if len(owners) > 1 or any(not leaves[name] <= classes[o] for o in owners):
            names = [spec.class_names[local_id] for local_id in owners]
            raise ValueError(f"{spec_name}: {name!r} is drawn as one thing, but {names} share it or cover a part")
        table[concept] = owners[0] if owners else -1
    return table


def raw_label(concept: np.ndarray, spec_name: str) -> np.ndarray:
    """Concept map -> raw label map of a spec.

    A class with as many raw ids as concepts has one for each, in the order of ``CONCEPTS``; else its first is written.

    Args:
        concept: (H, W) uint8.
        spec_name: a packaged toy spec.

    Returns:
        (H, W) uint16 raw ids, or (H, W, 3) uint8 RGB for encoding ``color``.
    """
    spec, owners = toy_spec(spec_name), concept_classes(spec_name)
    color = spec.encoding == "color"
    ignored = (spec.ignore_colors if color else spec.ignore_ids)[0]
    table = np.array([ignored] * len(CONCEPTS), np.uint8 if color else np.uint16)
    for local_id, cls in enumerate(spec.classes):
        raws, members = (cls.raw_colors if color else cls.raw_ids), np.flatnonzero(owners == local_id)
        table[members] = raws if len(raws) == len(members) else raws[0]
    return np.take(table, concept, axis=0)


def encode_image(image: np.ndarray, suffix: str) -> bytes:
    """(H, W, 3) uint8 RGB -> file content; ``.jpg`` or ``.png``."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix == ".jpg" else [cv2.IMWRITE_PNG_COMPRESSION, 3]
    return cv2.imencode(suffix, image[..., ::-1], options)[1].tobytes()


def encode_label(concept: np.ndarray, spec_name: str) -> bytes:
    """Concept map -> label file of a spec.

    PNG in colour where the spec says so, 16-bit grey where ids need it, with a palette where 255 is ignored (as BDD100K
    has it), else 8-bit grey.
    """
    spec, raw = toy_spec(spec_name), raw_label(concept, spec_name)
    if spec.encoding == "color":
        return encode_image(raw, ".png")
    if max(i for cls in spec.classes for i in cls.raw_ids) > 255:
        return cv2.imencode(".png", raw)[1].tobytes()
    raw = raw.astype(np.uint8)
    if 255 not in spec.ignore_ids:
        return cv2.imencode(".png", raw)[1].tobytes()
    palette = np.zeros((256, 3), np.uint8)
    for cls in spec.classes:
        palette[list(cls.raw_ids)] = cls.color
    image, content = Image.fromarray(raw), BytesIO()
    image.putpalette(palette.tobytes())
    image.save(content, "PNG")
    return content.getvalue()


def objects(drawing: Drawing, spec: DatasetSpec) -> list[dict[str, Any]]:
    """Objects of the classes of a box or tag spec, in COCO's form.

    Returns:
        ``category_id`` and ``bbox`` (x, y, width, height; the smallest box around the visible pixels), largest first.
    """
    owners = concept_classes(spec.name)[drawing.concept]  # (H, W)
    things = np.where(owners >= 0, drawing.thing, 0)
    found = []
    for thing in np.unique(things)[1:]:
        rows, columns = np.nonzero(things == thing)
        if len(rows) < MIN_PIXELS:
            continue
        x, y = int(columns.min()), int(rows.min())
        box = [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
        local_id = int(owners[rows[0], columns[0]])
        found.append({"category_id": spec.classes[local_id].raw_ids[0], "bbox": box, "area": len(rows)})
    return sorted(found, key=lambda item: -item["area"])
