"""Soft labels: shares of the classes per pixel, in a file beside the image.

The file is a compressed ``.npz`` with these arrays, H and W being the size of the image after its EXIF turn:

* ``num_classes``: (), C of the label space that the local ids below belong to;
* ``class_ids``: (M, H, W) uint8, the M classes with the largest shares of each pixel as local ids, 255 = none;
* ``shares``: (M, H, W) uint16, their shares, 65535 standing for 1; a pixel whose shares are all 0 says nothing;
* ``confidence``: (H, W) uint16, optional, 65535 standing for 1.

M is often 2 or 3: what a network gives the other classes is rounding. M = C keeps everything.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..array_file import read_arrays
from ..atomic_file import write_atomically
from ..label_space import IGNORE
from .augment import CropWindow, RotatedWindow
from .decode import BadFileError, SizeMismatchError

__all__ = ["SoftLabel", "encode_soft_label", "read_soft_label", "write_soft_label"]

_ONE = 65535


@dataclass(frozen=True)
class SoftLabel:
    """The content of a file of soft labels; see the module for the arrays."""

    num_classes: int
    class_ids: np.ndarray
    shares: np.ndarray
    confidence: np.ndarray | None = None

    def translated(self, translation: np.ndarray, num_classes: int) -> SoftLabel:
        """The same shares in the classes of another label space; those of several classes add up.

        Args:
            translation: (C,) uint8, local id -> local id there or ``IGNORE``, whose share is lost.
            num_classes: of that space.
        """
        table = np.full(256, IGNORE, np.uint8)
        table[: len(translation)] = translation
        return replace(self, num_classes=num_classes, class_ids=table[self.class_ids])

    def cropped(self, window: CropWindow | RotatedWindow) -> tuple[np.ndarray, np.ndarray | None]:
        """What a window shows.

        Args:
            window: of the whole image.

        Returns:
            (C, h, w) float32 shares; (h, w) float32 confidences, None where the file has none.
        """
        part = self
        if isinstance(window, CropWindow):  # only what the window needs
            area = (..., slice(window.y0, window.y0 + window.h), slice(window.x0, window.x0 + window.w))
            part = replace(self, class_ids=self.class_ids[area], shares=self.shares[area])
            confidence = None if self.confidence is None else self.confidence[area]
            window = CropWindow(0, 0, window.w, window.h, window.out_w, window.out_h, window.flip)
        else:
            confidence = self.confidence
        shares = np.empty((self.num_classes, window.out_h, window.out_w), np.float32)
        for local_id in range(self.num_classes):
            plane = np.where(part.class_ids == local_id, part.shares, 0).sum(0, dtype=np.float32)  # (h, w)
            shares[local_id] = window.apply_image(plane)
        shares /= _ONE
        if confidence is None:
            return shares, None
        return shares, window.apply_image(confidence.astype(np.float32)) / np.float32(_ONE)


def write_soft_label(
    path: str | Path, shares: np.ndarray, confidence: np.ndarray | None = None, keep: int | None = None
) -> None:
    """Writes the file that :func:`encode_soft_label` makes, whole or not at all.

    Raises:
        ValueError: shapes or values are not of its form.
    """
    try:
        write_atomically(path, encode_soft_label(shares, confidence, keep))
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def encode_soft_label(shares: np.ndarray, confidence: np.ndarray | None = None, keep: int | None = None) -> bytes:
    """Shares of the classes as the content of a file, by custom with the suffix ``.npz``.

    Args:
        shares: (C, H, W) in [0, 1], at most 254 classes.
        confidence: (H, W) in [0, 1].
        keep: how many classes per pixel are written, those with the largest shares; None = all.

    Raises:
        ValueError: shapes or values are not of this form.
    """
    shares = np.asarray(shares)
    for name, values in (("shares", shares), ("confidence", confidence)):
        if values is not None and not (np.min(values) >= 0 and np.max(values) <= 1):
            raise ValueError(f"{name} must lie in [0, 1]")
    fits = confidence is None or np.shape(confidence) == shares.shape[1:]
    if shares.ndim != 3 or not 1 <= len(shares) < IGNORE or not fits:
        raise ValueError("shares must be (C, H, W) with C <= 254, and confidence (H, W)")
    order = np.argsort(-shares, axis=0, kind="stable")[:keep]  # (M, H, W)
    kept = np.rint(np.take_along_axis(shares, order, axis=0).astype(np.float64) * _ONE).astype(np.uint16)
    arrays = {
        "num_classes": np.array(len(shares)),
        "class_ids": np.where(kept > 0, order, IGNORE).astype(np.uint8),
        "shares": kept,
    }
    if confidence is not None:
        arrays["confidence"] = np.rint(np.asarray(confidence, np.float64) * _ONE).astype(np.uint16)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def read_soft_label(path: str, height: int, width: int, num_classes: int = 0) -> SoftLabel:
    """Reads a file of soft labels.

    Args:
        path: of the file.
        height: of the image that it belongs to, after the EXIF turn.
        width: of the image.
        num_classes: of the label space; 0 = whatever the file says.

    Raises:
        BadFileError: missing, broken, not of this form, or of another label space.
        SizeMismatchError: of another size than the image.
    """
    arrays = read_arrays(path, BadFileError)
    try:
        soft = SoftLabel(int(arrays["num_classes"]), arrays["class_ids"], arrays["shares"], arrays.get("confidence"))
    except (KeyError, ValueError, TypeError) as problem:
        raise BadFileError(f"{path}: no readable file of soft labels ({problem}).") from problem
    problem = _form_problem(soft)
    if problem:
        raise BadFileError(f"{path}: no file of soft labels: {problem}.")
    if num_classes and soft.num_classes != num_classes:
        raise BadFileError(f"{path}: shares of {soft.num_classes} classes, but its dataset has {num_classes}.")
    if soft.shares.shape[1:] != (height, width):
        size = "x".join(map(str, soft.shares.shape[:0:-1]))
        raise SizeMismatchError(f"{path} is {size}, but its image is {width}x{height}.")
    return soft


def _form_problem(soft: SoftLabel) -> str:
    ids, shares, confidence = soft.class_ids, soft.shares, soft.confidence
    if ids.dtype != np.uint8 or shares.dtype != np.uint16 or ids.ndim != 3 or ids.shape != shares.shape:
        return "class_ids must be (M, H, W) uint8 and shares (M, H, W) uint16"
    if confidence is not None and (confidence.dtype != np.uint16 or confidence.shape != shares.shape[1:]):
        return "confidence must be (H, W) uint16"
    beyond = ids[(ids >= soft.num_classes) & (ids != IGNORE)]
    return f"class id {beyond[0]}, but there are {soft.num_classes} classes" if beyond.size else ""
