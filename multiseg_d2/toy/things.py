"""The things in the drawn street scenes that are not vehicles: people, two-wheelers, animals, street furniture.

All draw functions take (canvas, camera, look, rng, x, z): the foot stands at x, z (metres).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .canvas import Sprite
from .street import draw_tree, pick, shaded
from .vehicles import RED, TYRE, WHITE, draw_bus, draw_car, draw_truck, draw_van

__all__ = ["DRAW"]


def _person(canvas, camera, look, rng, x, z, concept="pedestrian_adult", size=1.0) -> None:
    man = Sprite(canvas, camera, x, z, concept, mirror=bool(rng.integers(2)))
    coat, legs, skin = (pick(rng, look, m) for m in ("clothes", "trousers", "skin"))
    tall, stride = size * float(rng.uniform(1.6, 1.85)), float(rng.uniform(0.04, 0.26)) * size
    canvas.shadow(man.at([(-0.3, 0.03), (0.5, 0.03), (0.9, -0.06), (0.1, -0.08)]), look.shadow)
    hip, neck, wide = 0.48 * tall, 0.83 * tall, 0.13 * tall
    for foot in (-stride, stride):
        man.line([(0, hip), (foot, 0)], 0.16 * size, legs)
    man.poly([(-wide, hip - 0.05), (wide, hip - 0.05), (wide * 1.1, neck), (-wide * 1.1, neck)], coat)
    man.line([(wide, neck - 0.05), (wide + 0.12 * size, hip)], 0.1 * size, shaded(coat, 0.85))
    head = 0.075 * tall if size > 0.9 else 0.1 * tall
    man.disc(0, neck + head, head, skin, 1.2 * head)
    man.disc(0, neck + 1.9 * head, 0.9 * head, (0.16, 0.11, 0.08), 0.5 * head)


def _child(canvas, camera, look, rng, x, z) -> None:
    _person(canvas, camera, look, rng, x, z, "child", 0.66)


def _draw_bicycle(wheels: Sprite, paint) -> None:
    for dx in (-0.52, 0.52):
        wheels.disc(dx, 0.34, 0.32, (0.42, 0.42, 0.42))  # spokes
        wheels.ring(dx, 0.34, 0.32, 0.06, TYRE)
    wheels.line([(-0.52, 0.34), (-0.18, 0.8), (0.36, 0.78), (0.0, 0.34), (-0.52, 0.34)], 0.06, paint)
    wheels.line([(0.52, 0.34), (0.36, 0.95), (0.24, 1.0)], 0.06, paint)
    wheels.line([(-0.32, 0.88), (-0.06, 0.88)], 0.09, TYRE)


def _draw_motorcycle(machine: Sprite, paint) -> None:
    for dx in (-0.62, 0.62):
        machine.disc(dx, 0.31, 0.31, TYRE)
        machine.disc(dx, 0.31, 0.14, (0.55, 0.55, 0.56))
    machine.poly([(-0.6, 0.4), (0.3, 0.3), (0.62, 0.5), (0.42, 0.92), (-0.02, 0.86), (-0.8, 0.82)], paint)
    machine.poly([(-0.25, 0.25), (0.25, 0.25), (0.22, 0.5), (-0.28, 0.5)], (0.40, 0.40, 0.42))
    machine.line([(0.45, 0.9), (0.32, 1.1)], 0.07, (0.30, 0.30, 0.32))


def _bicycle(canvas, camera, look, rng, x, z) -> None:
    _draw_bicycle(Sprite(canvas, camera, x, z, "bicycle", bool(rng.integers(2))), pick(rng, look, "car"))


def _motorcycle(canvas, camera, look, rng, x, z) -> None:
    _draw_motorcycle(Sprite(canvas, camera, x, z, "motorcycle", bool(rng.integers(2))), pick(rng, look, "car"))


def _bicyclist(canvas, camera, look, rng, x, z) -> None:
    """A person on a bicycle, from the side when crossing, else from behind; the bicycle is an object of its own."""
    ride = Sprite(canvas, camera, x, z, "bicycle", bool(rng.integers(2)))
    coat, legs, skin, paint = (pick(rng, look, m) for m in ("clothes", "trousers", "skin", "car"))
    canvas.shadow(ride.at([(-0.8, 0.03), (0.9, 0.03), (1.1, -0.06), (-0.5, -0.08)]), look.shadow)
    if rng.random() < 0.6:
        _draw_bicycle(ride, paint)
        ride.become("bicyclist")
        ride.line([(-0.16, 0.95), (0.14, 0.7), (0.02, 0.3)], 0.15, legs)
        ride.poly([(-0.32, 0.9), (0.02, 0.86), (0.28, 1.36), (-0.02, 1.48)], coat)
        ride.line([(0.12, 1.34), (0.34, 1.02)], 0.1, shaded(coat, 0.85))
        ride.disc(0.2, 1.58, 0.12, skin, 0.15)
        return
    ride.rect(-0.05, 0.0, 0.05, 0.75, TYRE)
    ride.line([(-0.3, 1.0), (0.3, 1.0)], 0.06, paint)
    ride.become("bicyclist")
    for dx in (-0.13, 0.13):
        ride.line([(dx, 0.9), (dx, 0.3)], 0.13, legs)
    ride.poly([(-0.2, 0.8), (0.2, 0.8), (0.23, 1.45), (-0.23, 1.45)], coat)
    ride.disc(0, 1.6, 0.11, skin, 0.14)


def _motorcyclist(canvas, camera, look, rng, x, z) -> None:
    """A person with a helmet on a motorcycle; the motorcycle is an object of its own."""
    ride = Sprite(canvas, camera, x, z, "motorcycle", bool(rng.integers(2)))
    coat, legs, paint = (pick(rng, look, m) for m in ("clothes", "trousers", "car"))
    canvas.shadow(ride.at([(-0.9, 0.03), (1.0, 0.03), (1.2, -0.08), (-0.6, -0.1)]), look.shadow)
    if rng.random() < 0.6:
        _draw_motorcycle(ride, paint)
        ride.become("motorcyclist")
        ride.line([(-0.28, 0.9), (0.1, 0.75), (0.0, 0.35)], 0.18, legs)
        ride.poly([(-0.42, 0.84), (-0.05, 0.82), (0.12, 1.34), (-0.24, 1.42)], coat)
        ride.line([(0.0, 1.28), (0.32, 1.06)], 0.12, shaded(coat, 0.85))
        ride.disc(0.02, 1.56, 0.17, paint, 0.18)
        return
    ride.rect(-0.1, 0.0, 0.1, 0.6, TYRE)
    ride.rect(-0.27, 0.5, 0.27, 0.9, paint)
    ride.line([(-0.42, 1.05), (0.42, 1.05)], 0.07, (0.30, 0.30, 0.32))
    ride.rect(-0.1, 0.66, 0.1, 0.78, RED)
    ride.lamp(0, 0.72, 0.4, RED)
    ride.become("motorcyclist")
    for dx in (-0.3, 0.3):
        ride.line([(dx, 0.88), (dx * 1.1, 0.35)], 0.16, legs)
    ride.poly([(-0.26, 0.86), (0.26, 0.86), (0.28, 1.42), (-0.28, 1.42)], coat)
    ride.disc(0, 1.6, 0.17, paint, 0.18)


def _animal(canvas, camera, look, rng, x, z) -> None:
    beast = Sprite(canvas, camera, x, z, "ground_animal", bool(rng.integers(2)))
    size = float(rng.choice([0.75, 1.4]))  # a dog or a cow
    coat = np.array([(0.45, 0.30, 0.16), (0.20, 0.16, 0.13), (0.80, 0.76, 0.70)][int(rng.integers(3))])
    canvas.shadow(beast.at([(-0.6, 0.03), (0.8, 0.03), (1.0, -0.06), (-0.4, -0.08)]), look.shadow)
    for dx in (-0.42, -0.3, 0.3, 0.42):
        beast.line([(dx * size, 0.5 * size), (dx * size, 0)], 0.12 * size, shaded(coat, 0.8))
    beast.disc(0, 0.62 * size, 0.58 * size, coat, 0.24 * size)
    beast.line([(0.45 * size, 0.7 * size), (0.66 * size, 0.95 * size)], 0.18 * size, coat)
    beast.disc(0.72 * size, 0.98 * size, 0.2 * size, coat, 0.13 * size)
    beast.line([(-0.56 * size, 0.7 * size), (-0.74 * size, 0.45 * size)], 0.07 * size, coat)


def _cone(canvas, camera, look, rng, x, z) -> None:
    cone = Sprite(canvas, camera, x, z, "traffic_cone")
    orange = np.array((0.92, 0.36, 0.08))
    cone.rect(-0.32, 0, 0.32, 0.08, shaded(orange, 0.7))
    cone.poly([(-0.24, 0.08), (0.24, 0.08), (0.06, 0.95), (-0.06, 0.95)], orange)
    cone.poly([(-0.17, 0.4), (0.17, 0.4), (0.12, 0.6), (-0.12, 0.6)], WHITE)


def _lamp_post(canvas, camera, look, rng, x, z) -> None:
    post = Sprite(canvas, camera, x, z, "pole", mirror=x > 0)
    metal, tall = pick(rng, look, "pole"), float(rng.uniform(5.5, 8.0))
    post.line([(0, 0), (0, tall)], 0.16, metal)
    if rng.random() < 0.7:
        post.line([(0, tall), (1.6, tall + 0.2)], 0.1, metal)
        post.rect(1.2, tall + 0.05, 1.9, tall + 0.3, shaded(metal, 1.5))
        post.lamp(1.6, tall, 1.5, (1.0, 0.80, 0.45))


def _traffic_light(canvas, camera, look, rng, x, z) -> None:
    post = Sprite(canvas, camera, x, z, "pole", mirror=x > 0)
    tall = float(rng.uniform(2.8, 3.6))
    post.line([(0, 0), (0, tall)], 0.15, pick(rng, look, "pole"))
    post.become("traffic_light")
    post.rect(-0.24, tall - 0.5, 0.24, tall + 0.75, (0.07, 0.07, 0.07))
    on = int(rng.integers(3))
    colors = [(0.10, 0.85, 0.35), (0.95, 0.70, 0.10), (0.95, 0.12, 0.10)]
    for i, color in enumerate(colors):
        post.disc(0, tall - 0.25 + 0.38 * i, 0.17, color if i == on else shaded(color, 0.25))
    post.lamp(0, tall - 0.25 + 0.38 * on, 0.6, colors[on])


def _traffic_sign(canvas, camera, look, rng, x, z) -> None:
    post = Sprite(canvas, camera, x, z, "pole", mirror=x > 0)
    y, kind = float(rng.uniform(2.1, 2.8)), int(rng.integers(4))
    post.line([(0, 0), (0, y)], 0.11, pick(rng, look, "pole"))
    post.become("traffic_sign")
    if kind == 0:  # speed limit
        post.disc(0, y, 0.42, RED)
        post.disc(0, y, 0.28, WHITE)
    elif kind == 1:  # warning
        post.poly([(-0.5, y - 0.4), (0.5, y - 0.4), (0, y + 0.5)], RED)
        post.poly([(-0.26, y - 0.26), (0.26, y - 0.26), (0, y + 0.22)], WHITE)
    elif kind == 2:  # direction
        post.rect(-0.7, y - 0.3, 0.7, y + 0.35, (0.10, 0.25, 0.65))
        post.rect(-0.5, y - 0.05, 0.5, y + 0.08, WHITE)
    else:  # stop
        around = np.pi / 8 + np.arange(8) * np.pi / 4
        post.poly(np.stack([0.46 * np.cos(around), y + 0.46 * np.sin(around)], 1), RED)
        post.rect(-0.28, y - 0.07, 0.28, y + 0.09, WHITE)


def _bush(canvas, camera, look, rng, x, z) -> None:
    plant = Sprite(canvas, camera, x, z, "bush")
    plant.thing = 0
    leaves = pick(rng, look, "bush")
    for tone in (0.8, 1.0, 1.15):
        cx, r = float(rng.uniform(-0.4, 0.4)), float(rng.uniform(0.4, 0.65))
        plant.disc(cx, 0.75 * r, r, shaded(leaves, tone), 0.85 * r)


#: kind -> draw(canvas, camera, look, rng, x, z)
DRAW: dict[str, Callable] = {
    "car_without_van": draw_car,
    "parked": draw_car,
    "van": draw_van,
    "truck": draw_truck,
    "bus": draw_bus,
    "pedestrian_adult": _person,
    "child": _child,
    "bicycle": _bicycle,
    "motorcycle": _motorcycle,
    "bicyclist": _bicyclist,
    "motorcyclist": _motorcyclist,
    "ground_animal": _animal,
    "traffic_cone": _cone,
    "lamp_post": _lamp_post,
    "traffic_light": _traffic_light,
    "traffic_sign": _traffic_sign,
    "tree": draw_tree,
    "bush": _bush,
}
