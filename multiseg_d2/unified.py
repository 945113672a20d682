"""One label space for several datasets: the union of their classes. numpy only.

Two classes are the same if and only if they mean the same: their rows of ``membership`` are equal. In a taxonomy by
exact names every name is a universal class of its own, so that this is UniSeg's union by names; in any other it is a
union by meaning, in which equal names may be two classes and different names one. Classes that nest or overlap stay
apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .label_space import LabelSpace, stack_memberships

__all__ = ["NO_CLASS", "UnifiedClasses"]

#: Table entry of a class that covers no universal class, and so has none in the union.
NO_CLASS = -1


@dataclass(frozen=True, eq=False)
class UnifiedClasses:
    """The union of the classes of K datasets. It may have more classes than a :class:`LabelSpace` can.

    Attributes:
        spaces: dataset -> its label space.
        names: U names, unique. The order is that of the universal classes (by exact names: alphabetical).
        membership: (U, L) bool, True where union class u covers universal class l; rows are distinct.
        main_universal: (U,) int64, the universal class that most pixels of u belong to, -1 where no table says so.
        tables: dataset -> (C,) int16, local id -> union id or ``NO_CLASS``.
        present: (K, U) bool, True where the dataset (in the order of ``spaces``) has the class.
    """

    spaces: Mapping[str, LabelSpace]
    names: tuple[str, ...]
    membership: np.ndarray
    main_universal: np.ndarray
    tables: Mapping[str, np.ndarray]
    present: np.ndarray

    @classmethod
    def of(cls, spaces: Mapping[str, LabelSpace]) -> UnifiedClasses:
        """The union for ``dataset -> label space``.

        Raises:
            ValueError: there is no dataset, or none of their classes covers anything.
        """
        if not spaces:
            raise ValueError("a union of classes needs at least one dataset")
        rows = dict(zip(spaces, stack_memberships(list(spaces.values()))))
        keys = {dataset: [tuple(np.flatnonzero(row).tolist()) for row in matrix] for dataset, matrix in rows.items()}
        order = sorted({key for listed in keys.values() for key in listed if key})
        if not order:
            raise ValueError(f"no class of {list(spaces)} covers a universal class: the union would be empty")
        union_id = {key: u for u, key in enumerate(order)}
        tables = {d: np.array([union_id.get(key, NO_CLASS) for key in keys[d]], np.int16) for d in spaces}
        membership = np.zeros((len(order), next(iter(rows.values())).shape[1]), bool)
        for u, key in enumerate(order):
            membership[u, list(key)] = True
        present = np.zeros((len(spaces), len(order)), bool)
        for k, table in enumerate(tables.values()):
            present[k, table[table != NO_CLASS]] = True
        names, mains = _names(spaces, tables, len(order)), _mains(spaces, tables, len(order))
        return cls(dict(spaces), names, membership, mains, tables, present)

    @property
    def size(self) -> int:
        """U."""
        return len(self.names)

    @property
    def datasets(self) -> tuple[str, ...]:
        """The K datasets, in the order of ``present``."""
        return tuple(self.spaces)

    def columns_of(self, space: LabelSpace) -> tuple[list[list[int]], list[int]]:
        """Which union classes score each class of a label space.

        A dataset of the union has its own classes. For any other, a union class belongs to the narrowest class that
        contains it; a class that contains none takes those, not contained in any, whose ``main_universal`` class (what
        most of their pixels are) it covers. Nothing else is guessed: a union class that is several classes of
        ``space`` at once names none of them.

        Returns:
            For each of the C classes the union ids whose maximum is its score; the local ids of classes without any.
        """
        columns = self._own_columns(space)
        if columns is None:
            columns = self._columns_by_meaning(space)
        return columns, [c for c, ids in enumerate(columns) if not ids]

    def _own_columns(self, space: LabelSpace) -> list[list[int]] | None:
        for dataset, own in self.spaces.items():
            if own.name == space.name and own.classes == space.classes:
                ids = self.tables[dataset].tolist()
                # Of two classes with one meaning the first is scored: the scores cannot tell them apart.
                return [[u] if u != NO_CLASS and u not in ids[:c] else [] for c, u in enumerate(ids)]
        return None

    def _columns_by_meaning(self, space: LabelSpace) -> list[list[int]]:
        width = max(self.membership.shape[1], space.membership.shape[1])
        union, wanted = (np.pad(m, ((0, 0), (0, width - m.shape[1]))) for m in (self.membership, space.membership))
        common = union.astype(np.int64) @ wanted.T.astype(np.int64)  # (U, C) universal classes that both cover
        inside = common == union.sum(1)[:, None]
        columns: list[list[int]] = [[] for _ in space.classes]
        for u in range(self.size):
            containing = np.flatnonzero(inside[u])
            if containing.size:
                columns[min(containing, key=lambda c: wanted[c].sum())].append(u)
        for c, ids in enumerate(columns):
            if not ids:
                unused = ~inside.any(1) & (self.main_universal >= 0)
                ids.extend(u for u in np.flatnonzero(unused).tolist() if wanted[c, self.main_universal[u]])
        return columns


def _names(spaces: Mapping[str, LabelSpace], tables: Mapping[str, np.ndarray], size: int) -> tuple[str, ...]:
    """What the first dataset calls each class; names that stand for several classes get that dataset's name as well."""
    named: dict[int, tuple[str, str]] = {}
    for dataset, space in spaces.items():
        for name, u in zip(space.classes, tables[dataset].tolist()):
            if u != NO_CLASS:
                named.setdefault(u, (name, dataset))
    times = Counter(name for name, _ in named.values())
    return tuple(
        name if times[name] == 1 else f"{name} ({dataset})" for name, dataset in (named[u] for u in range(size))
    )


def _mains(spaces: Mapping[str, LabelSpace], tables: Mapping[str, np.ndarray], size: int) -> np.ndarray:
    mains = np.full(size, -1, np.int64)
    for dataset, space in spaces.items():
        for main, u in zip(space.main_universal.tolist(), tables[dataset].tolist()):
            if u != NO_CLASS and mains[u] == -1:
                mains[u] = main
    return mains
