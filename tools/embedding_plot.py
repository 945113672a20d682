#!/usr/bin/env python
r"""Shows what pixels of several datasets look like to a trained model: t-SNE of their features, and nearest classes.

    python tools/embedding_plot.py --config-file configs/universal_semi/toy.yaml \
        MODEL.WEIGHTS output/universal_semi/toy/model_final.pth

writes to OUTPUT_DIR/embedding: for the decoder's output `decoder.png`, `decoder.csv` (places, dataset and class of each
pixel) and `decoder_nearest.csv` (for each class the nearest one of every other dataset, printed as well); for a model
of EntropyHead also `module.*`, the same of the embedding in which entropy is taken. Of each class of each dataset of
DATASETS.TEST at most --pixels pixels are taken. Run it for models with and without the module to compare them.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import multiseg_d2  # noqa: F401  first: it makes Detectron2 importable where parts of it are missing

# isort: split
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.engine import Trainer, add_config_arguments, load_weights, setup
from multiseg_d2.engine.dataset_pass import run_over
from multiseg_d2.evaluation.embedding_plot import PixelSample, draw_map, nearest_classes, tsne, write_points
from multiseg_d2.modeling.prototypes import PixelFeatures
from multiseg_d2.user_error import run_script


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--pixels", type=int, default=100, help="most pixels of one class of one dataset (default 100)")
    args = parser.parse_args(argv)
    cfg = setup(args)
    model = Trainer.build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS, complete=True)
    sample, folder = gather(cfg, model, args.pixels), Path(cfg.OUTPUT_DIR, "embedding")
    views = {"decoder": sample.features}
    if module := getattr(model.sem_seg_head, "entropy", None):
        views["module"] = embedded(module.embedding, sample.features)
    for name, features in views.items():
        shown = PixelSample(features, sample.datasets, sample.classes, sample.names)
        places, rows = tsne(features), nearest_classes(shown)
        write_points(folder / f"{name}.csv", shown, places)
        draw_map(folder / f"{name}.png", shown, places, f"{name}: {Path(cfg.MODEL.WEIGHTS).parent.name}")
        write_atomically(folder / f"{name}_nearest.csv", to_csv(rows))
        print(f"\n{name}: nearest classes of the other datasets")
        for row in rows:
            print("{dataset:>20} {class:<28} {other:>20} {nearest:<28} {cosine:6.3f}".format(**row))
    print(f"\nwritten to {folder}")
    return 0


def gather(cfg: CfgNode, model: nn.Module, most: int) -> PixelSample:
    """Features of labelled pixels of every dataset of DATASETS.TEST, one entry of each."""
    pixels, names = {}, {}
    for entry in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(entry)
        if metadata.dataset in pixels:
            continue
        names[metadata.dataset] = metadata.label_space.classes
        evaluator = PixelFeatures(len(metadata.label_space.classes), model.sem_seg_head.trunk.out_channels, sample=True)
        found = run_over(cfg, model, entry, evaluator, labels=True, embeddings=True)
        pixels[metadata.dataset] = found["pixels"].sample
    return PixelSample.of(pixels, names, most)


@torch.no_grad()
def embedded(embedding: nn.Module, features: np.ndarray) -> np.ndarray:
    """(P, d) of (P, D) features."""
    device = next(embedding.parameters()).device
    return embedding(torch.from_numpy(features).to(device)[:, :, None, None])[:, :, 0, 0].cpu().numpy()


def to_csv(rows: Sequence[dict]) -> str:
    """One line per row under the names of their values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["dataset"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(run_script(main))
