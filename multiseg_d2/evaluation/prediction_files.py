"""Which pictures are labelled, and where each result goes: one result per picture, and never over a picture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog

from ..data.views import register_views
from ..user_error import UserError
from ..view_name import ViewNameError
from ..yaml_file import did_you_mean

__all__ = ["IMAGES", "InputError", "Picture", "check_targets", "find_pictures"]

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


class InputError(UserError, ValueError):
    """What is asked for is not there or cannot be done."""


@dataclass(frozen=True)
class Picture:
    """One input.

    Attributes:
        path: of the file.
        target: path of the result below the output folder, without suffix.
        image_id: the ``{id}`` of a registered image, "" for any other.
        folder: that the input was looked for in, "" for a registered image.
    """

    path: str
    target: str
    image_id: str = ""
    folder: str = ""


def find_pictures(source: str, output: Path) -> list[Picture]:
    """The pictures behind an input: a file, a folder with all below it (links included), or a catalog entry.

    Args:
        source: path, or name of a catalog entry.
        output: folder of the results; what lies below it is not taken for a picture.

    Raises:
        InputError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return [Picture(source, path.stem, folder=str(path.parent))]
    if path.is_dir():
        files = sorted(_files_below(path, output.resolve()))
        if not files:
            raise InputError(f"{source}: no pictures ({', '.join(sorted(IMAGES))}) in this folder")
        targets = _distinct_names([str(file.relative_to(path)) for file in files])
        return [Picture(str(file), target, folder=source) for file, target in zip(files, targets)]
    try:
        register_views([source])
    except ViewNameError as problem:
        raise InputError(f"{source}: neither a file nor a folder; {problem}") from None
    if source in DatasetCatalog.list():
        records = DatasetCatalog.get(source)
        targets = _distinct_names([str(record["image_id"]) for record in records])
        return [Picture(r["file_name"], target, str(r["image_id"])) for r, target in zip(records, targets)]
    hint = did_you_mean(source, DatasetCatalog.list())
    raise InputError(f"{source}: neither a file nor a folder nor a registered split{hint}")


def check_targets(targets: Mapping[Path, str], inputs: Iterable[str]) -> None:
    """Refuses to write over what is read, whatever name, link or upper case it goes by.

    Args:
        targets: file that would be written -> picture that it is made of.
        inputs: all files that are read.

    Raises:
        InputError: an output is an input.
    """
    identities = {(status.st_dev, status.st_ino): path for path in inputs for status in _status(path)}
    for target, source in targets.items():
        for status in _status(target):
            if (status.st_dev, status.st_ino) in identities:
                raise InputError(
                    f"the result of {source} would replace the input {identities[status.st_dev, status.st_ino]}: "
                    "nothing was written; name another output"
                )


def _status(path: str | Path) -> Iterator[os.stat_result]:
    try:
        yield os.stat(path)
    except OSError:  # not there: nothing can be lost
        return


def _files_below(folder: Path, output: Path) -> Iterator[Path]:
    """Image files in a folder; linked folders are entered, each folder once, and ``output`` below it not."""
    entered: set[Path] = set() if folder.resolve() == output else {output}
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        yield from (Path(place, name) for name in names if Path(name).suffix.lower() in IMAGES)


def _distinct_names(names: Sequence[str]) -> list[str]:
    """Names without suffix, or with it (a_jpg) where that tells files apart; upper and lower case count as equal."""
    stems = [os.path.splitext(name) for name in names]
    count = Counter(stem.lower() for stem, _ in stems)
    chosen = [stem if count[stem.lower()] == 1 else f"{stem}_{suffix[1:]}" for stem, suffix in stems]
    count = Counter(name.lower() for name in chosen)  # a.jpg, a.png and a_jpg.png
    chosen = [new if count[new.lower()] == 1 else old for new, old in zip(chosen, names)]
    count = Counter(name.lower() for name in chosen)
    doubled = [name for name, new in zip(names, chosen) if count[new.lower()] > 1]
    if doubled:
        raise InputError(f"the results of {', '.join(doubled[:4])} would have the same name: rename one of them")
    return chosen
