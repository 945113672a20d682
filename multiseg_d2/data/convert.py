"""Turns the files of a download into those that a spec reads: resumable, in several processes, overwriting nothing.

Every file appears whole or not at all, so a run that was interrupted goes on where it stopped. A file that is there is
left alone; ``--verify`` compares it with what would be written, ``--overwrite`` replaces it where it differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..atomic_file import write_atomically
from ..user_error import UserError
from .decode import BadFileError, decode_index, open_file
from .files import data_root
from .parallel import default_workers, map_files

__all__ = ["ConversionError", "Job", "convert_files", "conversion_parser", "encode_label", "write_list"]

_SHOWN = 20


class ConversionError(UserError, ValueError):
    """A file cannot be converted; the message names it."""


@dataclass(frozen=True)
class Job:
    """One file to write, and whatever the conversion needs to know for it (picklable)."""

    target: str
    source: Any


def conversion_parser(description: str) -> argparse.ArgumentParser:
    """Command line that all conversions share: data root, processes, what to do with files that are there."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(data_root()), help="data root (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: %(default)s)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--verify", action="store_true", help="compare files that are there with what would be written"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace files that are there where they differ")
    return parser


def encode_label(ids: np.ndarray) -> bytes:
    """(H, W) uint8 or uint16 ids -> bytes of a grey PNG."""
    if ids.ndim != 2 or ids.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"label maps are (H, W) uint8 or uint16, not {ids.shape} {ids.dtype}")
    return cv2.imencode(".png", np.ascontiguousarray(ids))[1].tobytes()


def convert_files(
    jobs: Sequence[Job],
    convert: Callable[[Any], np.ndarray | bytes | tuple[np.ndarray, str]],
    options: argparse.Namespace,
    title: str,
) -> int:
    """Converts every file that is not there yet, and says what was done.

    Args:
        jobs: what to write.
        convert: ``job.source`` -> (H, W) label map, or a whole file as bytes, or a label map with a remark about it
            that the summary counts; what it raises is reported with the file, and the others are converted.
        options: of :func:`conversion_parser`.
        title: shown beside the progress bar.

    Returns:
        Exit code: 1 if a file could not be converted or, with ``--verify``, differs.
    """
    mode = "verify" if options.verify else "overwrite" if options.overwrite else "keep"
    done, remarks, bad = Counter(), Counter(), []
    for outcome, message in map_files(partial(_convert_one, convert, mode), jobs, options.workers, title):
        done[outcome] += 1
        if outcome in ("failed", "different"):
            bad.append(message)
        elif message:
            remarks[message] += 1
    print(
        f"{title}: " + (", ".join(f"{count} {outcome}" for outcome, count in sorted(done.items())) or "nothing to do")
    )
    for remark, count in remarks.most_common():
        print(f"  in {count} files: {remark}")
    for message in bad[:_SHOWN]:
        print(f"  {message}", file=sys.stderr)
    if len(bad) > _SHOWN:
        print(f"  ... and {len(bad) - _SHOWN} more", file=sys.stderr)
    return 1 if bad else 0


def _convert_one(convert: Callable, mode: str, job: Job) -> tuple[str, str]:
    """Works on one file: (what was done, message or remark)."""
    there = os.path.isfile(job.target) and os.path.getsize(job.target) > 0
    if there and mode == "keep":
        return "kept", ""
    try:
        if there and _is_source(job):
            raise ConversionError("is what the conversion reads: it would be lost")
        result = convert(job.source)
        content, remark = result if isinstance(result, tuple) else (result, "")
        if there and _same(job.target, content):
            return "the same", remark
        if there and mode == "verify":
            return "different", f"{job.target}: is not what the conversion gives; --overwrite would replace it"
        write_atomically(job.target, content if isinstance(content, bytes) else encode_label(content))
        return ("replaced" if there else "written"), remark
    except Exception as problem:  # whatever one file does to its reader, the others are converted and it is named
        return "failed", f"{job.target}: {type(problem).__name__}: {problem}"


def _is_source(job: Job) -> bool:
    source = job.source
    return isinstance(source, str) and os.path.exists(source) and os.path.samefile(job.target, source)


def _same(path: str, content: np.ndarray | bytes) -> bool:
    """Label maps are compared by pixels: another program may have packed the same ones differently."""
    if isinstance(content, bytes):
        return Path(path).read_bytes() == content
    try:
        return np.array_equal(decode_index(open_file(path)), content)
    except BadFileError:
        return False


def write_list(path: Path, lines: Iterable[str], options: argparse.Namespace) -> int:
    """Writes a list of ids, one per line; another list of that name is replaced with ``--overwrite`` only.

    Returns:
        Exit code: 1 if another list is there and stays.
    """
    text = "".join(f"{line}\n" for line in lines)
    if path.exists() and path.read_bytes().decode(errors="replace") == text:
        print(f"{path}: the same")
        return 0
    if path.exists() and not options.overwrite:
        print(f"{path}: holds another list; --overwrite would replace it", file=sys.stderr)
        return 1
    if options.verify:
        print(f"{path}: is not there", file=sys.stderr)
        return 1
    write_atomically(path, text)
    print(f"{path}: {text.count(chr(10))} ids written")
    return 0
