"""Reading and augmenting one training image: this package against Detectron2's own mapper, side by side.

One 1024x2048 image and its label map are read, scaled by 0.5 to 2, cropped to 512x1024 and flipped, in one thread, as
in a worker of a loader. The two mappers take turns, so that other load on the machine meets both. Without ``--image`` a
picture with the statistics of a photograph is made, since the cost of decoding depends on the content.

    python benchmarks/read_augment.py
    python benchmarks/read_augment.py --image photo.jpg --label photo_ids.png
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

import multiseg_d2  # isort: skip  (first: it lets Detectron2 be imported)
import detectron2
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from multiseg_d2.data.decode import decode_color, decode_index, open_file
from multiseg_d2.data.labels import LabelReader, LabelTarget
from multiseg_d2.data.mapper import TrainMapper
from multiseg_d2.label_space import raw_to_local_table

HEIGHT, WIDTH, CLASSES = 1024, 2048, 19
CROP = (512, 1024)


def photograph(rng: np.random.Generator) -> np.ndarray:
    """A picture with about a 1/f spectrum, edges and sensor noise, (1024, 2048, 3) uint8 BGR."""
    fy, fx = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    amplitude = np.maximum(np.hypot(fy, fx), 1 / WIDTH) ** -1.2
    planes = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * rng.random(amplitude.shape))
        plane = np.fft.irfft2(amplitude * phase, (HEIGHT, WIDTH))
        planes.append(plane / plane.std())
    common = planes[0]  # the channels of a photograph are much alike
    picture = np.stack([0.85 * common + 0.4 * plane for plane in planes], axis=2) * 45 + 118
    for _ in range(150):  # objects with hard edges
        y, x = rng.integers(0, HEIGHT), rng.integers(0, WIDTH)
        h, w = rng.integers(10, 200, 2)
        picture[y : y + h, x : x + w] = picture[y : y + h, x : x + w] * 0.5 + rng.uniform(0, 120, 3)
    picture += rng.normal(0, 1.5, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def regions(rng: np.random.Generator) -> np.ndarray:
    """A label map of polygons with the detail of a street scene, (1024, 2048) uint8 in [0, 19) and 255."""
    label = np.full((HEIGHT, WIDTH), 255, np.uint8)
    for i in range(500):
        size = HEIGHT * (0.5 if i < 30 else 0.08)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
        radius = rng.uniform(0.4, 1, 12) * size
        points = (
            rng.uniform(0, 1, 2) * (WIDTH, HEIGHT) + np.stack([np.cos(angles), np.sin(angles)], 1) * radius[:, None]
        )
        cv2.fillPoly(label, [points.astype(np.int32)], int(rng.integers(CLASSES)))
    return label


def make_files(folder: Path, image: str, label: str) -> dict[str, dict[str, str]]:
    """Writes the inputs; returns a dataset dict per kind of image file."""
    rng = np.random.default_rng(0)
    pixels = cv2.resize(cv2.imread(image), (WIDTH, HEIGHT)) if image else photograph(rng)
    if label:
        ids = np.asarray(Image.open(label))
        ids = cv2.resize(ids, (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)
    else:
        ids = regions(rng)
    Image.fromarray(ids).save(folder / "label.png")
    picture = Image.fromarray(pixels[..., ::-1])
    picture.save(folder / "image.jpg", quality=90)
    picture.save(folder / "image.png")
    kinds = {"JPEG": folder / "image.jpg", "PNG": folder / "image.png"}
    if image.lower().endswith((".jpg", ".jpeg")) and cv2.imread(image).shape[:2] == (HEIGHT, WIDTH):
        kinds["JPEG"] = Path(image)  # as it is, not encoded again
    common = {"sem_seg_file_name": str(folder / "label.png"), "entry": "bench_train"}
    return {kind: {"file_name": str(path), **common} for kind, path in kinds.items()}


def mappers() -> dict[str, Callable[[dict, int], dict]]:
    """The two contestants as functions of (dataset dict, seed)."""
    table = raw_to_local_table([[i] for i in range(CLASSES)], [255])
    targets = {"bench_train": LabelTarget("bench", LabelReader("index", table))}
    ours = TrainMapper(targets, crop_size=CROP, scale_range=(0.5, 2.0), flip_probability=0.5)
    augmentations = [T.ResizeScale(0.5, 2.0, HEIGHT, WIDTH), T.RandomCrop("absolute", CROP), T.RandomFlip()]
    theirs = DatasetMapper(is_train=True, augmentations=augmentations, image_format="BGR")

    def run_theirs(dataset_dict: dict, seed: int) -> dict:
        np.random.seed(seed)  # noqa: NPY002  (Detectron2 draws from the global generator)
        return theirs(dataset_dict)

    return {
        "multiseg_d2": lambda dataset_dict, seed: ours(dataset_dict, np.random.default_rng(seed)),
        "Detectron2": run_theirs,
    }


def measure(functions: dict[str, Callable[[int], object]], repeats: int, title: str) -> dict[str, np.ndarray]:
    """Runs the functions in turn.

    Returns:
        Per function (repeats, 2) milliseconds: on the clock, and of this thread on a processor.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for seed in track(range(-2, repeats), description=title, console=Console(stderr=True), transient=True):
        for name, function in functions.items():
            clock, thread = time.perf_counter(), time.thread_time()
            function(max(seed, 0))
            if seed >= 0:  # the first two rounds warm up
                times[name].append(((time.perf_counter() - clock) * 1e3, (time.thread_time() - thread) * 1e3))
    return {name: np.array(pairs) for name, pairs in times.items()}


