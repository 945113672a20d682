"""Files of tensors: a run's own checkpoints, and the weights of other programs. Read without running code from them.

Our checkpoints are written whole or not at all, and end with a checksum of all their bytes (as the comment of the zip
archive that PyTorch writes, which other programs pass over), so that no changed byte goes unnoticed.

Of other programs' files, a ``.pkl`` is read by an unpickler that builds numpy arrays and plain containers only, a
``.safetensors`` by the library of that name, everything else by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..atomic_file import write_atomically
from ..user_error import UserError
from .names import KNOWN_FILES

__all__ = [
    "BrokenCheckpointError",
    "CheckpointError",
    "UnsafeCheckpointError",
    "check_kind",
    "check_plain",
    "read_checkpoint",
    "read_pickle",
    "read_state",
    "tensor_bytes",
    "write_checkpoint",
    "write_file",
]

_PLAIN = (str, bytes, int, float, bool, type(None), Tensor)
#: Start of the checksum at the end of a file, and its length with the checksum's hexadecimal digits.
_SEAL, _SEAL_BYTES = b"multiseg_d2 sha256 ", len(b"multiseg_d2 sha256 ") + 64
#: First bytes of what is downloaded instead of a file of weights, in lower case, and what to say of it.
_NO_WEIGHTS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, which stands for the file: run `git lfs pull`, or download the file",
    ),
    (b"<!doctype html", "a web page: download the file of weights itself (the address of its download button)"),
    (b"<html", "a web page: download the file of weights itself (the address of its download button)"),
    (b"<?xml", "an XML text, probably the error message of a server: download the file again"),
    (b"{", "a JSON text, not tensors: name the file of weights that belongs to it"),
)
#: Keys under which a state dict is wrapped, by the tools that write such files.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
#: Names of modules around a network: of DataParallel and DistributedDataParallel, of torch.compile.
_WRAPPING_MODULES = ("module", "_orig_mod")


class CheckpointError(UserError, RuntimeError):
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
    """Writes tensors and plain values as a file that ``torch.load(weights_only=True)`` reads, with a checksum.

    Raises:
        CheckpointError: see :func:`write_file` and :func:`check_plain`.
    """
    check_plain(content)

    def write(file: IO[bytes]) -> None:
        torch.save(content, file)
        _seal(file)

    write_file(path, write, tensor_bytes(content))


def _seal(file: IO[bytes]) -> None:
    """Puts the checksum of all bytes of a zip archive at its end: the length of the comment is its last two bytes."""
    end = file.seek(0, 2)
    file.seek(end - 2)
    file.write(struct.pack("<H", _SEAL_BYTES))
    digest = _digest(file, end)
    file.seek(end)
    file.write(_SEAL + digest)


def _digest(file: IO[bytes], length: int) -> bytes:
    """Hexadecimal digits of the first ``length`` bytes' SHA-256."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (block := file.read(min(length, 1 << 20))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()


def _check_seal(path: Path) -> bool:
    """Whether a file ends with a checksum.

    Raises:
        BrokenCheckpointError: it does, but not with that of its bytes.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        end = file.seek(0, 2) - _SEAL_BYTES
        if end < 0:
            return False
        file.seek(end)
        seal = file.read()
        if not seal.startswith(_SEAL):
            return False
        if seal != _SEAL + _digest(file, end):
            raise BrokenCheckpointError(f"{path} is broken: its bytes have changed since it was written")
    return True


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a file that ``torch.save`` wrote onto the CPU, with every byte checked and no code run.

    Of a file that another program wrote, the checksums of the archive's parts are compared.

    Raises:
        BrokenCheckpointError: cut short, or with changed bytes.
        UnsafeCheckpointError: whole, but with pickled objects beyond tensors and plain values.
    """
    path = Path(path)
    try:
        if not _check_seal(path):
            _check_parts(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror or problem}") from problem
    except pickle.UnpicklingError as problem:
        reason = _first_line(problem)
        raise UnsafeCheckpointError(f"{path} is refused, loading it could run code: {reason}") from problem
    except Exception as problem:  # a damaged archive raises almost anything
        size = path.stat().st_size
        raise BrokenCheckpointError(f"{path} is broken: {_first_line(problem)} ({size:,} bytes)") from problem


