"""Label files -> raw ids -> local ids, for each way in which a dataset stores ids, in its own classes or in others'.

A file that does not look as the spec's ``encoding`` says is refused by name, never guessed. Crops translate only the
pixels that they keep, so reading is split: :meth:`LabelReader.decode` gives pixels as stored,
:meth:`LabelReader.to_local` translates any part of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from detectron2.data import MetadataCatalog

from ..label_space import IGNORE, IllegalLabelError, LabelSpace, remap, to_local
from ..user_error import ConfigError
from ..yaml_file import did_you_mean
from .cache import open_through_cache
from .decode import BadFileError, EncodedFile, decode_color, decode_first_channel, decode_index, refuse_damaged
from .spec import ENCODINGS, DatasetSpec
from .views import register_views

__all__ = [
    "ExactLookup",
    "IllegalColorError",
    "LabelReader",
    "LabelTarget",
    "UnknownSegmentError",
    "decode_label",
    "label_path",
    "label_targets",
    "read_label",
    "read_local_label",
]

logger = logging.getLogger(__name__)

_MULTIPLIERS = np.random.RandomState(0).randint(1 << 16, 1 << 31, 64).astype(np.uint32) | np.uint32(1)


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
        encoding: one of :data:`multiseg_d2.data.spec.ENCODINGS`.
        raw_to_local: (65536,) uint8 table of the label space.
        color_table: for encoding ``color``, what ``DatasetSpec.color_table()`` returns: (K,) uint32
            ``R << 16 | G << 8 | B`` and (K,) uint16 raw ids; other colours have the raw id K.
    """

    def __init__(
        self, encoding: str, raw_to_local: np.ndarray, color_table: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding {encoding!r} is none of {', '.join(ENCODINGS)}")
        if (encoding == "color") != (color_table is not None):
            raise ValueError("encoding 'color' needs a colour table, the others have none")
        self.encoding = encoding
        self.raw_to_local = raw_to_local
        if color_table is not None:
            self._raw_of_color, self._unlisted = ExactLookup(*color_table), np.uint16(len(color_table[0]))

    @classmethod
    def from_entry(cls, entry: str, raw_to_local: np.ndarray | None = None) -> LabelReader:
        """The reader of a registered entry, for example ``"camvid_train"``.

        Args:
            entry: name in Detectron2's ``MetadataCatalog``.
            raw_to_local: another table than the dataset's own, for remapped labels.
        """
        return cls.from_spec(MetadataCatalog.get(entry).spec, raw_to_local)

    @classmethod
    def from_spec(cls, spec: DatasetSpec, raw_to_local: np.ndarray | None = None) -> LabelReader:
        """The reader of a dataset that need not be registered.

        Args:
            spec: of the dataset.
            raw_to_local: as for :meth:`from_entry`.
        """
        table = spec.raw_to_local if raw_to_local is None else raw_to_local
        return cls(spec.encoding, table, spec.color_table() if spec.encoding == "color" else None)

    def decode(self, file: EncodedFile, rows: int | None = None) -> np.ndarray:
        """Pixels as stored; see :func:`decode_label`."""
        return decode_label(file, self.encoding, rows) if file.pixels is None else file.pixels

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
        if self.encoding in ("index", "first_channel"):
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
        return self.decode(open_through_cache(path, self.encoding))


def decode_label(file: EncodedFile, encoding: str, rows: int | None = None) -> np.ndarray:
    """Pixels of a label map as stored.

    Args:
        file: the label file, opened.
        encoding: one of :data:`multiseg_d2.data.spec.ENCODINGS`.
        rows: only the first ``rows`` rows are needed.

    Returns:
        (H', W) uint8 or uint16 raw ids for ``index`` and ``first_channel``; (H', W, 3) uint8 for the others,
        ``color`` in BGR and ``panoptic`` in RGB order, so that a pixel's bytes read as one little-endian number are
        its key; H' >= rows.

    Raises:
        BadFileError: broken file, or one that does not fit the encoding.
    """
    if encoding == "index":
        return decode_index(file, rows)
    if encoding == "first_channel":
        return decode_first_channel(file)
    refuse_damaged(file)
    if file.depth == 16 or file.mode not in ("RGB", "RGBA", "P"):
        raise BadFileError(
            f"{file.path}: the spec says 'encoding: {encoding}' (8-bit RGB PNG), but this is "
            f"{file.describe()}. If its pixels are ids, say 'encoding: index' in the spec; if it was made from a "
            "picture in colours, save that again without turning it grey."
        )
    return decode_color(file, "BGR" if encoding == "color" else "RGB", rows)


def _category_lookup(dataset_dict: dict[str, Any]) -> ExactLookup:
    """Segment id -> raw category id of one panoptic label."""
    try:
        segments = {s["id"]: s["category_id"] for s in dataset_dict["segments_info"]}
        if len(segments) < len(dataset_dict["segments_info"]):
            raise ValueError("a segment id stands twice")
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


def read_label(dataset_dict: dict[str, Any]) -> np.ndarray:
    """Reads a label map as raw ids, as the spec of the dict's catalog entry says.

    Args:
        dataset_dict: with ``entry`` and ``sem_seg_file_name`` (or ``pan_seg_file_name`` and ``segments_info``).

    Returns:
        (H, W) uint8 or uint16 raw ids.

    Raises:
        BadFileError: missing, broken or truncated file, or one that does not fit the encoding.
        UnknownSegmentError: PNG and JSON of a panoptic label do not belong together.
    """
    reader = LabelReader.from_entry(dataset_dict["entry"])
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
    reader = LabelReader.from_entry(dataset_dict["entry"])
    return reader.to_local(reader.read(dataset_dict), dataset_dict)


# ---- In whose classes the labels of an entry come out ----


@dataclass(frozen=True)
class LabelTarget:
    """How the labels of one catalog entry are read and in whose classes they come out.

    Attributes:
        dataset: whose label space the samples are in.
        reader: translates stored pixels into that space.
        translation: (C,) uint8, local id of the entry's own space -> local id of ``dataset``'s or ``IGNORE``, for boxes
            and tags; None where they are the same.
        own_classes: C, 0 = not known.
        num_classes: of ``dataset``'s space, 0 = not known.
    """

    dataset: str
    reader: LabelReader
    translation: np.ndarray | None = None
    own_classes: int = 0
    num_classes: int = 0


def label_targets(entries: Sequence[str], remap_to: str = "") -> dict[str, LabelTarget]:
    """The label targets of catalog entries.

    Args:
        entries: names in ``MetadataCatalog``.
        remap_to: dataset whose classes all labels are translated into, "" = each entry keeps its own.

    Raises:
        ValueError: ``remap_to`` is not registered.
    """
    register_views(entries)
    target = _space_of(remap_to) if remap_to else None
    targets = {}
    for entry in entries:
        metadata = MetadataCatalog.get(entry)
        if target is None or metadata.dataset == remap_to:
            count = metadata.label_space.num_classes
            targets[entry] = LabelTarget(metadata.dataset, LabelReader.from_entry(entry), None, count, count)
            continue
        translation = remap(metadata.label_space, target)  # (C,)
        dropped = ", ".join(c for c, t in zip(metadata.label_space.classes, translation) if t == IGNORE)
        logger.info("%s in the classes of %s; without a counterpart: %s", entry, remap_to, dropped or "none")
        composed = _compose(metadata.label_space.raw_to_local, translation)
        reader = LabelReader.from_entry(entry, composed)
        targets[entry] = LabelTarget(remap_to, reader, translation, len(translation), target.num_classes)
    return targets


def _compose(raw_to_local: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """One table for both look-ups, so that no label map is ever translated twice."""
    of_local = np.arange(256, dtype=np.uint8)  # IGNORE and ILLEGAL stay what they are
    of_local[: len(translation)] = translation
    return of_local[raw_to_local]


def _space_of(dataset: str) -> LabelSpace:
    known = (MetadataCatalog.get(entry) for entry in MetadataCatalog.list())
    spaces = {metadata.dataset: metadata.label_space for metadata in known if metadata.get("label_space") is not None}
    if dataset not in spaces:
        raise ConfigError(f"DATASETS.REMAP_TO: no dataset {dataset!r} is registered{did_you_mean(dataset, spaces)}.")
    return spaces[dataset]


# ---- 24-bit keys (colours, segment ids) ----


class ExactLookup:
    """Maps K known keys to values and tells unknown keys apart, at about 3 ns per pixel.

    A table of all 2^24 colours would be 32 MB per dataset or, for segment ids, per image; a binary search takes ten
    times as long. Here a multiplier is searched that sends every known key to a slot of its own (a perfect hash).

    Args:
        keys: (K,) distinct, below 2^24.
        values: (K,) values below 2^16.

    Raises:
        ValueError: keys repeat, or a key or a value is out of range.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        keys, values = np.asarray(keys), np.asarray(values)
        for name, numbers, limit in (("key", keys, 1 << 24), ("value", values, 1 << 16)):
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < limit:
                raise ValueError(f"{name}s must lie in [0, {limit - 1}], not in [{numbers.min()}, {numbers.max()}]")
        keys = keys.astype(np.uint32)
        self._multiplier, self._shift = _perfect_hash(keys)
        slots = self._slots(keys)
        self._values = np.zeros(1 << int(32 - self._shift), np.uint16)
        self._values[slots] = values
        # Empty slots hold a key beyond 24 bits, which no pixel has.
        self._keys = np.full(self._values.shape, 0xFFFFFFFF, np.uint32)
        self._keys[slots] = keys

    def __call__(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks up any number of keys.

        Args:
            keys: (...) uint32.

        Returns:
            (...) uint16 values, arbitrary where the key is unknown; (...) bool, True where it is known.
        """
        slots = self._slots(keys)
        return np.take(self._values, slots), np.take(self._keys, slots) == keys

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        slots = keys * self._multiplier  # modulo 2^32
        slots >>= self._shift
        return slots


def _perfect_hash(keys: np.ndarray) -> tuple[np.uint32, np.uint32]:
    if len(np.unique(keys)) != len(keys):
        raise ValueError("keys are not distinct")
    for bits in range(max(4, len(keys).bit_length() + 1), 25):
        shift = np.uint32(32 - bits)
        for multiplier in _MULTIPLIERS:
            if len(np.unique((keys * multiplier) >> shift)) == len(keys):
                return multiplier, shift
    raise RuntimeError(f"no multiplier separates these {len(keys)} keys")  # not met in 10^5 random sets
