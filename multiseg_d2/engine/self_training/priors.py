"""Spatial priors: how often each class of the source lies at each place of the image (CBST-SP)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from ...array_file import read_arrays
from ...atomic_file import write_atomically
from ...data.labels import read_local_label
from ...label_space import LabelSpace
from ...user_error import ConfigError

__all__ = ["NO_PRIOR", "load_prior", "save_prior", "spatial_prior"]

#: Taps of the smoothing kernel at CBST's size of 1024 x 2048, and of its deviation: a sixth of it is our choice.
KERNEL, FULL_HEIGHT = 70, 1024
NO_PRIOR = (
    "SELF_TRAINING.POLICY 'spatial_prior' needs the file of a prior in SELF_TRAINING.PRIOR; tools/spatial_prior.py "
    "makes one from the labels of the source"
)


def spatial_prior(
    records: Iterable[dict[str, Any]],
    num_classes: int,
    size: Sequence[int],
    kernel: int | None = None,
    read: Callable[[dict[str, Any]], np.ndarray] = read_local_label,
) -> np.ndarray:
    """Share of each class at each place over the label maps of a dataset, smoothed.

    Label maps are brought to the size (nearest), only labelled pixels count, and both the counts of a class and those
    of all labels are smoothed, so that the shares of a place sum to 1 where anything was labelled.

    Args:
        records: dataset dicts.
        num_classes: C.
        size: (H, W) of the target's images.
        kernel: taps of the Gaussian along each side, its deviation a sixth of it; None: 70 for 1024 rows, in
            proportion for others. Reflecting borders.
        read: dataset dict -> (h, w) local ids.

    Returns:
        (C, H, W) float32 in [0, 1].

    Raises:
        ValueError: no pixel is labelled.

    Source: CBST (ECCV 2018), spatial priors: frequencies at each place, smoothed by a 70 x 70 Gaussian kernel. That
    they are shares of a place, the deviation and the borders are our choices.
    """
    height, width = size
    counts = np.zeros((num_classes, height * width), np.float32)
    places = np.arange(height * width)
    for record in records:
        label = cv2.resize(read(record), (width, height), interpolation=cv2.INTER_NEAREST).ravel()
        known = label < num_classes
        counts[label[known], places[known]] += 1
    if not counts.any():
        raise ValueError("no pixel of the source is labelled: a spatial prior needs its label maps")
    taps = kernel or max(round(KERNEL * height / FULL_HEIGHT), 1)
    counts = _smoothed(counts.reshape(num_classes, height, width), taps)
    return (counts / np.maximum(counts.sum(axis=0), np.finfo(np.float32).tiny)).clip(0, 1)


def _smoothed(maps: np.ndarray, taps: int) -> np.ndarray:
    if taps == 1:
        return maps
    offsets = np.arange(taps) - (taps - 1) / 2
    weights = np.exp(-0.5 * (offsets / (taps / 6)) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    return np.stack([cv2.sepFilter2D(m, -1, weights, weights, borderType=cv2.BORDER_REFLECT) for m in maps])


def save_prior(path: str | Path, prior: np.ndarray, classes: Sequence[str]) -> None:
    """Writes a prior and the names of its classes as ``.npz``."""
    content = io.BytesIO()
    np.savez_compressed(content, prior=prior.astype(np.float32), classes=np.array(list(classes)))
    write_atomically(path, content.getvalue())


def load_prior(path: str | Path, space: LabelSpace) -> Tensor:
    """Reads a prior for a label space.

    Returns:
        (C, H, W) float32.

    Raises:
        ValueError: no path, no such file, or one of other classes.
    """
    if not path:
        raise ConfigError(NO_PRIOR)
    try:
        arrays = read_arrays(path)
        prior, classes = arrays["prior"], arrays["classes"].tolist()
    except (KeyError, ValueError) as problem:
        raise ConfigError(f"SELF_TRAINING.PRIOR: {path} is no file of a spatial prior ({problem})") from None
    if classes != list(space.classes):
        raise ConfigError(
            f"SELF_TRAINING.PRIOR: {path} is for other classes.\n  file:  {classes}\n  model: {list(space.classes)}"
        )
    return torch.from_numpy(prior)
