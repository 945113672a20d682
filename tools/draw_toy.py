#!/usr/bin/env python
"""Draws the toy data sets (street scenes with conflicting label spaces) and, if asked, one picture of all looks.

Examples::

    python tools/draw_toy.py                              # into the data root: $DETECTRON2_DATASETS or ./datasets
    python tools/draw_toy.py --images 8 --size 64x128 --root small --picture toy.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.progress import Progress

from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.data.files import data_root
from multiseg_d2.toy import LOOKS, ToyFilesError, draw_scene, write_toy
from multiseg_d2.toy.encode import concept_classes, toy_spec
from multiseg_d2.user_error import run_script

_MARGIN = 22  # pixels of the contact sheet for captions


def main(arguments: list[str] | None = None) -> int:
    """Runs the tool; returns the exit code."""
    args = _parser().parse_args(arguments)
    root = args.root or data_root()
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("drawing")

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            folder = write_toy(root, args.images, args.size, args.seed, args.redraw, show)
    except (ToyFilesError, ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(f"toy sets: {folder}")
    if args.picture:
        sheet = contact_sheet(*args.size, args.seed)[..., ::-1]
        write_atomically(args.picture, cv2.imencode(Path(args.picture).suffix, sheet)[1].tobytes())
        print(f"picture: {args.picture}")
    return 0


def contact_sheet(height: int, width: int, seed: int, columns: int = 3, scale: int = 2) -> np.ndarray:
    """All looks, each with a few scenes and their labels in the drawn concepts' colours.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    spec = toy_spec("toy_concepts")
    palette = np.concatenate([spec.colors, np.zeros((1, 3), np.uint8)])  # the last one: not labelled
    owners = concept_classes("toy_concepts")
    rows = []
    for number, (name, look) in enumerate(LOOKS.items()):
        tiles = []
        for index in range(columns):
            scene = draw_scene(look, height, width, (seed, number, index), index)
            tiles += [scene.image, palette[owners[scene.concept]]]
        strip = cv2.resize(np.concatenate(tiles, 1), None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        rows += [_caption(name, strip.shape[1]), strip]
    return np.concatenate([*rows, _legend(spec, rows[-1].shape[1])])


def _caption(text: str, width: int) -> np.ndarray:
    bar = np.full((_MARGIN, width, 3), 255, np.uint8)
    cv2.putText(bar, text, (6, _MARGIN - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return bar


def _legend(spec, width: int) -> np.ndarray:
    cell = 120
    per_row = max(1, width // cell)
    legend = np.full((_MARGIN * -(-len(spec.classes) // per_row), width, 3), 255, np.uint8)
    for i, (cls, color) in enumerate(zip(spec.classes, spec.colors.tolist())):
        x, y = i % per_row * cell, i // per_row * _MARGIN
        cv2.rectangle(legend, (x + 4, y + 4), (x + 18, y + 18), color, -1)
        cv2.rectangle(legend, (x + 4, y + 4), (x + 18, y + 18), (90, 90, 90), 1)
        cv2.putText(legend, cls.name, (x + 23, y + 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return legend


def _size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 96x192") from None
    return height, width


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="data root; default: $DETECTRON2_DATASETS or ./datasets")
    parser.add_argument("--images", type=int, default=48, help="training images per labelled set (default 48)")
    parser.add_argument("--size", type=_size, default=(96, 192), help="HEIGHTxWIDTH in pixels (default 96x192)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other scenes (default 0)")
    parser.add_argument("--redraw", action="store_true", help="replace toy sets that were drawn before")
    parser.add_argument("--picture", help="also write a PNG with scenes of all looks and their labels")
    return parser


if __name__ == "__main__":
    sys.exit(run_script(main))
