#!/usr/bin/env python3
"""Writes gta5/paired.txt: the images of GTA5 whose label has their size, which the split gta5_paired trains on.

A few labels of the release differ in size from their image; training on the split gta5_train would stop there. They are
left out, not mended: which of the two is wrong is not known. Only headers are read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from PIL import Image

from multiseg_d2.data.convert import conversion_parser, write_list
from multiseg_d2.data.files import DatasetFilesError, list_pairs
from multiseg_d2.data.parallel import map_files
from multiseg_d2.data.spec import load_spec
from multiseg_d2.user_error import run_script


def compare(record: dict[str, Any]) -> tuple[str, bool]:
    """What is wrong with the sizes of an image and its label, "" where nothing is; whether a file is broken."""
    sizes = []
    for path in (record["file_name"], record["sem_seg_file_name"]):
        try:
            with Image.open(path) as header:
                sizes.append(header.size)
        except Exception as problem:  # whatever is wrong with one file, the others are compared and it is named
            return f"{path}: {type(problem).__name__}: {problem}", True
    if sizes[0] == sizes[1]:
        return "", False
    image, label = (f"{width}x{height}" for width, height in sizes)
    return f"{record['sem_seg_file_name']}: is {label}, its image {image}", False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    options = conversion_parser(__doc__).parse_args(arguments)
    try:
        records = list_pairs(load_spec("gta5").splits["train"], str(options.root))
    except DatasetFilesError as problem:
        print(problem, file=sys.stderr)
        return 1
    compared = list(map_files(compare, records, options.workers, "sizes"))
    for problem, broken in compared:
        if problem:
            print(f"left out: {problem}", file=sys.stderr if broken else sys.stdout)
    paired = [record["image_id"] for record, (problem, _) in zip(records, compared) if not problem]
    return write_list(options.root / "gta5" / "paired.txt", paired, options) | any(broken for _, broken in compared)


if __name__ == "__main__":
    sys.exit(run_script(main))
