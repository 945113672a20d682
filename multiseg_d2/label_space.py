"""Label spaces: what the numbers in a label file mean. numpy and yaml only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["IGNORE", "ILLEGAL", "LabelSpace"]

#: Local id of pixels that are not scored and give no loss.
IGNORE = 255
#: Table entry of raw ids that a spec does not list: never passed on, always an error with file, id and count.
ILLEGAL = 254


@dataclass(frozen=True, eq=False)
class LabelSpace:
    """The classes of one dataset and how its raw ids map onto them.

    Attributes:
        name: dataset name, for example ``"camvid"``.
        classes: C class names in local order, 1 <= C <= 254.
        colors: (C, 3) uint8 RGB.
        raw_to_local: (65536,) uint8 table: raw id -> local id in [0, C), ``IGNORE`` or ``ILLEGAL``.
        membership: (C, U) bool, True where local class c covers universal class u.
    """

    name: str
    classes: tuple[str, ...]
    colors: np.ndarray
    raw_to_local: np.ndarray
    membership: np.ndarray
