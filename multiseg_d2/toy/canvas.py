"""The canvas and the camera of the drawn street scenes: every shape is drawn once, for picture and label alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

__all__ = ["CONCEPTS", "Camera", "Canvas", "Sprite", "concept_id"]

#: What is drawn, by the names of the universal taxonomy; the position is the concept id, 0 is never scored.
CONCEPTS = (
    "unlabelled",
    "road_surface",
    "road_marking",
    "crosswalk_zebra",
    "curb_beside_sidewalk",
    "sidewalk_core",
    "grass",
    "building",
    "fence",
    "tree",
    "bush",
    "sky",
    "pole",
    "traffic_light",
    "traffic_sign",
    "pedestrian_adult",
    "child",
    "bicyclist",
    "motorcyclist",
    "bicycle",
    "motorcycle",
    "car_without_van",
    "van",
    "truck",
    "bus",
    "ground_animal",
    "traffic_cone",
)
_IDS = {name: i for i, name in enumerate(CONCEPTS)}


def concept_id(name: str) -> int:
    """Position of a concept in :data:`CONCEPTS`."""
    return _IDS[name]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera above a flat, possibly curving street.

    World axes in metres: x to the right (0 = middle of the street), y up (0 = ground), z along the street.

    Attributes:
        height: picture height, pixels.
        width: picture width, pixels.
        focal: focal length, pixels.
        horizon: row of the horizon, pixels.
        vanish: column of the vanishing point, pixels.
        eye: height of the camera above ground, metres.
        offset: x of the camera, metres.
        curve: sideways bend of the street, x shifts by ``curve * z ** 2`` metres.
    """

    height: int
    width: int
    focal: float
    horizon: float
    vanish: float
    eye: float
    offset: float
    curve: float

    @property
    def near(self) -> float:
        """Depth (z) of the ground at the lower edge of the picture, metres."""
        return self.focal * self.eye / (self.height - self.horizon)

    def project(self, x, y, z) -> np.ndarray:
        """World points, as three arrays or numbers that broadcast to (...) -> (..., 2) columns and rows."""
        # Nothing nearer: OpenCV's polygons overflow some 30,000 pixels outside the picture.
        z = np.maximum(z, 0.4 * self.near)
        u = self.vanish + self.focal * ((x - self.offset) / z + self.curve * z)
        v = self.horizon + self.focal * (self.eye - y) / z
        pixels = np.empty((*np.broadcast(u, v).shape, 2))
        pixels[..., 0], pixels[..., 1] = u, v
        return pixels

    def ground_depth(self) -> np.ndarray:
        """(H,) float32: depth of the ground in each row, metres; far away at and above the horizon."""
        below = np.maximum(np.arange(self.height) + 0.5 - self.horizon, 0.5)
        return (self.focal * self.eye / below).astype(np.float32)


