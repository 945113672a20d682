"""Strict reading of JSON, whoever wrote it: nothing is lost or guessed silently. Standard library only."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .text_file import read_text

__all__ = ["parse_json", "read_json"]

_SHOWN = reprlib.Repr()
_SHOWN.maxdict = _SHOWN.maxlist = 4
_SHOWN.maxlevel = 2


def read_json(
    path: str | Path, error: type[Exception] = ValueError, finite: bool = True, keys: Collection[str] | None = None
) -> Any:
    """Reads a JSON file in any encoding that :func:`.read_text` knows.

    Args:
        path: the file.
        error: type of the error for anything wrong with it.
        finite: whether NaN and Infinity, which are no JSON but which many programs write, are errors.
        keys: the content must be an object with these keys; None: it may be anything.

    Raises:
        error: the file cannot be opened, is no JSON, names a key of an object twice, or has a number that is none; the
            message says file and key.
    """
    content = parse_json(read_text(path, error), str(path), error, finite)
    if keys is not None and not (isinstance(content, dict) and set(keys) <= content.keys()):
        wanted = f" with {', '.join(keys)}" if keys else ""
        raise error(f"{path}: an object{wanted} was expected, but the file holds {_SHOWN.repr(content)}")
    return content


def parse_json(text: str | bytes, where: str, error: type[Exception] = ValueError, finite: bool = True) -> Any:
    """As :func:`read_json`, of text that was read already; errors begin with ``where``."""
    checks = _Checks(where, error)
    hooks: dict[str, Any] = {"parse_constant": checks.constant} if finite else {}
    try:
        content = json.loads(text, object_pairs_hook=checks.object, **hooks)
    except _StrictError as problem:
        raise error(f"{where}: {problem}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not valid JSON: {problem}") from problem
    if checks.constants:
        raise error(f"{where}: {checks.constants[0]} is no number of JSON")
    return content


class _StrictError(Exception):
    """Internal: carries what is wrong out of the parser."""


class _Checks:
    """What the parser calls for every object, innermost first, and for every NaN or Infinity."""

    def __init__(self, where: str, error: type[Exception]) -> None:
        self.constants: list[str] = []  # met, and not yet found in an object

    def constant(self, name: str) -> float:
        self.constants.append(name)
        return float(name.replace("Infinity", "inf"))

    def object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            doubled = sorted({key for key in keys if keys.count(key) > 1})
            raise _StrictError(f"an object names twice: {doubled}; as read it is {_SHOWN.repr(content)}")
        for key, value in pairs if self.constants else ():
            if not _is_finite(value):
                raise _StrictError(f"{key!r} has {self.constants[0]}, which is no number: {_SHOWN.repr(content)}")
        return content


def _is_finite(value: Any) -> bool:
    """Of a number, or all numbers of a list; objects were looked at before."""
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or value - value == 0
