#!/usr/bin/env python
r"""Writes a trained model as one small file for others, with its label spaces inside and without what training needs.

    python tools/share.py --config-file configs/quickstart/toy.yaml \
        --weights output/quickstart/toy/model_final.pth --output toy.pth

Whoever has the file needs neither the config nor the datasets:
``multiseg_d2.engine.Predictor.from_checkpoint("toy.pth", space="toy_day")``. The label spaces in it are those of
DATASETS.TRAIN and DATASETS.TEST. Convolutions are stored in float16 unless ``--full`` is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import multiseg_d2.modeling  # noqa: F401  first: it makes Detectron2 importable where parts of it are missing

# isort: split
from multiseg_d2.engine import load_config, register_config, run_script
from multiseg_d2.engine.shared_model import read_shared_model, write_shared_model


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="the config that the model was trained with")
    parser.add_argument("--weights", default="", help="the trained model; default: MODEL.WEIGHTS of the config")
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    parser.add_argument("--full", action="store_true", help="store everything in float32: about twice as large")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config, last")
    args = parser.parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
    register_config(cfg)
    size = write_shared_model(cfg, args.output, half=not args.full)
    _, _, spaces = read_shared_model(args.output)
    print(f"{args.output}: {size / 1e6:.1f} MB, label spaces {', '.join(sorted(spaces))}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
