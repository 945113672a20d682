"""The street itself: sky, ground, buildings, yards. Drawn from far to near, before the things that stand on it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from .canvas import Camera, Canvas
from .looks import Look

__all__ = ["FAR", "Street", "draw_street", "pick", "shaded"]

#: Where the street ends, metres.
FAR = 90.0
_CURB = 0.35
_LAMPLIGHT = np.array([1.5, 1.2, 0.7])


@dataclass(frozen=True)
class Street:
    """Sideways layout, metres: the road is [-half, half], then curb, sidewalk to ``edge``, verge to ``front``."""

    half: float
    walk: float
    verge: float

    @property
    def edge(self) -> float:
        """Outer edge of the sidewalk."""
        return self.half + _CURB + self.walk

    @property
    def front(self) -> float:
        """Front of the buildings and fences."""
        return self.edge + self.verge

    @property
    def lanes(self) -> tuple[float, ...]:
        """Centres of the lanes, from left to right."""
        count = 4 if self.half > 6.2 else 2
        width = 2 * self.half / count
        return tuple(-self.half + width * (i + 0.5) for i in range(count))


def pick(rng: np.random.Generator, look: Look, material: str, spread: float = 0.05) -> np.ndarray:
    """A reflectance of the look's palette, (3,) in [0, 1], a little different every time."""
    variants = look.palette[material]
    draw = rng.random(5)
    color = np.array(variants[int(draw[4] * len(variants))])
    color = color * (1 + spread * (2 * draw[3] - 1)) + 0.3 * spread * (2 * draw[:3] - 1)
    return np.minimum(np.maximum(color, 0.01), 0.97)


def shaded(color, factor: float) -> np.ndarray:
    """The colour of a face turned away from the light."""
    return np.minimum(np.asarray(color) * factor, 0.98)


def draw_street(canvas: Canvas, camera: Camera, look: Look, rng: np.random.Generator) -> Street:
    """Draws everything that does not stand on the road or the sidewalks.

    Returns:
        The layout on which things are then placed.
    """
    verge = float(rng.uniform(0.8, 2.5)) if rng.random() < 0.4 else 0.0
    street = Street(float(rng.uniform(*look.road)), float(rng.uniform(*look.walk)), verge)
    _draw_background(canvas, camera, look, rng)
    _draw_ground(canvas, camera, look, street, rng)
    cuts = [_cuts(camera, rng) for _ in range(2)]
    for side, ends in zip((-1, 1), cuts):
        wall_before = False
        for z0, z1 in reversed(list(pairwise(ends))):
            if rng.random() < look.gap:
                _draw_yard(canvas, camera, look, street, rng, side, z0, z1)
                wall_before = False
            else:
                _draw_building(canvas, camera, look, street, rng, side, z0, z1, wall_before)
                wall_before = True
    return street


def _cuts(camera: Camera, rng: np.random.Generator) -> list[float]:
    """Ends of the roadside stretches, near to far, metres."""
    ends = [max(1.0, 0.45 * camera.near)]
    while ends[-1] < 0.7 * FAR:
        ends.append(ends[-1] + float(rng.uniform(7, 13)) * (1 + ends[-1] / 40))
    return ends


def _draw_background(canvas: Canvas, camera: Camera, look: Look, rng: np.random.Generator) -> None:
    height, width, row = canvas.height, canvas.width, camera.horizon
    canvas.fill(np.array([(0, 0), (width, 0), (width, height), (0, height)]), (0.5,) * 3, "sky", 1000.0)
    ground = np.array([(-1, row + 0.5), (width, row + 0.5), (width, height), (-1, height)])
    canvas.fill(ground, pick(rng, look, "grass"), "grass")
    # A ragged line of trees closes the view.
    u = np.linspace(-0.05, 1.05, 24) * width
    top = row - height * (0.03 + 0.05 * rng.random(24) + 0.03 * np.sin(u / width * 9 + rng.uniform(0, 6)))
    outline = np.concatenate([np.stack([u, top], 1), [(width * 1.05, row + 1), (-width * 0.05, row + 1)]])
    canvas.fill(outline, shaded(pick(rng, look, "tree"), 0.85), "tree", FAR)


