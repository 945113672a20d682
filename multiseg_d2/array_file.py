"""Reading of ``.npz`` files: every byte checked, no code run. numpy only."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

__all__ = ["read_arrays"]


def read_arrays(path: str | Path, error: type[Exception] = ValueError) -> dict[str, np.ndarray]:
    """Reads a file that ``np.savez`` or ``np.savez_compressed`` wrote.

    Args:
        path: the file.
        error: type of the error for anything wrong with it.

    Returns:
        Name -> array.

    Raises:
        error: the file cannot be read, is damaged, or holds Python objects; the message names it.
    """
    try:
        content = Path(path).read_bytes()
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            _check_end(content, len(file.zip.infolist()))
            arrays = dict(file)
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise zipfile.BadZipFile("what is in it are no arrays")
        return arrays
    except Exception as problem:  # a damaged archive raises almost anything
        reason = "its Python objects could run code" if "pickle" in str(problem) else problem
        raise error(f"{path}: no readable file of arrays, .npz ({reason})") from problem


def _check_end(content: bytes, found: int) -> None:
    """Compares the number of parts with that in the archive's last record: no checksum covers the list of them."""
    end = content[-22:]
    if not end.startswith(b"PK\x05\x06") or int.from_bytes(end[10:12], "little") != found:
        raise zipfile.BadZipFile("its list of parts has changed")
