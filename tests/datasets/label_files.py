"""Writes and reads the small pictures that these tests are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def ids_in(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def picture(rng, height=6, width=8):
    return rng.integers(0, 255, (height, width, 3), np.uint8)