def summary(times: np.ndarray) -> dict[str, float]:
    """Median and quartiles of (repeats, 2) milliseconds."""
    low, median, high = np.percentile(times, [25, 50, 75], axis=0).round(2).tolist()
    return {"median_ms": median[0], "quartile_1_ms": low[0], "quartile_3_ms": high[0], "processor_median_ms": median[1]}


def check(contestants: dict[str, Callable[[dict, int], dict]], dataset_dict: dict) -> None:
    """Both must do the same job: a 512x1024 crop of the same picture with its labels."""
    samples = {name: run(dataset_dict, 0) for name, run in contestants.items()}
    for name, sample in samples.items():
        assert sample["image"].shape == (3, *CROP) and sample["sem_seg"].shape == CROP, name
    means = [sample["image"].float().mean().item() for sample in samples.values()]
    assert abs(means[0] - means[1]) < 40, means


def compare(
    contestants: dict[str, Callable[[dict, int], dict]], dataset_dict: dict, repeats: int, kind: str
) -> dict[str, Any]:
    """Measures the contestants, and decoding alone, on one kind of image; returns what is said about it."""
    check(contestants, dataset_dict)
    image, label = dataset_dict["file_name"], dataset_dict["sem_seg_file_name"]
    runs = {name: partial(run, dataset_dict) for name, run in contestants.items()}
    runs["decoding"] = lambda _: (decode_color(open_file(image)), decode_index(open_file(label)))
    rows = {name: summary(times) for name, times in measure(runs, repeats, kind).items()}
    clock, processor = (rows["Detectron2"][k] / rows["multiseg_d2"][k] for k in ("median_ms", "processor_median_ms"))
    return {
        "ratio": round(clock, 2),
        "ratio_processor": round(processor, 2),
        "image_kib": os.path.getsize(image) // 1024,
        "label_kib": os.path.getsize(label) // 1024,
        **rows,
    }


def circumstances(repeats: int) -> dict[str, Any]:
    """What was measured, with what, on what."""
    return {
        "what": f"read + scale 0.5-2 + crop {CROP[0]}x{CROP[1]} + flip: {HEIGHT}x{WIDTH} image + PNG label, one thread",
        "versions": {
            "multiseg_d2": multiseg_d2.__version__,
            "detectron2": detectron2.__version__,
            "torch": torch.__version__,
            "opencv": cv2.__version__,
            "python": platform.python_version(),
        },
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "repeats": repeats,
    }


def print_table(result: dict[str, Any]) -> None:
    """One row per kind of image."""
    table = Table("image", "KiB", "multiseg_d2", "Detectron2", "ratio", "decoding all rows", title=result["what"])
    cell = "{median_ms:.1f} ({quartile_1_ms:.1f}-{quartile_3_ms:.1f}); {processor_median_ms:.1f}"
    for kind, row in result["images"].items():
        cells = [cell.format(**row[name]) for name in ("multiseg_d2", "Detectron2", "decoding")]
        ratios = f"{row['ratio']:.2f}x; {row['ratio_processor']:.2f}x"
        table.add_row(kind, f"{row['image_kib']} + {row['label_kib']}", *cells[:2], ratios, cells[2])
    notes = (
        f"Detectron2 {result['versions']['detectron2']}, {result['repeats']} rounds in turn, load "
        f"{result['load_at_start']} on {result['cores']} cores. Milliseconds on the clock, median (quartiles); median "
        "of processor time."
    )
    Console(width=150).print(table, notes)


def main() -> None:
    """Measures, prints the table and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--image", default="", help="a photograph to use instead of the made one (resized to 1024x2048)"
    )
    parser.add_argument("--label", default="", help="its label map, ids 0..18 and 255")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--output", default="output/benchmarks/read_augment.json", help="result file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)

    contestants = mappers()
    result = circumstances(args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), args.image, args.label)
        result["images"] = {kind: compare(contestants, d, args.repeats, kind) for kind, d in files.items()}
    print_table(result)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
