"""What a dataset spec says, as checked dataclasses. The file format is described in :mod:`multiseg_d2.data.spec`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import numpy as np

from ..label_space import IGNORE, ILLEGAL, MAX_CLASSES, raw_to_local_table
from ..yaml_file import did_you_mean

__all__ = [
    "ANNOTATIONS",
    "ENCODINGS",
    "OFFICIAL_RULES",
    "ClassSpec",
    "DatasetSpec",
    "EvaluationSpec",
    "SpecError",
    "SplitSpec",
]

ANNOTATIONS = ("pixel", "box", "tag", "none")
ENCODINGS = ("index", "color", "panoptic")
#: Evaluation rules that differ from the plain one and have code behind them in ``evaluation/official.py``.
OFFICIAL_RULES = ("none", "cityscapes", "bdd100k", "idd", "kitti", "coco_stuff", "wilddash2", "mapillary")

Color = tuple[int, int, int]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class SpecError(ValueError):
    """A dataset spec is wrong; the message names the file and the key."""


@dataclass(frozen=True)
class ClassSpec:
    """One class of a dataset.

    Attributes:
        name: as the dataset spells it.
        color: RGB for pictures; not necessarily unique.
        raw_ids: what stands for the class in label files; for encoding ``color`` made-up numbers, one per colour.
        raw_colors: encoding ``color`` only, RGB in the label files, in the order of ``raw_ids``.
        covers: universal concepts that the class stands for; None: the taxonomy file says it, or nobody does.
    """

    name: str
    color: Color
    raw_ids: tuple[int, ...] = ()
    raw_colors: tuple[Color, ...] = ()
    covers: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SplitSpec:
    """One split of a dataset: where its files are.

    Attributes:
        name: ``"train"``, ``"val"``, ...
        images: patterns with one ``{id}`` each, below the data root or absolute.
        labels: patterns of the label files; empty where there are none.
        ids: the ids of the split, a file that lists them (one per line), or None for every file that matches.
        annotation_file: JSON of encoding ``panoptic`` and of box and tag annotations.
        annotation: ``"pixel"``, ``"box"``, ``"tag"`` or ``"none"``.
        count: official number of images, None where there is no official one.
        spec: the dataset that the split belongs to; set by :class:`DatasetSpec`.
    """

    name: str
    images: tuple[str, ...]
    labels: tuple[str, ...] = ()
    ids: tuple[str, ...] | str | None = None
    annotation_file: str = ""
    annotation: str = "pixel"
    count: int | None = None
    spec: DatasetSpec = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    @property
    def entry(self) -> str:
        """Name of the entry in Detectron2's catalogs, for example ``"camvid_train"``."""
        return f"{self.spec.name}_{self.name}"


