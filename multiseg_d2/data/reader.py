"""Reads images and label maps, and checks that they belong together."""

from __future__ import annotations

from typing import Any

import numpy as np

from .decode import BadFileError, EncodedFile, SizeMismatchError, decode_color, open_file
from .label_reader import IllegalColorError, LabelReader, UnknownSegmentError, label_path

__all__ = [
    "BadFileError",
    "IllegalColorError",
    "LabelReader",
    "SizeMismatchError",
    "UnknownSegmentError",
    "check_sizes",
    "label_path",
    "read_image",
    "read_label",
    "read_local_label",
]


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


def read_label(dataset_dict: dict[str, Any]) -> np.ndarray:
    """Reads a label map as raw ids, as the spec of the dict's catalog entry says.

    Args:
        dataset_dict: with ``catalog`` and ``sem_seg_file_name`` (or ``pan_seg_file_name`` and ``segments_info``).

    Returns:
        (H, W) uint8 or uint16 raw ids.

    Raises:
        BadFileError: missing, broken or truncated file, or one that does not fit the encoding.
        UnknownSegmentError: PNG and JSON of a panoptic label do not belong together.
    """
    reader = LabelReader.from_catalog(dataset_dict["catalog"])
    return reader.to_raw(reader.read(dataset_dict), dataset_dict)


def read_local_label(dataset_dict: dict[str, Any]) -> np.ndarray:
    """Reads a label map as local ids of its own label space.

    Args:
        dataset_dict: as for :func:`read_label`.

    Returns:
        (H, W) uint8 local ids, ``IGNORE`` where nothing is scored.

    Raises:
        BadFileError: missing, broken or truncated file, or one that does not fit the encoding.
        IllegalLabelError: an id (or colour, or segment) that the label space does not know, with file, id and count.
    """
    reader = LabelReader.from_catalog(dataset_dict["catalog"])
    return reader.to_local(reader.read(dataset_dict), dataset_dict)
