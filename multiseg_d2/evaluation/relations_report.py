"""Measured class relations for people: beside the taxonomy's, as a graph, with examples, and as lines of a taxonomy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.data import DatasetCatalog

from ..class_relations import NEGATIVE, NULL, relation_pairs
from ..data.decode import read_image
from ..data.labels import read_local_label
from ..taxonomy import Taxonomy

__all__ = ["Comparison", "compare", "example_crops", "graph_picture", "taxonomy_lines"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """Relations of one dataset, measured and by the taxonomy: (labelled class, related class) union ids.

    Attributes:
        confirmed: in both.
        missing: the taxonomy has them, the measurement does not.
        contradicted: measured, although the taxonomy says that the classes are disjoint.
        new: measured, and the taxonomy says nothing: the ones to look at.
    """

    confirmed: tuple[Pair, ...]
    missing: tuple[Pair, ...]
    contradicted: tuple[Pair, ...]
    new: tuple[Pair, ...]

    def lines(self, classes: Sequence[str]) -> list[str]:
        """A listing under the four headings."""
        lines = []
        for kind in ("confirmed", "missing", "contradicted", "new"):
            pairs = getattr(self, kind)
            lines.append(f"  {kind}: {len(pairs) or 'none'}")
            lines += [f"    {classes[i]} -> {classes[j]}" for i, j in pairs]
        return lines


def compare(measured: np.ndarray, by_taxonomy: np.ndarray, pixels: np.ndarray) -> Comparison:
    """Sorts the relations of one dataset.

    Args:
        measured: (U, U) int8, see :mod:`multiseg_d2.class_relations`.
        by_taxonomy: likewise.
        pixels: (U,) pixels behind each measured row; of classes without any nothing is missing.
    """
    found, stated = relation_pairs(measured), relation_pairs(by_taxonomy)
    both = set(found) & set(stated)
    only = [pair for pair in found if pair not in both]
    return Comparison(
        tuple(pair for pair in found if pair in both),
        tuple((i, j) for i, j in stated if (i, j) not in both and pixels[i] > 0),
        tuple(pair for pair in only if by_taxonomy[pair] == NEGATIVE),
        tuple(pair for pair in only if by_taxonomy[pair] == NULL),
    )


def graph_picture(classes: Sequence[str], relations: Mapping[str, np.ndarray]) -> np.ndarray:
    """Arrows from labelled classes (left) to the classes that they are as well (right), a colour per dataset.

    Args:
        classes: U names.
        relations: dataset -> (U, U) int8.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no display
    from matplotlib.figure import Figure

    arrows = [(j, i, dataset) for dataset, matrix in relations.items() for i, j in relation_pairs(matrix)]
    arrows.sort(key=lambda arrow: (classes[arrow[0]], classes[arrow[1]]))
    figure = Figure(figsize=(9, 1.2 + 0.24 * max(len(arrows), 1)), dpi=100)
    canvas, axes = FigureCanvasAgg(figure), figure.add_axes((0.02, 0.02, 0.96, 0.9))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(max(len(arrows), 1), -1)
    axes.set_title(f"{len(arrows)} relations: a pixel of the left class is the right class as well", fontsize=10)
    heights = {j: np.mean([y for y, arrow in enumerate(arrows) if arrow[0] == j]) for j, _, _ in arrows}
    colors = {dataset: f"C{k}" for k, dataset in enumerate(relations)}
    for y, (j, i, dataset) in enumerate(arrows):
        axes.text(0.36, y, f"{classes[i]} ({dataset})", ha="right", va="center", fontsize=9, color=colors[dataset])
        style = {"arrowstyle": "->", "color": colors[dataset], "lw": 1.2}
        axes.annotate("", xy=(0.63, heights[j]), xytext=(0.37, y), arrowprops=style)
    for j, y in heights.items():
        axes.text(0.64, y, classes[j], ha="left", va="center", fontsize=9, weight="bold")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def example_crops(
    entry: str, local_ids: Iterable[int], number: int = 4, size: int = 192, images: int = 300
) -> dict[int, np.ndarray]:
    """Crops of an entry's images around its largest regions of some classes, the region outlined.

    Args:
        entry: labelled catalog entry.
        local_ids: the classes.
        number: crops of each class.
        size: side of a crop, pixels.
        images: how many images are looked at, in an order that does not depend on their names.

    Returns:
        Local id -> (size, number * size, 3) uint8 RGB, for the classes that were found.
    """
    wanted = set(local_ids)
    found: dict[int, list[tuple[int, dict]]] = {}
    records = sorted(DatasetCatalog.get(entry), key=lambda r: hashlib.sha256(str(r["image_id"]).encode()).digest())
    for record in records[:images]:
        ids, counts = np.unique(read_local_label(record), return_counts=True)
        for local_id, count in zip(ids.tolist(), counts.tolist()):
            if local_id in wanted:
                found.setdefault(local_id, []).append((count, record))
    pictures = {}
    for local_id, places in found.items():
        places.sort(key=lambda place: -place[0])
        crops = [_crop(record, local_id, size) for _, record in places[:number]]
        blank = np.zeros((size, size, 3), np.uint8)
        pictures[local_id] = np.concatenate(crops + [blank] * (number - len(crops)), axis=1)
    return pictures


