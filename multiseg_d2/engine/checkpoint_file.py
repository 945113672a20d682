"""One checkpoint file: written whole or not at all, checked when read, and never run."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

__all__ = [
    "BrokenCheckpointError",
    "CheckpointError",
    "UnsafeCheckpointError",
    "check_plain",
    "read_checkpoint",
    "tensor_bytes",
    "write_whole",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)
_PLAIN = (str, bytes, int, float, bool, type(None), Tensor)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or used for this run."""


class BrokenCheckpointError(CheckpointError):
    """The file is cut short or its bytes have changed since it was written."""


class UnsafeCheckpointError(CheckpointError):
    """The file is whole but holds more than tensors and plain values: loading it would run code."""


def check_plain(value: Any, where: str = "checkpoint") -> None:
    """Makes sure that a value can be stored without pickled code.

    Raises:
        CheckpointError: naming the first thing that is neither a tensor nor a plain Python value.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise CheckpointError(f"{where} has a key of type {type(key).__name__}: {key!r}")
            check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise CheckpointError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}; checkpoints hold tensors and plain "
            "Python values only, so that they load without running code (NumPy: .item() or torch.as_tensor)"
        )


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested value, about the size of its checkpoint."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(tensor_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(item) for item in value)
    return 0


def write_whole(path: Path, write: Callable[[IO[bytes]], None], needed: int = 0) -> None:
    """Writes a file that is, at every moment, either the old one or the whole new one.

    Args:
        path: where; the temporary file is put beside it.
        write: writes the content to the open file it is given.
        needed: about how many bytes that will be.

    Raises:
        CheckpointError: the file could not be written. The old one is untouched, no partial file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_free_space(path.parent, needed)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except Exception as problem:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)
        cause = _cause(problem)
        if cause is None:
            raise
        raise CheckpointError(
            f"{path} could not be written: {cause.strerror or cause}. It needs {needed:,} bytes, "
            f"{_free_bytes(path.parent)} are free in {path.parent}. What was saved before is untouched"
        ) from problem


def _cause(problem: BaseException | None) -> OSError | None:
    """The operating system's error behind ``problem``: torch hides it behind a RuntimeError of its own."""
    while problem is not None and not isinstance(problem, OSError):
        problem = problem.__cause__ or problem.__context__
    return problem


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


def _check_free_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _sync_folder(folder: Path) -> None:
    """Makes the new name survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values as a file that ``torch.load(weights_only=True)`` reads.

    Raises:
        CheckpointError: see :func:`write_whole` and :func:`check_plain`.
    """
    check_plain(content)
    write_whole(path, lambda file: torch.save(content, file), tensor_bytes(content))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, with every byte checked and no code run.

    Raises:
        BrokenCheckpointError: cut short, or with changed bytes.
        UnsafeCheckpointError: whole, but with pickled objects beyond tensors and plain values.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not compare the checksums that it stores
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as problem:
        raise BrokenCheckpointError(f"{path} is broken: {problem} ({path.stat().st_size:,} bytes)") from problem
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror or problem}") from problem
    if bad is not None:
        raise BrokenCheckpointError(f"{path} is broken: the bytes of its part {bad} have changed")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as problem:
        raise UnsafeCheckpointError(f"{path} is refused, loading it could run code: {problem}") from problem
    except (RuntimeError, EOFError, KeyError) as problem:
        raise BrokenCheckpointError(f"{path} is broken: {problem}") from problem
