#!/usr/bin/env python3
"""Makes the SUN RGB-D tree that the spec sun_rgbd reads, from either of the two forms in which the set is published.

    prepare_sun_rgbd.py archives --labels DIR --train-images DIR --test-images DIR
    prepare_sun_rgbd.py official --images DIR --toolbox DIR          (pip install h5py scipy)

archives: the three unpacked archives of github ankurhanda/sunrgbd-meta-data. Trap: its labels 1 to 5050 are the TEST
images and label 5050 + i belongs to TRAIN image i; paired by number, training runs on wrong labels without any error.

official: SUNRGBD.zip and SUNRGBDtoolbox.zip as unpacked (DIR is the folder that holds kv1/, kv2/, ..., and
SUNRGBDtoolbox/).

Written: sun_rgbd/image/{train,test}/img-000001.jpg and sun_rgbd/label37/{train,test}/00000001.png, ids 1 to 37, 0 =
unlabelled.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from multiseg_d2.data.convert import ConversionError, Job, conversion_parser, convert_files
from multiseg_d2.data.decode import decode_index, open_file
from multiseg_d2.user_error import run_script

CLASSES = 37
#: Labels of the archives: 1 to TEST_COUNT are the test set, what follows is the training set.
TEST_COUNT = 5050
NUMBERED = re.compile(r"img-(\d{6})\.(?:jpg|png)")


def checked(ids: np.ndarray, where: str) -> np.ndarray:
    """The ids of a label map as (H, W) uint8, if they are those of the 37 classes."""
    if ids.size and ids.max() > CLASSES:
        raise ConversionError(f"{where}: holds the id {ids.max()}, but 0 to {CLASSES} are all there are: other labels?")
    return ids.astype(np.uint8)


def convert(source: tuple[str, ...]) -> np.ndarray | bytes:
    """Image: its bytes. Label map: its ids."""
    kind, path, *index = source
    if kind == "image":
        content = Path(path).read_bytes()
        if not content.startswith(b"\xff\xd8"):
            raise ConversionError(f"{path}: not a JPEG file")
        return content
    if kind == "png":
        return checked(decode_index(open_file(path)), path)
    file, references = labels_of_toolbox(path)
    ids = np.asarray(file[references[int(index[0])]]).T  # MATLAB stores (W, H)
    return checked(ids, f"{path}, entry {int(index[0]) + 1}")


# ---- The archives ----------------------------------------------------------------------------------------------------


def numbered(folder: Path) -> dict[int, Path]:
    """Files img-<number> of a folder, by number.

    Raises:
        ConversionError: there is none, or two have one number.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.rglob("img-*")):
        match = NUMBERED.fullmatch(path.name)
        if match and int(match[1]) in found:
            raise ConversionError(f"two files of number {int(match[1])}: {found[int(match[1])]} and {path}")
        if match:
            found[int(match[1])] = path
    if not found:
        raise ConversionError(f"no file img-<6 digits>.jpg or .png below {folder}")
    return dict(sorted(found.items()))


def from_archives(options: argparse.Namespace) -> Iterator[tuple[str, int, tuple, tuple]]:
    """Yields (split, number, source of the image, source of the label)."""
    labels = numbered(options.labels)
    offsets = {"test": 0, "train": TEST_COUNT}
    images = {split: numbered(getattr(options, f"{split}_images")) for split in offsets}
    belonging = {offsets[split] + number for split, files in images.items() for number in files}
    strays = sorted(belonging ^ labels.keys())
    if strays or any(not 1 <= number <= TEST_COUNT for number in images["test"]):
        raise ConversionError(
            f"images and labels do not belong together: label numbers {strays[:10]} have no partner (label i is "
            f"test image i up to {TEST_COUNT}, label {TEST_COUNT} + i is train image i). Unpack all three archives."
        )
    for split, files in images.items():
        for number, path in files.items():
            yield split, number, ("image", str(path)), ("png", str(labels[offsets[split] + number]))


# ---- The official files ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def labels_of_toolbox(path: str):
    """SUNRGBD2Dseg.mat (HDF5) and its references to the label maps, opened once per process: 64 GB if read whole."""
    import h5py

    file = h5py.File(path, "r")
    return file, file["SUNRGBD2Dseg"]["seglabel"][()].ravel()


def scene(path: str) -> str:
    """A scene folder as the metadata spell it -> relative to the image folder."""
    return re.sub(r"/+", "/", path.split("SUNRGBD/", 1)[-1]).strip("/")


def from_official(options: argparse.Namespace) -> Iterator[tuple[str, int, tuple, tuple]]:
    """Yields (split, number in the order of the metadata, source of the image, source of the label)."""
    import scipy.io

    def load(name: str) -> dict:
        try:
            return scipy.io.loadmat(options.toolbox / name, squeeze_me=True, struct_as_record=False)
        except (ValueError, TypeError, NotImplementedError) as problem:
            raise ConversionError(f"{options.toolbox / name}: no MATLAB file that scipy reads ({problem})") from problem

    lists = load("traintestSUNRGBD/allsplit.mat")
    members = {split: set(map(scene, np.atleast_1d(lists[f"all{split}"]))) for split in ("train", "test")}
    entries = np.atleast_1d(load("Metadata/SUNRGBDMeta.mat")["SUNRGBDMeta"])
    labels = str(options.toolbox / "Metadata/SUNRGBD2Dseg.mat")
    numbers = dict.fromkeys(members, 0)
    for index, entry in enumerate(entries):
        folder = scene(entry.rgbpath.rsplit("/", 2)[0])
        splits = [split for split, folders in members.items() if folder in folders]
        if len(splits) != 1:
            raise ConversionError(f"{folder} is in {' and '.join(splits) or 'no split'} of allsplit.mat")
        numbers[splits[0]] += 1
        image = options.images / folder / "image" / entry.rgbname
        yield splits[0], numbers[splits[0]], ("image", str(image)), ("mat", labels, str(index))


def jobs_of(items: Iterable[tuple[str, int, tuple, tuple]], folder: Path) -> Iterator[Job]:
    """What to write for each image."""
    for split, number, image, label in items:
        yield Job(str(folder / f"image/{split}/img-{number:06d}.jpg"), image)
        yield Job(str(folder / f"label37/{split}/{number:08d}.png"), label)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = conversion_parser(__doc__)
    parser.add_argument("form", choices=("archives", "official"), help="what was downloaded")
    for name in ("labels", "train-images", "test-images", "images", "toolbox"):
        form = "official" if name in ("images", "toolbox") else "archives"
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"{form}: unpacked folder")
    options = parser.parse_args(arguments)
    needed = ("labels", "train_images", "test_images") if options.form == "archives" else ("images", "toolbox")
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(options, name) is None]
    if missing:
        parser.error(f"{options.form} needs {', '.join(missing)}")
    try:
        items = (from_archives if options.form == "archives" else from_official)(options)
        jobs = list(jobs_of(items, options.root / "sun_rgbd"))
    except ImportError as problem:
        print(f"{problem}; the official files need: pip install h5py scipy", file=sys.stderr)
        return 1
    except (ConversionError, OSError, KeyError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return convert_files(jobs, convert, options, "SUN RGB-D")


if __name__ == "__main__":
    sys.exit(run_script(main))
