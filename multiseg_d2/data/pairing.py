"""Image and label files of a split, paired by ``{id}``, never by sorted position."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..text_file import read_text
from ..user_error import UserError
from .spec import SplitSpec

__all__ = [
    "DATA_ROOT_VARIABLE",
    "DatasetFilesError",
    "Pairing",
    "any_file",
    "composed",
    "fixed_folders",
    "only_what_is_there",
    "pair_files",
    "place",
    "some",
]

DATA_ROOT_VARIABLE = "DETECTRON2_DATASETS"
#: Endings of pictures, for what lies beside the images of a split.
_PICTURES = frozenset(
    [".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".jp2", ".avif"]
)

_SHOWN = 10  # names in an error message; the rest is counted


class DatasetFilesError(UserError, RuntimeError):
    """Files of a dataset are missing, or do not belong together."""


@dataclass(frozen=True)
class Pairing:
    """What was found for a split.

    Attributes:
        images: id -> image file, in the order of the split (by id, or as ``ids`` lists them).
        labels: id -> label file; empty for splits without label files.
        without_label: ids of images that have no label file, sorted; empty for splits without label files.
        without_image: ids of label files that have no image, sorted.
        unmatched: pictures in the folders of the images that no pattern of the spec takes, sorted.
    """

    images: dict[str, str]
    labels: dict[str, str]
    without_label: tuple[str, ...]
    without_image: tuple[str, ...]
    unmatched: tuple[str, ...] = ()


def pair_files(split: SplitSpec, root: str) -> Pairing:
    """Finds the image and label files of a split, strays included.

    Raises:
        DatasetFilesError: a folder or a listed file is missing, no image is there, or one id has two files.
    """
    if split.ids is None:
        images, labels = _search(split, split.images, root), _search(split, split.labels, root)
    else:
        ids = _listed_ids(split, root)
        images = _look_up(split, split.images, root, ids)
        labels = _look_up(split, split.labels, root, ids)
        for kind, patterns, files in (("images", split.images, images), ("labels", split.labels, labels)):
            if patterns and len(files) < len(ids):
                missing = [i for i in ids if i not in files]
                listed = f", listed in {split.ids}" if isinstance(split.ids, str) else ""
                raise DatasetFilesError(f"{split.entry}: no {kind} for {some(missing)}{listed}{place(patterns, root)}")
    if not images:
        raise DatasetFilesError(
            f"{split.entry}: no image found{place(split.images, root)}{_example(split.images, root)}"
        )
    unmatched = _unmatched(split, root) if split.ids is None else ()
    if not split.labels:
        return Pairing(images, {}, (), (), unmatched)
    without_label = tuple(sorted(images.keys() - labels.keys()))
    return Pairing(images, labels, without_label, tuple(sorted(labels.keys() - images.keys())), unmatched)


def _unmatched(split: SplitSpec, root: str) -> tuple[str, ...]:
    """Pictures beside the images of a split that no split of its spec knows, neither as image nor as label."""
    patterns = [p for other in split.spec.splits.values() for p in (*other.images, *other.labels)]
    known = [_compile(pattern, root)[1] for pattern in (*split.images, *split.labels, *patterns)]
    pictures = (path for folder in dict.fromkeys(fixed_folders(split.images, root)) for path in _walk(folder))
    pictures = (path for path in pictures if os.path.splitext(path)[1].lower() in _PICTURES)
    return tuple(sorted(p for p in pictures if not any(expression.fullmatch(p) for expression in known)))


def only_what_is_there(split: SplitSpec, root: str) -> SplitSpec:
    """The split with the ids of its list that have an image; as it is where it has no list.

    Raises:
        DatasetFilesError: the list cannot be read, one id has two files, or none has an image.
    """
    if split.ids is None:
        return split
    images = _look_up(split, split.images, root, _listed_ids(split, root))
    if not images:
        raise DatasetFilesError(f"{split.entry}: none of the listed images is there{place(split.images, root)}")
    return replace(split, ids=tuple(images))


def _search(split: SplitSpec, patterns: tuple[str, ...], root: str) -> dict[str, str]:
    """All files that match, by id, sorted by id."""
    files: dict[str, str] = {}
    for pattern in patterns:
        folder, expression = _compile(pattern, root)
        if not os.path.isdir(folder):
            raise DatasetFilesError(f"{split.entry}: the folder {folder} does not exist{place((pattern,), root)}")
        for path in _walk(folder):
            match = expression.fullmatch(path)
            if match:
                _add(split, files, composed(match["id"]), path)
    return dict(sorted(files.items()))


def _look_up(split: SplitSpec, patterns: tuple[str, ...], root: str, ids: list[str]) -> dict[str, str]:
    """The files of the given ids, in their order, without reading whole folders."""
    files: dict[str, str] = {}
    for image_id in ids:
        for pattern in patterns:
            path = os.path.join(root, pattern)
            found = next(filter(os.path.isfile, _spellings(path, image_id)), None)
            if found:
                _add(split, files, image_id, found)
    return files


def _spellings(pattern: str, image_id: str) -> Iterator[str]:
    """Paths that a pattern may mean: as it stands, extension in capitals, accents as marks of their own."""
    stem, extension = os.path.splitext(pattern)
    for text in dict.fromkeys((image_id, unicodedata.normalize("NFD", image_id))):
        for ending in dict.fromkeys((extension, extension.upper(), extension.lower())):
            yield f"{stem}{ending}".replace("{id}", text)


def composed(image_id: str) -> str:
    """An id in the one Unicode form in which ids are compared: file systems and programs differ in how they write é."""
    return unicodedata.normalize("NFC", image_id)


def _add(split: SplitSpec, files: dict[str, str], image_id: str, path: str) -> None:
    if image_id in files:
        both = f"{files[image_id]} and {path}"
        if composed(files[image_id]) == composed(path):
            both += ", which differ only in how their accents are encoded"
        raise DatasetFilesError(f"{split.entry}: two files have the id {image_id!r}: {both}")
    files[image_id] = path


def _listed_ids(split: SplitSpec, root: str) -> list[str]:
    if isinstance(split.ids, tuple):
        ids, source = list(split.ids), f"the spec {split.spec.path}"
    else:
        source = os.path.join(root, split.ids)
        try:
            ids = [line.strip() for line in read_text(source).split("\n") if line.strip()]
        except ValueError as problem:
            raise DatasetFilesError(
                f"{split.entry}: the list of ids {problem}. Some lists are written by a script in datasets/, see "
                "datasets/README.md."
            ) from problem
    if not ids:
        raise DatasetFilesError(f"{split.entry}: {source} lists no ids")
    ids = [composed(image_id) for image_id in ids]
    doubled = sorted(i for i, n in Counter(ids).items() if n > 1)
    if doubled:
        raise DatasetFilesError(f"{split.entry}: {source} lists twice: {some(doubled)}")
    return ids


def _compile(pattern: str, root: str) -> tuple[str, re.Pattern[str]]:
    """The fixed folder of a pattern, and an expression for whole paths with the group ``id``.

    The extension may be in capitals: cameras and Windows programs write ``.JPG``.
    """
    before, after = os.path.join(root, pattern).split("{id}")
    after, extension = os.path.splitext(after) if "." in after[1:] else ("", after)
    ending = f"{re.escape(after)}(?i:{re.escape(extension)})"
    return os.path.dirname(before), re.compile(f"{re.escape(before)}(?P<id>.+){ending}", re.DOTALL)


def any_file(patterns: tuple[str, ...], root: str) -> bool:
    """Whether there is a file that matches one of the patterns."""
    for pattern in patterns:
        folder, expression = _compile(pattern, root)
        if os.path.isdir(folder) and any(expression.fullmatch(path) for path in _walk(folder)):
            return True
    return False


def fixed_folders(patterns: tuple[str, ...], root: str) -> list[str]:
    """The folders in front of ``{id}``, one per pattern."""
    return [_compile(pattern, root)[0] for pattern in patterns]


def _walk(folder: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Files below a folder, links followed but not back to a folder above, names with a leading dot left out."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:  # a loop of links: everything in it has been found
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, (*above, here))
            else:
                yield entry.path


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def place(patterns: tuple[str, ...], root: str) -> str:
    """End of an error message: where was looked, and what sets the data root."""
    looked = " or ".join(os.path.join(root, pattern) for pattern in patterns)
    return f"; looked for {looked}, the data root is {root!r} (environment variable {DATA_ROOT_VARIABLE})."


def _example(patterns: tuple[str, ...], root: str) -> str:
    path = next(_walk(fixed_folders(patterns, root)[0]), None)
    return f" There is, for example, {path}." if path else " There is no file at all."