def _depths(camera: Camera, z1: float = FAR) -> np.ndarray:
    return np.geomspace(max(0.5, 0.6 * camera.near), z1, 14)


def _strip(camera: Camera, x0: float, x1: float, depths: np.ndarray) -> np.ndarray:
    """Outline in pixels of the ground between two lines along the street."""
    return np.concatenate([camera.project(x0, 0.0, depths), camera.project(x1, 0.0, depths)[::-1]])


def _draw_ground(canvas: Canvas, camera: Camera, look: Look, street: Street, rng: np.random.Generator) -> None:
    depths = _depths(camera)
    half, edge = street.half, street.edge
    walk = pick(rng, look, "sidewalk")
    for side in (-1, 1):
        canvas.fill(_strip(camera, side * half, side * edge, depths), walk, "sidewalk_core")
        joints = np.arange(camera.near, 24, 2.4)
        canvas.fill(_bars(camera, side * half, side * edge, joints, joints + 0.12), shaded(walk, 0.8), "sidewalk_core")
        curb = _strip(camera, side * half, side * (half + _CURB), depths)
        canvas.fill(curb, pick(rng, look, "curb"), "curb_beside_sidewalk")
    canvas.fill(_strip(camera, -half, half, depths), pick(rng, look, "road"), "road_surface")
    paint = pick(rng, look, "marking")
    lanes = street.lanes
    width = lanes[1] - lanes[0]
    dashes = np.arange(float(rng.uniform(-6, 0)), 60, 6.0)
    dashes = dashes[dashes + 3 > camera.near]
    for i in range(1, len(lanes)):
        x = -half + i * width
        if 2 * i == len(lanes) and len(lanes) == 4:  # a solid line parts the directions
            canvas.fill(_strip(camera, x - 0.09, x + 0.09, _depths(camera, 70)), paint, "road_marking")
        else:
            canvas.fill(_bars(camera, x - 0.09, x + 0.09, dashes, dashes + 3.0), paint, "road_marking")
    if rng.random() < 0.6:
        for x in (-half + 0.4, half - 0.4):
            canvas.fill(_strip(camera, x - 0.07, x + 0.07, _depths(camera, 60)), paint, "road_marking")
    if rng.random() < 0.35:  # a crossing: bars along the street
        z, x = float(rng.uniform(6, 20)), np.arange(-half + 0.6, half - 0.7, 1.0)
        canvas.fill(_bars(camera, x, x + 0.5, z, z + 3.0), paint, "crosswalk_zebra")


def _bars(camera: Camera, x0, x1, z0, z1) -> np.ndarray:
    """(N, 4, 2) pixels of rectangles on the ground; arguments broadcast."""
    x0, x1, z0, z1 = np.broadcast_arrays(x0, x1, z0, z1)
    return camera.project(np.stack([x0, x1, x1, x0], -1), 0.0, np.stack([z0, z0, z1, z1], -1))


def _uprights(camera: Camera, x: float, z0, z1, y0, y1) -> np.ndarray:
    """(N, 4, 2) pixels of upright rectangles at x, along the street; arguments broadcast."""
    y0, y1, z0, z1 = np.broadcast_arrays(*np.atleast_1d(y0, y1, z0, z1))
    return camera.project(x, np.stack([y0, y0, y1, y1], -1), np.stack([z0, z1, z1, z0], -1))


