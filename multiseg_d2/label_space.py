"""Label spaces: what the numbers in a label file mean, and how the classes of two datasets relate. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .user_error import UserError

__all__ = [
    "DISJOINT",
    "EQUAL",
    "IGNORE",
    "ILLEGAL",
    "MAX_CLASSES",
    "OVERLAP",
    "RELATION_NAMES",
    "SUBSET",
    "SUPERSET",
    "IllegalLabelError",
    "LabelSpace",
    "default_color",
    "raw_to_local_table",
    "relation",
    "remap",
    "stack_memberships",
    "to_local",
]

#: Local id of pixels that are not scored and give no loss.
IGNORE = 255
#: Table entry of raw ids that no spec lists: never passed on, always an error with file, id and count.
ILLEGAL = 254
#: Local ids are uint8, and two values are taken.
MAX_CLASSES = 254
TABLE_SIZE = 65536

#: What class a of one space is to class b of another, as sets of universal classes.
DISJOINT, EQUAL, SUBSET, SUPERSET, OVERLAP = range(5)
RELATION_NAMES = ("disjoint", "equal", "subset", "superset", "overlap")


class IllegalLabelError(UserError, ValueError):
    """A label map holds raw ids that its table does not know.

    Attributes:
        counts: raw id -> number of pixels.
    """

    def __init__(self, counts: dict[int, int], where: str = "") -> None:
        self.counts = counts
        listing = ", ".join(f"{i} ({n} pixels)" for i, n in sorted(counts.items())[:20])
        more = f" and {len(counts) - 20} more ids" if len(counts) > 20 else ""
        super().__init__(
            f"{where or 'label map'}: raw ids that the label space does not know: {listing}{more}. "
            "List them in the dataset's spec (as a class or under `ignore`), or mend the file."
        )

    def at(self, where: str) -> IllegalLabelError:
        """The same error, saying in which file."""
        return IllegalLabelError(self.counts, where)


@dataclass(frozen=True, eq=False)
class LabelSpace:
    """The classes of one dataset and how its raw ids map onto them.

    Attributes:
        name: dataset name, for example ``"camvid"``.
        classes: C class names in local order, 1 <= C <= 254, unique.
        colors: (C, 3) uint8 RGB.
        raw_to_local: (65536,) uint8 table: raw id -> local id in [0, C), ``IGNORE`` or ``ILLEGAL``.
        membership: (C, U) bool, True where local class c covers universal class u.
        main_universal: (C,) int64, universal class that most pixels of class c belong to, -1 where no table says so.

    Raises:
        ValueError: shapes, types, names or table entries are not of this form.
    """

    name: str
    classes: tuple[str, ...]
    colors: np.ndarray
    raw_to_local: np.ndarray
    membership: np.ndarray
    main_universal: np.ndarray = field(default=None)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        if self.main_universal is None:
            object.__setattr__(self, "main_universal", np.full(len(self.classes), -1, np.int64))
        for problem in self._problems():
            raise ValueError(f"label space {self.name!r}: {problem}")
        for array in (self.colors, self.raw_to_local, self.membership, self.main_universal):
            array.setflags(write=False)

    def _problems(self):
        count = len(self.classes)
        if not 1 <= count <= MAX_CLASSES:
            yield f"{count} classes, but local ids are 8 bit: 1 to {MAX_CLASSES} are possible. Split or merge classes."
        doubles = sorted({c for c in self.classes if self.classes.count(c) > 1})
        if doubles:
            yield f"class names must be unique, these are not: {doubles}"
        if self.colors.shape != (count, 3) or self.colors.dtype != np.uint8:
            yield f"colors must be ({count}, 3) uint8, not {self.colors.shape} {self.colors.dtype}"
        if self.raw_to_local.shape != (TABLE_SIZE,) or self.raw_to_local.dtype != np.uint8:
            yield f"raw_to_local must be ({TABLE_SIZE},) uint8, not {self.raw_to_local.shape} {self.raw_to_local.dtype}"
        beyond = np.setdiff1d(self.raw_to_local, np.r_[np.arange(count), IGNORE, ILLEGAL])
        if beyond.size:
            yield f"raw_to_local holds {beyond[:10].tolist()}, but there are only {count} classes"
        if self.membership.ndim != 2 or len(self.membership) != count or self.membership.dtype != bool:
            yield f"membership must be ({count}, U) bool, not {self.membership.shape} {self.membership.dtype}"
        if self.main_universal.shape != (count,) or self.main_universal.max(initial=-1) >= self.membership.shape[1]:
            yield f"main_universal must be ({count},) universal ids below {self.membership.shape[1]}"

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.classes)

    def __repr__(self) -> str:
        return f"LabelSpace({self.name!r}, {self.num_classes} classes)"


def default_color(position: int) -> tuple[int, int, int]:
    """RGB of a class without a colour: different ones for 254 classes, none of them black.

    The bits of ``position + 1`` are spread over the high bits of R, G and B.
    """
    rgb, rest = [0, 0, 0], position + 1
    for bit in range(24):
        rgb[bit % 3] |= (rest >> bit & 1) << (7 - bit // 3)
    return rgb[0], rgb[1], rgb[2]


def raw_to_local_table(
    raw_ids: Sequence[Sequence[int]], ignore: Sequence[int] = (), unlisted: int = ILLEGAL
) -> np.ndarray:
    """Builds the look-up table of a label space.

    Args:
        raw_ids: for each of the C local classes, the raw ids in [0, 65535] that stand for it.
        ignore: raw ids whose pixels are not scored.
        unlisted: what all other raw ids become, ``ILLEGAL`` or ``IGNORE``.

    Returns:
        (65536,) uint8.

    Raises:
        ValueError: a raw id is out of range or listed twice.
    """
    table = np.full(TABLE_SIZE, unlisted, np.uint8)
    seen: dict[int, str] = {}
    listed = [(i, local) for local, ids in enumerate(raw_ids) for i in ids] + [(i, IGNORE) for i in ignore]
    for raw_id, local in listed:
        owner = "ignore" if local == IGNORE else f"class {local}"
        if not 0 <= raw_id < TABLE_SIZE:
            raise ValueError(f"raw id {raw_id} of {owner} is not in [0, {TABLE_SIZE - 1}]")
        if raw_id in seen:
            raise ValueError(f"raw id {raw_id} is listed for {seen[raw_id]} and again for {owner}")
        seen[raw_id] = owner
        table[raw_id] = local
    return table


def to_local(label: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Translates raw ids by one table look-up; the table is applied exactly once.

    Args:
        label: (...) uint8 or uint16 raw ids.
        table: (65536,) uint8, as ``LabelSpace.raw_to_local``.

    Returns:
        (...) uint8 local ids, same shape.

    Raises:
        TypeError: the label map is of another type.
        IllegalLabelError: a raw id is in no table; the caller adds the file with :meth:`IllegalLabelError.at`.
    """
    if label.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"label maps are uint8 or uint16, not {label.dtype}")
    local = np.take(table, label)
    illegal = local == ILLEGAL
    if illegal.any():
        ids, counts = np.unique(label[illegal], return_counts=True)
        raise IllegalLabelError(dict(zip(ids.tolist(), counts.tolist())))
    return local


