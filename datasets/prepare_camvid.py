#!/usr/bin/env python3
"""Optional: turns CamVid's colour maps (LabeledApproved_full/) into index PNGs (Labeled_index/), which decode faster.

The spec camvid_full reads the colour maps as downloaded; camvid_index reads what is written here. Both give the same
labels: 0 to 10 in the order of the merged 11-class protocol, 11 for Void and, as in that protocol, for colours that
are in no table (the summary says in how many files there are some).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from multiseg_d2.data.convert import Job, conversion_parser, convert_files
from multiseg_d2.data.decode import open_file
from multiseg_d2.data.labels import LabelReader
from multiseg_d2.data.spec import load_spec
from multiseg_d2.label_space import IGNORE
from multiseg_d2.user_error import run_script

SPEC = load_spec("camvid_full")
VOID = len(SPEC.classes)
READER = LabelReader.from_spec(SPEC)


def merge(path: str) -> np.ndarray | tuple[np.ndarray, str]:
    """Colours of a file -> (H, W) uint8 merged classes, with a remark where a colour is in no table."""
    record = {"sem_seg_file_name": path}
    stored = READER.decode(open_file(path))
    local = READER.to_local(stored, record)
    unknown = READER.to_raw(stored, record) == len(SPEC.color_table()[0])  # the raw id of colours that nobody lists
    ids = np.where(local == IGNORE, VOID, local).astype(np.uint8)
    return (ids, "some colours are in no table and count as Void") if unknown.any() else ids


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    options = conversion_parser(__doc__).parse_args(arguments)
    folder = options.root / "camvid"
    files = sorted((folder / "LabeledApproved_full").glob("*_L.png"))
    if not files:
        missing = folder / "LabeledApproved_full"
        print(f"no file *_L.png in {missing}: unpack CamVid there (see datasets/README.md)", file=sys.stderr)
        return 1
    jobs = [Job(str(folder / "Labeled_index" / f"{path.stem.removesuffix('_L')}.png"), str(path)) for path in files]
    return convert_files(jobs, merge, options, "CamVid colours")


if __name__ == "__main__":
    sys.exit(run_script(main))
