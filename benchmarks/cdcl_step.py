"""One CDCL update: fused against sequential against as many separate plain Detectron2 steps; time and peak memory.

Fused and sequential are the engine's whole step with a batch norm per dataset. "Separate" is what a user without this
project does: one Detectron2 SemanticSegmentor per dataset, with plain batch norms, the same backbone, decoder and
auxiliary branch, and an update of its own; its time is that of all of them, its memory that of one. Times are taken in
turn within one process, so that other load meets all alike, and ratios are formed round by round; memory is the peak of
a process of its own, above what it holds before its first step (on a GPU: from CUDA's counters, without momentum).

    python benchmarks/cdcl_step.py
    python benchmarks/cdcl_step.py --device cuda --depth 101 --size 512 512 --images 4 --amp --channels-last
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import multiseg_d2.modeling  # noqa: F401  # isort: skip  (first: it lets Detectron2 be imported, and registers)
from detectron2.data import MetadataCatalog
from detectron2.modeling import SemanticSegmentor, build_model
from detectron2.utils.events import EventStorage
from rich.console import Console
from rich.progress import track
from rich.table import Table
from train_step import Detectron2Head  # the benchmark beside this one

from multiseg_d2.engine import load_config
from multiseg_d2.engine.step import TrainStep
from multiseg_d2.label_space import LabelSpace, raw_to_local_table

VARIANTS = ("fused", "sequential", "separate")
CLASSES = (19, 11, 19, 26)
Step = Callable[[], None]


def datasets(count: int) -> list[str]:
    """Names of the first ``count`` made-up datasets, registered."""
    names = [f"bench{i}" for i in range(count)]
    for name, classes in zip(names, CLASSES):
        if f"{name}_train" in MetadataCatalog.list():
            continue
        table = raw_to_local_table([[i] for i in range(classes)])
        colors, covers = np.zeros((classes, 3), np.uint8), np.eye(classes, dtype=bool)
        space = LabelSpace(name, tuple(f"class {i}" for i in range(classes)), colors, table, covers)
        MetadataCatalog.get(f"{name}_train").set(label_space=space, dataset=name)
    return names


def make_model(args: argparse.Namespace, names: list[str], dataset_norm: bool) -> nn.Module:
    """PSPNet as in configs/cdcl, with plain BN for one process."""
    base = Path(__file__).resolve().parents[1] / "configs" / "cdcl" / f"base_r{args.depth}.yaml"
    cfg = load_config(str(base))
    cfg.merge_from_list(
        ["MODEL.DEVICE", args.device, "MODEL.RESNETS.NORM", "BN", "MODEL.SEM_SEG_HEAD.NORM", "BN"]
        + ["MODEL.DATASET_NORM.ENABLED", dataset_norm, "DATASETS.TRAIN", [f"{name}_train" for name in names]]
    )
    torch.manual_seed(0)
    model = build_model(cfg).train()
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def make_samples(args: argparse.Namespace, names: list[str]) -> list[dict]:
    """Random images and labels, grouped by dataset, as a loader gives them."""
    rng = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(0, 256, (3, *args.size), generator=rng, dtype=torch.uint8),
            "sem_seg": torch.randint(0, classes, tuple(args.size), generator=rng, dtype=torch.uint8),
            "dataset": name,
            "file_name": f"{name}_{i}",
        }
        for name, classes in zip(names, CLASSES)
        for i in range(args.images)
    ]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


def make_step(args: argparse.Namespace, variant: str, count: int) -> Step:
    """One update of everything, on ``count`` datasets."""
    names, amp = datasets(count), torch.bfloat16 if args.amp else None
    if variant == "separate":
        steps = [separate_step(args, name, amp) for name in names]
        return lambda: [step() for step in steps] and None
    model, samples = make_model(args, names, True), make_samples(args, names)
    train_step = TrainStep(
        model, optimizer_of(model), lambda _first: iter(lambda: samples, None), seed=0, mode=variant, amp_dtype=amp
    )
    storage = EventStorage()

    def step() -> None:
        with storage:
            train_step.run(storage.iter)
        storage.step()

    return step


def separate_step(args: argparse.Namespace, name: str, amp: torch.dtype | None) -> Step:
    """Detectron2's segmentor on one dataset, with an update of its own."""
    ours = make_model(args, [name], False)
    mean, std = (value.flatten().tolist() for value in (ours.pixel_mean, ours.pixel_std))
    head = Detectron2Head(ours.sem_seg_head)
    head.dataset = name
    plain = SemanticSegmentor(backbone=ours.backbone, sem_seg_head=head, pixel_mean=mean, pixel_std=std)
    plain.to(ours.device).train()
    optimizer = optimizer_of(plain)
    batch = [dict(s, sem_seg=s["sem_seg"].long()) for s in make_samples(args, datasets(4)) if s["dataset"] == name]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(ours.device.type, amp, enabled=amp is not None):
            losses = plain(batch)
        sum(losses.values()).backward()
        optimizer.step()

    return step


