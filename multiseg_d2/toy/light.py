"""From painted regions to a photograph: texture, light, weather, sensor."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from .canvas import CONCEPTS, Camera, Canvas, concept_id
from .looks import Look

__all__ = ["photograph"]

_ROAD = ("road_surface", "road_marking", "crosswalk_zebra")
_GROUND = (*_ROAD, "curb_beside_sidewalk", "sidewalk_core", "grass")
#: Strength of the surface texture, by concept; 0.06 where not listed.
_TEXTURE = dict(
    road_surface=0.08, sidewalk_core=0.08, grass=0.22, tree=0.3, bush=0.28, building=0.07, sky=0.0, pole=0.03
)  # fmt: skip
_ROUGHNESS = np.array([_TEXTURE.get(name, 0.06) for name in CONCEPTS], np.float32)
_ON_GROUND = np.array([name in _GROUND for name in CONCEPTS])
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@lru_cache(maxsize=4)
def _noise_tiles(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Fine and smooth noise of unit variance, (2H, 2W) float32: drawn once, a random part is used per picture."""
    rng = np.random.default_rng([height, width])
    fine = rng.standard_normal((2 * height, 2 * width), np.float32)
    smooth = cv2.GaussianBlur(fine, (0, 0), 2.0) + 1.5 * cv2.GaussianBlur(fine[::-1], (0, 0), 6.0)
    return fine, smooth / smooth.std()


def _window(tile: np.ndarray, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    y, x = (int(rng.integers(t - s + 1)) for t, s in zip(tile.shape, shape))
    return tile[y : y + shape[0], x : x + shape[1]]


def photograph(canvas: Canvas, camera: Camera, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Lights and senses what was painted; never moves a boundary by more than the blur.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    colors, concepts, _, depths = canvas.tables()
    concept = np.take(concepts, canvas.region)  # (H, W)
    ground = np.take(_ON_GROUND, concept)
    depth = np.take(depths, canvas.region)
    depth = np.where(depth > 0, depth, camera.ground_depth()[:, None])  # (H, W) metres
    tiles = _noise_tiles(*concept.shape)
    fine, smooth = (_window(tile, concept.shape, rng) for tile in tiles)
    bumps = (0.5 * fine + 0.7 * smooth) * np.take(_ROUGHNESS * np.float32(look.texture), concept)
    image = np.take(colors, canvas.region, 0) * (1 + bumps)[..., None]  # (H, W, 3)
    sky = concept == concept_id("sky")
    image = np.where(sky[..., None], _sky(camera, look, smooth), image)
    image *= np.where(ground, canvas.shade, 255).astype(np.float32)[..., None] * np.float32(1 / 255)
    image = _illuminate(image, canvas, camera, look, sky, depth, rng)
    if look.wet > 0:
        image = _mirror(image, camera, look, concept)
    if look.haze > 0:
        clear = np.where(sky, 0.75, np.exp(-look.haze * depth))[..., None].astype(np.float32)
        image = image * clear + np.array(look.haze_color, np.float32) * (1 - clear)
    if look.lamps > 0:
        image += look.lamps * _glow(canvas)
    return _sense(image, look, tiles[0], rng)


def _sky(camera: Camera, look: Look, smooth: np.ndarray) -> np.ndarray:
    low = np.clip((np.arange(camera.height) / max(camera.horizon, 1)) ** 1.5, 0, 1)[:, None, None]  # (H, 1, 1)
    top, bottom = (np.array(look.palette[k][0], np.float32) for k in ("sky_top", "sky_low"))
    cloud = 0.03 * look.texture * smooth[..., None]
    return ((top + (bottom - top) * low) * (1 + cloud)).astype(np.float32)


def _illuminate(image, canvas, camera, look, sky, depth, rng) -> np.ndarray:
    """Sun or dusk over everything; with lamps, a cone of headlight on what is near and in front."""
    exposure = np.float32(rng.uniform(*look.exposure))
    side = rng.choice([-1, 1]) * look.slope * np.linspace(-0.5, 0.5, camera.width, dtype=np.float32)
    light = np.array(look.light, np.float32) * (1 + side)[None, :, None] * exposure  # (1, W, 3)
    if look.lamps > 0.5:
        aside = (np.arange(camera.width, dtype=np.float32) - camera.vanish) / (0.30 * camera.width)
        low = np.clip((np.arange(camera.height) - 0.6 * camera.horizon) / (0.3 * camera.height), 0, 1)
        cone = np.exp(-(aside**2))[None] * low[:, None].astype(np.float32) * np.exp(-depth / 25)
        light = light + look.lamps * 0.9 * cone[..., None] * np.array((1.0, 0.95, 0.85), np.float32)
    return image * np.where(sky[..., None], exposure, light)


def _mirror(image, camera, look, concept) -> np.ndarray:
    """The wet road mirrors what stands above it."""
    rows = np.arange(camera.height)
    source = np.clip(np.rint(2 * camera.horizon - rows), 0, camera.height - 1).astype(int)
    mirrored = cv2.blur(image[source], (3, 9))
    share = np.where(np.isin(concept, [concept_id(name) for name in _ROAD]), look.wet, 0.0)
    share = share[..., None].astype(np.float32)
    return image * (1 - share) + mirrored * share


def _glow(canvas: Canvas) -> np.ndarray:
    """(H, W, 3) light that lamps scatter into the lens."""
    height, width = canvas.height, canvas.width
    light = np.zeros((height, width, 3), np.float32)
    for u, v, radius, color in canvas.lamps:
        center = int(np.clip(u, -500, 5000)), int(np.clip(v, -500, 5000))
        cv2.circle(light, center, max(1, min(int(radius / 2), height // 6)), color, -1)
    halo = cv2.resize(light, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    halo = cv2.resize(cv2.GaussianBlur(halo, (0, 0), height / 80), (width, height))
    return 0.7 * cv2.GaussianBlur(light, (0, 0), height / 80) + 0.8 * halo


def _sense(image: np.ndarray, look: Look, fine: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    if look.streaks > 0:
        streaks = np.zeros((height, width), np.float32)
        for u, v in rng.uniform(0, (width, height), (int(look.streaks * height * width / 1000), 2)):
            long = rng.uniform(0.04, 0.10) * height
            cv2.line(streaks, (int(u), int(v)), (int(u - 0.2 * long), int(v + long)), float(rng.uniform(0.05, 0.2)), 1)
        image = image + streaks[..., None]
    image = cv2.GaussianBlur(image, (0, 0), max(0.2, look.blur * height / 100))
    grey = (image @ _LUMA)[..., None]
    image = grey + look.saturation * (image - grey)
    image = 0.5 + look.contrast * (image - 0.5)
    image = cv2.pow(np.clip(image, 0, 1), look.gamma)
    noise = cv2.merge([_window(fine, (height, width), rng) for _ in range(3)])
    return np.rint(np.clip(image + np.float32(look.noise) * noise, 0, 1) * 255).astype(np.uint8)
