"""From the content of a spec file to the dataclasses of :mod:`multiseg_d2.data.spec`: keys and types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..yaml_file import did_you_mean
from .spec_model import ClassSpec, Color, DatasetSpec, EvaluationSpec, SpecError, SplitSpec

__all__ = ["build_spec", "check_top_level"]

_TEXTS = ("name", "dataset", "extends", "title", "homepage", "licence", "annotation", "encoding", "unlisted", "raw_ids")
_TOP = (*_TEXTS, "ignore", "classes", "splits", "evaluation")
_CLASS = ("name", "color", "raw", "raw_colors", "covers")
_SPLIT = ("images", "labels", "ids", "annotation_file", "annotation", "count")
_EVALUATION = ("official", "submission_ids", "submission_void", "submission_name", "groupings")
_MAX_RAW = 65535


class _Where:
    """A place in a spec file; builds the errors that name it."""

    def __init__(self, path: str, key: str = "") -> None:
        self.path, self.key = path, key

    def __truediv__(self, key: object) -> _Where:
        return _Where(self.path, f"{self.key}.{key}" if self.key else str(key))

    def error(self, problem: str) -> SpecError:
        return SpecError(f"{self.path}: {self.key}: {problem}" if self.key else f"{self.path}: {problem}")


def check_top_level(content: Any, path: str) -> dict[str, Any]:
    """Checks what can be said of one file alone, before it is joined with the file that it extends.

    Args:
        content: as the YAML file has it.
        path: of that file.

    Returns:
        The content, in which paths that begin with ``./`` or ``../`` start from the folder of the file.
    """
    where = _Where(path)
    content = dict(_mapping(content, where, _TOP))
    for key in _TEXTS:
        if key in content:
            _text(content[key], where / key)
    if "name" not in content:
        raise where.error("the key `name` is missing")
    if content.get("raw_ids", "listed") not in ("listed", "position"):
        raise (where / "raw_ids").error(f"{content['raw_ids']!r} is neither listed nor position")
    if content.get("raw_ids") == "position" and any("raw" in c for c in _items(content.get("classes"))):
        raise (where / "raw_ids").error("`position` says that raw ids are positions in `classes`, which lists others")
    if "classes" in content:
        content.setdefault("raw_ids", "listed")
    if "splits" in content:
        splits = _mapping(content["splits"], where / "splits")
        content["splits"] = {n: _resolve(s, where / "splits" / n) for n, s in splits.items()}
    return content


def build_spec(content: Mapping[str, Any], path: str) -> DatasetSpec:
    """Builds the spec from checked content.

    Raises:
        SpecError: a key is missing or unknown, or a value is of the wrong type; names file and key.
    """
    where = _Where(path)
    for key in ("classes", "splits"):
        if key not in content:
            raise where.error(f"the key `{key}` is missing, and there is no `extends` to take it from")
    color = content.get("encoding") == "color"
    parse_raw = _color if color else _raw_id
    ignored = _list(content.get("ignore", ()), where / "ignore", parse_raw)
    classes = _classes(content, where / "classes", color)
    listed = sum(len(c.raw_colors) for c in classes)
    annotation = content.get("annotation", "pixel")
    return DatasetSpec(
        name=content["name"],
        dataset=content.get("dataset", content["name"]),
        classes=classes,
        splits={n: _split(n, s, where / "splits" / n, annotation) for n, s in content["splits"].items()},
        title=content.get("title", ""),
        homepage=content.get("homepage", ""),
        licence=content.get("licence", ""),
        encoding=content.get("encoding", "index"),
        unlisted=content.get("unlisted", "error"),
        ignore_ids=tuple(range(listed, listed + len(ignored))) if color else ignored,
        ignore_colors=ignored if color else (),
        evaluation=_evaluation(content.get("evaluation", {}), where / "evaluation"),
        path=path,
    )


def _classes(content: Mapping[str, Any], where: _Where, color: bool) -> tuple[ClassSpec, ...]:
    by_position = content.get("raw_ids") == "position" and not color
    classes: list[ClassSpec] = []
    listed = 0
    for position, item in enumerate(_list(content["classes"], where)):
        here = where / position
        item = {"name": item} if isinstance(item, str) else _mapping(item, here, _CLASS)
        if "name" not in item:
            raise here.error("the key `name` is missing")
        here = where / item["name"]
        raw_colors = _list(item.get("raw_colors", ()), here / "raw_colors", _color)
        if raw_colors and not color:
            raise (here / "raw_colors").error("belongs to `encoding: color`; other encodings list `raw` ids")
        if color:
            raw_ids = tuple(range(listed, listed := listed + len(raw_colors)))
        elif by_position:
            raw_ids = (position,)
        else:
            raw = item.get("raw", ())
            raw_ids = _list([raw] if isinstance(raw, int) else raw, here / "raw", _raw_id)
        shown = item.get("color", raw_colors[0] if raw_colors else _default_color(position))
        covers = _list(item["covers"], here / "covers", _text) if "covers" in item else None
        if covers == ():
            raise (here / "covers").error("is empty; leave the key out if the class has no place in the taxonomy")
        classes.append(
            ClassSpec(_text(item["name"], here / "name"), _color(shown, here / "color"), raw_ids, raw_colors, covers)
        )
    return tuple(classes)


def _split(name: str, item: Any, where: _Where, annotation: str) -> SplitSpec:
    labels = _list(item.get("labels", ()), where / "labels", _text)
    if "annotation" not in item and annotation == "pixel" and not labels:
        annotation = "none"  # a hidden test split
    count = item.get("count")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise (where / "count").error(f"must be a positive number, not {count!r}")
    ids = item.get("ids")
    if ids is not None and not isinstance(ids, str):
        ids = _list(ids, where / "ids", _text)
    return SplitSpec(
        name=_text(name, where),
        images=_list(item.get("images", ()), where / "images", _text),
        labels=labels,
        ids=ids,
        annotation_file=_text(item.get("annotation_file", ""), where / "annotation_file", empty=True),
        annotation=_text(item.get("annotation", annotation), where / "annotation"),
        count=count,
    )


def _evaluation(item: Any, where: _Where) -> EvaluationSpec:
    item = _mapping(item, where, _EVALUATION)
    given = {k: _text(item[k], where / k) for k in ("official", "submission_name") if k in item}
    if "submission_ids" in item:
        given["submission_ids"] = _list(item["submission_ids"], where / "submission_ids", _raw_id)
    if "submission_void" in item:
        given["submission_void"] = _raw_id(item["submission_void"], where / "submission_void")
    groupings = {}
    for name, groups in _mapping(item.get("groupings", {}), where / "groupings").items():
        here = where / "groupings" / name
        groupings[name] = {g: _list(c, here / g, _text) for g, c in _mapping(groups, here).items()}
    return EvaluationSpec(**given, groupings=groupings)


def _resolve(split: Any, where: _Where) -> dict[str, Any]:
    """The split with ``./`` and ``../`` replaced by the folder of the spec file; checks its keys."""
    folder = Path(where.path).resolve().parent

    def absolute(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(("./", "../")):
            return (folder / value).as_posix()
        return value

    split = dict(_mapping(split, where, _SPLIT))
    for key in ("images", "labels"):
        if key in split:
            split[key] = [
                absolute(p) for p in _list([split[key]] if isinstance(split[key], str) else split[key], where / key)
            ]
    for key in ("ids", "annotation_file"):
        if key in split:
            split[key] = absolute(split[key])
    return split


# ---- types ----


def _mapping(value: Any, where: _Where, known: Sequence[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise where.error(f"must be a mapping of keys to values, not {value!r}")
    for key in value:
        if not isinstance(key, str):
            raise where.error(f"the key {key!r} is not text; put it in quotes")
        if known and key not in known:
            raise where.error(f"unknown key {key!r}{did_you_mean(key, known)}; known are {', '.join(known)}")
    return value


def _text(value: Any, where: _Where, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise where.error(
            f"must be text, not {value!r}; put it in quotes (YAML reads 000_10, no and on as other things)"
        )
    if not value.strip() and not empty:
        raise where.error("is empty")
    return value


def _list(value: Any, where: _Where, parse: Callable[[Any, _Where], Any] | None = None) -> tuple:
    if isinstance(value, str) or not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise where.error(f"must be a list, not {value!r}")
    return tuple(parse(item, where) for item in value) if parse else tuple(value)


def _items(value: Any) -> list[Mapping]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _raw_id(value: Any, where: _Where) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_RAW:
        raise where.error(f"{value!r} is no raw id: a whole number from 0 to {_MAX_RAW}")
    return value


def _color(value: Any, where: _Where) -> Color:
    whole = isinstance(value, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not whole or len(value) != 3 or not all(0 <= v <= 255 for v in value):
        raise where.error(f"{value!r} is no colour: [red, green, blue], each from 0 to 255")
    return tuple(value)  # type: ignore[return-value]


def _default_color(position: int) -> Color:
    """Different colours for 254 classes: the bits of ``position + 1`` spread over the high bits of R, G and B."""
    rgb, rest = [0, 0, 0], position + 1
    for bit in range(24):
        rgb[bit % 3] |= (rest >> bit & 1) << (7 - bit // 3)
    return tuple(rgb)  # type: ignore[return-value]
