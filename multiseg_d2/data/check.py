"""Looks at every file of a dataset and says what is wrong, before training does. Used by ``datasets/check.py``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..label_space import ILLEGAL, TABLE_SIZE, IllegalLabelError
from .decode import BadFileError, EncodedFile, SizeMismatchError, check_sizes, decode_color, open_file
from .files import dataset_dicts
from .labels import LabelReader, UnknownSegmentError, label_path
from .numbering import suspicion
from .pairing import DatasetFilesError, Pairing, any_file, fixed_folders, only_what_is_there, pair_files
from .parallel import map_files
from .spec import SplitSpec

__all__ = ["KINDS", "Problem", "SplitReport", "check_splits", "splits_on_disk"]

#: What can be wrong, and the heading under which it is reported.
KINDS = {
    "missing": "missing files",
    "count": "another number of images than the official one",
    "stray": "strays: images without label, labels without image",
    "file": "unreadable, truncated or of the wrong kind",
    "size": "image and label (or annotation) differ in size",
    "ids": "ids that are in no table",
    "numbering": "suspicion of another numbering",
}

Record = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong; ``kind`` is a key of :data:`KINDS`, ``file`` may be empty, ``message`` names it."""

    kind: str
    message: str
    file: str = ""


@dataclass
class SplitReport:
    """What was found for one split.

    Attributes:
        entry: name of the catalog entry, for example ``"camvid_train"``.
        spec_name: of the spec that it belongs to, for example ``"camvid"``.
        classes: C class names.
        expected: official number of images, None where there is none.
        images, labels: number of files found.
        unmatched: pictures beside the images that no pattern of the spec takes; not an error.
        present: False where not even the folder of the images is there.
        checked: number of images that were opened.
        problems: everything that is wrong.
        raw_pixels: (65536,) int64 pixels per raw id.
        class_pixels: (256,) int64 pixels per local id; index 255 are the ignored ones, 254 those in no table.
    """

    entry: str
    spec_name: str
    classes: tuple[str, ...]
    expected: int | None = None
    images: int = 0
    labels: int = 0
    unmatched: tuple[str, ...] = ()
    present: bool = True
    checked: int = 0
    problems: list[Problem] = field(default_factory=list)
    raw_pixels: np.ndarray = field(default_factory=lambda: np.zeros(TABLE_SIZE, np.int64))
    class_pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))

    def by_kind(self) -> dict[str, list[Problem]]:
        """The problems, grouped, in the order of :data:`KINDS`."""
        groups = defaultdict(list)
        for problem in self.problems:
            groups[problem.kind].append(problem)
        return {kind: groups[kind] for kind in KINDS if kind in groups}


def splits_on_disk(splits: Sequence[SplitSpec], root: str) -> list[SplitSpec]:
    """The splits that lie below a data root.

    Several specs read the same images with other label files (``cityscapes``, ``cityscapes_trainids``), and people have
    one kind of them: a split without a single label file is left out if another one has some. Where none has, the first
    stays, so that labels that are missing altogether are noticed.

    Args:
        splits: of any number of specs.
        root: data root.

    Returns:
        Some of the splits, in their order.
    """
    readers: dict[tuple[str, ...], list[SplitSpec]] = defaultdict(list)  # patterns of the images -> who reads them
    for split in splits:
        if _has_folder(split, root):
            readers[split.images].append(split)
    there = set()
    for alternatives in readers.values():
        complete = [s for s in alternatives if s.annotation != "none" and (not s.labels or any_file(s.labels, root))]
        there.update(split.entry for split in complete or alternatives[:1])
    return [split for split in splits if split.entry in there]


def check_splits(splits: Sequence[SplitSpec], root: str, workers: int = 1, part: bool = False) -> list[SplitReport]:
    """Pairs, opens and counts every file of some splits; a file that several of them read is opened once.

    Args:
        splits: from ``DatasetSpec.splits``.
        root: data root.
        workers: number of processes.
        part: only a part of the dataset is there, on purpose: official counts, ids of lists without an image and
            annotations without a file are no problems.

    Returns:
        One report per split, in their order.
    """
    reports: list[SplitReport] = []
    readers = [LabelReader.from_spec(split.spec) if split.labels else None for split in splits]
    jobs: dict[Any, tuple[int, Record]] = {}
    owners: dict[Any, list[SplitReport]] = defaultdict(list)
    for number, split in enumerate(splits):
        report, records = _pair(split, root, part)
        reports.append(report)
        reading = _reading(split)
        for record in records:
            key = (record["file_name"], label_path(record), split.annotation_file, reading)
            jobs.setdefault(key, (number, record))
            owners[key].append(report)
    results = map_files(_check_image, list(jobs.values()), workers, "checking", _keep, (readers,))
    for key, (problems, raw_ids, pixels) in zip(jobs, results):
        for report in owners[key]:
            report.checked += 1
            report.problems.extend(problems)
            report.raw_pixels[raw_ids] += pixels
    for split, report in zip(splits, reports):
        np.add.at(report.class_pixels, split.spec.raw_to_local, report.raw_pixels)
        doubt = suspicion(split.spec, report.raw_pixels)
        if doubt:
            report.problems.append(Problem("numbering", doubt))
    return reports


