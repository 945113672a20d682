#!/usr/bin/env python
r"""Evaluates a trained model on datasets that it was not trained on, once for every way to choose the batch norm.

    python tools/compare_unseen.py --config-file configs/quickstart/four_datasets.yaml \
        MODEL.WEIGHTS output/quickstart/four_datasets/model_final.pth DATASETS.TEST "('comma10k_sample_train',)"

The choices are those of MODEL.DATASET_NORM.UNSEEN: the branch of each trained dataset, the nearest one by the
statistics of the norms' inputs, the average of all, and the nearest one with statistics re-estimated on the unseen
images (without their labels). Datasets of DATASETS.TEST that the model was trained on are left out. Prints one table
and writes it to OUTPUT_DIR as unseen.md and unseen.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import multiseg_d2  # noqa: F401  first: it makes Detectron2 importable where parts of it are missing

# isort: split
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from rich.console import Console
from rich.table import Table
from torch import nn

from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.engine import Trainer, add_config_arguments, load_weights, setup
from multiseg_d2.engine.dataset_pass import run_over
from multiseg_d2.engine.unseen import NUM_IMAGES
from multiseg_d2.modeling.norm.unseen import CHOICES, is_unseen
from multiseg_d2.progress import CONSOLE
from multiseg_d2.user_error import run_script


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 if no dataset of DATASETS.TEST is unseen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--images", type=int, default=NUM_IMAGES, help="unseen images that are looked at (%(default)s)")
    args = parser.parse_args(argv)
    args.opts = [*args.opts, *_ANY]
    cfg = setup(args)
    model = Trainer.build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS, complete=True)
    unseen = [name for name in cfg.DATASETS.TEST if is_unseen(model, MetadataCatalog.get(name).dataset)]
    if not unseen:
        print(f"all of DATASETS.TEST {cfg.DATASETS.TEST} were trained on: name an unseen one", file=sys.stderr)
        return 2
    choices = [*model.sem_seg_head.datasets, *CHOICES[1:]]
    pairs = [(name, choice) for name in unseen for choice in choices]
    rows = []
    for name, choice in pairs:  # each pass shows its own progress
        CONSOLE.print(f"[{len(rows) + 1} of {len(pairs)}] {name} by {choice!r}", markup=False, soft_wrap=True)
        rows.append(evaluate(cfg, model, name, choice, args.images))
    write_atomically(Path(cfg.OUTPUT_DIR, "unseen.json"), json.dumps(rows, indent=1))
    write_atomically(Path(cfg.OUTPUT_DIR, "unseen.md"), to_markdown(rows))
    out = Console()
    if not out.is_terminal:
        out.width = max(out.width, 160)  # a log file has no narrow window
    out.print(to_table(rows))
    return 0


#: The config check wants a decision; here all of them are tried.
_ANY = ("MODEL.DATASET_NORM.UNSEEN", "nearest")


def evaluate(cfg: CfgNode, model: nn.Module, name: str, choice: str, images: int = NUM_IMAGES) -> dict[str, Any]:
    """One row: scores of one dataset under one choice."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DATASET_NORM.UNSEEN = choice
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, f"unseen_{choice}"))
    evaluator = Trainer.build_evaluator(cfg, name)
    choices: list[Any] = []
    scores = run_over(cfg, model, name, evaluator, on_ready=choices.append, looked_at=images)["sem_seg"]
    (chosen,) = choices
    row = {"dataset": name, "choice": choice, "norm": chosen.norm, "classifier": chosen.classifier}
    classes = len(MetadataCatalog.get(name).label_space.classes)
    row["nameable"] = f"{classes - len(chosen.unnameable)} of {classes}"
    numbers = {key: scores[key] for key in ("mIoU", "fwIoU", "pACC")}
    return {**row, **numbers, "distances": chosen.distances}


def to_table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal."""
    table = Table(title="Unseen datasets: which batch norm and classifier")
    for head in _HEADS:
        table.add_column(head, justify="right" if head in _NUMBERS else "left", no_wrap=head == "choice")
    for row in rows:
        table.add_row(*_texts(row))
    return table


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """For a page."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|" + "|".join("---:" if h in _NUMBERS else "---" for h in _HEADS) + "|"]
    lines += ["| " + " | ".join(_texts(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


_NUMBERS = ("mIoU", "fwIoU", "pACC")
_HEADS = ("dataset", "choice", "classifier", "classes it can name", *_NUMBERS, "distances")


def _texts(row: dict[str, Any]) -> list[str]:
    distances = ", ".join(f"{name} {value:.2f}" for name, value in row["distances"].items())
    texts = [row[key] for key in ("dataset", "choice", "classifier", "nameable")]
    return [*texts, *(f"{row[key]:.2f}" for key in _NUMBERS), distances]


if __name__ == "__main__":
    sys.exit(run_script(main))
