"""Losses and labels in pieces beside the same on scores of full size: time and memory, in one run.

For each number of classes the two ways take turns; what they give must agree. Times are processor time of all threads;
"wall" is the ratio of the times on the clock, which counts where there are several threads. Memory is what a call needs
beyond the scores and labels that it is given. The full-size losses are PyTorch's own functions; the full-size labels
are resized scores and this project's fast argmax.

    python benchmarks/pieces.py
    python benchmarks/pieces.py --classes 19 171 --threads 2 --repeats 5
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import multiseg_d2  # noqa: F401  isort: skip  (first: it lets Detectron2 be imported)
from multiseg_d2.evaluation import confusion
from multiseg_d2.modeling.inference import confident_labels, label_map
from multiseg_d2.modeling.losses import binary_loss, cross_entropy, soft_cross_entropy
from multiseg_d2.modeling.score_maps import Resized

IGNORE = -1
CROP, IMAGE = (512, 512), (1024, 2048)
Job = Callable[[], object]


def street(classes: int, height: int, width: int, noise: float = 0.5) -> Tensor:
    """(C, h, w) scores of areas with smooth borders and noise, as of a trained network at an eighth of the size."""
    rng, label = np.random.default_rng(0), np.zeros((height, width), np.uint8)
    for i in range(90):
        size = height * (0.9 if i < 15 else 0.12)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * (rng.uniform(0.2, 1, 9) * size / 2)[:, None]
        center = rng.uniform(0, 1, 2) * (width, height)
        cv2.fillPoly(label, [(center + points).astype(np.int32)], int(rng.integers(classes)))
    leads = F.one_hot(torch.from_numpy(label.astype(np.int64)), classes).permute(2, 0, 1).float()
    leads = F.avg_pool2d(leads[None], 3, 1, 1, count_include_pad=False)[0]
    return 8 * leads + noise * torch.randn(leads.shape, generator=torch.Generator().manual_seed(0))


def different(scores: Tensor) -> float:
    """Share of the cells between four neighbouring positions of (C, h, w) scores in which not one class leads."""
    lead = scores.argmax(0)
    corner = lead[1:, 1:]
    return float(((lead[:-1, :-1] != corner) | (lead[:-1, 1:] != corner) | (lead[1:, :-1] != corner)).float().mean())


def full_size(logits: Tensor) -> Tensor:
    """(N, C, 512, 512)."""
    return F.interpolate(logits, size=CROP, mode="bilinear", align_corners=False)


def full_size_binary(logits: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """Binary cross-entropy over present classes, as one writes it with PyTorch's functions."""
    valid = target != IGNORE
    one_hot = torch.zeros(len(target), logits.shape[1], *CROP)
    one_hot.scatter_(1, target.masked_fill(~valid, 0)[:, None], valid[:, None].float())
    loss = F.binary_cross_entropy_with_logits(full_size(logits), one_hot, reduction="none")
    return (loss * (valid[:, None] & present[:, :, None, None])).sum() / valid.sum()


def full_size_soft(logits: Tensor, soft: Tensor) -> Tensor:
    """Cross-entropy of soft labels."""
    return -(soft * full_size(logits).log_softmax(1)).sum() / soft[:, 0].numel()


