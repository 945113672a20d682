"""Files of tensors: a run's own checkpoints, and the weights of other programs. Read without running code from them.

Our checkpoints are written whole or not at all, and checked when they are read. Of other programs' files, a ``.pkl`` is
read by an unpickler that builds numpy arrays and plain containers only, a ``.safetensors`` by the library of that name,
everything else by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..atomic_file import write_atomically

__all__ = [
    "BrokenCheckpointError",
    "CheckpointError",
    "UnsafeCheckpointError",
    "check_plain",
    "read_checkpoint",
    "read_pickle",
    "read_state",
    "tensor_bytes",
    "write_checkpoint",
    "write_file",
]

_PLAIN = (str, bytes, int, float, bool, type(None), Tensor)
#: Keys under which a state dict is wrapped, by the tools that write such files.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")


class CheckpointError(RuntimeError):
    """A file of tensors cannot be written, read, or used for this model or run."""


class BrokenCheckpointError(CheckpointError):
    """The file is cut short or its bytes have changed since it was written."""


class UnsafeCheckpointError(CheckpointError):
    """The file holds more than tensors and plain values: loading it would run code."""


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


def write_file(path: Path, content: str | Callable, needed: int = 0) -> None:
    """:func:`write_atomically`, with an error that says what is missing.

    Args:
        path: where.
        content: text, or what writes to the open file that it is given.
        needed: about how many bytes that will be.

    Raises:
        CheckpointError: the file could not be written. The old one is untouched, no partial file is left.
    """
    try:
        write_atomically(path, content, needed)
    except Exception as problem:
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


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain values as a file that ``torch.load(weights_only=True)`` reads.

    Raises:
        CheckpointError: see :func:`write_file` and :func:`check_plain`.
    """
    check_plain(content)
    write_file(path, lambda file: torch.save(content, file), tensor_bytes(content))


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
    except pickle.UnpicklingError as problem:
        raise UnsafeCheckpointError(f"{path} is refused, loading it could run code: {problem}") from problem
    except (RuntimeError, EOFError, KeyError) as problem:
        raise BrokenCheckpointError(f"{path} is broken: {problem}") from problem


def read_state(path: str) -> tuple[dict[str, Tensor | np.ndarray], str]:
    """The state dict in a file, without ``module.`` before its keys, and the author that Detectron2's files name.

    Args:
        path: local path or anything that Detectron2's PathManager resolves.

    Raises:
        UnsafeCheckpointError: the file holds something else than tensors and plain containers.
        BrokenCheckpointError: it is broken, or holds no tensors.
    """
    local = PathManager.get_local_path(path)
    readers = {".pkl": read_pickle, ".safetensors": _read_safetensors}
    return _unwrap(readers.get(Path(local).suffix, _read_torch)(local), path)


def _unwrap(raw: Any, path: str) -> tuple[dict[str, Any], str]:
    """The state dict inside a file's contents, and the author that Detectron2's files name."""
    author = raw.get("__author__", "") if isinstance(raw, Mapping) else ""
    while isinstance(raw, Mapping):
        inner = next((raw[k] for k in _WRAPPERS if isinstance(raw.get(k), Mapping)), None)
        if inner is None:
            arrays = {str(k).removeprefix("module."): v for k, v in raw.items() if isinstance(v, (Tensor, np.ndarray))}
            if arrays:
                return {k: v for k, v in arrays.items() if not k.endswith("_momentum")}, str(author)
            break
        raw = inner
    raise BrokenCheckpointError(f"{path}: no tensors found in it")


def _read_torch(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{path} holds more than tensors, or is broken: {str(error).splitlines()[0]}"
        ) from error
    except (EOFError, RuntimeError, ValueError, KeyError) as error:
        raise BrokenCheckpointError(f"{path} cannot be read as torch weights: {error}") from error


def _read_safetensors(path: str) -> Any:
    """A file of tensors only; timm's hub gives such files."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} needs the library safetensors: pip install multiseg-d2[timm]") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BrokenCheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def read_pickle(path: str) -> Any:
    """Reads a pickle of numpy arrays and plain containers.

    Raises:
        UnsafeCheckpointError: it asks for anything else.
        BrokenCheckpointError: it is broken.
    """
    try:
        with Path(path).open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise BrokenCheckpointError(f"{path} is a broken pickle: {type(error).__name__}: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers; every other name in the file is an error."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        allowed = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if allowed is None:
            raise UnsafeCheckpointError(
                f"the file asks for {module}.{name}, but weights need arrays and plain containers only. Nothing was "
                "run. If you trust the file, save its arrays alone."
            )
        return allowed


def _encode(text: str, encoding: str) -> bytes:
    """How old pickle protocols spell bytes."""
    if encoding != "latin1":
        raise UnsafeCheckpointError(f"the file encodes text as {encoding!r}")
    return text.encode("latin1")


def _ordered(*items: Any) -> dict:
    return dict(*items)


# numpy has moved its two functions between versions; an array itself knows the present ones.
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce_ex__(4)[0],
    ("numpy.core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered,
}
