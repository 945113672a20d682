"""Evaluating one 1024x2048 image, from a network's stride-8 scores to counts, beside Detectron2 and MMSegmentation.

All get the same float32 scores at an eighth of the size and read the same label PNG; they take turns, in processor
time, so that other load on the machine meets all. The counts must agree. Detectron2's way is resizing, and its own
SemSegEvaluator, which takes the argmax. MMSegmentation's way (1.2) is written down here from its description: resizing,
argmax, and three histograms of the pixels that are not ignored. Then the memory that each evaluator holds after many
images is compared.

    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --classes 19 --threads 2
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
from torch.nn import functional

import multiseg_d2  # isort: skip  (first: it lets Detectron2 be imported)
import detectron2
from detectron2.data import DatasetCatalog

from multiseg_d2.data.labels import read_local_label
from multiseg_d2.evaluation import MultiDatasetEvaluator, confusion
from multiseg_d2.modeling.inference import Prediction
from multiseg_d2.modeling.score_maps import Resized

SIZE = (1024, 2048)


def write_dataset(folder: Path, name: str, height: int, width: int, classes: int) -> str:
    """One picture and its label map of polygons, ids and 255; returns the name of the catalog entry."""
    folder = folder / name
    rng = np.random.default_rng(0)
    label = np.full((height, width), 255, np.uint8)
    for i in range(90):
        size = height * (0.9 if i < 15 else 0.12)
        center = rng.uniform(0, 1, 2) * (width, height)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = rng.uniform(0.2, 1, 9) * size / 2
        points = center + np.stack([np.cos(angles), np.sin(angles)], 1) * radius[:, None]
        cv2.fillPoly(label, [points.astype(np.int32)], int(rng.integers(classes)))
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    cv2.imwrite(str(folder / "labels/0.png"), label)
    cv2.imwrite(str(folder / "images/0.png"), np.zeros((height, width), np.uint8))
    listing = "\n".join(f"  - {{name: class {c}, color: [{c}, 0, 0], raw: [{c}]}}" for c in range(classes))
    (folder / "spec.yaml").write_text(
        f"name: {name}\nannotation: pixel\nencoding: index\nignore: [255]\n"
        f"classes:\n{listing}\n"
        f'splits: {{val: {{images: "{folder}/images/{{id}}.png", labels: "{folder}/labels/{{id}}.png"}}}}\n'
    )
    return multiseg_d2.register_dataset(folder / "spec.yaml")[0]


def make_scores(label: np.ndarray, classes: int) -> torch.Tensor:
    """(C, H / 8, W / 8) float32 with the smooth borders and the noise of a trained network, right on most pixels."""
    target = torch.from_numpy(label[4::8, 4::8].astype(np.int64)).clamp(max=classes - 1)
    leads = functional.one_hot(target, classes).permute(2, 0, 1).float()[None]
    leads = functional.avg_pool2d(leads, 3, 1, 1, count_include_pad=False)[0]
    return 8 * leads + 0.5 * torch.randn(leads.shape, generator=torch.Generator().manual_seed(0))


def resized(scores: torch.Tensor) -> torch.Tensor:
    """(C, H, W), as the segmentors of both programs give them."""
    return functional.interpolate(scores[None], size=SIZE, mode="bilinear", align_corners=False)[0]


def histograms(prediction: torch.Tensor, truth: torch.Tensor, classes: int) -> tuple[torch.Tensor, ...]:
    """Hits, predicted and labelled pixels of each class, by three histograms: MMSegmentation's way of counting."""
    labelled = truth != 255
    prediction, truth = prediction[labelled], truth[labelled]
    kinds = (prediction[prediction == truth], prediction, truth)
    return tuple(torch.histc(kind.float(), bins=classes, min=0, max=classes - 1) for kind in kinds)


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
    """Milliseconds of processor time of one call."""
    start = time.process_time()
    job()
    return 1000 * (time.process_time() - start)


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
    outputs = [{"sem_seg": torch.randn(19, *truth.shape, generator=torch.Generator().manual_seed(0))}]
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
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 171])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--images", type=int, default=300, help="images of the memory comparison; 0 = leave it out")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"Detectron2 {detectron2.__version__}, torch {torch.__version__}, {args.threads} threads")
    times, megabytes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for classes in args.classes:
            catalog = write_dataset(Path(folder), f"full{classes}", *SIZE, classes)
            times[classes] = compare_speed(catalog, classes, args.repeats)
            report(times[classes], classes, args)
        if args.images:
            megabytes = compare_memory(write_dataset(Path(folder), "small", 256, 512, 19), args.images)
    for name, value in megabytes.items():
        print(f"  {name:<20} resident memory +{value:.1f} MB over {args.images // 2} noisy 256x512 predictions")
    if args.json:
        args.json.write_text(json.dumps({"milliseconds": times, "growth_mb": megabytes}, indent=2) + "\n")


def compare_speed(catalog: str, classes: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of all ways and of our parts; asserts that the counts agree."""
    (sample,) = DatasetCatalog.get(catalog)
    truth = read_local_label(sample)
    scores = make_scores(truth, classes)
    answer = Prediction(Resized(scores, SIZE))
    ours, theirs = MultiDatasetEvaluator(catalog, distributed=False), detectron2_evaluator(catalog)
    found = []

    def mmsegmentation() -> None:
        label = cv2.imread(sample["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
        found[:] = histograms(resized(scores).argmax(0), torch.from_numpy(label), classes)

    prediction = answer["sem_seg_labels"].numpy()
    jobs = {
        "ours": lambda: ours.process([sample], [answer]),
        "Detectron2": lambda: theirs.process([sample], [{"sem_seg": resized(scores)}]),
        "MMSegmentation": mmsegmentation,
        "  ours: labels": lambda: answer["sem_seg_labels"],
        "  ours: read label": lambda: read_local_label(sample),
        "  ours: count": lambda: confusion.count(prediction, truth, classes),
    }
    times = measure(jobs, repeats)
    matrix = ours._matrices["plain"]
    # Detectron2: rows are predictions; the last row and column hold ignored pixels. Rounding may decide ties.
    different = np.abs(matrix[:, :classes] - theirs._conf_matrix[:classes, :classes].T).sum()
    assert different <= 4 * (repeats + 1), f"counts differ in {different} cells"
    counts = np.stack([matrix.diagonal(), matrix[:, :classes].sum(0), matrix.sum(1)]) / (repeats + 1)
    assert np.abs(counts - torch.stack(found).numpy()).max() <= 2, "counts differ from the histograms"
    return times


def compare_memory(catalog: str, images: int) -> dict[str, float]:
    """MB by which each evaluator grows."""
    (sample,) = DatasetCatalog.get(catalog)
    ours, theirs = MultiDatasetEvaluator(catalog, distributed=False), detectron2_evaluator(catalog)
    return {"ours": growth(ours, sample, images), "Detectron2": growth(theirs, sample, images)}


def report(times: dict[str, list[float]], classes: int, args: argparse.Namespace) -> None:
    """Prints medians, spread and ratios."""
    print(f"{SIZE[0]}x{SIZE[1]}, {classes} classes, scores -> counts; milliseconds of {args.repeats} rounds in turns")
    ratios = {f"{name} / ours": [b / a for a, b in zip(times["ours"], times[name])] for name in list(times)[1:3]}
    for name, values in {**times, **ratios}.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"  {name:<22} median {middle:7.1f}   range {low:7.1f} .. {high:7.1f}", flush=True)


if __name__ == "__main__":
    main()
