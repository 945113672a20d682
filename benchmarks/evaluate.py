"""Evaluating one 1024x2048 prediction of 19 classes, from logits to counts: ours beside Detectron2's SemSegEvaluator.

Both evaluators get the same float32 logits and read the same label PNG; they take turns, so that other load on the
machine meets both. The counts must agree in every cell. Then the memory that each holds after many images is compared.

    python benchmarks/evaluate.py
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

import multiseg_d2  # isort: skip  (first: it lets Detectron2 be imported)
import detectron2
from detectron2.data import DatasetCatalog

from multiseg_d2.data.labels import read_local_label
from multiseg_d2.evaluation import MultiDatasetEvaluator, confusion

CLASSES = 19


def write_dataset(folder: Path, name: str, height: int, width: int) -> str:
    """One picture and its label map of polygons, ids 0 to 18 and 255; returns the name of the catalog entry."""
    folder = folder / name
    rng = np.random.default_rng(0)
    label = np.full((height, width), 255, np.uint8)
    for i in range(400):
        size = height * (0.9 if i < 20 else 0.15)
        center = rng.uniform(0, 1, 2) * (width, height)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = rng.uniform(0.2, 1, 9) * size / 2
        points = center + np.stack([np.cos(angles), np.sin(angles)], 1) * radius[:, None]
        cv2.fillPoly(label, [points.astype(np.int32)], int(rng.integers(CLASSES)))
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    cv2.imwrite(str(folder / "labels/0.png"), label)
    cv2.imwrite(str(folder / "images/0.png"), np.zeros((height, width), np.uint8))
    classes = "\n".join(f"  - {{name: class {c}, color: [{c}, 0, 0], raw: [{c}]}}" for c in range(CLASSES))
    (folder / "spec.yaml").write_text(
        f"name: {name}\nannotation: pixel\nencoding: index\nignore: [255]\n"
        f"classes:\n{classes}\n"
        f'splits: {{val: {{images: "{folder}/images/{{id}}.png", labels: "{folder}/labels/{{id}}.png"}}}}\n'
    )
    return multiseg_d2.register_dataset(folder / "spec.yaml")[0]


def make_logits(label: np.ndarray) -> torch.Tensor:
    """(19, H, W) float32, upsampled from stride 8 as a model's are, right on most pixels."""
    height, width = label.shape
    target = torch.from_numpy(label[::8, ::8].astype(np.int64)).clamp(max=CLASSES - 1)
    coarse = torch.nn.functional.one_hot(target, CLASSES).permute(2, 0, 1)[None] * 3.0
    coarse = coarse + torch.randn(coarse.shape, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0].contiguous()


def detectron2_evaluator(catalog: str):
    """Detectron2's evaluator; 0.5 needs names that numpy 2 no longer has."""
    for name, kind in (("int", int), ("float", float)):
        if not hasattr(np, name):
            setattr(np, name, kind)
    from detectron2.evaluation import SemSegEvaluator

    evaluator = SemSegEvaluator(catalog, distributed=False)
    evaluator.reset()
    return evaluator


def clock(job) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    job()
    return 1000 * (time.perf_counter() - start)


def measure(jobs: dict, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each job, in turns, after one round that is not counted."""
    times = {name: [] for name in jobs}
    for round_number in range(repeats + 1):
        for name, job in jobs.items():
            taken = clock(job)
            if round_number:
                times[name].append(taken)
    return times


def growth(evaluator, sample: dict, images: int) -> float:
    """How many MB the resident set grows over the second half of ``images`` noisy predictions."""
    truth = read_local_label(sample)
    outputs = [{"sem_seg": torch.randn(CLASSES, *truth.shape, generator=torch.Generator().manual_seed(0))}]
    sizes = []
    for _ in range(2):
        for _ in range(images // 2):
            evaluator.process([sample], outputs)
        sizes.append(_resident_bytes())
    return (sizes[1] - sizes[0]) / 2**20


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak has to do
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--images", type=int, default=300, help="images of the memory comparison; 0 = leave it out")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        times = compare_speed(write_dataset(Path(folder), "full", 1024, 2048), args.repeats)
        megabytes = compare_memory(write_dataset(Path(folder), "small", 256, 512), args.images) if args.images else {}
    report(times, megabytes, args)
    if args.json:
        args.json.write_text(json.dumps({"milliseconds": times, "growth_mb": megabytes}, indent=2) + "\n")


def compare_speed(catalog: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of both evaluators and of our parts; asserts that the counts agree."""
    (sample,) = DatasetCatalog.get(catalog)
    truth = read_local_label(sample)
    logits = make_logits(truth)
    prediction, outputs = confusion.argmax(logits.numpy()), [{"sem_seg": logits}]
    ours, theirs = MultiDatasetEvaluator(catalog, distributed=False), detectron2_evaluator(catalog)
    jobs = {
        "ours": lambda: ours.process([sample], outputs),
        "Detectron2": lambda: theirs.process([sample], outputs),
        "  ours: argmax": lambda: confusion.argmax(logits.numpy()),
        "  ours: label": lambda: read_local_label(sample),
        "  ours: count": lambda: confusion.count(prediction, truth, CLASSES),
        "  torch.argmax": lambda: logits.argmax(0),
    }
    times = measure(jobs, repeats)
    # Detectron2: rows are predictions; the last row and column hold ignored pixels.
    assert (ours._matrices["plain"][:, :CLASSES] == theirs._conf_matrix[:CLASSES, :CLASSES].T).all(), "counts differ"
    return times


def compare_memory(catalog: str, images: int) -> dict[str, float]:
    """MB by which each evaluator grows."""
    (sample,) = DatasetCatalog.get(catalog)
    ours, theirs = MultiDatasetEvaluator(catalog, distributed=False), detectron2_evaluator(catalog)
    return {"ours": growth(ours, sample, images), "Detectron2": growth(theirs, sample, images)}


def report(times: dict[str, list[float]], megabytes: dict[str, float], args: argparse.Namespace) -> None:
    """Prints medians, spread and ratios."""
    versions = f"Detectron2 {detectron2.__version__}, torch {torch.__version__}"
    print(f"{versions}, {args.threads} threads, {os.cpu_count()} cores")
    print(f"1024x2048, {CLASSES} classes, logits -> counts; milliseconds of {args.repeats} rounds in turns")
    ratios = [b / a for a, b in zip(times["ours"], times["Detectron2"])]
    for name, values in {**times, "ratio": ratios}.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"  {name:<16} median {middle:7.1f}   range {low:7.1f} .. {high:7.1f}")
    rest = statistics.median(times["Detectron2"]) - statistics.median(times["  torch.argmax"])
    print(f"  Detectron2 without its argmax: {rest:.1f}; the counts agree in every cell")
    for name, value in megabytes.items():
        print(f"  {name:<16} resident memory +{value:.1f} MB over {args.images // 2} noisy 256x512 predictions")


if __name__ == "__main__":
    main()
