#!/usr/bin/env python
r"""Writes a trained model as one small file for others, with its label spaces inside and without what training needs.

    python tools/share.py --config-file configs/quickstart/toy.yaml \
        --weights output/quickstart/toy/model_final.pth --output toy.pth

Whoever has the file needs neither the config nor the datasets:
``multiseg_d2.engine.Predictor.from_checkpoint("toy.pth", space="toy_day")``. The label spaces in it are those of
DATASETS.TRAIN and DATASETS.TEST. Convolutions are stored in float16 unless ``--full`` is given.

All models behind a table of ``tools/claims.py``, a file per row and seed::

    python tools/share.py --claim benchmarks/claims/one_footing.yaml --runs output/claims/runs --output shared
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import multiseg_d2.modeling  # noqa: F401  first: it makes Detectron2 importable where parts of it are missing

# isort: split
from detectron2.config import CfgNode

from multiseg_d2.claims import load_claim, plan
from multiseg_d2.engine import load_config, register_config, run_script
from multiseg_d2.engine.shared_model import read_shared_model, write_shared_model
from multiseg_d2.user_error import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(argv)
    if args.claim:
        return _share_table(args)
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
    _share(cfg, args.output, args.full)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", help="the config that the model was trained with")
    what.add_argument("--claim", type=Path, help="claims file, all of whose finished runs are shared")
    parser.add_argument("--weights", default="", help="the trained model; default: MODEL.WEIGHTS of the config")
    parser.add_argument("--runs", type=Path, default=Path("output/claims/runs"), help="runs of --claim; %(default)s")
    parser.add_argument("--output", required=True, type=Path, help="the file to write; with --claim, the folder")
    parser.add_argument("--full", action="store_true", help="store everything in float32: about twice as large")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config, last")
    return parser


def _share_table(args: argparse.Namespace) -> int:
    """Returns 1 where nothing has been run yet.

    Raises:
        UserError: labels of rows that differ in nothing that a file's name can have.
    """
    jobs = [job for job in plan(load_claim(args.claim), args.runs, any_source=True) if job.cells]
    done = [job for job in jobs if job.record]
    names = [re.sub(r"[^a-z0-9]+", "_", job.title.lower()) + ".pth" for job in done]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{args.claim}: several rows would be written to {', '.join(twice)}: give them other labels")
    args.output.mkdir(parents=True, exist_ok=True)
    for job, name in zip(done, names):
        cfg = load_config(str(job.phase.config), job.overrides)
        cfg.MODEL.WEIGHTS = str(job.weights if job.phase.eval_only else job.record.folder / "model_final.pth")
        _share(cfg, args.output / name, args.full)
    print(f"{len(done)} of {len(jobs)} models of {args.claim}")
    return 0 if done else 1


def _share(cfg: CfgNode, path: Path, full: bool) -> None:
    register_config(cfg)
    size = write_shared_model(cfg, path, half=not full)
    _, _, spaces = read_shared_model(path)
    print(f"{path}: {size / 1e6:.1f} MB, label spaces {', '.join(sorted(spaces))}")


if __name__ == "__main__":
    sys.exit(run_script(main))
