"""Decoded pixels on disk: training maps the crop that it needs into memory instead of decoding whole files.

``datasets/cache.py`` fills the folder. Where the environment variable ``MULTISEG_CACHE`` names it, images and label
maps that it holds are read from it and all others from their own files; samples are the same to the bit. A crop of
512x1024 of a 1024x2048 image takes 0.6 ms (PNG 21, JPEG 5.8), and the image 6 MB of disk. QOI tiles would take a sixth
of that, but 4 to 7 ms, which is no gain beside JPEG.

Each file has one of its own: a page of JSON (what was decoded, and of which file), then the pixels, row by row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_file import write_atomically
from ..json_file import parse_json
from .decode import BadFileError, EncodedFile, open_file

__all__ = ["CACHE_VARIABLE", "IMAGE", "PixelCache", "open_through_cache"]

CACHE_VARIABLE = "MULTISEG_CACHE"
#: The role of images, which are kept in RGB order; that of a label map is its encoding.
IMAGE = "image"
_PAGE = 4096
_FORMAT = 2
_HEADER_FIELDS = [field.name for field in fields(EncodedFile) if field.name not in ("path", "data", "pixels")]


@dataclass(frozen=True)
class PixelCache:
    """A folder of decoded files.

    Attributes:
        folder: where they lie; need not exist.
    """

    folder: Path

    def place(self, path: str, role: str) -> Path:
        """Where the pixels of a file are kept.

        Args:
            path: of the image or label map.
            role: :data:`IMAGE`, or the encoding of a label map.
        """
        name = hashlib.sha256(f"{os.path.abspath(path)}\n{role}".encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.pixels"

    def open(self, path: str, role: str) -> EncodedFile | None:
        """A file as :func:`multiseg_d2.data.decode.open_file` opens it, its pixels mapped into memory; None: not kept.

        Raises:
            BadFileError: the file is not the one that was decoded (its size or time differs), or was lost.
        """
        place = self.place(path, role)
        record = _record(place)
        if record is None:
            return None
        different = _difference(record, path)
        if different:
            raise BadFileError(
                f"{path}: its decoded pixels in {self.folder} are out of date: {different}. Run datasets/cache.py for "
                f"this dataset again, or remove them (datasets/cache.py --remove), or unset {CACHE_VARIABLE}."
            )
        try:
            if os.path.getsize(place) != _PAGE + np.dtype(record["dtype"]).itemsize * math.prod(record["shape"]):
                raise ValueError("it was cut, or has grown")
            pixels = np.memmap(place, record["dtype"], "r", _PAGE, tuple(record["shape"]))
        except (OSError, ValueError) as problem:
            raise BadFileError(f"{place}: the pixels of {path} cannot be read ({problem}). Remove it.") from problem
        return EncodedFile(path, b"", pixels=np.asarray(pixels), **record["header"])

    def store(self, path: str, role: str, decode: Callable[[EncodedFile], np.ndarray], verify: bool = False) -> int:
        """Decodes a file and keeps its pixels, unless that was done before.

        Args:
            path: of the image or label map.
            role: :data:`IMAGE`, or the encoding of a label map.
            decode: gives (H, W) or (H, W, 3) pixels.
            verify: the contents of a file that was decoded before, and its pixels here, are compared with their
                checksums, too, not only size and time.

        Returns:
            Bytes written, 0 where nothing had to be done.

        Raises:
            BadFileError: the file cannot be decoded.
            OSError: the disk is full or cannot be written to.
        """
        place = self.place(path, role)
        record = _record(place)
        if record and not _difference(record, path) and not (verify and _has_changed(record, place, path)):
            return 0
        stat = os.stat(path)  # before it is read: what is written meanwhile shows as a difference
        file = open_file(path)
        pixels = np.ascontiguousarray(decode(file))
        record = {"format": _FORMAT, "path": os.path.abspath(path), "role": role, "size": stat.st_size}
        record |= {"mtime_ns": stat.st_mtime_ns, "sha256": hashlib.sha256(file.data).hexdigest()}
        record |= {"shape": pixels.shape, "dtype": pixels.dtype.str, "pixels": zlib.crc32(pixels.data)}
        record["header"] = {name: getattr(file, name) for name in _HEADER_FIELDS}
        page = json.dumps({**record, "crc32": _crc32(record)}).encode().ljust(_PAGE)
        if len(page) > _PAGE:
            raise BadFileError(f"{path}: this path is too long for the cache.")
        write_atomically(place, page + pixels.tobytes(), needed=_PAGE + pixels.nbytes)
        return _PAGE + pixels.nbytes

    def remove(self, files: Iterable[tuple[str, str]] | None = None) -> int:
        """Deletes the pixels of (path, role) files, or of all, and what interrupted runs left; returns how many."""
        if files is None:
            places = [*self.folder.glob("[0-9a-f][0-9a-f]/*.pixels"), *self.folder.glob("??/.*.pixels.*.tmp")]
        else:
            places = [place for place in (self.place(*file) for file in files) if place.exists()]
        for place in places:
            place.unlink()
        for folder in {place.parent for place in places} | {self.folder}:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return len(places)


def open_through_cache(path: str, role: str) -> EncodedFile:
    """Opens a file, with its decoded pixels where ``MULTISEG_CACHE`` names a folder that holds them.

    Args:
        path: of the image or label map.
        role: :data:`IMAGE`, or the encoding of a label map.

    Raises:
        BadFileError: it cannot be read, or is not the file that was decoded.
    """
    folder = os.environ.get(CACHE_VARIABLE)
    kept = PixelCache(Path(folder).expanduser()).open(path, role) if folder else None
    return open_file(path) if kept is None else kept


def _record(place: Path) -> dict[str, Any] | None:
    """What the first page of a file of the cache says."""
    try:
        with open(place, "rb") as file:
            record = parse_json(file.read(_PAGE), str(place))
        if record["format"] == _FORMAT and record.pop("crc32") != _crc32(record):
            raise ValueError("its first page has changed")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise BadFileError(f"{place}: no file of decoded pixels ({problem}). Remove it.") from problem


def _has_changed(record: dict[str, Any], place: Path, path: str) -> bool:
    """Whether a file is not the one that was decoded, or its pixels are not those that were written."""
    return _sha256(path) != record["sha256"] or zlib.crc32(place.read_bytes()[_PAGE:]) != record["pixels"]


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _difference(record: dict[str, Any], path: str) -> str:
    """How a file differs from the one that was decoded; "" if not at all, as far as its size and time tell."""
    if record.get("format") != _FORMAT:
        return "they were written by another version"
    try:
        stat = os.stat(path)
    except OSError as problem:
        return f"the file cannot be read ({problem.strerror})"
    if stat.st_size != record["size"]:
        return f"the file has {stat.st_size} bytes, {record['size']} were decoded"
    return "the file was written since" if stat.st_mtime_ns != record["mtime_ns"] else ""


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