@dataclass
class Canvas:
    """One integer map of painted regions; colour, concept, object and depth of a pixel are looked up by its region.

    Picture and label therefore come from the same drawing call and cannot disagree.

    Attributes:
        region: (H, W) uint16 region numbers.
        shade: (H, W) uint8, 255 = lit; shadows are seen on the ground only and change no label.
        lamps: (column, row, radius in pixels, RGB) of things that shine.
    """

    height: int
    width: int
    region: np.ndarray = field(init=False)
    shade: np.ndarray = field(init=False)
    lamps: list[tuple[float, float, float, tuple[float, float, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.region = np.zeros((self.height, self.width), np.uint16)
        self.shade = np.full((self.height, self.width), 255, np.uint8)
        self._rows: list[tuple] = [((0.0, 0.0, 0.0), 0, 0, 0.0)]
        self._things = 0

    def new_thing(self) -> int:
        """Number of a new object, from 1."""
        self._things += 1
        return self._things

    def add(self, color: Sequence[float], concept: str, depth: float = 0.0, thing: int = 0) -> int:
        """A new region.

        Args:
            color: RGB reflectance in [0, 1].
            concept: one of :data:`CONCEPTS`.
            depth: metres; 0 = lies on the ground, its depth follows from the row.
            thing: object number of :meth:`new_thing`, 0 = no object.
        """
        self._rows.append((tuple(color), _IDS[concept], thing, depth))
        return len(self._rows) - 1

    def fill(self, polygons: np.ndarray, color: Sequence[float], concept: str, depth=0.0, thing=0) -> None:
        """Paints one (P, 2) pixel polygon, or (N, P, 2) that do not overlap, as one region."""
        region = self.add(color, concept, depth, thing)
        corners = _pixels(polygons)
        cv2.fillPoly(self.region, [corners] if corners.ndim == 2 else list(corners), region)

    def shadow(self, polygon: np.ndarray, strength: float) -> None:
        """Darkens the ground inside a (P, 2) pixel polygon; strength in [0, 1]."""
        cv2.fillPoly(self.shade, [_pixels(polygon)], int(255 * (1 - strength)))

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """By region number: (R, 3) float32 colours, (R,) uint8 concepts, (R,) uint16 things, (R,) float32 depths."""
        colors, concepts, things, depths = zip(*self._rows)
        return (
            np.array(colors, np.float32),
            np.array(concepts, np.uint8),
            np.array(things, np.uint16),
            np.array(depths, np.float32),
        )


class Sprite:
    """Draws one upright object in its own metres: origin at its foot, x to the right, y up."""

    def __init__(self, canvas: Canvas, camera: Camera, x: float, z: float, concept: str, mirror: bool = False) -> None:
        self.canvas, self.concept, self.depth = canvas, concept, z
        self.thing = canvas.new_thing()
        self.origin = camera.project(x, 0.0, z)
        self.scale = camera.focal / z
        self.step = np.array([-self.scale if mirror else self.scale, -self.scale])

    def become(self, concept: str) -> None:
        """What is drawn from now on is another object, at the same place."""
        self.concept, self.thing = concept, self.canvas.new_thing()

    def at(self, points) -> np.ndarray:
        """(..., 2) metres -> pixels."""
        return self.origin + np.asarray(points, np.float64) * self.step

    def poly(self, points, color) -> None:
        """A filled polygon."""
        self.canvas.fill(self.at(points), color, self.concept, self.depth, self.thing)

    def rect(self, x0: float, y0: float, x1: float, y1: float, color) -> None:
        """A filled rectangle."""
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    def disc(self, x: float, y: float, radius: float, color, height: float | None = None) -> None:
        """A filled circle, or an ellipse of radius ``height`` along y."""
        axes = (max(0, round(self.scale * radius)), max(0, round(self.scale * (height or radius))))
        self._stamp(cv2.ellipse, self._pixel(x, y), axes, 0, 0, 360, color=color, thickness=-1)

    def ring(self, x: float, y: float, radius: float, width: float, color) -> None:
        """A circle line, at least one pixel wide."""
        radius = max(1, round(self.scale * radius))
        self._stamp(cv2.circle, self._pixel(x, y), radius, color=color, thickness=self._stroke(width))

    def line(self, points, width: float, color) -> None:
        """A chain of lines, at least one pixel wide."""
        chain = [_pixels(self.at(points))]
        self._stamp(cv2.polylines, chain, False, color=color, thickness=self._stroke(width))

    def lamp(self, x: float, y: float, radius: float, color) -> None:
        """Makes a point shine where the look has lights on."""
        u, v = self.at((x, y))
        self.canvas.lamps.append((float(u), float(v), self.scale * radius, tuple(color)))

    def _pixel(self, x: float, y: float) -> tuple[int, int]:
        return tuple(_pixels(self.at((x, y))).tolist())

    def _stroke(self, width: float) -> int:
        return max(1, round(self.scale * width))

    def _stamp(self, draw, *args, color, thickness: int) -> None:
        region = self.canvas.add(color, self.concept, self.depth, self.thing)
        draw(self.canvas.region, *args, region, thickness)


def _pixels(points: np.ndarray) -> np.ndarray:
    return np.rint(points).astype(np.int32)
