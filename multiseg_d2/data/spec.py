"""Dataset spec files: one YAML file says where a dataset lies, what its label files hold and what its classes are.

The format: ``docs/dataset_specs.md``. Errors name the file, the key and, where one is near, the name that was meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..label_space import IGNORE, ILLEGAL, MAX_CLASSES, TABLE_SIZE, default_color, raw_to_local_table
from ..user_error import UserError
from ..yaml_file import Place, did_you_mean, fields_of, list_of, mapping_of, read_yaml, text, whole_number

__all__ = [
    "OFFICIAL_RULES",
    "ClassSpec",
    "DatasetSpec",
    "EvaluationSpec",
    "SpecError",
    "SplitSpec",
    "load_spec",
    "packaged_specs",
]

ANNOTATIONS = ("pixel", "box", "tag", "none")
ENCODINGS = ("index", "color", "panoptic", "first_channel")
#: Evaluation rules that differ from the plain one and have code behind them in ``evaluation/official.py``.
_BENCHMARKS = ("cityscapes", "bdd100k", "idd", "kitti", "coco_stuff", "wilddash2", "mapillary", "synthia", "ade20k")
OFFICIAL_RULES = ("none", *_BENCHMARKS)

Color = tuple[int, int, int]
_PACKAGED = Path(__file__).resolve().parent / "specs"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class SpecError(UserError, ValueError):
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
        soft_labels: pattern of soft labels beside them.
        ids: the ids of the split, a file that lists them (one per line), or None for every file that matches.
        annotation_file: JSON of encoding ``panoptic`` and of box and tag annotations.
        annotation: ``"pixel"``, ``"box"``, ``"tag"`` or ``"none"``.
        count: official number of images, or None.
        suffix: of the entry's name, for views: ``"[:30]"``.
        spec: the dataset that the split belongs to; set by :class:`DatasetSpec`.
    """

    name: str
    images: tuple[str, ...]
    labels: tuple[str, ...] = ()
    soft_labels: str = ""
    ids: tuple[str, ...] | str | None = None
    annotation_file: str = ""
    annotation: str = "pixel"
    count: int | None = None
    suffix: str = ""
    spec: DatasetSpec = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    @property
    def entry(self) -> str:
        """Name of the entry in Detectron2's catalogs, for example ``"camvid_train"``."""
        return f"{self.spec.name}_{self.name}{self.suffix}"


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
        checks = (self._name_problems, self._class_problems, self._split_problems, self._score_problems)
        problems = [f"{key}: {problem}" for check in checks for key, problem in check()]
        if problems:
            raise SpecError(f"{self.path or self.name}: " + "; ".join(problems))
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
            *((f"splits.{name}.annotation", split.annotation, ANNOTATIONS) for name, split in self.splits.items()),
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
            if not raws and owner != "ignore" and any(split.annotation != "none" for split in self.splits.values()):
                yield key, f"{owner} has no {what}"
            for raw in raws:
                if raw in owners:
                    yield key, f"{what} {raw} is listed for {owners[raw]} and again for {owner}"
                owners[raw] = owner
        if self.encoding == "panoptic" and 0 not in owners:
            yield "ignore", "raw id 0 is missing: with encoding panoptic it stands for pixels that belong to no segment"

    def _split_problems(self) -> Iterator[tuple[str, str]]:
        if not self.splits:
            yield "splits", "there is none"
        for name, split in self.splits.items():
            key = f"splits.{name}"
            if split.annotation not in ANNOTATIONS:
                continue
            for pattern in (*split.images, *split.labels, *filter(None, [split.soft_labels])):
                if pattern.count("{id}") != 1 or re.search(r"[{}]", pattern.replace("{id}", "")):
                    yield key, f"pattern {pattern!r} must hold {{id}} exactly once, and no other braces"
            if bool(split.labels) != (split.annotation == "pixel"):
                has = "has no" if split.labels else "needs"
                yield f"{key}.labels", f"annotation {split.annotation!r} {has} label files"
            needs_json = split.annotation in ("box", "tag") or (bool(split.labels) and self.encoding == "panoptic")
            if needs_json != bool(split.annotation_file):
                has = "needs one" if needs_json else "has none"
                yield f"{key}.annotation_file", f"annotation {split.annotation!r} with encoding {self.encoding!r} {has}"

    def _score_problems(self) -> Iterator[tuple[str, str]]:
        ids = self.evaluation.submission_ids
        if ids is not None and len(ids) != len(self.classes):
            yield "evaluation.submission_ids", f"{len(ids)} ids for {len(self.classes)} classes"
        name = self.evaluation.submission_name
        if (rest := name.replace("{stem}", "").replace("{id}", "")) == name or re.search(r"[{}]", rest):
            yield "evaluation.submission_name", f"{name!r} must hold {{stem}} or {{id}}, and no other braces"
        for grouping, groups in self.evaluation.groupings.items():
            members, key = [n for names in groups.values() for n in names], f"evaluation.groupings.{grouping}"
            for name in sorted(set(members)):
                if name not in self.class_names:
                    yield key, f"{name!r} is no class{did_you_mean(name, self.class_names)}"
                if members.count(name) > 1:
                    yield key, f"{name!r} is in two groups"