def losses(classes: int, images: int) -> dict[str, tuple[Job, Job]]:
    """Name -> (in pieces, at full size); each gives loss and gradient."""
    logits = torch.stack([street(classes, CROP[0] // 8, CROP[1] // 8)] * images).requires_grad_()
    target = torch.randint(0, classes, (images, *CROP), generator=torch.Generator().manual_seed(1))
    target[:, :20] = IGNORE
    present = torch.arange(classes).expand(images, -1) % 4 == 0  # a quarter of the union, as one of four datasets has
    own = target - target % 4
    own[target == IGNORE] = IGNORE
    everything = torch.ones_like(present)

    def both(loss: Callable[[], Tensor]) -> Job:
        return lambda: (lambda value: (value.detach(), torch.autograd.grad(value, logits)[0]))(loss())

    def soft() -> Tensor:
        return F.one_hot(target.clamp(min=0), classes).movedim(-1, 1).float() * 0.9 + 0.1 / classes

    jobs = {
        "cross-entropy": (
            lambda: cross_entropy(logits, target, ignore=IGNORE),
            lambda: F.cross_entropy(full_size(logits), target, ignore_index=IGNORE),
        ),
        "binary, all classes": (
            lambda: binary_loss(logits, target, ignore=IGNORE),
            lambda: full_size_binary(logits, target, everything),
        ),
        "binary, a quarter": (
            lambda: binary_loss(logits, own, present, ignore=IGNORE),
            lambda: full_size_binary(logits, own, present),
        ),
    }
    if classes * images <= 400:  # the soft labels themselves are as large as the scores
        labels = soft()
        jobs["soft cross-entropy"] = (
            lambda: soft_cross_entropy(logits, labels),
            lambda: full_size_soft(logits, labels),
        )
    return {name: (both(ours), both(theirs)) for name, (ours, theirs) in jobs.items()}


def labels(classes: int, noise: float) -> dict[str, tuple[Job, Job]]:
    """Name -> (in pieces, at full size) for one image of 1024x2048."""
    scores = street(classes, IMAGE[0] // 8, IMAGE[1] // 8, noise)
    print(f"{classes:4} cells between positions with different labels: {100 * different(scores):.0f} %")

    def whole() -> Tensor:
        return F.interpolate(scores[None], size=IMAGE, mode="bilinear", align_corners=False)[0]

    return {
        "labels": (lambda: label_map(Resized(scores, IMAGE)), lambda: confusion.argmax(whole().numpy())),
        "labels, probability": (
            lambda: confident_labels(Resized(scores, IMAGE))[1],
            lambda: whole().softmax(0).max(0).values,
        ),
    }


def check(name: str, ours: object, theirs: object) -> None:
    """Both ways give the same."""
    if name == "labels":
        different = int((torch.as_tensor(ours) != torch.as_tensor(theirs)).sum())
        assert different <= 2, f"{different} labels differ"
    elif name == "labels, probability":
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    else:
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
        assert (ours[1] - theirs[1]).norm() <= 2e-6 * theirs[1].norm(), "gradients differ"


def seconds(job: Job) -> tuple[float, float]:
    """Processor time of all threads, and time on the clock."""
    start, clock = time.process_time(), time.perf_counter()
    job()
    return time.process_time() - start, time.perf_counter() - clock


def grown(job: Job) -> float:
    """MiB by which the resident memory of this process grows during one call (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that it must be asked for again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    job()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB, from the process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 65, 171])
    parser.add_argument("--images", type=int, default=2, help="crops of 512x512 in a batch")
    parser.add_argument("--noise", type=float, default=0.5, help="of the scores that labels are made of; 3: all differ")
    parser.add_argument("--only", default="", help="jobs whose name holds this text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads; losses: {args.images} x {CROP}, labels: {IMAGE}")
    print(
        f"{'':28}{'pieces ms':>11}{'full ms':>10}{'ratio':>8}{'quartiles':>16}{'wall':>8}"
        f"{'pieces MiB':>12}{'full MiB':>10}"
    )
    for classes in args.classes:
        for name, (ours, theirs) in {**losses(classes, args.images), **labels(classes, args.noise)}.items():
            if args.only not in name:
                continue
            check(name, ours(), theirs())
            pairs = [(seconds(ours), seconds(theirs)) for _ in range(args.repeats)]
            low, middle, high = statistics.quantiles([a[0] / b[0] for a, b in pairs], n=4)
            wall = statistics.median(a[1] / b[1] for a, b in pairs)
            mine, full = (1000 * statistics.median(cpu for cpu, _ in side) for side in zip(*pairs))
            line = f"{classes:4} {name:23}{mine:11.1f}{full:10.1f}{middle:8.3f}{low:9.3f} -{high:5.3f}{wall:8.3f}"
            print(f"{line}{grown(ours):12.0f}{grown(theirs):10.0f}", flush=True)


if __name__ == "__main__":
    main()
