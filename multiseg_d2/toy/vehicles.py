"""The vehicles of the drawn street scenes: boxes along the street, seen from behind or in front.

All draw functions take (canvas, camera, look, rng, x, z): the near end stands at x, z (metres); x < 0 comes towards us.
"""

from __future__ import annotations

import cv2
import numpy as np

from .canvas import Camera, Canvas
from .street import pick, shaded

__all__ = ["RED", "TYRE", "WHITE", "draw_bus", "draw_car", "draw_truck", "draw_van"]

_GLASS = np.array((0.16, 0.20, 0.26))
TYRE = (0.06, 0.06, 0.07)
WHITE, RED = (0.95, 0.95, 0.92), (0.85, 0.08, 0.08)


class _Block:
    """A vehicle in world axes: boxes along the street with their near end at z."""

    def __init__(self, canvas: Canvas, camera: Camera, x: float, z: float, concept: str) -> None:
        self.canvas, self.camera, self.x, self.z, self.concept = canvas, camera, x, z, concept
        self.thing = canvas.new_thing()

    def _face(self, z, y0, y1, low, high) -> np.ndarray:
        """(4, 2) pixels of the upright face at depth z; widths ``low`` and ``high`` at its lower and upper edge."""
        x = self.x + 0.5 * np.array([-low, low, high, -high])
        return self.camera.project(x, np.array([y0, y0, y1, y1]), self.z + z)

    def _paint(self, polygon, color) -> None:
        self.canvas.fill(polygon, color, self.concept, self.z, self.thing)

    def box(self, z0, z1, y0, y1, low, high, front, sides, top=None) -> None:
        """A box from z0 to z1 behind the near end: its hull in ``sides``, then roof, then near face."""
        near, far = self._face(z0, y0, y1, low, high), self._face(z1, y0, y1, low, high)
        hull = cv2.convexHull(np.concatenate([near, far]).astype(np.float32))[:, 0]
        self._paint(hull, sides)
        if top is not None and self.camera.eye > y1:
            self._paint(np.concatenate([near[2:], far[3:1:-1]]), top)
        self._paint(near, front)

    def panel(self, y0, y1, left, right, color, z=0.0) -> None:
        """A rectangle on the near face, from ``left`` to ``right`` of the middle."""
        x = self.x + np.array([left, right, right, left])
        self._paint(self.camera.project(x, np.array([y0, y0, y1, y1]), self.z + z), color)

    def band(self, z0, z1, y0, y1, half, color) -> None:
        """A strip along both long sides; the hidden one falls inside the hull, so only the visible one is drawn."""
        side = -1 if self.x > self.camera.offset else 1
        z = self.z + np.array([z0, z1, z1, z0])
        self._paint(self.camera.project(self.x + side * half, np.array([y0, y0, y1, y1]), z), color)

    def ground_shadow(self, length: float, width: float, strength: float) -> None:
        x = self.x + 0.62 * width * np.array([-1, 1, 1, -1])
        z = self.z + np.array([-0.3, -0.3, length + 0.3, length + 0.3])
        self.canvas.shadow(self.camera.project(x, 0.0, z), strength)

    def lights(self, y: float, half: float, oncoming: bool) -> None:
        """A pair of lights on the near face: white heads or red tails."""
        color = WHITE if oncoming else RED
        for dx in (-half, half):
            self.panel(y - 0.1, y + 0.1, dx - 0.17, dx + 0.17, color)
            u, v = self.camera.project(self.x + dx, y, self.z)
            radius = (1.1 if oncoming else 0.5) * self.camera.focal / self.z
            self.canvas.lamps.append((float(u), float(v), radius, color))