# ---- Files ----


def load_spec(path_or_name: str | Path) -> DatasetSpec:
    """Reads a spec file, with those that it extends, and checks it.

    Args:
        path_or_name: path of a YAML file, or the name of a packaged spec.

    Raises:
        SpecError: anything wrong with the file; names the file and the key.
    """
    path = _spec_path(path_or_name)
    return _build(_merged(path, ()), Place(str(path), error_type=SpecError))


def packaged_specs() -> tuple[str, ...]:
    """Names of the specs that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _PACKAGED.glob("*.yaml")))


def _spec_path(path_or_name: str | Path, folder: Path | None = None) -> Path:
    """File of a spec; a relative path starts from ``folder`` (None: the working directory)."""
    name = str(path_or_name)
    if name.endswith((".yaml", ".yml")) or "/" in name or isinstance(path_or_name, Path):
        return Path(folder or ".", name).expanduser()
    if name not in packaged_specs():
        raise SpecError(
            f"no packaged dataset spec is called {name!r}{did_you_mean(name, packaged_specs())}; "
            f"there are {', '.join(packaged_specs())}. For a file of your own give its path, with .yaml at the end."
        )
    return _PACKAGED / f"{name}.yaml"


def _merged(path: Path, inner: tuple[Path, ...]) -> Mapping[str, Any]:
    """Content of a spec file on top of the content of the file that it extends."""
    if path.resolve() in inner:
        chain = " > ".join(str(p) for p in (*inner, path))
        raise SpecError(f"specs extend each other in a circle: {chain}")
    content = _packaged_content(path) if path.parent == _PACKAGED else _content(path)
    if "extends" not in content:
        return content
    try:
        base = _merged(_spec_path(content["extends"], path.parent), (*inner, path.resolve()))
    except SpecError as problem:
        raise SpecError(f"{path}: extends: {problem}") from None
    merged = {**base, "dataset": base.get("dataset", base["name"]), **content}
    ours, theirs = ([c["name"] for c in side.get("classes", ())] for side in (merged, base))
    if "dataset" not in content and ours != theirs:
        raise SpecError(
            f"{path}: dataset: the classes differ from those of {merged['dataset']!r}, which {content['extends']} "
            f"belongs to: {ours} against {theirs}. Give this spec a `dataset` of its own."
        )
    return merged


def _content(path: Path) -> Mapping[str, Any]:
    """Values of one file, checked as far as can be said of it alone."""
    where = Place(str(path), error_type=SpecError)
    content = _TOP(read_yaml(path, SpecError), where)
    if content.get("raw_ids", "listed") not in ("listed", "position"):
        raise (where / "raw_ids").error(f"{content['raw_ids']!r} is neither listed nor position")
    if content.get("raw_ids") == "position" and any("raw" in c for c in content.get("classes", ())):
        raise (where / "raw_ids").error("`position` says that raw ids are positions in `classes`, which lists others")
    if "classes" in content:
        content.setdefault("raw_ids", "listed")
    return content


_packaged_content = lru_cache(maxsize=None)(_content)  # several specs extend the same one


# ---- From the values of a file to the dataclasses ----


def _build(content: Mapping[str, Any], where: Place) -> DatasetSpec:
    for key in ("classes", "splits"):
        if key not in content:
            raise where.error(f"the key `{key}` is missing, and there is no `extends` to take it from")
    color, annotation = content.get("encoding") == "color", content.get("annotation", "pixel")
    ignored = list_of(_color if color else _raw_id)(content.get("ignore", ()), where / "ignore")
    classes = _build_classes(content, where / "classes", color)
    listed = sum(len(c.raw_colors) for c in classes)
    return DatasetSpec(
        name=content["name"],
        dataset=content.get("dataset", content["name"]),
        classes=classes,
        splits={name: _build_split(name, given, annotation) for name, given in content["splits"].items()},
        ignore_ids=tuple(range(listed, listed + len(ignored))) if color else ignored,
        ignore_colors=ignored if color else (),
        evaluation=EvaluationSpec(**content.get("evaluation", {})),
        path=where.path,
        **{key: content[key] for key in ("title", "homepage", "licence", "encoding", "unlisted") if key in content},
    )


def _build_classes(content: Mapping[str, Any], where: Place, color: bool) -> tuple[ClassSpec, ...]:
    classes, listed = [], 0
    for position, given in enumerate(content["classes"]):
        raw_ids, raw_colors = given.get("raw", ()), given.get("raw_colors", ())
        if color:  # one made-up raw id per colour
            raw_ids, listed = tuple(range(listed, listed + len(raw_colors))), listed + len(raw_colors)
        elif raw_colors:
            place = where / given["name"] / "raw_colors"
            raise place.error("belongs to `encoding: color`; other encodings list `raw` ids")
        elif content["raw_ids"] == "position":
            raw_ids = (position,)
        shown = given.get("color", raw_colors[0] if raw_colors else default_color(position))
        classes.append(ClassSpec(given["name"], shown, raw_ids, raw_colors, given.get("covers")))
    return tuple(classes)


def _build_split(name: str, given: Mapping[str, Any], annotation: str) -> SplitSpec:
    if annotation == "pixel" and not given.get("labels"):
        annotation = "none"  # a hidden test split
    return SplitSpec(name, **{"annotation": annotation, **given})


def _path(value: Any, where: Place) -> str:
    """Text in which ``./`` and ``../`` in front become the folder of the spec file."""
    if text(value, where).startswith(("./", "../")):
        return (Path(where.path).resolve().parent / value).as_posix()
    return value


def _classes(value: Any, where: Place) -> list[dict[str, Any]]:
    """Classes, some of them given by their name alone; errors in them call them by name."""
    parsed = []
    for position, item in enumerate(list_of()(value, where)):
        item = {"name": item} if isinstance(item, str) else item
        named = where / item["name"] if isinstance(item, Mapping) and "name" in item else None
        parsed.append(_CLASS(item, where / position, named))
    return parsed


def _color(value: Any, where: Place) -> Color:
    whole = isinstance(value, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not whole or len(value) != 3 or not all(0 <= v <= 255 for v in value):
        raise where.error(f"{value!r} is no colour: [red, green, blue], each from 0 to 255")
    return tuple(value)  # type: ignore[return-value]


def _ids(value: Any, where: Place) -> str | tuple[str, ...]:
    return _path(value, where) if isinstance(value, str) else list_of(text, empty=False)(value, where)


_raw_id = whole_number("raw id", 0, TABLE_SIZE - 1)
_CLASS = fields_of(
    {
        "name": text,
        "color": _color,
        "raw": list_of(_raw_id, single=int),
        "raw_colors": list_of(_color),
        "covers": list_of(text, empty=False),
    },
    required=("name",),
)
_SPLIT = fields_of(
    {
        **dict.fromkeys(("images", "labels"), list_of(_path, single=str)),
        **dict.fromkeys(("soft_labels", "annotation_file"), _path),
        "ids": _ids,
        "annotation": text,
        "count": whole_number("number of images", 1),
    },
    required=("images",),
)
_EVALUATION = fields_of(
    {
        **dict.fromkeys(("official", "submission_name"), text),
        "submission_ids": list_of(_raw_id),
        "submission_void": _raw_id,
        "groupings": mapping_of(mapping_of(list_of(text))),
    }
)
_TOP = fields_of(
    {
        **dict.fromkeys(("name", "dataset", "extends", "title", "homepage", "licence"), text),
        **dict.fromkeys(("annotation", "encoding", "unlisted", "raw_ids"), text),
        "ignore": lambda value, _: value,  # ids or colours: the file that this one extends may say which
        "classes": _classes,
        "splits": mapping_of(_SPLIT),
        "evaluation": _EVALUATION,
    },
    required=("name",),
)