def _check_parts(path: Path) -> None:
    """Compares the checksums of a zip archive's parts: torch itself does not.

    Raises:
        BrokenCheckpointError: a part has changed, or the archive does not end as torch ends it (with a record of 22
            bytes and no comment): its end was cut off, or it is one of ours whose checksum cannot be recognised.
    """
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
    if bad is not None:
        raise BrokenCheckpointError(f"{path} is broken: the bytes of its part {bad} have changed")
    with open(path, "rb") as file:
        file.seek(-22, 2)
        end = file.read()
    if not end.startswith(b"PK\x05\x06") or end[-2:] != b"\0\0":
        raise BrokenCheckpointError(f"{path} is broken: its end is missing or has changed")


def check_kind(path: str | Path) -> None:
    """Says so where a file is no file of weights at all, but what is often downloaded in its place.

    Raises:
        BrokenCheckpointError: it is empty, a Git LFS pointer, a web page or another text.
        CheckpointError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(200)
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror or problem}") from problem
    if not start:
        raise BrokenCheckpointError(f"{path} is empty")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for beginning, what in _NO_WEIGHTS:
        if text.startswith(beginning) and b"\0" not in start:
            raise BrokenCheckpointError(f"{path} is {what} ({Path(path).stat().st_size:,} bytes)")


def read_state(path: str) -> tuple[dict[str, Tensor | np.ndarray], str, dict[str, Any]]:
    """The state dict in a file, the author that Detectron2's files name, and the facts of the run where it is ours.

    State dicts of other programs are taken out of what is wrapped around them, and their keys out of the modules that
    wrapped the network (``module.`` of ``DistributedDataParallel``, at any level).

    Args:
        path: local path or anything that Detectron2's PathManager resolves.

    Raises:
        UnsafeCheckpointError: the file holds something else than tensors and plain containers.
        BrokenCheckpointError: it is broken, or holds no tensors.
        CheckpointError: it cannot be read.
    """
    try:
        local = str(PathManager.get_local_path(path))
    except OSError as error:  # of a download, too
        raise CheckpointError(f"{path} cannot be fetched: {error}") from error
    if not Path(local).is_file():
        source = KNOWN_FILES.get(Path(path).name)
        advice = f". Download {source} and put it there; docs/backbones.md has other ways to start" if source else ""
        raise CheckpointError(f"MODEL.WEIGHTS: there is no file {path}{advice}")
    check_kind(local)
    if local.endswith(".pkl"):
        raw = read_pickle(local)
    elif local.endswith(".safetensors"):
        raw = _read_safetensors(local)
    elif _is_zip(local):
        raw = read_checkpoint(Path(local))
    else:
        raw = _read_torch(local)
    if isinstance(raw, Mapping) and isinstance(raw.get("run"), Mapping) and isinstance(raw.get("model"), Mapping):
        return dict(raw["model"]), "", dict(raw["run"])
    author = raw.get("__author__", "") if isinstance(raw, Mapping) else ""
    return _unwrap(raw, path), str(author), {}


def _is_zip(path: str) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile as problem:  # it was one
        raise BrokenCheckpointError(f"{path} is broken: {problem}") from problem


def _unwrap(raw: Any, path: str) -> dict[str, Any]:
    """The state dict inside a file's contents."""
    while isinstance(raw, Mapping):
        inner = [key for key in raw if isinstance(raw[key], Mapping) and raw[key]]
        arrays = {str(k): v for k, v in raw.items() if isinstance(v, (Tensor, np.ndarray))}
        known = [key for key in _WRAPPERS if key in inner]
        if arrays and not known:
            return _bare({k: v for k, v in arrays.items() if not k.endswith("_momentum")}, path)
        if not known and len(inner) != 1:
            break
        raw = raw[known[0] if known else inner[0]]
    raise BrokenCheckpointError(f"{path}: no tensors found in it")


def _bare(state: dict[str, Any], path: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in state.items():
        bare = ".".join(part for part in key.split(".") if part not in _WRAPPING_MODULES)
        if bare in result:
            raise CheckpointError(f"{path}: two tensors are called {bare!r}, one of them {key!r}")
        result[bare] = value
    return result


def _read_torch(path: str) -> Any:
    """A file in PyTorch's format before version 1.6."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = _first_line(error)
        raise UnsafeCheckpointError(f"{path} holds more than tensors, or is broken: {reason}") from error
    except Exception as error:  # a damaged file raises almost anything
        raise BrokenCheckpointError(f"{path} cannot be read as torch weights: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise BrokenCheckpointError(f"{path} is a broken pickle: {reason}") from error


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