@dataclass(frozen=True)
class EvaluationSpec:
    """What scoring and submitting need to know beyond the label space.

    Attributes:
        official: one of :data:`OFFICIAL_RULES`; ``"none"``: the plain mean IoU is the dataset's own number.
        submission_ids: per class the id that the server expects; None: local ids.
        submission_void: id for pixels without a class, None where there is no server.
        submission_name: file name of one prediction; ``{id}`` as in the patterns, ``{stem}`` = image name, no suffix.
        groupings: named coarser scores: grouping -> group -> class names. Classes in no group are left out.
    """

    official: str = "none"
    submission_ids: tuple[int, ...] | None = None
    submission_void: int | None = None
    submission_name: str = "{stem}.png"
    groupings: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset, or one layout of it on disk.

    Two specs with the same ``dataset`` share label space, norm branch and classifier, so their classes must be equal;
    what their label files hold may differ.

    Attributes:
        name: prefix of the catalog entries.
        dataset: key of the label space.
        classes: in local order.
        splits: by name.
        encoding: how label files hold raw ids, one of :data:`ENCODINGS`.
        unlisted: ``"error"`` or ``"ignore"``: what a raw id or colour is that no class and no ``ignore`` lists.
        ignore_ids: raw ids that are not scored.
        ignore_colors: encoding ``color`` only, in the order of ``ignore_ids``.
        path: file that the spec was read from.

    Raises:
        SpecError: something contradicts itself; all problems are listed.
    """

    name: str
    dataset: str
    classes: tuple[ClassSpec, ...]
    splits: Mapping[str, SplitSpec]
    title: str = ""
    homepage: str = ""
    licence: str = ""
    encoding: str = "index"
    unlisted: str = "error"
    ignore_ids: tuple[int, ...] = ()
    ignore_colors: tuple[Color, ...] = ()
    evaluation: EvaluationSpec = EvaluationSpec()
    path: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        problems = list(
            chain(self._name_problems(), self._class_problems(), self._split_problems(), self._score_problems())
        )
        if problems:
            raise SpecError(f"{self.path or self.name}: " + "; ".join(f"{key}: {text}" for key, text in problems))
        object.__setattr__(self, "splits", {name: replace(split, spec=self) for name, split in self.splits.items()})

    @property
    def class_names(self) -> tuple[str, ...]:
        """C class names in local order."""
        return tuple(c.name for c in self.classes)

    @property
    def colors(self) -> np.ndarray:
        """(C, 3) uint8 RGB for pictures."""
        return np.array([c.color for c in self.classes], np.uint8)

    @cached_property
    def raw_to_local(self) -> np.ndarray:
        """(65536,) uint8 look-up table, read-only."""
        unlisted = IGNORE if self.unlisted == "ignore" else ILLEGAL
        table = raw_to_local_table([c.raw_ids for c in self.classes], self.ignore_ids, unlisted)
        table.setflags(write=False)
        return table

    def color_table(self) -> tuple[np.ndarray, np.ndarray]:
        """Raw colours of encoding ``color`` and the raw ids that they stand for.

        Returns:
            (K,) uint32, ``R << 16 | G << 8 | B``, ascending; (K,) uint16 raw ids in the same order. A colour that is
            not there has the raw id K, which ``raw_to_local`` makes an error or *ignore*, as ``unlisted`` says.
        """
        colors = [c for cls in self.classes for c in cls.raw_colors] + list(self.ignore_colors)
        raw_ids = [i for cls in self.classes for i in cls.raw_ids] + list(self.ignore_ids)
        rgb = np.array(colors, np.uint32).reshape(-1, 3)
        packed = rgb[:, 0] << 16 | rgb[:, 1] << 8 | rgb[:, 2]
        order = np.argsort(packed)
        return packed[order], np.array(raw_ids, np.uint16)[order]

    # ---- checks: (key, problem) pairs ----

    def _name_problems(self) -> Iterator[tuple[str, str]]:
        named = {"name": self.name, "dataset": self.dataset, **{f"splits.{s}": s for s in self.splits}}
        for key, name in named.items():
            if not _NAME.fullmatch(name):
                yield key, f"{name!r} may hold letters, digits, '_' and '-' only"
        for key, value, allowed in (
            ("encoding", self.encoding, ENCODINGS),
            ("unlisted", self.unlisted, ("error", "ignore")),
            ("evaluation.official", self.evaluation.official, OFFICIAL_RULES),
        ):
            if value not in allowed:
                yield key, f"{value!r} is none of {', '.join(allowed)}{did_you_mean(value, allowed)}"

    def _class_problems(self) -> Iterator[tuple[str, str]]:
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            yield "classes", f"{len(self.classes)} classes, but 1 to {MAX_CLASSES} are possible (local ids are 8 bit)"
        names = self.class_names
        for name in sorted({n for n in names if names.count(n) > 1}):
            yield "classes", f"the name {name!r} stands twice"
        color = self.encoding == "color"
        what = "raw colour" if color else "raw id"
        owners: dict[object, str] = {}
        ignored = self.ignore_colors if color else self.ignore_ids
        listed = [(c.raw_colors if color else c.raw_ids, f"class {c.name!r}", "classes") for c in self.classes]
        for raws, owner, key in [*listed, (ignored, "ignore", "ignore")]:
            if not raws and owner != "ignore" and self._labelled():
                yield key, f"{owner} has no {what}"
            for raw in raws:
                if raw in owners:
                    yield key, f"{what} {raw} is listed for {owners[raw]} and again for {owner}"
                owners[raw] = owner
        if self.encoding == "panoptic" and 0 not in owners:
            yield "ignore", "raw id 0 is missing: with encoding panoptic it stands for pixels that belong to no segment"

    def _labelled(self) -> bool:
        return any(split.annotation != "none" for split in self.splits.values())

    def _split_problems(self) -> Iterator[tuple[str, str]]:
        if not self.splits:
            yield "splits", "there is none"
        for name, split in self.splits.items():
            key = f"splits.{name}"
            if split.annotation not in ANNOTATIONS:
                hint = did_you_mean(split.annotation, ANNOTATIONS)
                yield f"{key}.annotation", f"{split.annotation!r} is none of {', '.join(ANNOTATIONS)}{hint}"
                continue
            if not split.images:
                yield f"{key}.images", "missing"
            if split.ids == ():
                yield f"{key}.ids", "is empty; leave the key out to take every file"
            for pattern in (*split.images, *split.labels):
                if pattern.count("{id}") != 1 or re.search(r"[{}]", pattern.replace("{id}", "")):
                    yield key, f"pattern {pattern!r} must hold {{id}} exactly once, and no other braces"
            if bool(split.labels) != (split.annotation == "pixel"):
                yield (
                    f"{key}.labels",
                    f"annotation {split.annotation!r} {'has no' if split.labels else 'needs'} label files",
                )
            needs_json = split.annotation in ("box", "tag") or (bool(split.labels) and self.encoding == "panoptic")
            if needs_json != bool(split.annotation_file):
                kind = f"annotation {split.annotation!r} with encoding {self.encoding!r}"
                yield f"{key}.annotation_file", f"{kind} {'needs one' if needs_json else 'has none'}"

    def _score_problems(self) -> Iterator[tuple[str, str]]:
        ids = self.evaluation.submission_ids
        if ids is not None and len(ids) != len(self.classes):
            yield "evaluation.submission_ids", f"{len(ids)} ids for {len(self.classes)} classes"
        name = self.evaluation.submission_name
        rest = name.replace("{stem}", "").replace("{id}", "")
        if rest == name or re.search(r"[{}]", rest):
            yield "evaluation.submission_name", f"{name!r} must hold {{stem}} or {{id}}, and no other braces"
        for grouping, groups in self.evaluation.groupings.items():
            members = [name for names in groups.values() for name in names]
            key = f"evaluation.groupings.{grouping}"
            for name in sorted(set(members)):
                if name not in self.class_names:
                    yield key, f"{name!r} is no class{did_you_mean(name, self.class_names)}"
                if members.count(name) > 1:
                    yield key, f"{name!r} is in two groups"
