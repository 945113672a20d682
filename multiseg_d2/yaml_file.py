"""Strict, safe reading of the YAML files that people write: keys, types, and errors that name the place. yaml only."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .text_file import read_text

__all__ = [
    "Parser",
    "Place",
    "did_you_mean",
    "fields_of",
    "list_of",
    "mapping_of",
    "read_yaml",
    "text",
    "whole_number",
]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is about ten times faster


class _DoubledKeyError(Exception):
    """Internal: carries the message to :func:`read_yaml`, which knows the caller's type of error."""


class _UniqueKeyLoader(_LOADER):  # type: ignore[misc, valid-type]
    """Safe YAML in which a key that stands twice is an error, not a silent loss of the first."""

    def construct_mapping(self, node, deep=False):
        merge = "tag:yaml.org,2002:merge"  # `<<: *other`, which the base class resolves below
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        doubles = sorted({str(key) for key in keys if keys.count(key) > 1})
        if doubles:
            raise _DoubledKeyError(f"line {node.start_mark.line + 1}: names twice: {doubles}")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, error: type[Exception] = ValueError) -> Any:
    """Reads a YAML file; runs no code from it.

    Args:
        path: the file.
        error: type of the error for anything wrong with the file.

    Raises:
        error: the file cannot be opened, is no YAML, or names a key twice; the message says file and line.
    """
    stream = io.StringIO(read_text(path, error))
    stream.name = str(path)  # for messages
    try:
        return yaml.load(stream, _UniqueKeyLoader)
    except _DoubledKeyError as problem:
        raise error(f"{path}: {problem}") from None
    except Exception as problem:  # beside its own errors yaml passes on what odd values raise: a date in month 13
        raise error(f"{path}: not valid YAML: {problem}") from problem


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for names close to ``name``, else an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=3)
    return f" (did you mean {', '.join(map(repr, close))}?)" if close else ""


@dataclass(frozen=True)
class Place:
    """Where a value stands; ``place / key`` is what lies under a key of it.

    Attributes:
        path: of the file.
        key: dotted keys, "" = the whole file.
        error_type: what :meth:`error` makes.
    """

    path: str
    key: str = ""
    error_type: type[Exception] = ValueError

    def __truediv__(self, key: object) -> Place:
        return Place(self.path, f"{self.key}.{key}" if self.key else str(key), self.error_type)

    def error(self, problem: str) -> Exception:
        """An error that says which file and which key, to be raised."""
        return self.error_type(f"{self.path}: {self.key}: {problem}" if self.key else f"{self.path}: {problem}")


#: Takes a value and its place, and returns it in the form that the code wants, or raises ``place.error(...)``.
Parser = Callable[[Any, Place], Any]


def _as_read(value: Any, _place: Place) -> Any:
    return value


def text(value: Any, place: Place) -> str:
    """Parser of text that is not empty."""
    if not isinstance(value, str):
        raise place.error(
            f"must be text, not {value!r}; put it in quotes (YAML reads 000_10, no and on as other things)"
        )
    if not value.strip():
        raise place.error("is empty")
    return value


def fields_of(parsers: Mapping[str, Parser], required: Sequence[str] = ()) -> Callable[..., dict[str, Any]]:
    """A parser of mappings with known keys; what is not there stays away.

    Args:
        parsers: per known key.
        required: keys that must be there.

    Returns:
        The parser; its third argument, a place or None, is what errors in values call the mapping.
    """

    def parse_fields(value: Any, place: Place, named: Place | None = None) -> dict[str, Any]:
        for key in as_mapping(value, place):
            if key not in parsers:
                known = ", ".join(parsers)
                raise place.error(f"unknown key {key!r}{did_you_mean(key, parsers)}; known are {known}")
        for key in required:
            if key not in value:
                raise place.error(f"the key `{key}` is missing")
        return {key: parsers[key](item, (named or place) / key) for key, item in value.items()}

    as_mapping = mapping_of(_as_read)
    return parse_fields


def mapping_of(parse: Parser) -> Callable[[Any, Place], dict[str, Any]]:
    """A parser of mappings with any keys that are text; ``parse`` is applied to the values."""

    def parse_mapping(value: Any, place: Place) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise place.error(f"must be a mapping of keys to values, not {value!r}")
        for key in value:
            if not isinstance(key, str):
                raise place.error(f"the key {key!r} is not text; put it in quotes")
        return {key: parse(item, place / key) for key, item in value.items()}

    return parse_mapping


def whole_number(what: str, lowest: int, highest: int | None = None) -> Parser:
    """A parser of whole numbers in a range; ``what`` they are is said in errors."""
    allowed = f"a whole number from {lowest}" + ("" if highest is None else f" to {highest}")

    def parse_number(value: Any, place: Place) -> int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < lowest or (highest is not None and value > highest):
            raise place.error(f"{value!r} is no {what}: {allowed}")
        return value

    return parse_number


def list_of(parse: Parser = _as_read, single: type | tuple[type, ...] = (), empty: bool = True) -> Parser:
    """A parser of lists, which become tuples.

    Args:
        parse: applied to each item, with the place of the list.
        single: one value of this type may stand for a list of one.
        empty: whether a list of nothing will do.
    """

    def parse_list(value: Any, place: Place) -> tuple:
        if single and isinstance(value, single):
            value = [value]
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise place.error(f"must be a list, not {value!r}")
        items = tuple(parse(item, place) for item in value)
        if not (items or empty):
            raise place.error("is empty; leave the key out")
        return items

    return parse_list
