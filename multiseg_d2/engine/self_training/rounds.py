"""Rounds of self-training as a pure function of the step: which round, how large its portions, what it draws from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...user_error import ConfigError

__all__ = ["Portion", "RoundPlan"]


@dataclass(frozen=True)
class Portion:
    """A share that grows by ``step`` each round up to ``maximum``; all in [0, 1]."""

    start: float
    step: float
    maximum: float

    @classmethod
    def of(cls, key: str, values: Sequence[float]) -> Portion:
        """Of a config value (start, step, maximum).

        Raises:
            ValueError: it has another form, or a share is outside [0, 1] or decreasing.
        """
        if len(values) != 3:
            raise ConfigError(f"{key} is (share in the first round, growth per round, maximum), not {tuple(values)}")
        start, step, maximum = map(float, values)
        if not (0 < start <= maximum <= 1 and step >= 0):
            raise ConfigError(f"{key} needs 0 < start <= maximum <= 1 and growth >= 0, not {(start, step, maximum)}")
        return cls(start, step, maximum)

    def of_round(self, number: int) -> float:
        """The share in round ``number`` (from 0)."""
        return min(self.start + number * self.step, self.maximum)


@dataclass(frozen=True)
class RoundPlan:
    """Equal rounds over a run.

    Args:
        rounds: how many.
        max_iter: steps of the run; the rounds share them, and the first ones have one more where they do not divide.
        target: portion of the target's pixels (per predicted class) that is labelled.
        source: portion of the source's images that a round trains on.

    Raises:
        ValueError: fewer than one round, or more rounds than steps.
    """

    rounds: int
    max_iter: int
    target: Portion
    source: Portion

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= self.max_iter:
            raise ValueError(f"{self.rounds} rounds do not fit into {self.max_iter} steps: each has one step or more")

    def origin(self, number: int) -> int:
        """First step of round ``number``; of ``rounds`` itself the end of the run."""
        length, longer = divmod(self.max_iter, self.rounds)
        return number * length + min(number, longer)

    def round_of(self, step: int) -> int:
        """The round that a step in [0, max_iter) belongs to."""
        if not 0 <= step < self.max_iter:
            raise ValueError(f"step {step} lies outside the run of {self.max_iter} steps")
        length, longer = divmod(self.max_iter, self.rounds)
        boundary = longer * (length + 1)
        return step // (length + 1) if step < boundary else longer + (step - boundary) // length

    def starts_round(self, step: int) -> bool:
        """Whether the step is the first of its round."""
        return step < self.max_iter and self.origin(self.round_of(step)) == step

    def ends_round(self, step: int) -> bool:
        """Whether the step is the last of its round."""
        return step + 1 == self.max_iter or self.starts_round(step + 1)
