"""Strict, safe reading of the YAML files that people write: specs and taxonomies. yaml only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

__all__ = ["did_you_mean", "read_yaml"]

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
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, _UniqueKeyLoader)
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from problem
    except _DoubledKeyError as problem:
        raise error(f"{path}: {problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise error(f"{path}: not valid YAML: {problem}") from problem


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for names close to ``name``, else an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=3)
    return f" (did you mean {', '.join(map(repr, close))}?)" if close else ""
