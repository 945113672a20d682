#!/usr/bin/env python3
"""Optional: writes Cityscapes' *_labelTrainIds.png beside *_labelIds.png, for tools that want train ids.

The spec cityscapes reads *_labelIds.png as downloaded and needs none of this; the spec cityscapes_trainids reads what
is written here. Pixels: train ids 0 to 18, 255 for everything else, as csCreateTrainIdLabelImgs of cityscapesscripts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import numpy as np

from multiseg_d2.data.convert import Job, conversion_parser, convert_files
from multiseg_d2.data.decode import decode_index, open_file
from multiseg_d2.data.spec import load_spec
from multiseg_d2.label_space import IllegalLabelError, to_local
from multiseg_d2.user_error import run_script

SOURCE, TARGET = "_labelIds.png", "_labelTrainIds.png"


def translate(table: np.ndarray, path: str) -> np.ndarray:
    """Label ids of a file -> (H, W) uint8 train ids."""
    try:
        return to_local(decode_index(open_file(path)), table)
    except IllegalLabelError as problem:
        raise problem.at(path) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    options = conversion_parser(__doc__).parse_args(arguments)
    folder = options.root / "cityscapes"
    files = sorted(path for part in ("gtFine", "gtCoarse") for path in (folder / part).rglob(f"*{SOURCE}"))
    if not files:
        print(f"no file *{SOURCE} below {folder}: unpack Cityscapes there (see datasets/README.md)", file=sys.stderr)
        return 1
    jobs = [Job(str(path).removesuffix(SOURCE) + TARGET, str(path)) for path in files]
    return convert_files(
        jobs, partial(translate, load_spec("cityscapes").raw_to_local), options, "Cityscapes train ids"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
