"""Reads files of weights without running code from them.

A ``.pkl`` is read by an unpickler that builds numpy arrays and plain containers only, everything else with
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

__all__ = ["UnsafeFileError", "read_pickle", "read_state"]

#: Keys under which a state dict is wrapped, by the tools that write such files.
_WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")


class UnsafeFileError(ValueError):
    """A weights file wants to run code when it is read."""


def read_state(path: str) -> tuple[dict[str, Tensor | np.ndarray], str]:
    """The state dict in a file, without ``module.`` before its keys, and the author that Detectron2's files name.

    Args:
        path: local path or anything that Detectron2's PathManager resolves.

    Raises:
        UnsafeFileError: the file holds something else than tensors and plain containers.
        ValueError: it is broken, or holds no tensors.
    """
    local = PathManager.get_local_path(path)
    return _unwrap(read_pickle(local) if str(local).endswith(".pkl") else _read_torch(local), path)


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
    raise ValueError(f"{path}: no tensors found in it")


def _read_torch(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(f"{path} holds more than tensors, or is broken: {str(error).splitlines()[0]}") from error
    except (EOFError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as torch weights: {error}") from error


def read_pickle(path: str) -> Any:
    """Reads a pickle of numpy arrays and plain containers.

    Raises:
        UnsafeFileError: it asks for anything else.
        ValueError: it is broken.
    """
    try:
        with Path(path).open("rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"{path} is a broken pickle: {type(error).__name__}: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers; every other name in the file is an error."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        allowed = _ALLOWED.get((module.replace("numpy._core", "numpy.core"), name))
        if allowed is None:
            raise UnsafeFileError(
                f"the file asks for {module}.{name}, but weights need arrays and plain containers only. Nothing was "
                "run. If you trust the file, save its arrays alone."
            )
        return allowed


def _encode(text: str, encoding: str) -> bytes:
    """How old pickle protocols spell bytes."""
    if encoding != "latin1":
        raise UnsafeFileError(f"the file encodes text as {encoding!r}")
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
