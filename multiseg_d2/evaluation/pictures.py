"""Pictures of label maps: panels side by side with a legend of the classes that occur.

All arrays are RGB, uint8. Label maps hold local ids, 255 where nothing is labelled or predicted.
"""

from __future__ import annotations

import colorsys
import io
import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..atomic_file import write_atomically

__all__ = ["color_map", "comparison", "distinct_colors", "in_label_spaces", "overlay", "save", "spread"]

IGNORED = 255
_IGNORED_COLOR = (0, 0, 0)
_ERROR_COLOR = (230, 25, 40)
_PAPER, _INK = (255, 255, 255), (20, 20, 20)
_MARGIN, _HEADING, _TEXT = 8, 22, 14
_TILE = (480, 760)  # shortest and longest wanted width of a panel


def spread(length: int, number: int) -> list[int]:
    """``number`` indices spread evenly over ``range(length)``, always the same; all of them if there are fewer."""
    number = min(length, number)
    return [(2 * k + 1) * length // (2 * number) for k in range(number)]


def distinct_colors(colors: np.ndarray) -> np.ndarray:
    """Colours that tell all classes apart: doubled ones (and black, which means *ignored*) are exchanged.

    Some datasets give several classes one colour (COCO-Stuff, BDD100K, IDD). The first of them keeps it.

    Args:
        colors: (C, 3) uint8.

    Returns:
        (C, 3) uint8, rows unique.
    """
    taken, result = {_IGNORED_COLOR}, []
    hue = 0.0
    for color in map(tuple, np.asarray(colors).tolist()):
        tries = 0
        while color in taken:
            hue, tries = (hue + 0.618034) % 1.0, tries + 1  # the golden angle: neighbours in the list differ much
            rgb = colorsys.hsv_to_rgb(hue, (0.9, 0.55, 0.75)[tries % 3], (0.95, 0.75, 0.55)[tries // 3 % 3])
            color = tuple(round(255 * v) for v in rgb)
        taken.add(color)
        result.append(color)
    return np.array(result, np.uint8)


def color_map(ids: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Paints a label map.

    Args:
        ids: (H, W) uint8 local ids; ids without a colour become black.
        colors: (C, 3) uint8.

    Returns:
        (H, W, 3) uint8.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    return table[ids]


def overlay(image: np.ndarray, ids: np.ndarray, colors: np.ndarray, alpha: float = 0.55) -> np.ndarray:
    """Lays a label map over its image; pixels without a class show the image as it is.

    Args:
        image: (H, W, 3) uint8.
        ids: (H, W) uint8 local ids.
        colors: (C, 3) uint8.
        alpha: share of the class colour.

    Returns:
        (H, W, 3) uint8.
    """
    mixed = cv2.addWeighted(image, 1 - alpha, color_map(ids, colors), alpha, 0)
    return np.where((ids < len(colors))[..., None], mixed, image)


def comparison(
    image: np.ndarray, maps: Mapping[str, np.ndarray], classes: Sequence[str], colors: np.ndarray, title: str = ""
) -> np.ndarray:
    """An image and its label maps side by side, with a legend below.

    Args:
        image: (H, W, 3) uint8.
        maps: (H, W) uint8 local ids by the heading of their panel. Where there are both ``"ground truth"`` and
            ``"prediction"``, a panel of the errors is added.
        classes: C names.
        colors: (C, 3) uint8; doubled ones are exchanged, see :func:`distinct_colors`.
        title: line above the panels.

    Returns:
        (h, w, 3) uint8; panels of a readable size, whatever the image's.
    """
    colors = distinct_colors(colors)
    size = _tile_size(*image.shape[:2])
    photo = _resize(image, size)
    panels = {"image": photo}
    scaled = {heading: _resize(ids, size, nearest=True) for heading, ids in maps.items()}
    for heading, ids in scaled.items():
        panels[heading] = _label_panel(photo, ids, classes, colors)
    truth, prediction = maps.get("ground truth"), maps.get("prediction")
    if truth is not None and prediction is not None:
        labelled = truth != IGNORED
        share = ((prediction != truth) & labelled).sum() / max(1, labelled.sum())
        panels[f"errors: {100 * share:.1f} % of the labelled pixels"] = _error_panel(photo, *scaled.values())
    entries = _legend_entries(maps.values(), classes, colors)
    if len(panels) > 1 + len(maps):
        entries.append((_ERROR_COLOR, "error"))
    return _page(panels, entries, title)


def in_label_spaces(
    image: np.ndarray, labelled: Mapping[str, tuple[np.ndarray, Sequence[str], np.ndarray]]
) -> np.ndarray:
    """One image labelled in several label spaces, a panel each, with names on the large regions.

    Args:
        image: (H, W, 3) uint8 RGB.
        labelled: title -> ((H, W) ids, C names of classes, their (C, 3) uint8 colours).

    Returns:
        (h, w, 3) uint8; panels of a readable size, whatever the image's.
    """
    size = _tile_size(*image.shape[:2])
    photo = _resize(image, size)
    panels = {
        title: _label_panel(photo, _resize(ids, size, nearest=True), classes, distinct_colors(colors))
        for title, (ids, classes, colors) in labelled.items()
    }
    return _page(panels, [], "")


def save(picture: np.ndarray, path: str | os.PathLike) -> None:
    """Writes (H, W, 3) RGB as PNG; makes the folder."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    write_atomically(Path(path), content.getvalue())


def _tile_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of a panel."""
    low, high = _TILE
    scale = min(high / max(width, height), max(1.0, low / max(width, height)))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resize(array: np.ndarray, size: tuple[int, int], nearest: bool = False) -> np.ndarray:
    if array.shape[:2] == size:
        return array
    smooth = cv2.INTER_AREA if size[0] < array.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(array, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT if nearest else smooth)


def _label_panel(photo: np.ndarray, ids: np.ndarray, classes: Sequence[str], colors: np.ndarray) -> np.ndarray:
    """Class colours, a hint of the photo's structure, borders, and names on the large regions."""
    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)[..., None]
    painted = color_map(ids, colors)
    panel = np.where((ids < len(colors))[..., None], 0.82 * painted + 0.18 * grey, 0.12 * grey).astype(np.uint8)
    border = np.zeros(ids.shape, bool)
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    border[1:] |= ids[1:] != ids[:-1]
    panel[border] //= 2
    canvas = Image.fromarray(panel)
    draw = ImageDraw.Draw(canvas)
    for name, x, y in _name_places(ids, classes):
        draw.text((x, y), name, (255, 255, 255), _font(), anchor="mm", stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(canvas)


def _name_places(ids: np.ndarray, classes: Sequence[str]) -> list[tuple[str, int, int]]:
    """Where names fit: the middle of the largest region of each class, if it is wide enough."""
    places = []
    for c in np.unique(ids[ids < len(classes)]).tolist():
        regions, labels, stats, _ = cv2.connectedComponentsWithStats((ids == c).astype(np.uint8), connectivity=4)
        if regions < 2:
            continue
        largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
        text_width = _font().getlength(classes[c])
        if stats[largest, cv2.CC_STAT_WIDTH] < text_width or stats[largest, cv2.CC_STAT_AREA] < 18 * text_width:
            continue
        inside = cv2.copyMakeBorder((labels == largest).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        half = text_width / 2 + 3
        places.append((classes[c], int(np.clip(x, half, max(half, ids.shape[1] - half))), int(y)))
    return places


def _error_panel(photo: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    grey = np.repeat(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    panel = 90 + grey // 3
    labelled = truth != IGNORED
    panel[~labelled] = grey[~labelled] // 8
    wrong = labelled & (prediction != truth)
    panel[wrong] = (0.25 * grey[wrong] + 0.75 * np.array(_ERROR_COLOR)).astype(np.uint8)
    return panel


def _legend_entries(maps, classes: Sequence[str], colors: np.ndarray) -> list[tuple[tuple[int, int, int], str]]:
    found = np.unique(np.concatenate([np.unique(ids) for ids in maps])) if maps else np.array([], int)
    entries = [(tuple(colors[c].tolist()), classes[c]) for c in found.tolist() if c < len(classes)]
    if (found >= len(classes)).any():
        entries.append((_IGNORED_COLOR, "ignored"))
    return entries


def _page(panels: Mapping[str, np.ndarray], entries: list, title: str) -> np.ndarray:
    """Panels in a grid, title above, legend below."""
    height, width = next(iter(panels.values())).shape[:2]
    columns = _columns(len(panels), width, height)
    rows = math.ceil(len(panels) / columns)
    step_x, step_y = width + _MARGIN, height + _HEADING + _MARGIN
    page_width = max(columns * step_x + _MARGIN, 480)
    top = _HEADING + _MARGIN if title else _MARGIN
    places, legend_height = _legend_places([name for _, name in entries], page_width)
    page = Image.new("RGB", (page_width, top + rows * step_y + legend_height + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN + 1), title, _INK, _font(_TEXT, bold=True))
    for i, (heading, panel) in enumerate(panels.items()):
        x, y = _MARGIN + i % columns * step_x, top + i // columns * step_y
        draw.text((x, y + 3), heading, _INK, _font())
        page.paste(Image.fromarray(panel), (x, y + _HEADING))
    y0 = top + rows * step_y
    for (color, name), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y0 + y + 2, x + 14, y0 + y + 16), fill=color, outline=_INK)
        draw.text((x + 20, y0 + y + 1), name, _INK, _font())
    return np.asarray(page)


def _columns(panels: int, width: int, height: int) -> int:
    """The number of columns, of those that fill all rows, that brings the page closest to the shape of a screen."""
    full = [n for n in range(1, panels + 1) if panels % n == 0]
    return min(full, key=lambda n: abs(math.log(n * width / (panels // n * height) / 2.2)))


def _legend_places(names: Sequence[str], width: int) -> tuple[list[tuple[int, int]], int]:
    """Upper left corners of the legend's entries in columns of equal width, and the height of all."""
    if not names:
        return [], 0
    cell = 20 + max(math.ceil(_font().getlength(name)) for name in names) + 14
    columns = max(1, (width - _MARGIN) // cell)
    places = [(_MARGIN + i % columns * cell, i // columns * 20) for i in range(len(names))]
    return places, places[-1][1] + 20


@lru_cache(maxsize=8)
def _font(size: int = 13, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # brings the font along, the same on every machine

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)