def _draw_building(canvas, camera, look, street, rng, side, z0, z1, wall_before) -> None:
    storeys = int(rng.integers(look.storeys[0], look.storeys[1] + 1))
    top = storeys * float(rng.uniform(2.8, 3.4)) + 1.0
    wall, x = pick(rng, look, "wall"), side * street.front
    depth = 0.5 * (z0 + z1)
    if not wall_before or rng.random() < 0.5:  # the end wall that faces the camera
        face = camera.project(np.array([x, x + side * 14, x + side * 14, x]), np.array([0, 0, top, top]), z0)
        canvas.fill(face, shaded(wall, 0.85), "building", z0)
    light = 1.0 if side > 0 else 0.78  # the sun is always on one side
    canvas.fill(_uprights(camera, x, z0, z1, 0.0, top), shaded(wall, light), "building", depth)
    base = float(rng.uniform(0.5, 1.0))
    canvas.fill(_uprights(camera, x, z0, z1, 0.0, base), shaded(wall, 0.7 * light), "building", depth)
    columns = max(2, int((z1 - z0) / 2.6))
    at = z0 + (np.arange(columns) + 0.5) * (z1 - z0) / columns
    floors = 1.4 + np.arange(storeys) * (top - 1.2) / storeys
    zs, ys = (grid.ravel() for grid in np.meshgrid(at, floors))
    panes = _uprights(camera, x, zs - 0.6, zs + 0.6, ys, ys + 1.5)
    lit = rng.random(len(panes)) < 0.35 * look.lamps
    glass = pick(rng, look, "window")
    canvas.fill(panes[~lit], glass, "building", depth)
    canvas.fill(panes[lit], glass + look.lamps * _LAMPLIGHT, "building", depth)


def _draw_yard(canvas, camera, look, street, rng, side, z0, z1) -> None:
    """Grass with trees behind a fence, a hedge, or nothing."""
    x, depth = side * street.front, 0.5 * (z0 + z1)
    for z in sorted(rng.uniform(z0, z1, int(rng.integers(1, 4))), reverse=True):
        draw_tree(canvas, camera, look, rng, side * (street.front + float(rng.uniform(2, 7))), float(z))
    border = rng.random()
    if border < 0.45:
        top, paint = float(rng.uniform(1.1, 1.9)), pick(rng, look, "fence")
        canvas.fill(_uprights(camera, x, z0, z1, 0.0, top), paint, "fence", depth)
        posts = np.arange(z0, z1 - 0.2, max(0.5, z0 / 12))
        canvas.fill(_uprights(camera, x, posts, posts + 0.2, 0.0, top), shaded(paint, 0.6), "fence", depth)
    elif border < 0.8:
        top, leaves = float(rng.uniform(0.9, 1.7)), pick(rng, look, "bush")
        canvas.fill(_uprights(camera, x, z0, z1, 0.0, top), shaded(leaves, 0.85), "bush", depth)
        canvas.fill(_uprights(camera, x, z0, z1, 0.75 * top, top), shaded(leaves, 1.1), "bush", depth)


def draw_tree(canvas: Canvas, camera: Camera, look: Look, rng: np.random.Generator, x: float, z: float) -> None:
    """A trunk and a crown of leaf clumps; all of it is `tree`."""
    foot, scale = camera.project(x, 0.0, z), camera.focal / z
    height, spread = float(rng.uniform(4.0, 7.5)), float(rng.uniform(1.2, 2.2))
    trunk = np.array([(-0.14, 0), (0.14, 0), (0.1, height * 0.6), (-0.1, height * 0.6)]) * (scale, -scale) + foot
    canvas.fill(trunk, pick(rng, look, "trunk"), "tree", z)
    leaves = pick(rng, look, "tree")
    clumps = rng.uniform(-1, 1, (7, 2)) * (0.75 * spread, 0.22 * height) + (0, 0.72 * height)
    radius = rng.uniform(0.45, 0.75, 7) * spread
    for tone, part in ((0.78, slice(0, 3)), (1.0, slice(3, 5)), (1.18, slice(5, 7))):
        region = canvas.add(shaded(leaves, tone), "tree", z)
        for (cx, cy), r in zip(clumps[part], radius[part]):
            center = np.rint(foot + (scale * cx, -scale * cy)).astype(int)
            cv2.circle(canvas.region, center.tolist(), max(1, round(scale * r)), region, -1)