def draw_car(canvas, camera, look, rng, x, z) -> None:
    """A saloon car."""
    body, oncoming = _Block(canvas, camera, x, z, "car_without_van"), x < 0
    paint = pick(rng, look, "car")
    body.ground_shadow(4.2, 1.8, look.shadow)
    for dx in (-0.72, 0.72):
        body.panel(0.0, 0.4, dx - 0.12, dx + 0.12, TYRE)
    body.band(0.5, 3.9, 0.02, 0.3, 0.85, TYRE)
    body.box(0, 4.2, 0.25, 0.86, 1.8, 1.74, paint, shaded(paint, 0.7), shaded(paint, 1.12))
    body.box(0.6, 3.3, 0.84, 1.42, 1.62, 1.26, paint, shaded(_GLASS, 0.8), shaded(paint, 1.1))
    body.panel(0.92, 1.34, -0.6, 0.6, _GLASS, z=0.6)
    body.lights(0.66, 0.66, oncoming)


def draw_van(canvas, camera, look, rng, x, z) -> None:
    """A van: taller than a car, in one box."""
    body, oncoming = _Block(canvas, camera, x, z, "van"), x < 0
    paint = pick(rng, look, "car")
    body.ground_shadow(4.8, 1.9, look.shadow)
    for dx in (-0.78, 0.78):
        body.panel(0.0, 0.4, dx - 0.13, dx + 0.13, TYRE)
    body.band(0.5, 4.4, 0.02, 0.35, 0.9, TYRE)
    body.box(0, 4.8, 0.28, 2.15, 1.95, 1.8, paint, shaded(paint, 0.7), shaded(paint, 1.1))
    body.panel(1.25, 1.95, -0.75, 0.75, _GLASS)
    if rng.random() < 0.5:
        body.band(0.4, 4.2, 1.3, 1.9, 0.95, shaded(_GLASS, 0.8))
    body.lights(0.8, 0.75, oncoming)


def draw_truck(canvas, camera, look, rng, x, z) -> None:
    """A truck: cargo box, and a cab where it comes towards the camera."""
    body, oncoming = _Block(canvas, camera, x, z, "truck"), x < 0
    cargo, cab = pick(rng, look, "cargo"), pick(rng, look, "car")
    body.ground_shadow(7.5, 2.4, look.shadow)
    body.box(0.2, 7.2, 0.35, 0.95, 2.0, 2.0, (0.14,) * 3, (0.11,) * 3)
    for dx in (-0.85, 0.85):
        body.panel(0.0, 0.75, dx - 0.25, dx + 0.25, TYRE)
    if oncoming:
        body.box(2.0, 8.0, 0.95, 3.4, 2.45, 2.45, shaded(cargo, 0.9), shaded(cargo, 0.72), cargo)
        body.box(0, 1.8, 0.45, 2.6, 2.3, 2.2, cab, shaded(cab, 0.7), shaded(cab, 1.1))
        body.panel(1.5, 2.3, -0.95, 0.95, _GLASS)
    else:
        body.box(0, 6.5, 0.9, 3.4, 2.45, 2.45, cargo, shaded(cargo, 0.75), shaded(cargo, 1.05))
        body.panel(0.95, 3.35, -0.05, 0.05, shaded(cargo, 0.6))
    body.lights(0.75, 0.95, oncoming)


def draw_bus(canvas, camera, look, rng, x, z) -> None:
    """A bus with rows of windows."""
    body, oncoming = _Block(canvas, camera, x, z, "bus"), x < 0
    paint = pick(rng, look, "bus")
    body.ground_shadow(10.5, 2.5, look.shadow)
    for dx in (-0.9, 0.9):
        body.panel(0.0, 0.5, dx - 0.2, dx + 0.2, TYRE)
    body.box(0, 10.5, 0.3, 3.05, 2.5, 2.45, paint, shaded(paint, 0.75), shaded(paint, 1.1))
    for a in range(7):
        body.band(0.5 + 1.4 * a, 1.6 + 1.4 * a, 1.45, 2.45, 1.22, shaded(_GLASS, 0.9) + 0.5 * look.lamps)
    body.panel(1.3 if oncoming else 1.7, 2.5, -1.05, 1.05, _GLASS + 0.35 * look.lamps)
    body.panel(2.62, 2.9, -0.7, 0.7, (0.90, 0.85, 0.40) if oncoming else shaded(paint, 0.6))
    body.lights(0.75, 0.98, oncoming)
