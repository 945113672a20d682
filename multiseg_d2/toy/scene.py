"""One drawn street scene: picture, concept map and objects, a pure function of look, size and seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from .canvas import Camera, Canvas
from .light import photograph
from .looks import Look
from .street import Street, draw_street, pick
from .things import DRAW

__all__ = ["Drawing", "draw_scene"]

_IN_LANE = ("car_without_van", "van", "truck", "bus", "motorcyclist")
_LENGTH = dict(car_without_van=4.5, parked=4.5, van=5.2, truck=8.0, bus=11.0)
#: How near and how far things are placed, metres beyond the lower edge of the picture.
_REACH = dict(
    child=(2.5, 14), pedestrian_adult=(2.5, 22), bicycle=(2.5, 14), motorcycle=(2.5, 16), bicyclist=(3, 20),
    motorcyclist=(3.5, 20), ground_animal=(3, 18), traffic_cone=(2.5, 12), traffic_sign=(4, 20), traffic_light=(5, 22),
    van=(4, 40), truck=(6, 45), bus=(6, 45),
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A scene.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        concept: (H, W) uint8 concept ids (positions in ``CONCEPTS``).
        thing: (H, W) uint16 object numbers, 0 = no object.
    """

    image: np.ndarray
    concept: np.ndarray
    thing: np.ndarray


def draw_scene(look: Look, height: int, width: int, seed: tuple[int, ...], index: int = 0) -> Drawing:
    """Draws one scene.

    Args:
        look: camera, frequencies, colours, light and sensor.
        height: picture height, pixels.
        width: picture width, pixels.
        seed: everything that names the picture, as integers >= 0; equal seeds give equal drawings.
        index: number of the picture, for the things that every n-th picture has.
    """
    rng = np.random.default_rng(list(seed))
    camera = Camera(
        height=height,
        width=width,
        focal=float(rng.uniform(*look.focal)) * width,
        horizon=float(rng.uniform(*look.horizon)) * height,
        vanish=float(rng.uniform(0.38, 0.62)) * width,
        eye=float(rng.uniform(*look.eye)),
        offset=float(rng.uniform(-0.5, 2.0)),
        curve=float(rng.normal(0, 0.0015)),
    )
    canvas = Canvas(height, width)
    street = draw_street(canvas, camera, look, rng)
    for _, draw in sorted(_place_things(look, camera, street, rng, index), key=lambda placed: -placed[0]):
        draw(canvas)
    if look.hood > 0:
        _draw_hood(canvas, look, rng)
    concepts, things = canvas.tables()[1:3]
    return Drawing(
        photograph(canvas, camera, look, rng), np.take(concepts, canvas.region), np.take(things, canvas.region)
    )


def _place_things(
    look: Look, camera: Camera, street: Street, rng: np.random.Generator, index: int
) -> list[tuple[float, Callable[[Canvas], None]]]:
    """(z, draw(canvas)) of everything that stands on road and sidewalks."""
    placed = []
    taken: list[tuple[float, float, float]] = []  # x, z0, z1 of vehicles
    # The things that must be there come first: they find the places near the camera free.
    wanted = [(kind, True) for kind, period in look.every.items() if (index + 1) % period == 0]
    wanted += [(kind, False) for kind, rate in look.rates.items() for _ in range(rng.poisson(rate))]
    for kind, near in wanted:
        for _ in range(4):
            x, z = _place(kind, near, camera, street, rng)
            if kind not in _LENGTH:
                break
            end = z + _LENGTH[kind]
            if all(abs(x - x2) > 2.3 or end < a or z > b for x2, a, b in taken):
                taken.append((x, z - 1.0, end + 1.0))
                break
        else:
            continue
        placed.append((z, partial(_draw, DRAW[kind], camera, look, rng, x, z)))
    return placed


def _draw(draw, camera, look, rng, x, z, canvas) -> None:
    draw(canvas, camera, look, rng, x, z)


def _place(kind: str, near: bool, camera: Camera, street: Street, rng: np.random.Generator) -> tuple[float, float]:
    low, high = _REACH.get(kind, (4.0, 50.0))
    if near:
        high = low + 0.45 * (high - low)
    z = camera.near + low + (high - low) * float(rng.random()) ** 1.4
    side = float(rng.choice([-1, 1]))
    if kind in _IN_LANE:
        return float(rng.choice(street.lanes)) + float(rng.uniform(-0.3, 0.3)), z
    if kind == "parked":
        return side * (street.half - 1.0), z
    if kind in ("bicyclist", "ground_animal", "traffic_cone"):
        return float(rng.uniform(-street.half + 0.3, street.half - 0.3)), z
    if kind in ("lamp_post", "traffic_light", "traffic_sign", "tree"):
        return side * (street.half + 0.7), z
    if kind == "bush":
        return side * (street.edge + 0.2), z
    if kind == "pedestrian_adult" and rng.random() < 0.2:  # crosses the road
        return float(rng.uniform(-street.half, street.half)), z
    return side * float(rng.uniform(street.half + 0.8, street.edge - 0.3)), z


def _draw_hood(canvas: Canvas, look: Look, rng: np.random.Generator) -> None:
    """The own bonnet, which no dataset labels."""
    height, width = canvas.height, canvas.width
    u = np.linspace(0, 1, 16)
    rim = height * (1 - look.hood * (0.35 + 0.65 * np.sin(np.pi * u)))
    outline = np.concatenate([np.stack([u * width, rim], 1), [(width, height), (0, height)]])
    canvas.fill(outline, pick(rng, look, "hood"), "unlabelled", 1.0)
