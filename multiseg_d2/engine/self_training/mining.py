"""Crops around rare classes: where classes that are seldom predicted are looked for, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...user_error import ConfigError

__all__ = ["MiningRule", "RareCrops"]


@dataclass(frozen=True)
class RareCrops:
    """Centres crops on a pixel of a rare class: ``centre`` of a ``TrainMapper``.

    Args:
        classes: local ids.
        probability: of looking for one; else, and where the image has none of them, the crop is random.
    """

    classes: tuple[int, ...]
    probability: float

    def __call__(
        self, label: np.ndarray, dataset_dict: dict[str, Any], rng: np.random.Generator
    ) -> tuple[float, float] | None:
        """(y, x) of a pixel: one of the image's rare classes, then one of its pixels, each drawn uniformly.

        Source: CBST (ECCV 2018), mining of rare classes.
        """
        if rng.random() >= self.probability:
            return None
        present = [c for c in self.classes if (label == c).any()]
        if not present:
            return None
        pixels = np.flatnonzero(label == present[rng.integers(len(present))])
        y, x = divmod(int(pixels[rng.integers(len(pixels))]), label.shape[1])
        return y + 0.5, x + 0.5


@dataclass(frozen=True)
class MiningRule:
    """Which classes are rare.

    Args:
        probability: that a crop looks for a rare class.
        share: classes with a smaller share of the predicted pixels are rare.
        number: where there is none of these, so many of the least predicted classes are; 0 for none (CRST's code).
    """

    probability: float
    share: float
    number: int

    @classmethod
    def of(cls, key: str, values: Sequence[float]) -> MiningRule:
        """Of a config value (probability, share, number).

        Raises:
            ValueError: it has another form.
        """
        fits = len(values) == 3 and all(0 <= v <= 1 for v in values[:2]) and values[2] in range(256)
        if not fits:
            raise ConfigError(f"{key} is (probability, share, number of classes), both in [0, 1], not {tuple(values)}")
        return cls(float(values[0]), float(values[1]), int(values[2]))

    def crops(self, predicted: np.ndarray) -> RareCrops | None:
        """The crops of a round, None for random ones.

        Args:
            predicted: (C,) pixels of the target that are predicted as each class.
        """
        shares = predicted / max(predicted.sum(), 1)
        rare = np.flatnonzero(shares < self.share).tolist() or np.argsort(shares, kind="stable")[: self.number].tolist()
        return RareCrops(tuple(rare), self.probability) if rare and self.probability > 0 else None
