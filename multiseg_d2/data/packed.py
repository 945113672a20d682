"""Dataset dicts as one block of bytes: a million of them fit, and worker processes share the block."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

__all__ = ["PackedDicts"]


class PackedDicts(Sequence[dict[str, Any]]):
    """A list of dicts that is read, not changed: each access makes a new dict.

    It does what Detectron2's ``DatasetFromList`` does, without an array of its own for every dict on the way, which
    takes more memory than the block. Processes that are forked share the block: nothing in it counts references.

    Args:
        dicts: of plain values.
    """

    def __init__(self, dicts: Iterable[dict[str, Any]]) -> None:
        block, ends = bytearray(), []
        for one in dicts:
            block += pickle.dumps(one, protocol=-1)
            ends.append(len(block))
        self._block = np.frombuffer(block, np.uint8)
        self._ends = np.array([0, *ends], np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        place = range(len(self))[index]
        return pickle.loads(memoryview(self._block[self._ends[place] : self._ends[place + 1]]))