def timed(args: argparse.Namespace, count: int) -> dict[str, list[float]]:
    """Seconds of each round, all variants in turn."""
    steps = {variant: make_step(args, variant, count) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    clock = time.process_time if args.processor_time else time.perf_counter
    console = Console(stderr=True)
    for number in track(range(args.repeats + 1), f"{count} datasets", console=console):
        order = [*VARIANTS[number % 3 :], *VARIANTS[: number % 3]]
        for variant in order:
            synchronise(args)
            start = clock()
            steps[variant]()
            synchronise(args)
            if number:  # the first round warms up
                times[variant].append(clock() - start)
    return times


def synchronise(args: argparse.Namespace) -> None:
    """Waits for the device."""
    if args.device == "cuda":
        torch.cuda.synchronize()


def peak_memory(args: argparse.Namespace, variant: str, count: int) -> float:
    """MiB above what this process holds before its first step; call it in a process of its own."""
    step = make_step(args, variant, 1 if variant == "separate" else count)
    if args.device == "cuda":
        step()  # momentum buffers and libraries
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    before = resident("VmRSS")
    step()
    step()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> float:
    """KiB: VmRSS = now, VmHWM = the most so far (where there is no /proc, the latter for both)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(float(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def measured_memory(argv: list[str], variant: str, count: int) -> float:
    """:func:`peak_memory` of a new process."""
    command = [sys.executable, __file__, *argv, "--memory-of", variant, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table_of(args: argparse.Namespace, count: int, times: dict[str, list[float]], memory: dict[str, float]) -> Table:
    """Medians, quartiles and ratios."""
    size = f"{args.size[0]}x{args.size[1]}"
    table = Table(title=f"{count} datasets, {args.images} images of {size} each, PSPNet-R{args.depth}, {args.device}")
    clock = "processor ms" if args.processor_time else "ms"
    for head in ("step", clock, "quartiles", "/ separate", "quartiles", "peak MiB", "/ separate"):
        table.add_column(head, justify="left" if head == "step" else "right")
    for variant in VARIANTS:
        ratios = [a / b for a, b in zip(times[variant], times["separate"])]
        table.add_row(
            variant,
            f"{1000 * statistics.median(times[variant]):.0f}",
            "{:.0f} to {:.0f}".format(*(1000 * q for q in quartiles(times[variant]))),
            f"{statistics.median(ratios):.2f}",
            "{:.2f} to {:.2f}".format(*quartiles(ratios)),
            f"{memory[variant]:.0f}",
            f"{memory[variant] / memory['separate']:.2f}",
        )
    return table


def quartiles(values: list[float]) -> tuple[float, float]:
    """First and third."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def main() -> None:
    """Prints one table for each number of datasets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--datasets", type=int, nargs="+", default=[2, 4], choices=(1, 2, 3, 4), help="%(default)s")
    parser.add_argument("--depth", type=int, default=18, choices=(18, 101), help="of the ResNet; %(default)s")
    parser.add_argument("--size", type=int, nargs=2, default=[96, 128], help="crop; %(default)s")
    parser.add_argument("--images", type=int, default=2, help="of each dataset; %(default)s")
    parser.add_argument("--repeats", type=int, default=10, help="rounds; %(default)s")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--processor-time", action="store_true", help="for a machine that does other work meanwhile")
    parser.add_argument("--memory-of", nargs=2, metavar=("VARIANT", "DATASETS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(peak_memory(args, args.memory_of[0], int(args.memory_of[1]))))
        return
    console = Console(width=max(Console().width, 100))
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", highlight=False)
    for count in args.datasets:
        memory = {variant: measured_memory(sys.argv[1:], variant, count) for variant in VARIANTS}
        console.print(table_of(args, count, timed(args, count), memory))


if __name__ == "__main__":
    main()
