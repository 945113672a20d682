#!/usr/bin/env python
"""Trains and evaluates one model on several datasets; ``train_net.py --help`` shows how."""

from __future__ import annotations

import argparse
import sys

from multiseg_d2.engine import Trainer, argument_parser, launch, load_weights, run_script, setup


def main(args: argparse.Namespace) -> object:
    """What every process of the run does."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        load_weights(model, cfg.MODEL.WEIGHTS, complete=True)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    arguments = argument_parser().parse_args()
    sys.exit(run_script(lambda: launch(main, arguments)))
