#!/usr/bin/env python3
"""Unpacks stuffthingmaps_trainval2017.zip into coco/annotations/{train2017,val2017}/, looking at every pixel.

The maps are stored as they are: pixel = COCO-Stuff id minus 1, 255 = unlabelled. Unlike a plain unzip this can be
interrupted and repeated, never leaves half a file, and refuses maps that hold one of the ids that never occur (a sign
of another numbering: the 10k .mat files hold the id itself). With --folder stuffthingmaps they go to
coco/stuffthingmaps/, where the spec coco_stuff_maps looks for them.
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from multiseg_d2.data.convert import ConversionError, Job, conversion_parser, convert_files
from multiseg_d2.data.spec import load_spec
from multiseg_d2.label_space import IllegalLabelError, to_local
from multiseg_d2.user_error import run_script

MAP = re.compile(r"(?:.*/)?((?:train|val)2017/\d{12}\.png)")
TABLE = load_spec("coco_stuff").raw_to_local


@lru_cache(maxsize=1)
def archive(path: str) -> zipfile.ZipFile:
    """The zip file, opened once per process."""
    return zipfile.ZipFile(path)


def members(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Members of the archive by where they go, and the PNG files among them that go nowhere.

    Raises:
        ConversionError: two members go to one file.
    """
    found, others = {}, []
    for name in names:
        match = MAP.fullmatch(name)
        if match and match[1] in found:
            raise ConversionError(f"holds {match[1]} twice: as {found[match[1]]} and as {name}")
        if match:
            found[match[1]] = name
        elif name.lower().endswith(".png"):
            others.append(name)
    return found, others


def take(source: tuple[str, str]) -> bytes:
    """One label map of the archive, as its bytes, after its ids were checked."""
    path, name = source
    try:
        content = archive(path).read(name)  # compares the checksum
    except zipfile.BadZipFile as problem:
        raise ConversionError(f"{path}: {name}: {problem}") from None
    ids = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if ids is None or ids.ndim != 2 or ids.dtype != np.uint8:
        raise ConversionError(f"{path}: {name}: not an 8-bit grey PNG")
    try:
        to_local(ids, TABLE)
    except IllegalLabelError as problem:
        raise problem.at(f"{path}: {name}") from None
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = conversion_parser(__doc__)
    parser.add_argument("zip", type=Path, help="stuffthingmaps_trainval2017.zip")
    parser.add_argument(
        "--folder", default="annotations", choices=("annotations", "stuffthingmaps"), help="below coco/"
    )
    options = parser.parse_args(arguments)
    try:
        with zipfile.ZipFile(options.zip) as content:
            names, others = members(content.namelist())
    except ConversionError as problem:
        print(f"{options.zip}: {problem}", file=sys.stderr)
        return 1
    except (OSError, zipfile.BadZipFile) as problem:
        print(f"{options.zip}: {problem}; download it again", file=sys.stderr)
        return 1
    if not names:
        print(f"{options.zip}: holds no {{train,val}}2017/<12 digits>.png: another archive?", file=sys.stderr)
        return 1
    if others:
        print(f"{len(others)} PNG files of the archive have other names and are left out: {', '.join(others[:5])}")
    target = options.root / "coco" / options.folder
    jobs = [Job(str(target / short), (str(options.zip), name)) for short, name in sorted(names.items())]
    return convert_files(jobs, take, options, "COCO-Stuff maps")


if __name__ == "__main__":
    sys.exit(run_script(main))
