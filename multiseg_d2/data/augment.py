"""Augmentation as Detectron2 transforms: one object per drawn change, applied to images, labels, boxes and points.

All of them are drawn from a generator that the caller seeds, never from a global one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from detectron2.data.transforms import NoOpTransform, Transform

from ..label_space import IGNORE

__all__ = [
    "ColorJitter",
    "CropWindow",
    "GaussianBlur",
    "RotatedWindow",
    "draw_blur",
    "draw_color_jitter",
    "draw_crop",
    "draw_rotation",
    "draw_scale",
    "shortest_edge_scale",
]


class CropWindow(Transform):
    """Random scale, crop and flip in one step: takes a window of the *original* pixels and resizes that alone.

    Equal to resizing the whole image and then cropping, up to the rounding of the window to whole pixels, at a fraction
    of the work. Coordinates are Detectron2's: continuous, an image of width W spans [0, W].

    Args:
        x0: left edge of the window, original pixels.
        y0: upper edge of the window, original pixels.
        w: width of the window, original pixels.
        h: height of the window, original pixels.
        out_w: width of the result.
        out_h: height of the result.
        flip: mirror the result horizontally.

    Rows of the original below ``y0 + h`` are not read and need not be decoded.
    """

    def __init__(self, x0: int, y0: int, w: int, h: int, out_w: int, out_h: int, flip: bool = False) -> None:
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Applies the window to an image or to soft label maps.

        Args:
            img: (H, W) or (H, W, C), uint8 or float32.
            interp: an OpenCV interpolation; default: bilinear, and area averaging when shrinking below one half, where
                bilinear would skip pixels.

        Returns:
            (out_h, out_w) or (out_h, out_w, C), same type.
        """
        if interp is None:
            shrinks = self.out_h < 0.5 * self.h or self.out_w < 0.5 * self.w
            interp = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return self._resample(img, interp)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Applies the window to ids, by nearest neighbour, with pixel centres where :meth:`apply_image` has them.

        Args:
            segmentation: (H, W) or (H, W, 3), uint8 or uint16.
        """
        return self._resample(segmentation, cv2.INTER_NEAREST_EXACT)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Applies the window to (N, 2) points (x, y); those outside get coordinates outside [0, out_w] x [0, out_h]."""
        coords = np.asarray(coords, np.float64)
        x = (coords[:, 0] - self.x0) * (self.out_w / self.w)
        y = (coords[:, 1] - self.y0) * (self.out_h / self.h)
        return np.stack((self.out_w - x if self.flip else x, y), axis=1)

    def content(self) -> np.ndarray | None:
        """(out_h, out_w) bool, True where the result shows the image; None: everywhere."""
        return None

    def _resample(self, pixels: np.ndarray, interp: int) -> np.ndarray:
        window = pixels[self.y0 : self.y0 + self.h, self.x0 : self.x0 + self.w]  # a view
        if window.ndim == 2 or window.shape[2] <= 4:
            return self._resize(window, interp)
        # OpenCV's functions know four channels; some of them do more, and none says so.
        parts = [np.ascontiguousarray(window[..., k : k + 4]) for k in range(0, window.shape[2], 4)]
        return np.concatenate([self._resize(part, interp) for part in parts], axis=2)

    def _resize(self, window: np.ndarray, interp: int) -> np.ndarray:
        result = window
        if (self.h, self.w) != (self.out_h, self.out_w):
            result = cv2.resize(result, (self.out_w, self.out_h), interpolation=interp)
        if self.flip:
            result = cv2.flip(result, 1)
        return result.reshape(self.out_h, self.out_w, *window.shape[2:])  # OpenCV drops a channel axis of length 1