def stack_memberships(spaces: Sequence[LabelSpace]) -> list[np.ndarray]:
    """Memberships of several spaces with equally many columns.

    A taxonomy grows at its end when a dataset brings universal classes of its own, so an earlier space may have fewer
    columns; what is missing is not covered.

    Returns:
        One (C_i, U) bool array per space.
    """
    width = max(space.membership.shape[1] for space in spaces)
    return [np.pad(space.membership, ((0, 0), (0, width - space.membership.shape[1]))) for space in spaces]


def relation(a: LabelSpace, b: LabelSpace) -> np.ndarray:
    """What each class of ``a`` is to each class of ``b``.

    Returns:
        (Ca, Cb) int8: ``DISJOINT``, ``EQUAL``, ``SUBSET`` (the class of a lies inside that of b), ``SUPERSET`` or
        ``OVERLAP``. A class that covers no universal class is disjoint from everything.
    """
    ma, mb = (m.astype(np.int64) for m in stack_memberships([a, b]))
    common = ma @ mb.T  # (Ca, Cb) universal classes that both cover
    inside_b = common == ma.sum(1)[:, None]
    inside_a = common == mb.sum(1)[None, :]
    codes = np.full(common.shape, OVERLAP, np.int8)
    codes[inside_b] = SUBSET
    codes[inside_a] = SUPERSET
    codes[inside_a & inside_b] = EQUAL
    codes[common == 0] = DISJOINT
    return codes


def remap(source: LabelSpace, target: LabelSpace) -> np.ndarray:
    """Translates the classes of one dataset into those of another by the taxonomy (label-remapping baseline).

    A source class becomes the target class that contains it. A wider source class becomes the target class that holds
    its ``main_universal`` class; without such a statement it is ignored rather than guessed.

    Returns:
        (Cs,) uint8: local id of ``source`` -> local id of ``target`` or ``IGNORE``.
    """
    codes = relation(source, target)
    (covered,) = stack_memberships([target])
    table = np.full(source.num_classes, IGNORE, np.uint8)
    for local_id, row in enumerate(codes):
        containing = np.flatnonzero((row == EQUAL) | (row == SUBSET))
        main = source.main_universal[local_id]
        if not containing.size and 0 <= main < covered.shape[1]:
            containing = np.flatnonzero(covered[:, main])
        if containing.size:  # several, where target classes nest: the narrowest says most
            table[local_id] = min(containing, key=lambda t: covered[t].sum())
    return table
