"""Label files -> raw ids -> local ids, for each way in which a dataset stores ids.

A file that does not look as the spec's ``encoding`` says is refused by name, never guessed. Crops translate only the
pixels that they keep, so reading is split: :meth:`LabelReader.decode` gives pixels as stored,
:meth:`LabelReader.to_local` translates any part of them.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from detectron2.data import MetadataCatalog

from ..label_space import IllegalLabelError, to_local
from .decode import BadFileError, EncodedFile, decode_color, decode_index, open_file
from .exact_lookup import ExactLookup
from .spec_model import DatasetSpec

__all__ = ["IllegalColorError", "LabelReader", "UnknownSegmentError", "label_path"]


class IllegalColorError(IllegalLabelError):
    """A label map holds colours that its spec does not list; ``counts``: (R, G, B) -> number of pixels."""

    def __init__(self, counts: dict[tuple[int, int, int], int], where: str) -> None:
        IllegalLabelError.__init__(self, counts, where)
        self.args = (
            f"{where}: colours (R, G, B) that the spec does not list: {_listing(counts)}. List them under `raw_colors` "
            "of a class or under `ignore`, or mend the file (interpolation and JPEG compression make new colours).",
        )


class UnknownSegmentError(IllegalLabelError):
    """A panoptic PNG holds segment ids that its JSON does not; ``counts``: segment id -> number of pixels."""

    def __init__(self, counts: dict[int, int], where: str) -> None:
        IllegalLabelError.__init__(self, counts, where)
        self.args = (
            f"{where}: segment ids that `segments_info` of the annotation file does not list: {_listing(counts)}. "
            "PNG and JSON do not belong together; get both from the same release.",
        )


def _listing(counts: dict) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])[:10]
    more = f" and {len(counts) - 10} more" if len(counts) > 10 else ""
    return ", ".join(f"{key}: {n} pixels" for key, n in most) + more


def label_path(dataset_dict: dict[str, Any]) -> str | None:
    """The label file of a dataset dict, None where there is no label."""
    return dataset_dict.get("sem_seg_file_name") or dataset_dict.get("pan_seg_file_name")


class LabelReader:
    """Reads the label maps of one catalog entry.

    Args:
        encoding: ``"index"``, ``"color"`` or ``"panoptic"``.
        raw_to_local: (65536,) uint8 table of the label space.
        color_table: for encoding ``color``, what ``DatasetSpec.color_table()`` returns: (K,) uint32
            ``R << 16 | G << 8 | B`` and (K,) uint16 raw ids; other colours have the raw id K.
    """

    def __init__(
        self, encoding: str, raw_to_local: np.ndarray, color_table: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        if encoding not in ("index", "color", "panoptic"):
            raise ValueError(f"encoding {encoding!r} is none of index, color, panoptic")
        if (encoding == "color") != (color_table is not None):
            raise ValueError("encoding 'color' needs a colour table, the others have none")
        self.encoding = encoding
        self.raw_to_local = raw_to_local
        if color_table is not None:
            self._raw_of_color, self._unlisted = ExactLookup(*color_table), np.uint16(len(color_table[0]))

    @classmethod
    def from_catalog(cls, catalog: str, raw_to_local: np.ndarray | None = None) -> LabelReader:
        """The reader of a registered entry, for example ``"camvid_train"``.

        Args:
            catalog: name in Detectron2's ``MetadataCatalog``.
            raw_to_local: another table than the dataset's own, for remapped labels.
        """
        return cls.from_spec(MetadataCatalog.get(catalog).spec, raw_to_local)

    @classmethod
    def from_spec(cls, spec: DatasetSpec, raw_to_local: np.ndarray | None = None) -> LabelReader:
        """The reader of a dataset that need not be registered.

        Args:
            spec: of the dataset.
            raw_to_local: as for :meth:`from_catalog`.
        """
        table = spec.raw_to_local if raw_to_local is None else raw_to_local
        return cls(spec.encoding, table, spec.color_table() if spec.encoding == "color" else None)

    def decode(self, file: EncodedFile, rows: int | None = None) -> np.ndarray:
        """Pixels as stored.

        Args:
            file: the label file, opened.
            rows: only the first ``rows`` rows are needed.

        Returns:
            (H', W) uint8 or uint16 raw ids for ``index``; (H', W, 3) uint8 for the others, ``color`` in BGR and
            ``panoptic`` in RGB order, so that a pixel's bytes read as one little-endian number are its key; H' >= rows.

        Raises:
            BadFileError: broken file, or one that does not fit the encoding.
        """
        if self.encoding == "index":
            return decode_index(file, rows)
        if file.kind == "JPEG" or file.depth == 16 or file.mode not in ("RGB", "RGBA", "P"):
            raise BadFileError(
                f"{file.path}: the spec says 'encoding: {self.encoding}' (8-bit RGB PNG), but this is a "
                f"{file.describe()}. If its pixels are ids, say 'encoding: index' in the spec."
            )
        return decode_color(file, "BGR" if self.encoding == "color" else "RGB", rows)

    def to_raw(self, stored: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """Raw ids of stored pixels.

        Args:
            stored: all or part of what :meth:`decode` gave, resized by nearest neighbour at most.
            dataset_dict: the entry, for messages and ``segments_info``.

        Returns:
            (h, w) uint8 or uint16.

        Raises:
            UnknownSegmentError: a segment id that ``segments_info`` does not list.
            BadFileError: ``segments_info`` is not in COCO's form.
        """
        if self.encoding == "index":
            return stored
        keys = _keys(stored)  # (h, w)
        if self.encoding == "color":
            raw, known = self._raw_of_color(keys)
            return np.where(known, raw, self._unlisted)
        raw, known = _category_lookup(dataset_dict)(keys)
        if not known.all():
            raise UnknownSegmentError(_counts(keys[~known]), str(label_path(dataset_dict)))
        return raw

    def to_local(self, stored: np.ndarray, dataset_dict: dict[str, Any]) -> np.ndarray:
        """Local ids of stored pixels: raw ids as :meth:`to_raw`, then one table look-up.

        Returns:
            (h, w) uint8.

        Raises:
            IllegalLabelError: ids, colours or segments that nobody lists, with file, ids and pixel counts.
        """
        raw = self.to_raw(stored, dataset_dict)
        try:
            return to_local(raw, self.raw_to_local)
        except IllegalLabelError as e:
            where = str(label_path(dataset_dict))
            if self.encoding != "color":
                raise e.at(where) from None
            keys = _keys(stored)
            counts = _counts(keys[~self._raw_of_color(keys)[1]])
            colors = {(key >> 16, key >> 8 & 255, key & 255): n for key, n in counts.items()}
            raise IllegalColorError(colors, where) from None

    def read(self, dataset_dict: dict[str, Any]) -> np.ndarray:
        """Pixels of the whole label map as stored; see :meth:`decode`."""
        path = label_path(dataset_dict)
        if path is None:
            raise BadFileError(f"{dataset_dict.get('file_name', 'dataset dict')}: this image has no label map.")
        return self.decode(open_file(path))


def _category_lookup(dataset_dict: dict[str, Any]) -> ExactLookup:
    """Segment id -> raw category id of one panoptic label."""
    try:
        segments = {s["id"]: s["category_id"] for s in dataset_dict["segments_info"]}
        segments.setdefault(0, 0)  # id 0 is void, and raw id 0 stands for it
        return ExactLookup(np.array(list(segments)), np.array(list(segments.values())))
    except (KeyError, TypeError, ValueError) as problem:
        raise BadFileError(
            f"{label_path(dataset_dict)}: its `segments_info` in the annotation file is not in COCO's form "
            f"({type(problem).__name__}: {problem})."
        ) from None


def _keys(stored: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 -> (h, w) uint32: the three bytes as one little-endian number."""
    alpha_255 = cv2.cvtColor(np.ascontiguousarray(stored), cv2.COLOR_RGB2RGBA)  # (h, w, 4)
    return alpha_255.view("<u4")[:, :, 0] & np.uint32(0xFFFFFF)


def _counts(keys: np.ndarray) -> dict[int, int]:
    values, counts = np.unique(keys, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist()))