class RotatedWindow(Transform):
    """A :class:`CropWindow` of an image that is turned about its middle first, all in one interpolation.

    What the turn lays bare is no image: label maps hold ``IGNORE`` there, which is why they must be *local* ids (raw 0
    is a class in many datasets), images hold ``fill``, and :meth:`content` is False.

    Args:
        window: what is cut out of the turned image, which has the size of the original.
        angle: degrees, counter-clockwise as seen.
        height: of the original.
        width: of the original.
        fill: value of bare pixels of images, one number per channel.
    """

    def __init__(self, window: CropWindow, angle: float, height: int, width: int, fill: Sequence[float]) -> None:
        super().__init__()
        self._set_attributes(locals())
        self.out_h, self.out_w = window.out_h, window.out_w
        scale = np.diag((window.out_w / window.w, window.out_h / window.h))
        self._linear = scale @ _rotation(angle)
        self._shift = scale @ (np.array((width / 2, height / 2)) - (window.x0, window.y0))
        self._shift = self._shift - self._linear @ (width / 2, height / 2)
        if window.flip:
            self._linear[0] *= -1
            self._shift[0] = window.out_w - self._shift[0]

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Turns and crops an image or a map of shares.

        Args:
            img: the whole image, (H, W) or (H, W, up to 4), uint8 or float32.

        Returns:
            (out_h, out_w) or (out_h, out_w, C), same type, bilinear; ``fill`` (0 for maps of one channel) where bare.
        """
        height, width = img.shape[:2]
        shrunk = [max(1, round(n * out / part)) for n, out, part in self._sides(height, width)]
        if shrunk[0] < 0.5 * height or shrunk[1] < 0.5 * width:  # bilinear would skip pixels
            img = cv2.resize(img, (shrunk[1], shrunk[0]), interpolation=cv2.INTER_AREA)
        fill = tuple(float(v) for v in self.fill) if img.ndim == 3 else 0.0
        return self._warp(img, (width / img.shape[1], height / img.shape[0]), cv2.INTER_LINEAR, fill)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Turns and crops (H, W) uint8 local ids by nearest neighbour; ``IGNORE`` where bare."""
        return self._warp(segmentation, (1.0, 1.0), cv2.INTER_NEAREST, IGNORE)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Applies the turn and the window to (N, 2) points (x, y)."""
        return np.asarray(coords, np.float64) @ self._linear.T + self._shift

    def content(self) -> np.ndarray:
        """(out_h, out_w) bool, True where the result shows the image."""
        return self._warp(np.ones((self.height, self.width), np.uint8), (1.0, 1.0), cv2.INTER_NEAREST, 0) == 1

    def _sides(self, height: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        window = self.window
        return (height, window.out_h, window.h), (width, window.out_w, window.w)

    def _warp(self, pixels: np.ndarray, per_pixel: tuple[float, float], flags: int, fill) -> np.ndarray:
        """Resamples pixels that are ``per_pixel`` original ones wide and high."""
        linear = self._linear @ np.diag(per_pixel)
        shift = linear @ (0.5, 0.5) + self._shift - 0.5  # from edges of pixels to their centres
        matrix = np.hstack((linear, shift[:, None]))
        size = (self.out_w, self.out_h)
        return cv2.warpAffine(pixels, matrix, size, flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill)


def _rotation(angle: float) -> np.ndarray:
    """(2, 2) matrix for points (x, y) with y downwards."""
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return np.array(((cos, sin), (-sin, cos)))


class _PixelsOnly(Transform):
    """A change of pixels that leaves labels, boxes and points alone."""

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Returns the coordinates unchanged."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Returns the label map unchanged."""
        return segmentation


