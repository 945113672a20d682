#!/usr/bin/env python
"""What self-training's labelling adds to its forward passes, and thresholds beside the sort-based definition.

    python benchmarks/labelling.py --images 3 --height 1024 --width 2048

A round passes over the target twice: one pass collects confidences, one writes label files. Each image is scored by a
network with random weights (EfficientNet-Lite0 if timm is there, else ResNet-18) for 19 classes; processor time of the
scoring and of everything else, interleaved, medians over the images. Then thresholds of many confidences: our streaming
selection beside sorting all of them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import multiseg_d2  # noqa: F401  isort: skip  (first: it lets Detectron2 be imported)
from detectron2.modeling import build_model

from multiseg_d2.engine import load_config
from multiseg_d2.engine.self_training.labelling import ConfidenceCollector, LabelWriter
from multiseg_d2.engine.self_training.thresholds import ConfidenceSamples

CLASSES = 19


def network(config: str) -> torch.nn.Module:
    """A segmentor for Cityscapes with random weights whose predictions are not all of one class."""
    keys = [
        "MODEL.DEVICE",
        "cpu",
        "MODEL.WEIGHTS",
        "",
        "DATASETS.TRAIN",
        "('cityscapes_train',)",
        "DATASETS.SPECS",
        "()",
    ]
    torch.manual_seed(0)
    model = build_model(load_config(config, keys)).eval()
    classifier = model.sem_seg_head.classifiers["cityscapes"]
    torch.nn.init.normal_(classifier.weight, std=1.0)
    sample = {"image": torch.randint(0, 256, (3, 128, 256), dtype=torch.uint8), "dataset": "cityscapes"}
    with torch.no_grad():  # scores of the size that trained networks have
        classifier.weight.mul_(3 / model([sample])[0]["sem_seg"].std())
    return model


def timed(function, *arguments):
    """Result and processor time in seconds."""
    start = time.process_time()
    result = function(*arguments)
    return result, time.process_time() - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--config-file", default="configs/quickstart/camvid.yaml")
    parser.add_argument("--confidences", type=int, default=5_000_000, help="for the comparison of thresholds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    label(args)
    thresholds(args.confidences)


def label(args: argparse.Namespace) -> None:
    """Times both passes."""
    model = network(args.config_file)
    generator = torch.Generator().manual_seed(1)
    scoring, collecting, writing = [], [], []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        collector = ConfidenceCollector(ConfidenceSamples(CLASSES, folder))
        collector.reset()
        writer = LabelWriter(folder, np.full(CLASSES, 0.5, np.float32))
        for i in range(args.images + 1):  # the first is not counted
            image = torch.nn.functional.interpolate(
                torch.rand(1, 3, 16, 32, generator=generator) * 255, (args.height, args.width), mode="bicubic"
            )[0].clamp(0, 255)
            sample = {"image": image.byte(), "dataset": "cityscapes", "image_id": str(i)}
            output, forward = timed(model, [sample])
            _, first = timed(collector.process, [sample], output)
            _, second = timed(writer.process, [sample], output)
            if i:
                scoring.append(forward)
                collecting.append(first)
                writing.append(second)
    forward, first, second = (statistics.median(values) for values in (scoring, collecting, writing))
    print(f"one image of {args.height} x {args.width}, {CLASSES} classes, processor time, median of {args.images}")
    print(f"  forward pass        {1000 * forward:8.0f} ms (two per image and round)")
    print(f"  confidences         {1000 * first:8.0f} ms")
    print(f"  label file          {1000 * second:8.0f} ms")
    print(f"  added to the passes {100 * (first + second) / (2 * forward):8.1f} %")


def thresholds(count: int) -> None:
    """Times the streaming selection beside sorting."""
    rng = np.random.default_rng(0)
    confidence = rng.random(count, np.float32) ** np.float32(0.1)
    labels = rng.integers(0, CLASSES, count).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        samples = ConfidenceSamples(CLASSES, Path(folder), stride=1)
        _, adding = timed(samples.add, confidence[None], labels[None])
        streamed, choosing = timed(samples.thresholds, 0.2)
        samples.close()

    def by_sorting() -> np.ndarray:
        lists = [np.sort(confidence[labels == c])[::-1] for c in range(CLASSES)]
        return np.array([values[int(len(values) * 0.2) - 1] for values in lists])

    expected, sorting = timed(by_sorting)
    print(f"thresholds of {count} confidences: streaming {adding:.2f} + {choosing:.2f} s, sorting {sorting:.2f} s")
    print(f"  equal: {bool((streamed == expected).all())}; sorting holds all confidences, streaming 127 KiB per class")


if __name__ == "__main__":
    main()
