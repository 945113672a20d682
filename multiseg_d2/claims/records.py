"""What is kept of a run: its scores with what they belong to, or why it failed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import torch

from ..atomic_file import write_atomically
from ..json_file import read_json
from .claim import ClaimError

__all__ = ["FinishedRun", "find_record", "read_failure", "write_failure", "write_record"]

_RECORD, _FAILURE = "claims_result.json", "claims_failure.json"
_KEYS = ("key", "source", "results", "seconds", "finished")


@dataclass(frozen=True)
class FinishedRun:
    """A run that came to its end.

    Attributes:
        folder: where it ran.
        results: nested scores by catalog entry.
        seconds: duration of the calls that it took.
        source: hash of the package that ran it.
    """

    folder: Path
    results: Mapping[str, Any]
    seconds: float
    source: str


def find_record(folder: Path, key: str, source: str, any_source: bool) -> FinishedRun | None:
    """The finished run with this key: by this version of the package or, with ``any_source``, else the newest.

    Raises:
        ClaimError: a record is damaged; without it the run is repeated.
    """
    found = []
    for path in folder.glob(f"*-{key[:10]}-*/{_RECORD}"):
        content = read_json(path, ClaimError, finite=False, keys=_KEYS)
        if content["key"] == key and (any_source or content["source"] == source):
            found.append((content["source"] == source, content["finished"], path.parent, content))
    if not found:
        return None
    *_, where, content = max(found, key=lambda item: item[:2])
    return FinishedRun(where, content["results"], content["seconds"], content["source"])


def write_record(folder: Path, key: str, source: str, results: Mapping[str, Any], seconds: float) -> FinishedRun:
    """Stores the scores of a run that has ended, and forgets an earlier failure."""
    content = {
        "key": key,
        "source": source,
        "results": results,
        "seconds": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"torch": torch.__version__, "detectron2": detectron2.__version__},
    }
    write_atomically(folder / _RECORD, json.dumps(content, indent=1))
    (folder / _FAILURE).unlink(missing_ok=True)
    return FinishedRun(folder, results, seconds, source)


def write_failure(folder: Path, message: str) -> None:
    """Stores why a run failed; the next call tries it again."""
    write_atomically(folder / _FAILURE, json.dumps({"message": message}))


def read_failure(folder: Path) -> str | None:
    """Why the run in this folder failed last time, None if it did not."""
    path = folder / _FAILURE
    return str(read_json(path, ClaimError, keys=("message",))["message"]) if path.is_file() else None