class GaussianBlur(_PixelsOnly):
    """Gaussian blur with a kernel of ``2 * radius + 1`` pixels and OpenCV's sigma for it.

    Args:
        radius: in pixels of the sample, 0 = nothing.
    """

    def __init__(self, radius: int) -> None:
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Returns a blurred copy of an (H, W, 3) uint8 image."""
        return cv2.GaussianBlur(img, (2 * self.radius + 1,) * 2, 0) if self.radius else img


class ColorJitter(_PixelsOnly):
    """Brightness, contrast and saturation, in this order; leaves labels, boxes and points alone.

    Args:
        brightness: factor of all values.
        contrast: factor of the distances from the mean grey.
        saturation: factor of the distances from each pixel's grey.
        order: channel order of the images, ``"BGR"`` or ``"RGB"``.
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, order: str = "BGR") -> None:
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Returns a changed copy of an (H, W, 3) uint8 image."""
        to_grey = cv2.COLOR_BGR2GRAY if self.order == "BGR" else cv2.COLOR_RGB2GRAY
        img = np.ascontiguousarray(img)
        middle = self.brightness * cv2.mean(cv2.cvtColor(img, to_grey))[0]
        values = (np.arange(256) * self.brightness - middle) * self.contrast + middle
        img = cv2.LUT(img, np.clip(np.rint(values), 0, 255).astype(np.uint8))
        if self.saturation == 1:
            return img
        grey = cv2.cvtColor(cv2.cvtColor(img, to_grey), cv2.COLOR_GRAY2BGR)
        return cv2.addWeighted(img, self.saturation, grey, 1 - self.saturation, 0)


def draw_scale(rng: np.random.Generator, scale_range: Sequence[float]) -> float:
    """Draws a scale.

    Args:
        rng: source of randomness.
        scale_range: (low, high) or (low, high, step); with step > 0 from the grid low, low + step, ... <= high.
    """
    low, high, step = (*scale_range, 0.0)[:3]
    if step > 0:
        count = int(np.floor((high - low) / step + 1e-6)) + 1
        return float(low + step * int(rng.random() * count))
    return float(low + (high - low) * rng.random())


def shortest_edge_scale(height: int, width: int, min_size: int, max_size: int = 0) -> float:
    """Factor that makes the shorter side ``min_size`` pixels long, as Detectron2's ``ResizeShortestEdge``.

    Args:
        height: of the image.
        width: of the image.
        min_size: 0 = the image keeps its size.
        max_size: limit of the longer side, if ``min_size`` is not 0; 0 = none.
    """
    if not min_size:
        return 1.0
    scale = min_size / min(height, width)
    return min(scale, max_size / max(height, width)) if max_size else scale


def draw_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: float,
    crop_size: tuple[int, int] | None,
    flip_probability: float = 0.0,
    accept: Callable[[CropWindow], bool] | None = None,
    tries: int = 10,
    centre: tuple[float, float] | None = None,
) -> CropWindow:
    """Draws where to crop an image that is to be scaled by ``scale``.

    Args:
        rng: source of randomness.
        height: original height.
        width: original width.
        scale: the factor; 1 keeps the size.
        crop_size: (height, width) of the crop in scaled pixels, None = everything. A smaller image is taken whole.
        flip_probability: of mirroring horizontally.
        accept: whether a window will do; asked at most ``tries`` times, the last window is taken in any case.
        tries: how many windows are drawn at most.
        centre: (y, x) in original pixels that the window is centred on as far as the image reaches; nothing is drawn
            or asked for then but the flip.
    """
    rows, out_h = _extent(height, scale, crop_size[0] if crop_size else None)
    columns, out_w = _extent(width, scale, crop_size[1] if crop_size else None)
    flip = bool(rng.random() < flip_probability)
    if centre is not None:
        y0, x0 = (int(c - n / 2) for c, n in zip(centre, (rows, columns)))
        y0, x0 = min(max(y0, 0), height - rows), min(max(x0, 0), width - columns)
        return CropWindow(x0, y0, columns, rows, out_w, out_h, flip)
    for _ in range(tries):
        y0 = int(rng.random() * (height - rows + 1))
        x0 = int(rng.random() * (width - columns + 1))
        window = CropWindow(x0, y0, columns, rows, out_w, out_h, flip)
        if accept is None or accept(window):
            break
    return window


def _extent(length: int, scale: float, crop: int | None) -> tuple[int, int]:
    """Pixels taken from an axis of the original, and how many they become."""
    scaled = max(1, round(length * scale))
    if crop is None or scaled <= crop:
        return length, scaled
    return min(length, max(1, round(crop / scale))), crop


def draw_color_jitter(rng: np.random.Generator, strength: float, order: str) -> Transform:
    """Draws the three factors of a :class:`ColorJitter` from [1 - strength, 1 + strength]."""
    if strength == 0:
        return NoOpTransform()
    return ColorJitter(*(1 + strength * (2 * rng.random(3) - 1)).tolist(), order)


def draw_rotation(rng: np.random.Generator, largest: float) -> float:
    """Draws an angle from [-largest, largest] degrees; nothing is drawn where that is 0."""
    return largest * (2 * rng.random() - 1) if largest else 0.0


def draw_blur(rng: np.random.Generator, largest: int) -> Transform:
    """Draws a :class:`GaussianBlur` of radius 0 to ``largest`` for every second image."""
    if largest == 0:
        return NoOpTransform()
    blurred, radius = rng.random() < 0.5, int(rng.random() * (largest + 1))
    return GaussianBlur(radius if blurred else 0)