def _pair(split: SplitSpec, root: str, part: bool) -> tuple[SplitReport, list[Record]]:
    """The report of a split as far as file names go, and the dataset dicts of what belongs together."""
    report = SplitReport(split.entry, split.spec.name, split.spec.class_names, split.count)
    report.present = _has_folder(split, root)
    try:
        found = pair_files(only_what_is_there(split, root) if part else split, root)
    except DatasetFilesError as problem:
        report.problems.append(Problem("missing", str(problem)))
        return report, []
    report.images, report.labels, report.unmatched = len(found.images), len(found.labels), found.unmatched
    if split.count is not None and report.images != split.count and not part:
        counts = f"{split.entry}: {report.images} images found, {split.count} expected (--part: that is on purpose)"
        report.problems.append(Problem("count", counts))
    report.problems += [Problem("stray", f"{found.images[i]}: has no label", i) for i in found.without_label]
    report.problems += [Problem("stray", f"{found.labels[i]}: has no image", i) for i in found.without_image]
    strays = {*found.without_label, *found.without_image}
    paired = Pairing(
        *({i: f for i, f in side.items() if i not in strays} for side in (found.images, found.labels)), (), ()
    )
    for whole in (
        (False,) if part else (True, False)
    ):  # an annotation file that lists more than there is still serves for the rest
        try:
            return report, dataset_dicts(paired, split, root, whole)
        except DatasetFilesError as problem:
            report.problems.append(Problem("missing", str(problem)))
    return report, []


def _has_folder(split: SplitSpec, root: str) -> bool:
    return any(os.path.isdir(folder) for folder in fixed_folders(split.images, root))


def _reading(split: SplitSpec) -> int:
    """Equal for splits whose label files are read alike: the same raw ids are known, whatever their classes."""
    spec = split.spec
    colors = spec.color_table()[0].tobytes() if spec.encoding == "color" else b""
    return hash((spec.encoding, (spec.raw_to_local == ILLEGAL).tobytes(), colors))


# ---- In the worker processes -----------------------------------------------------------------------------------------

_readers: list[LabelReader | None] = []


def _keep(readers: list[LabelReader | None]) -> None:
    _readers[:] = readers


def _check_image(job: tuple[int, Record]) -> tuple[list[Problem], np.ndarray, np.ndarray]:
    """Decodes an image and its label: (problems, (K,) raw ids, (K,) pixels of each)."""
    number, record = job
    problems: list[Problem] = []
    image = _open(record["file_name"], problems)
    if image is not None:
        try:
            decode_color(image)  # a truncated file has a good header: only decoding tells
        except BadFileError as problem:
            problems.append(Problem("file", str(problem), image.path))
    label = None if label_path(record) is None else _open(label_path(record), problems)
    if image is not None and (label is not None or label_path(record) is None):
        try:
            check_sizes(image, label, record)
        except SizeMismatchError as problem:
            problems.append(Problem("size", str(problem), image.path))
    pixels = np.zeros(0, np.int64) if label is None else _count_ids(_readers[number], label, record, problems)
    raw_ids = np.flatnonzero(pixels)
    return problems, raw_ids, pixels[raw_ids]


def _open(path: str, problems: list[Problem]) -> EncodedFile | None:
    try:
        return open_file(path)
    except BadFileError as problem:
        problems.append(Problem("file", str(problem), path))
        return None


def _count_ids(reader: LabelReader, label: EncodedFile, record: Record, problems: list[Problem]) -> np.ndarray:
    """Number of pixels per raw id of a label map, empty where it cannot be decoded."""
    try:
        stored = reader.decode(label)
        raw = reader.to_raw(stored, record)
    except (BadFileError, UnknownSegmentError) as problem:
        problems.append(Problem("file" if isinstance(problem, BadFileError) else "ids", str(problem), label.path))
        return np.zeros(0, np.int64)
    pixels = np.bincount(raw.ravel())
    if (reader.raw_to_local[np.flatnonzero(pixels)] == ILLEGAL).any():
        try:
            reader.to_local(stored, record)  # for its error, which names ids or colours, and pixel counts
        except IllegalLabelError as problem:
            problems.append(Problem("ids", str(problem), label.path))
    return pixels