def _crop(record: Mapping, local_id: int, size: int) -> np.ndarray:
    mask = (read_local_label(record) == local_id).astype(np.uint8)
    _, _, stats, centres = cv2.connectedComponentsWithStats(mask)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    image = read_image(record["file_name"], "RGB")
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, outlines, -1, (255, 255, 0), 1)
    side = min(max(size, int(1.3 * stats[largest, cv2.CC_STAT_HEIGHT])), *image.shape[:2])
    y, x = (
        int(np.clip(centre - side / 2, 0, full - side)) for centre, full in zip(centres[largest][::-1], image.shape[:2])
    )
    return cv2.resize(image[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA)


def taxonomy_lines(taxonomy: Taxonomy, inner: tuple[str, str], outer: tuple[str, str]) -> list[str]:
    """Lines for a taxonomy file which say that one class lies inside another.

    Args:
        taxonomy: the file's.
        inner: (dataset, class) of the narrower class.
        outer: (dataset, class) of the wider one.

    Returns:
        One line for each concept of the inner class, to replace that concept's line in the file.

    Raises:
        TaxonomyError: one of the classes is not listed in the taxonomy.
        ValueError: the wider class stands for several concepts, so that no single one can be the parent, or the line
            would make a concept contain itself.
    """
    parents = taxonomy.concepts_of(*outer)
    if len(parents) != 1:
        raise ValueError(f"{outer[1]!r} of {outer[0]} stands for {list(parents)}: make one concept that contains them")
    lines = []
    for name in taxonomy.concepts_of(*inner):
        if taxonomy.leaves(parents[0]) <= taxonomy.leaves(name):
            raise ValueError(f"{parents[0]!r} lies inside {name!r}: the relation the other way round would be a circle")
        concept = taxonomy.concepts[name]
        classes = {d: c[0] if len(c) == 1 else list(c) for d, c in concept.classes.items()}
        fields = [f"parents: [{', '.join(dict.fromkeys([*concept.parents, parents[0]]))}]"]
        if classes:
            fields.append("classes: {" + ", ".join(f"{d}: {_yaml(c)}" for d, c in classes.items()) + "}")
        fields += [f"main: {concept.main}"] * bool(concept.main) + [f"note: {concept.note!r}"] * bool(concept.note)
        lines.append(f"  {name}: {{{', '.join(fields)}}}")
    return lines


def _yaml(names: str | list[str]) -> str:
    if isinstance(names, list):
        return "[" + ", ".join(map(_yaml, names)) + "]"
    return f'"{names}"' if any(letter in names for letter in "(){}[],:#&*!|>'%@`") else names
