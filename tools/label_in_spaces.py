#!/usr/bin/env python
r"""Labels one picture in several label spaces with one model of tools/share.py, a panel each.

    python tools/share.py --config-file configs/quickstart/four_datasets.yaml \
        --weights output/quickstart/four_datasets/model_final.pth --output four.pth
    python tools/label_in_spaces.py --model four.pth --picture street.png --output four.png

The file alone is needed, neither config nor datasets. Without --spaces all that the model was trained on are shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import multiseg_d2  # noqa: F401  isort: skip  (first: it lets Detectron2 be imported)

from multiseg_d2.data.decode import read_image
from multiseg_d2.engine import Predictor, run_script
from multiseg_d2.engine.shared_model import read_shared_model
from multiseg_d2.evaluation import pictures


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="file of tools/share.py")
    parser.add_argument("--picture", required=True, help="the picture to label")
    parser.add_argument("--output", required=True, type=Path, help="the picture to write, .png")
    parser.add_argument("--spaces", nargs="+", default=(), help="label spaces; default: all that it was trained on")
    parser.add_argument("--norm", default="", help="trained dataset whose batch norm is used")
    args = parser.parse_args(argv)
    image = read_image(args.picture, "RGB")
    spaces = args.spaces or tuple(read_shared_model(args.model)[1].sem_seg_head.spaces)
    labelled = {}
    for name in spaces:
        predictor = Predictor.from_checkpoint(args.model, name, args.norm)
        ids = predictor(image if predictor.image_format == "RGB" else image[..., ::-1], args.picture)
        space = predictor.space
        labelled[f"{name}: {space.num_classes} classes"] = (ids, space.classes, space.colors)
    pictures.save(pictures.in_label_spaces(image, labelled), args.output)
    print(f"{args.output}: {', '.join(labelled)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
