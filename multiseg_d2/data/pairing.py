"""Image and label files of a split, paired by ``{id}``, never by sorted position."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .spec import SplitSpec

__all__ = [
    "DATA_ROOT_VARIABLE",
    "DatasetFilesError",
    "Pairing",
    "any_file",
    "fixed_folders",
    "only_what_is_there",
    "pair_files",
    "place",
    "some",
]

DATA_ROOT_VARIABLE = "DETECTRON2_DATASETS"
_SHOWN = 10  # names in an error message; the rest is counted


class DatasetFilesError(RuntimeError):
    """Files of a dataset are missing, or do not belong together."""


@dataclass(frozen=True)
class Pairing:
    """What was found for a split.

    Attributes:
        images: id -> image file, in the order of the split (by id, or as ``ids`` lists them).
        labels: id -> label file; empty for splits without label files.
        without_label: ids of images that have no label file, sorted; empty for splits without label files.
        without_image: ids of label files that have no image, sorted.
    """

    images: dict[str, str]
    labels: dict[str, str]
    without_label: tuple[str, ...]
    without_image: tuple[str, ...]


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
                raise DatasetFilesError(f"{split.entry}: no {kind} for {some(missing)}{place(patterns, root)}")
    if not images:
        raise DatasetFilesError(
            f"{split.entry}: no image found{place(split.images, root)}{_example(split.images, root)}"
        )
    if not split.labels:
        return Pairing(images, {}, (), ())
    without_label = tuple(sorted(images.keys() - labels.keys()))
    return Pairing(images, labels, without_label, tuple(sorted(labels.keys() - images.keys())))


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
                _add(split, files, match["id"], path)
    return dict(sorted(files.items()))


def _look_up(split: SplitSpec, patterns: tuple[str, ...], root: str, ids: list[str]) -> dict[str, str]:
    """The files of the given ids, in their order, without reading whole folders."""
    files: dict[str, str] = {}
    for image_id in ids:
        for pattern in patterns:
            path = os.path.join(root, pattern.replace("{id}", image_id))
            if os.path.isfile(path):
                _add(split, files, image_id, path)
    return files


def _add(split: SplitSpec, files: dict[str, str], image_id: str, path: str) -> None:
    if image_id in files:
        raise DatasetFilesError(f"{split.entry}: two files have the id {image_id!r}: {files[image_id]} and {path}")
    files[image_id] = path


def _listed_ids(split: SplitSpec, root: str) -> list[str]:
    if isinstance(split.ids, tuple):
        ids, source = list(split.ids), f"the spec {split.spec.path}"
    else:
        source = os.path.join(root, split.ids)
        try:
            with open(source, encoding="utf-8") as file:
                ids = [line.strip() for line in file if line.strip()]
        except OSError as problem:
            raise DatasetFilesError(
                f"{split.entry}: the list of ids {source} cannot be read ({problem.strerror}). "
                "Some lists are written by a script in datasets/, see datasets/README.md."
            ) from problem
    doubled = sorted(i for i, n in Counter(ids).items() if n > 1)
    if doubled:
        raise DatasetFilesError(f"{split.entry}: {source} lists twice: {some(doubled)}")
    return ids


def _compile(pattern: str, root: str) -> tuple[str, re.Pattern[str]]:
    """The fixed folder of a pattern, and an expression for whole paths with the group ``id``."""
    before, after = os.path.join(root, pattern).split("{id}")
    folder = os.path.dirname(before)
    return folder, re.compile(f"{re.escape(before)}(?P<id>.+){re.escape(after)}", re.DOTALL)


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


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder, links followed, names with a leading dot left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path)
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
