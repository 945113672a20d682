"""What step s of a training run contains: a pure function of (seed, s). numpy and the standard library only.

Nothing here has state that matters, so a resumed run equals an unbroken one, every rank computes the same step, and the
number of workers changes nothing. Three questions are answered for any s, without going through the steps before it:

* **How many images of each dataset?** Alternation and fixed numbers are arithmetic. A mixture interleaves the datasets
  so that after any number of images each has had its share to within a few images (see :class:`_Mixture`), and then
  shuffles within blocks of 1024 images, so that the composition of a step is random but no drought is long.
* **Which images?** Each dataset is one endless stream of shuffled epochs: every image once per epoch, none left out.
* **Which random crop?** Each draw has a seed of its own, a hash of (seed, step, position).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

__all__ = ["KINDS", "Draw", "Schedule"]

KINDS = ("alternation", "fixed", "size", "weights")
_BLOCK = 1024  # images of a mixture that are shuffled among themselves
_CACHED = 8  # permutations kept per schedule; a step needs one or two per dataset


class Draw(NamedTuple):
    """One image of a step.

    Attributes:
        dataset: position in the list of training sets.
        index: image of that set, in [0, size).
        seed: 63-bit seed of everything random about it.
    """

    dataset: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a draw
    seed: int


class Schedule:
    """The data order of a run.

    Args:
        sizes: number of images of each of the K training sets.
        images_per_batch: images per step over all ranks; for ``"alternation"`` per dataset; not used by ``"fixed"``.
        kind: one of

            * ``"alternation"``, ``interval`` = 1: ``images_per_batch`` images of every set in each step;
              ``interval`` = t > 1: one set per step, t consecutive steps, then the next set (CDCL's interval, in our
              reading);
            * ``"fixed"``: ``weights[k]`` images of set k in each step;
            * ``"size"``: a mixture, set k with probability ~ ``sizes[k] ** (1 / temperature)``; with temperature 1 all
              sets together have epochs: every image once among the first ``sum(sizes)`` images, and so on;
            * ``"weights"``: a mixture, set k with probability ~ ``weights[k]``.
        weights: K numbers for ``"fixed"`` (whole numbers) and ``"weights"``, else empty.
        temperature: for ``"size"``: 1 = proportional, 2 = square root, towards infinity = uniform.
        interval: for ``"alternation"``.
        seed: of the order and of all draws.

    Raises:
        ValueError: arguments that contradict each other; the message names the config key.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        images_per_batch: int,
        kind: str = "alternation",
        weights: Sequence[float] = (),
        temperature: float = 1.0,
        interval: int = 1,
        seed: int = 0,
    ) -> None:
        self.sizes = [int(n) for n in sizes]
        self.images_per_batch = int(images_per_batch)
        self.kind = kind
        self.interval = int(interval)
        self.seed = int(seed)
        self._check(weights, temperature)
        self._per_step = [int(w) for w in weights] if kind == "fixed" else [self.images_per_batch] * len(self.sizes)
        if kind in ("size", "weights"):
            shares = weights if kind == "weights" else [n ** (1 / temperature) for n in self.sizes]
            exact = kind == "size" and temperature == 1
            self._mixture = _Mixture(self.sizes if exact else shares, self.seed, exact)
        self._epochs: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def _check(self, weights: Sequence[float], temperature: float) -> None:
        count = len(self.sizes)
        if self.kind not in KINDS:
            raise ValueError(f"DATALOADER.SCHEDULE is {self.kind!r}, not one of {', '.join(KINDS)}.")
        if count == 0 or min(self.sizes) < 1:
            raise ValueError(f"DATASETS.TRAIN: every training set needs an image, but the sizes are {self.sizes}.")
        if self.kind in ("fixed", "weights"):
            if len(weights) != count:
                raise ValueError(
                    f"DATALOADER.WEIGHTS has {len(weights)} numbers for {count} training sets: with DATALOADER.SCHEDULE"
                    f" {self.kind!r} give one per entry of DATASETS.TRAIN, in its order."
                )
            if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
                raise ValueError(f"DATALOADER.WEIGHTS is {tuple(weights)}: numbers >= 0 are needed, not all 0.")
        elif len(weights):
            raise ValueError(
                f"DATALOADER.WEIGHTS is {tuple(weights)}, but DATALOADER.SCHEDULE {self.kind!r} uses none: leave it "
                "empty, or choose 'fixed' or 'weights'."
            )
        if self.kind == "fixed" and any(w != int(w) for w in weights):
            raise ValueError(f"DATALOADER.WEIGHTS is {tuple(weights)}: 'fixed' needs whole numbers of images per step.")
        if self.kind != "fixed" and self.images_per_batch < 1:
            raise ValueError(f"SOLVER.IMS_PER_BATCH is {self.images_per_batch}; at least 1 is needed.")
        if self.kind == "size" and not temperature > 0:
            raise ValueError(f"DATALOADER.TEMPERATURE is {temperature}; it must be positive.")
        if self.kind == "alternation" and self.interval < 1:
            raise ValueError(f"DATALOADER.INTERVAL is {self.interval}; at least 1 is needed.")

    def counts(self, step: int) -> list[int]:
        """Images of each dataset in a step, K numbers."""
        return [len(positions) for positions in self._positions(step)]

    def step(self, step: int) -> list[Draw]:
        """All draws of a step, over all ranks, those of one dataset side by side, datasets in order.

        Args:
            step: 0, 1, 2, ...
        """
        draws: list[Draw] = []
        for dataset, positions in enumerate(self._positions(step)):
            for position in positions:
                draws.append(Draw(dataset, self._image(dataset, position), _hash63(self.seed, step, len(draws))))
        return draws

    @staticmethod
    def rank_slice(draws: Sequence[Draw], rank: int, world: int) -> list[Draw]:
        """One rank's part of a step: every ``world``-th draw.

        Draws are grouped by dataset, so every rank gets an equal part of each dataset where the counts divide, and
        parts that differ by at most one image where they do not.

        Raises:
            ValueError: the draws cannot be shared out equally.
        """
        if len(draws) % world:
            raise ValueError(
                f"{len(draws)} images per step cannot be shared out equally to {world} processes. Change the number of "
                "processes or SOLVER.IMS_PER_BATCH (with DATALOADER.SCHEDULE 'fixed': DATALOADER.WEIGHTS)."
            )
        return list(draws[rank::world])

    def _positions(self, step: int) -> list[range]:
        """For each dataset the positions in its stream that a step takes."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        if self.kind in ("size", "weights"):
            first = self._mixture.counts(step * self.images_per_batch)
            last = self._mixture.counts((step + 1) * self.images_per_batch)
            return [range(a, b) for a, b in zip(first, last)]
        if self.kind == "fixed" or self.interval == 1:
            return [range(step * n, (step + 1) * n) for n in self._per_step]
        return [range(a * n, b * n) for a, b, n in zip(self._turns(step), self._turns(step + 1), self._per_step)]

    def _turns(self, step: int) -> list[int]:
        """How many of the steps before ``step`` each dataset had, for an interval t > 1."""
        t = self.interval
        rounds, rest = divmod(step, t * len(self.sizes))
        return [rounds * t + min(max(rest - k * t, 0), t) for k in range(len(self.sizes))]

    def _image(self, dataset: int, position: int) -> int:
        epoch, offset = divmod(position, self.sizes[dataset])
        order = self._epochs.get((dataset, epoch))
        if order is None:
            order = _permutation(self.sizes[dataset], self.seed, dataset, epoch)
            self._epochs[dataset, epoch] = order
            if len(self._epochs) > _CACHED + 2 * len(self.sizes):
                self._epochs.popitem(last=False)
        return int(order[offset])


class _Mixture:
    """An endless sequence over K datasets with given shares; its prefix counts are computed, not counted.

    Dataset 0 takes image g of the sequence when ``floor(g * p0 + phase)`` steps up; what it leaves over is a sequence
    of its own in which dataset 1 does the same with its share of the rest, and so on. All in whole numbers, so the
    result is the same on every machine. After any g images dataset k has had ``g * p_k`` to within ``k + 1`` images.
    Inside each block the order is then shuffled by a seeded permutation.

    With ``exact``, shares are whole numbers, and after every ``sum(shares)`` images dataset k has had ``shares[k]`` of
    them: no block reaches over that boundary.
    """

    _ONE = 1 << 48

    def __init__(self, shares: Sequence[float], seed: int, exact: bool = False) -> None:
        self._seed = seed
        rests = list(accumulate(reversed(shares)))[::-1]
        self._period = int(rests[0]) if exact else _BLOCK
        # Share of dataset k among those from k on, as a fraction; the last one with a share takes all that is left.
        one = self._ONE
        self._parts = [
            (int(s), int(r)) if exact else (round(s / r * one) if r > 0 else 0, one) for s, r in zip(shares, rests)
        ]
        self._parts[max(k for k, s in enumerate(shares) if s > 0)] = (1, 1)
        self._phases = [_hash63(seed, -1, k) % whole for k, (_, whole) in enumerate(self._parts)]
        self._cache: tuple[int, np.ndarray] = (-1, np.empty((0, 0)))

    def counts(self, length: int) -> list[int]:
        """Images of each dataset among the first ``length`` of the shuffled sequence."""
        period, inside = divmod(length, self._period)
        block, offset = divmod(inside, _BLOCK)
        if offset == 0:
            return self._even(length)
        start, block = length - offset, period * -(-self._period // _BLOCK) + block
        if self._cache[0] != block:
            size = min(_BLOCK, (period + 1) * self._period - start)
            before = self._even(start)
            members = np.repeat(np.arange(len(before)), np.subtract(self._even(start + size), before))
            members = members[_permutation(size, self._seed, -1, block)]
            table = np.cumsum(members[:, None] == np.arange(len(before)), axis=0) + before  # (size, K)
            self._cache = (block, table)
        return self._cache[1][offset - 1].tolist()

    def _even(self, length: int) -> list[int]:
        counts = []
        for (part, whole), phase in zip(self._parts, self._phases):
            counts.append((length * part + phase) // whole)
            length -= counts[-1]
        return counts


def _permutation(size: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    # RandomState: NumPy promises that its numbers never change, which it does not for the newer generators.
    key = hashlib.blake2b(f"{seed}/{stream}/{epoch}".encode(), digest_size=32).digest()
    return np.random.RandomState(np.frombuffer(key, "<u4")).permutation(size)


def _hash63(seed: int, step: int, position: int) -> int:
    key = hashlib.blake2b(f"{seed}/{step}/{position}".encode(), digest_size=8, person=b"draw").digest()
    return int.from_bytes(key, "little") >> 1
