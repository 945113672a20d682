"""Bytes of an image file -> pixels, fast where it matters, and never guessing what the pixels mean.

JPEG goes through simplejpeg (1024x2048: 5.2 ms; OpenCV 5.8, Pillow 8.6), PNG through pyspng where that is installed
(1280x720: 12.8 ms; OpenCV 16.8), everything else through OpenCV or Pillow. Of a PNG of which only the upper rows are
wanted, no more is decoded.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..user_error import ConfigError, UserError

try:
    import simplejpeg
except ImportError:  # optional: Pillow decodes the same files, more slowly
    simplejpeg = None
try:
    import pyspng
except ImportError:  # optional: OpenCV and Pillow decode the same files, more slowly
    pyspng = None

__all__ = [
    "BadFileError",
    "EncodedFile",
    "SizeMismatchError",
    "check_sizes",
    "decode_color",
    "decode_first_channel",
    "decode_index",
    "open_file",
    "refuse_damaged",
    "read_image",
]

_ORIENTATION_TAG = 274  # https://www.exiv2.org/tags.html, Exif.Image.Orientation
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_DEPTH, _TIFF_PHOTOMETRIC = 256, 257, 258, 262
#: Pillow's names of the compressions of TIFF that give back what was stored.
_LOSSLESS_TIFF = {
    *("raw", "tiff_ccitt", "group3", "group4", "tiff_lzw", "tiff_adobe_deflate", "tiff_raw_16", "packbits"),
    *("tiff_thunderscan", "tiff_deflate", "lzma", "zstd"),
}
_PNG_COLOR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey+alpha", 6: "RGBA"}
#: Pillow modes whose conversion to RGB loses nothing but transparency.
_COLOR_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa"}


class BadFileError(UserError, ValueError):
    """A file is missing, truncated, broken or of a kind that is refused. The message names the file."""


class SizeMismatchError(BadFileError):
    """Image and label (or image and dataset dict) differ in size. The message names the files and both sizes."""


@dataclass(frozen=True)
class EncodedFile:
    """A file that was read but not decoded.

    Attributes:
        path: as given, for messages.
        data: the file's bytes.
        kind: Pillow's name of the format, ``"JPEG"``, ``"PNG"``, ...
        mode: Pillow's mode of the pixels, ``"RGB"``, ``"L"``, ``"P"``, ``"I;16"``, ...
        depth: bits per channel as stored (PNG, TIFF, BMP; 8 for the others).
        height, width: size after the EXIF turn, the size that a viewer shows.
        orientation: EXIF orientation, 1 (as stored) to 8.
        damage: why its numbers cannot serve as ids, for example lossy compression; "" = they can.
        pixels: what it decodes to, where that was done before (see :mod:`.cache`); images (H, W, 3) in RGB order.
    """

    path: str
    data: bytes
    kind: str
    mode: str
    depth: int
    height: int
    width: int
    orientation: int
    damage: str = ""
    pixels: np.ndarray | None = None

    def describe(self) -> str:
        """For messages: what is stored, for example ``"an 8-bit palette PNG"`` or ``"a TIFF of mode F"``."""
        article = "an" if self.depth == 8 else "a"
        if self.kind == "PNG":
            return f"{article} {self.depth}-bit {_PNG_COLOR_TYPES.get(self.data[25], self.mode)} PNG"
        if self.kind == "BMP":
            return f"{article} {self.depth}-bit BMP"
        return f"a {self.kind} of mode {self.mode}"


def open_file(path: str) -> EncodedFile:
    """Reads a file and its header.

    Raises:
        BadFileError: the file cannot be read, or is not an image.
    """
    try:
        with PathManager.open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        raise BadFileError(f"{path}: cannot be read ({e.strerror or e}).") from e
    if not data:
        raise BadFileError(f"{path}: the file is empty.")
    try:
        with Image.open(io.BytesIO(data)) as header:
            orientation = _orientation(header, data)
            width, height = _stored_size(header)
            width, height = (width, height) if orientation < 5 else (height, width)
            depth, damage = _depth(header, data), _damage(header, data)
            return EncodedFile(path, data, header.format, header.mode, depth, height, width, orientation, damage)
    except UnidentifiedImageError as e:
        raise BadFileError(f"{path}: not a readable image ({len(data)} bytes; {_what_it_is(data)}).") from e
    except Image.DecompressionBombError as e:
        raise BadFileError(
            f"{path}: {e} Cut or shrink the picture, or raise the limit PIL.Image.MAX_IMAGE_PIXELS at the start "
            "of your own code."
        ) from e
    except Exception as e:  # Pillow raises many types on broken headers (OSError, SyntaxError, struct.error, ...)
        raise BadFileError(f"{path}: not a readable image ({len(data)} bytes; {e}).") from e


def _what_it_is(data: bytes) -> str:
    """For messages: what is known of bytes that are no image."""
    if data.startswith(b"\x93NUMPY"):
        return "a NumPy array: save label maps as 8- or 16-bit grey PNG, PIL.Image.fromarray(array).save(path)"
    if data.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: run git lfs pull"
    if data[:200].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page or XML, not a picture"
    return "of no known format"


def _stored_size(header: Image.Image) -> tuple[int, int]:
    """(width, height) before any turn: some versions of Pillow give that of a TIFF after its turn."""
    if header.format == "TIFF":
        return int(header.tag_v2[_TIFF_WIDTH]), int(header.tag_v2[_TIFF_HEIGHT])
    return header.size


def _depth(header: Image.Image, data: bytes) -> int:
    if header.format == "PNG":
        return data[24]
    if header.format == "TIFF":
        return int(header.tag_v2.get(_TIFF_DEPTH, (8,))[0])
    if header.format == "BMP" and len(data) > 30:
        return int.from_bytes(data[28:30], "little")
    return 8


def _damage(header: Image.Image, data: bytes) -> str:
    """Why pixels cannot be ids: what is stored, or what Pillow makes of it, is not the number that was written."""
    if header.format == "TIFF":
        compression = header.info.get("compression", "raw")
        if compression not in _LOSSLESS_TIFF:
            return f"its compression ({compression}) changes ids"
        inverted = header.tag_v2.get(_TIFF_PHOTOMETRIC) == 0
        return "it stores white as 0, so that its numbers are upside down" if inverted else ""
    if header.format == "BMP":
        indexed = header.mode not in ("1", "L", "P")
        return "" if indexed or (header.mode != "1" and _depth(header, data) == 8) else "its numbers are packed colours"
    if header.format == "WEBP" and b"VP8L" in data[:64]:
        return ""
    return "" if header.format in ("PNG", "GIF") else "its compression changes ids"


def _orientation(header: Image.Image, data: bytes) -> int:
    # Asking a PNG without EXIF for it makes Pillow decode the whole picture.
    if header.format == "PNG" and not ("exif" in header.info or b"eXIf" in data):
        return 1
    try:
        orientation = header.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF data is common and says nothing about the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1


@cache
def _pillow_turns_tiff() -> bool:
    """Whether this version of Pillow turns a TIFF on loading as its orientation says; it would be turned twice."""
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 1]], np.uint8)).save(buffer, "TIFF", tiffinfo={_ORIENTATION_TAG: 3})
    with Image.open(buffer) as image:
        return bool(np.asarray(image)[0, 0] == 1)


def _turned(pixels: np.ndarray, file: EncodedFile) -> np.ndarray:
    """Applies the EXIF orientation of a file, where Pillow has not done so."""
    if file.orientation == 1 or (file.kind == "TIFF" and _pillow_turns_tiff()):
        return pixels
    return turn(pixels, file.orientation)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation to (H, W, ...) pixels; a view where possible."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def read_image(path: str, format: str = "BGR") -> np.ndarray:
    """Reads an image as Detectron2's function of this name does: turned as EXIF says, always three channels.

    Grey and palette images become colour, transparency is dropped, of 16 bits the upper 8 are kept.

    Args:
        path: the file.
        format: ``"BGR"`` or ``"RGB"``, as ``INPUT.FORMAT``.

    Returns:
        (H, W, 3) uint8.

    Raises:
        BadFileError: missing, broken or truncated file, or pixels without a defined range of colours.
    """
    return np.ascontiguousarray(decode_color(open_file(path), format))


def check_sizes(image: EncodedFile, label: EncodedFile | None, dataset_dict: dict[str, Any]) -> None:
    """Compares the sizes of an image (after its EXIF turn), its label and its dataset dict.

    Raises:
        SizeMismatchError: they differ; both files and sizes are named.
    """
    size = f"{image.path} is {image.width}x{image.height}"
    if image.orientation != 1:
        size += f" (after the turn that its EXIF orientation {image.orientation} asks for)"
    if label is not None and (label.height, label.width) != (image.height, image.width):
        raise SizeMismatchError(
            f"{size}, but its label {label.path} is {label.width}x{label.height}. Both must show the same pixels."
        )
    stated = (dataset_dict.get("height", image.height), dataset_dict.get("width", image.width))
    if stated != (image.height, image.width):
        raise SizeMismatchError(f"{size}, but the annotation file says {stated[1]}x{stated[0]}.")


def decode_color(file: EncodedFile, order: str = "BGR", rows: int | None = None) -> np.ndarray:
    """Decodes colour pixels, turned as EXIF says. Grey is repeated, transparency dropped, 16 bits cut to the upper 8.

    Args:
        file: from :func:`open_file`.
        order: ``"BGR"`` or ``"RGB"``.
        rows: only the first ``rows`` rows are needed; fewer are decoded where that is cheaper.

    Returns:
        (H', W, 3) uint8 with H' = H, or ``rows`` <= H' <= H if ``rows`` is given.

    Raises:
        BadFileError: broken or truncated file, or pixels that have no defined meaning as colours (float, 32-bit).
    """
    if order not in ("BGR", "RGB"):
        raise ConfigError(f"INPUT.FORMAT is {order!r}: only 'BGR' and 'RGB' are known.")
    if file.pixels is not None:
        return file.pixels if order == "RGB" else file.pixels[..., ::-1]
    _check_sums(file)
    if file.kind == "JPEG" and file.mode != "CMYK" and simplejpeg is not None:
        try:
            return _turned(simplejpeg.decode_jpeg(file.data, order), file)
        except ValueError:
            pass  # strict about harmless oddities too: Pillow tells those from broken files
    pixels = _spng(file, "RGB", rows)
    if pixels is not None:
        return _turned(pixels if order == "RGB" else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), file)
    if file.kind == "PNG" and (rows is None or rows > 0.8 * file.height):  # beyond that OpenCV is the faster one
        return _turned(_opencv(file, order), file)
    return _turned(_pillow_color(file, order, rows), file)


def refuse_damaged(file: EncodedFile) -> None:
    """Refuses label maps whose pixels are not the numbers that were written.

    Raises:
        BadFileError: lossy compression, whatever the container, or a format that stores other numbers.
    """
    if file.damage:
        article = "an" if file.kind[0] in "AEIO" else "a"
        raise BadFileError(
            f"{file.path}: a label map cannot be {article} {file.kind} like this: {file.damage}. Export it as PNG."
        )


def decode_index(file: EncodedFile, rows: int | None = None) -> np.ndarray:
    """Decodes a label map whose pixels are ids: 8- or 16-bit grey, or the *indices* of a palette image.

    Args:
        file: from :func:`open_file`.
        rows: as in :func:`decode_color`.

    Returns:
        (H', W) uint8 or uint16 raw ids.

    Raises:
        BadFileError: broken file, lossy format, or several channels: which of them is the id is not guessed.
    """
    refuse_damaged(file)
    _check_sums(file)
    if file.mode == "1":
        pixels = _pillow(file, rows).astype(np.uint8)
    elif file.mode in ("L", "P"):
        pixels = _spng(file, "L", rows) if file.mode == "L" else None
        pixels = _pillow(file, rows) if pixels is None else pixels
        if file.mode == "L" and file.depth < 8:  # Pillow spreads 2- and 4-bit grey over 0..255
            pixels = pixels // (255 // (2**file.depth - 1))
    elif _is_16_bit_grey(file):
        pixels = _pillow(file, rows).astype(np.uint16, copy=False)
    elif file.mode.startswith(("F", "I")):
        raise BadFileError(
            f"{file.path}: this is {file.describe()}, numbers of 32 bits, but ids have 8 or 16: save the label map "
            "as an 8- or 16-bit grey PNG."
        )
    else:
        raise BadFileError(
            f"{file.path}: the spec says 'encoding: index' (one id per pixel), but this is {file.describe()}. If "
            "its colours stand for classes, say 'encoding: color' in the spec and list them; if all channels hold the "
            "same id, save one of them as an 8-bit grey PNG."
        )
    return _turned(pixels, file)


def decode_first_channel(file: EncodedFile) -> np.ndarray:
    """Decodes a label map of which the first (red) of three 16-bit channels is the id, as SYNTHIA's.

    Args:
        file: from :func:`open_file`.

    Returns:
        (H, W) uint16 raw ids.

    Raises:
        BadFileError: broken file or another format. 8-bit copies are refused: whoever cut 16 bits down to the upper
            eight has lost the ids.
    """
    if file.kind != "PNG" or file.depth != 16 or file.data[25] not in (2, 6):
        raise BadFileError(
            f"{file.path}: the spec says 'encoding: first_channel' (16-bit RGB PNG, the id in the red channel), but "
            f"this is {file.describe()}. Take the file as downloaded: a copy saved with 8 bits has lost its ids."
        )
    _check_sums(file)
    pixels = cv2.imdecode(np.frombuffer(file.data, np.uint8), cv2.IMREAD_UNCHANGED)  # Pillow would cut to 8 bits
    if pixels is None or pixels.shape[:2] != Image.open(io.BytesIO(file.data)).size[::-1]:
        raise BadFileError(f"{file.path}: broken or truncated {file.kind} file.")
    return turn(np.ascontiguousarray(pixels[..., 2]), file.orientation)  # BGR


def _is_16_bit_grey(file: EncodedFile) -> bool:
    return file.mode.startswith("I;16") or (file.mode == "I" and file.kind == "PNG")  # "I": Pillow before 11


def _spng(file: EncodedFile, mode: str, rows: int | None) -> np.ndarray | None:
    """Pixels of a PNG of 8 bits as ``"RGB"`` or ``"L"``; None where others must do it, or say what is wrong."""
    if pyspng is None or file.kind != "PNG" or file.depth != 8:
        return None
    try:
        return pyspng.load(_upper_part(file, rows), mode)
    except Exception:  # RuntimeError for what is broken
        return None


def _check_sums(file: EncodedFile) -> None:
    """Compares the checksums of a PNG's parts: no decoder does so for all, and changed bytes may give other pixels.

    Raises:
        BadFileError: one does not hold, or the end is missing.
    """
    if file.kind != "PNG":
        return
    view, start = memoryview(file.data), 8
    while start + 12 <= len(view):
        end = start + 8 + int.from_bytes(view[start : start + 4], "big")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise BadFileError(f"{file.path}: broken or truncated PNG file (the bytes from {start} on have changed).")
        if view[start + 4 : start + 8] == b"IEND":
            return
        start = end + 4
    raise BadFileError(f"{file.path}: broken or truncated PNG file (its end is missing).")


def _opencv(file: EncodedFile, order: str) -> np.ndarray:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    pixels = cv2.imdecode(np.frombuffer(file.data, np.uint8), flags)
    if pixels is None:
        return _pillow_color(file, order)  # Pillow says what is wrong
    return pixels if order == "BGR" else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _pillow_color(file: EncodedFile, order: str, rows: int | None = None) -> np.ndarray:
    if _is_16_bit_grey(file):
        pixels = np.repeat((_pillow(file, rows) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    elif file.mode in _COLOR_MODES:
        pixels = _pillow(file, rows, "RGB")
    else:
        raise BadFileError(
            f"{file.path}: {file.describe()} has no defined range of colours. Save the image with 8 bits per channel."
        )
    return pixels if order == "RGB" else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)


def _pillow(file: EncodedFile, rows: int | None = None, mode: str | None = None) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(_upper_part(file, rows))) as image:
            return np.asarray(image if mode in (None, image.mode) else image.convert(mode))
    except Exception as e:  # OSError for truncated files, SyntaxError, zlib.error, ... for broken ones
        raise BadFileError(f"{file.path}: broken or truncated {file.kind} file ({e}).") from e


def _upper_part(file: EncodedFile, rows: int | None) -> bytes:
    """The file, or, of a PNG that is not turned, one with only its first ``rows`` rows."""
    if file.kind == "PNG" and rows is not None and rows < file.height and file.orientation == 1:
        return _cut_png(file.data, rows)
    return file.data


def _cut_png(data: bytes, rows: int) -> bytes:
    """The same PNG with the height of its header set to ``rows``: a decoder stops there. Not for interlaced files."""
    if data[28]:  # interlace method
        return data
    header = data[12:20] + struct.pack(">I", rows) + data[24:29]  # "IHDR", width | height | depth ... interlace
    return b"".join((data[:12], header, struct.pack(">I", zlib.crc32(header)), memoryview(data)[33:]))
