#!/usr/bin/env python
r"""Measures prototypes of any size for MODEL.SEM_SEG_HEAD.CLASS_STATISTICS of EntropyHead.

    python tools/prototypes.py --config-file configs/universal_semi/toy.yaml --dim 64 --centroids 3 \
        --output prototypes.npz MODEL.WEIGHTS output/universal_semi/toy_basic/model_final.pth

One pass over the labelled images of DATASETS.TRAIN with the weights of MODEL.WEIGHTS. The embedding of a model that is
trained with the file has its d, each class as many prototypes, and they are frozen or move as the file says.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from multiseg_d2.engine import Trainer, add_config_arguments, setup
from multiseg_d2.engine.dataset_pass import run_over
from multiseg_d2.modeling.heads import EntropyHead
from multiseg_d2.modeling.prototypes import PrototypeSource
from multiseg_d2.user_error import ConfigError, run_script


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--dim", type=int, default=100, help="d, at most the width of the decoder; %(default)s")
    parser.add_argument("--centroids", type=int, default=1, help="prototypes of each class, by k-means; %(default)s")
    parser.add_argument("--momentum", type=float, default=1.0, help="share they keep per step; 1 = frozen (default)")
    parser.add_argument("--output", type=Path, required=True, metavar="NPZ", help="file to write")
    args = parser.parse_args(argv)
    if args.dim < 1 or args.centroids < 1 or not 0 <= args.momentum <= 1:
        parser.error("--dim and --centroids are at least 1, --momentum lies in [0, 1]")
    if args.momentum < 1 and args.centroids > 1:
        parser.error("prototypes that follow the labelled pixels are means: --centroids 1, or --momentum 1")
    if args.output.suffix != ".npz":
        parser.error(f"--output {args.output}: the name must end in .npz")
    args.opts, args.eval_only = [*args.opts, "MODEL.SEM_SEG_HEAD.CLASS_STATISTICS", ""], False
    cfg = setup(args)
    model = Trainer.build_model(cfg)
    head = model.sem_seg_head
    if not isinstance(head, EntropyHead):
        raise ConfigError(f"MODEL.SEM_SEG_HEAD.NAME is {cfg.MODEL.SEM_SEG_HEAD.NAME}, not EntropyHead")
    source = dataclasses.replace(PrototypeSource.from_config(cfg), statistics=cfg.MODEL.WEIGHTS, folder="")
    found = source.find(head, partial(run_over, cfg, model), args.dim, args.centroids)
    dataclasses.replace(found, momentum=args.momentum).save(args.output)
    datasets = ", ".join(found.classes)
    print(f"{args.output}: {found.shape[0]} prototypes of {found.shape[1]} dimensions for each class of {datasets}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
