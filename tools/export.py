#!/usr/bin/env python
"""Writes a trained model's branch and classes of one dataset as ONNX or TorchScript, for programs without this one.

    python tools/export.py --config-file configs/quickstart/toy.yaml --weights output/quickstart/toy/model_final.pth \
        --dataset toy_day --picture street.png --output exported

The file takes images of one size, (1, 3, H, W) float on the scale 0 to 255 with the channels of ``INPUT.FORMAT``, and
gives scores (logits) of the same size; normalisation and padding are inside. Beside it lies a ``.json`` with names and
colours of the classes. Each file is run on the picture and compared with the model; one that computes something else is
removed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import multiseg_d2.modeling  # noqa: F401  first: it makes Detectron2 importable where parts of it are missing

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image

from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.checkpoint import load_weights
from multiseg_d2.data.register import register_from_config
from multiseg_d2.engine import Trainer, load_config
from multiseg_d2.engine.export import FORMATS, DeployedSegmentor, ExportError, compare, describe, export
from multiseg_d2.user_error import ConfigError, UserError, run_script


def read_picture(path: str, image_format: str, size: Sequence[int] | None) -> torch.Tensor:
    """(3, H, W) uint8; resized to ``size`` (height, width) where one is given."""
    image = torch.from_numpy(read_image(path, format=image_format).copy()).permute(2, 0, 1)
    if size is not None and tuple(image.shape[1:]) != tuple(size):
        image = torch.nn.functional.interpolate(image[None].float(), size=tuple(size), mode="bilinear")[0].byte()
    return image


def write(cfg: CfgNode, dataset: str, image: torch.Tensor, output: Path, kinds: Sequence[str]) -> list[str]:
    """Exports a config's model in each format; returns one line per file.

    Raises:
        ConfigError: the model was not trained on this dataset.
        CheckpointError: the weights are missing, or another model's.
        ExportError: a file cannot be written or differs from the model; the latter is removed.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"  # files are the same wherever they were traced, and are compared there
    model = Trainer.build_model(cfg).eval()
    head = model.sem_seg_head
    if dataset not in head.datasets:
        raise ConfigError(f"--dataset {dataset}: the model was trained on {list(head.datasets)}")
    load_weights(model, cfg.MODEL.WEIGHTS, complete=True)
    network = DeployedSegmentor(model, dataset, head.spaces[head.space_of[dataset]], tuple(image.shape[1:]))
    write_atomically(output / f"{dataset}.json", json.dumps(describe(network, cfg.INPUT.FORMAT), indent=2) + "\n")
    lines = []
    for kind in kinds:
        path = output / f"{dataset}{FORMATS[kind]}"
        export(network, path, kind)
        try:
            difference = compare(network, path, kind, image)
        except ExportError:
            path.unlink()
            raise
        lines.append(f"{path}: {kind}, largest difference to the model {difference:.1e} of the largest score")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="the config that the model was trained with")
    parser.add_argument("--weights", default="", help="the trained model; default: MODEL.WEIGHTS of the config")
    parser.add_argument("--dataset", required=True, help="trained dataset whose norms and classes are wanted")
    parser.add_argument("--picture", required=True, help="picture to compare on; gives the size unless --size does")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="size of the images")
    parser.add_argument("--format", nargs="+", choices=tuple(FORMATS), default=list(FORMATS), help="default: all")
    parser.add_argument("--output", required=True, type=Path, help="folder")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config, last")
    args = parser.parse_args(argv)
    try:
        cfg = load_config(args.config_file, args.opts)
        cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
        register_from_config(cfg)
        image = read_picture(args.picture, cfg.INPUT.FORMAT, args.size)
        print("\n".join(write(cfg, args.dataset, image, args.output, args.format)))
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run_script(main))
