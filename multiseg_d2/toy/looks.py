"""The looks of the drawn street scenes: where the camera stands, what is about, its colours, light, weather, sensor.

A look changes pictures and how often things are seen, never what a thing is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np

__all__ = ["LOOKS", "Look", "blend"]

#: Reflectances (RGB in [0, 1]) of the `day` look. Entries have several variants: one is drawn per object.
_DAY_PALETTE: dict[str, tuple] = {
    "road": ((0.33, 0.33, 0.35),),
    "marking": ((0.86, 0.86, 0.84),),
    "curb": ((0.72, 0.71, 0.68),),
    "sidewalk": ((0.60, 0.57, 0.53),),
    "grass": ((0.36, 0.52, 0.20),),
    "wall": ((0.80, 0.70, 0.55), (0.70, 0.42, 0.32), (0.85, 0.80, 0.70), (0.62, 0.56, 0.46)),
    "window": ((0.25, 0.30, 0.38),),
    "fence": ((0.50, 0.36, 0.22), (0.82, 0.82, 0.80)),
    "tree": ((0.20, 0.42, 0.14), (0.30, 0.50, 0.18), (0.16, 0.34, 0.16)),
    "trunk": ((0.34, 0.24, 0.16),),
    "bush": ((0.24, 0.46, 0.18), (0.34, 0.50, 0.22)),
    "pole": ((0.45, 0.46, 0.47),),
    "clothes": ((0.75, 0.16, 0.14), (0.14, 0.26, 0.62), (0.85, 0.85, 0.80), (0.14, 0.14, 0.16), (0.80, 0.62, 0.14)),
    "trousers": ((0.16, 0.18, 0.28), (0.30, 0.26, 0.22), (0.12, 0.12, 0.13)),
    "skin": ((0.85, 0.64, 0.52), (0.45, 0.30, 0.22)),
    "car": ((0.72, 0.10, 0.10), (0.12, 0.20, 0.52), (0.84, 0.84, 0.84), (0.12, 0.12, 0.13), (0.50, 0.52, 0.54)),
    "cargo": ((0.88, 0.88, 0.86), (0.80, 0.46, 0.14), (0.20, 0.38, 0.60)),
    "bus": ((0.82, 0.62, 0.10), (0.70, 0.14, 0.12)),
    "hood": ((0.16, 0.16, 0.18),),
    "sky_top": ((0.30, 0.52, 0.88),),
    "sky_low": ((0.72, 0.84, 0.96),),
}


@dataclass(frozen=True)
class Look:
    """Everything that may differ between two places, hours and cameras. Pairs are (low, high) of a uniform draw.

    Attributes:
        eye: camera height, metres.
        focal: focal length / picture width.
        horizon: row of the horizon / picture height.
        hood: share of the picture height that the own bonnet hides (never scored), 0 = not seen.
        road: half width of the road, metres.
        walk: width of the sidewalks, metres.
        storeys: storeys of a building.
        gap: probability that a stretch of roadside has no building.
        rates: expected number of each kind of thing per picture.
        every: kind -> period; pictures whose number divides by it get one more, near the camera, so that rare things
            are in every split.
        palette: reflectances by material, see ``_DAY_PALETTE``.
        light: RGB factor of the illumination (colour cast and brightness).
        exposure: brightness factor of one picture.
        slope: brightness change from the left to the right edge.
        shadow: strength of shadows on the ground, in [0, 1].
        lamps: brightness of lamps, lit windows and headlights.
        haze: 1 / metres; distant things fade into ``haze_color``.
        wet: how much of the scene the road mirrors, in [0, 1].
        streaks: rain streaks per 1000 pixels.
        texture: strength of surface texture.
        saturation, contrast, gamma: tone curve of the camera; contrast acts around middle grey.
        blur: standard deviation, pixels per 100 pixels of picture height.
        noise: standard deviation of the sensor noise, share of full scale.
    """

    eye: tuple[float, float] = (1.45, 1.65)
    focal: tuple[float, float] = (0.66, 0.74)
    horizon: tuple[float, float] = (0.40, 0.46)
    hood: float = 0.0
    road: tuple[float, float] = (4.5, 6.0)
    walk: tuple[float, float] = (2.2, 3.4)
    storeys: tuple[int, int] = (2, 5)
    gap: float = 0.35
    rates: Mapping[str, float] = field(default_factory=dict)
    every: Mapping[str, int] = field(default_factory=dict)
    palette: Mapping[str, tuple] = field(default_factory=lambda: _DAY_PALETTE)
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    exposure: tuple[float, float] = (0.92, 1.08)
    slope: float = 0.1
    shadow: float = 0.45
    lamps: float = 0.0
    haze: float = 0.002
    haze_color: tuple[float, float, float] = (0.80, 0.86, 0.92)
    wet: float = 0.0
    streaks: float = 0.0
    texture: float = 1.0
    saturation: float = 1.0
    contrast: float = 1.1
    gamma: float = 1.0
    blur: float = 0.35
    noise: float = 0.01


def blend(a: Look, b: Look, share: float) -> Look:
    """The look between two: share 0 is ``a``, 1 is ``b``. Periods of rare things are those of ``a``."""

    def mix(x, y):
        if isinstance(x, Mapping):
            zero = 0.0 if not x or np.isscalar(next(iter(x.values()))) else ()
            return {k: mix(x.get(k, zero), y.get(k, zero)) for k in {**x, **y}}
        if isinstance(x, tuple):
            return tuple(mix(i, j) for i, j in zip(x, y, strict=True))
        return round(x + (y - x) * share) if isinstance(x, int) else x + (y - x) * share

    mixed = {f.name: mix(getattr(a, f.name), getattr(b, f.name)) for f in fields(Look) if f.name != "every"}
    return Look(every=a.every, **mixed)


def _palette(**changed) -> dict[str, tuple]:
    return {**_DAY_PALETTE, **changed}


_DAY = Look(
    rates=dict(
        car_without_van=2.6, van=0.4, truck=0.25, bus=0.1, parked=2.2, bicyclist=0.8, motorcyclist=0.1, bicycle=1.2,
        motorcycle=0.15, pedestrian_adult=2.6, child=0.5, tree=2.6, bush=0.8, lamp_post=1.6, traffic_light=0.5,
        traffic_sign=1.1, ground_animal=0.1, traffic_cone=0.15,
    ),
    every=dict(bus=6, motorcyclist=7, motorcycle=6, truck=5, traffic_light=4, ground_animal=9, traffic_cone=8, van=5),
    light=(1.15, 1.13, 1.08), contrast=1.25,
)  # fmt: skip

# Low orange sun over pale concrete: the road has the sidewalk's colour of `day` and the other way round; autumn leaves.
_DUSK = Look(
    eye=(2.1, 2.6), focal=(0.52, 0.58), horizon=(0.33, 0.39), road=(5.5, 7.5), walk=(1.6, 2.4), storeys=(3, 7),
    gap=0.25,
    rates=dict(
        car_without_van=2.4, van=0.6, truck=0.9, bus=0.25, parked=1.2, bicyclist=0.2, motorcyclist=0.9, bicycle=0.3,
        motorcycle=0.9, pedestrian_adult=1.6, child=0.2, tree=1.6, bush=1.4, lamp_post=1.4, traffic_light=0.7,
        traffic_sign=1.3, ground_animal=0.15, traffic_cone=0.3,
    ),
    every=dict(bicyclist=6, bicycle=6, bus=6, traffic_light=5, ground_animal=8, traffic_cone=7, child=7, van=6),
    palette=_palette(
        road=((0.58, 0.56, 0.54),), marking=((0.88, 0.74, 0.26),), curb=((0.44, 0.43, 0.44),),
        sidewalk=((0.36, 0.36, 0.38),), grass=((0.58, 0.52, 0.28),),
        wall=((0.52, 0.54, 0.58), (0.40, 0.42, 0.46), (0.66, 0.66, 0.68), (0.46, 0.40, 0.40)),
        tree=((0.66, 0.38, 0.12), (0.58, 0.28, 0.12), (0.50, 0.46, 0.16)),
        bush=((0.42, 0.42, 0.16), (0.52, 0.34, 0.16)),
        sky_top=((0.46, 0.40, 0.62),), sky_low=((0.98, 0.66, 0.36),),
    ),
    light=(0.80, 0.56, 0.46), exposure=(0.82, 1.08), slope=0.45, shadow=0.6, lamps=0.35, haze=0.006,
    haze_color=(0.86, 0.56, 0.36), texture=1.4, saturation=1.1, contrast=0.95, gamma=1.25, blur=0.5, noise=0.025,
)  # fmt: skip

# Grey, flat light through a wet windscreen, a long lens, the bonnet in the picture; dark mirror road, red pavement.
_RAIN = Look(
    eye=(1.25, 1.4), focal=(0.84, 0.95), horizon=(0.44, 0.50), hood=0.08, road=(4.0, 5.5), walk=(2.6, 4.0),
    storeys=(2, 4), gap=0.5,
    rates=dict(
        car_without_van=2.6, van=0.7, truck=0.6, bus=0.6, parked=1.6, bicyclist=0.3, motorcyclist=0.2, bicycle=0.5,
        motorcycle=0.3, pedestrian_adult=2.2, child=0.4, tree=3.0, bush=1.0, lamp_post=1.8, traffic_light=0.9,
        traffic_sign=1.0, ground_animal=0.2, traffic_cone=0.5,
    ),
    every=dict(bicyclist=6, motorcyclist=7, motorcycle=8, ground_animal=7, traffic_cone=6, child=7),
    palette=_palette(
        road=((0.24, 0.25, 0.27),), sidewalk=((0.46, 0.32, 0.28),), curb=((0.52, 0.52, 0.52),),
        grass=((0.26, 0.38, 0.22),),
        wall=((0.46, 0.30, 0.26), (0.56, 0.54, 0.52), (0.36, 0.36, 0.38), (0.60, 0.52, 0.46)),
        tree=((0.14, 0.24, 0.16), (0.22, 0.28, 0.20), (0.28, 0.28, 0.24)),
        clothes=((0.80, 0.72, 0.16), (0.20, 0.24, 0.36), (0.36, 0.36, 0.38), (0.12, 0.12, 0.14), (0.28, 0.44, 0.36)),
        sky_top=((0.62, 0.65, 0.68),), sky_low=((0.74, 0.76, 0.78),),
    ),
    light=(0.78, 0.84, 0.90), slope=0.08, shadow=0.12, lamps=0.2, haze=0.020, haze_color=(0.66, 0.70, 0.74), wet=0.45,
    streaks=3.0, texture=0.7, saturation=0.65, contrast=0.62, gamma=0.9, blur=0.8, noise=0.015,
)  # fmt: skip

# Lamps, lit windows and headlights as night falls.
_NIGHT = Look(
    eye=(1.6, 2.1), focal=(0.58, 0.70), horizon=(0.38, 0.46), road=(4.5, 7.0), walk=(2.0, 3.2), storeys=(2, 6), gap=0.3,
    rates=dict(
        car_without_van=2.4, van=0.5, truck=0.5, bus=0.3, parked=1.8, bicyclist=0.5, motorcyclist=0.5, bicycle=0.6,
        motorcycle=0.5, pedestrian_adult=2.0, child=0.3, tree=2.0, bush=1.0, lamp_post=2.0, traffic_light=0.7,
        traffic_sign=1.1, ground_animal=0.2, traffic_cone=0.3,
    ),
    every=dict(bicyclist=5, motorcyclist=5, bus=6, truck=5, ground_animal=6, traffic_cone=6, child=6, van=6, bicycle=5),
    palette=_palette(
        road=((0.44, 0.44, 0.45),), sidewalk=((0.56, 0.52, 0.50),), grass=((0.38, 0.42, 0.24),),
        wall=((0.60, 0.54, 0.48), (0.50, 0.38, 0.34), (0.62, 0.62, 0.64), (0.44, 0.44, 0.48)),
        tree=((0.24, 0.42, 0.16), (0.48, 0.36, 0.14), (0.18, 0.32, 0.18)),
        sky_top=((0.36, 0.39, 0.60),), sky_low=((0.74, 0.62, 0.60),),
    ),
    light=(0.64, 0.59, 0.64), exposure=(0.85, 1.15), slope=0.2, shadow=0.3, lamps=0.8, haze=0.008,
    haze_color=(0.40, 0.36, 0.42), texture=1.0, saturation=0.9, contrast=1.0, gamma=0.95, blur=0.5, noise=0.022,
)  # fmt: skip

#: By name. `evening` lies between day and dusk: near enough for a model of `day` to be half right there.
LOOKS: dict[str, Look] = {
    "day": _DAY,
    "dusk": _DUSK,
    "rain": _RAIN,
    "night": _NIGHT,
    "evening": replace(
        blend(_DAY, _DUSK, 0.35),
        every=dict(bus=8, motorcyclist=8, bicyclist=6, truck=6, traffic_light=6, bicycle=6, motorcycle=8),
    ),
}
