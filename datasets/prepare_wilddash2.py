#!/usr/bin/env python3
"""Splits WildDash 2's public set into wilddash2/train.txt and val.txt; with --index also turns panoptic maps into PNGs.

WildDash 2 has no official split. The one written here depends on the seed and the names alone, not on the order of
files or the version of Python: the images with the smallest sha256 of "<seed>:<name>" are validation. --val-list
takes a list of your own instead. 36 images of the benchmark lie in the public set: --benchmark FOLDER keeps those out
of train.txt.

The specs wilddash2 (panoptic maps as downloaded) and wilddash2_index (what --index writes into labels_index/, raw
category ids as 8-bit PNG, faster to decode) read the same lists.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multiseg_d2.data.convert import Job, conversion_parser, convert_files, write_list
from multiseg_d2.data.decode import open_file
from multiseg_d2.data.files import DatasetFilesError, list_pairs
from multiseg_d2.data.labels import LabelReader
from multiseg_d2.data.spec import load_spec
from multiseg_d2.text_file import read_text
from multiseg_d2.user_error import run_script

SPEC = load_spec("wilddash2")
READER = LabelReader.from_spec(SPEC)


def draw_split(ids: Collection[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, val), both sorted; ``share`` of the ids, rounded up, are validation."""
    ordered = sorted(ids, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    count = math.ceil(share * len(ordered))
    return sorted(ordered[count:]), sorted(ordered[:count])


def choose(ids: list[str], options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The split that the command line asks for.

    Raises:
        DatasetFilesError: a given list names images that are not there.
    """
    if options.val_list is None:
        train, val = draw_split(ids, options.val_share, options.seed)
    else:
        lines = read_text(options.val_list, DatasetFilesError).split("\n")
        wanted = {Path(line.strip()).stem for line in lines if line.strip()}
        unknown = sorted(wanted - set(ids))
        if unknown:
            raise DatasetFilesError(f"{options.val_list} lists images that are not there: {', '.join(unknown[:10])}")
        train, val = [i for i in ids if i not in wanted], sorted(wanted)
    if options.benchmark is not None:
        hidden = {path.stem for path in options.benchmark.rglob("*.jpg")} & set(train)
        print(f"{len(hidden)} images of the benchmark are left out of train.txt")
        train = [i for i in train if i not in hidden]
    return train, val


def to_index(record: dict[str, Any]) -> np.ndarray:
    """Panoptic map of a dataset dict -> (H, W) uint8 raw category ids."""
    stored = READER.decode(open_file(record["pan_seg_file_name"]))
    READER.to_local(stored, record)  # raises for categories that are in no table
    return READER.to_raw(stored, record).astype(np.uint8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = conversion_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument("--val-share", type=float, default=0.2, help="share of validation (default: %(default)s)")
    parser.add_argument("--val-list", type=Path, help="file with the names of the validation images, one per line")
    parser.add_argument(
        "--benchmark", type=Path, metavar="FOLDER", help="images of the benchmark, to keep out of train.txt"
    )
    parser.add_argument("--index", action="store_true", help="also write labels_index/*.png")
    options = parser.parse_args(arguments)
    folder = options.root / "wilddash2"
    try:
        records = list_pairs(SPEC.splits["public"], str(options.root))
        train, val = choose([record["image_id"] for record in records], options)
    except (DatasetFilesError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    failed = write_list(folder / "train.txt", train, options) | write_list(folder / "val.txt", val, options)
    if options.index:
        jobs = [Job(str(folder / "labels_index" / f"{record['image_id']}.png"), record) for record in records]
        failed |= convert_files(jobs, to_index, options, "WildDash 2 panoptic maps")
    return failed


if __name__ == "__main__":
    sys.exit(run_script(main))
