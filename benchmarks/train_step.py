"""One training step with two datasets: ours beside the same batches through Detectron2's SemanticSegmentor.

Detectron2's side is its own meta-architecture, with the same backbone, decoder, auxiliary branch and classifiers in
its head, called once per dataset: forward, backward, and one optimizer update for both. Ours is the whole step of the
engine (batch, losses, gradient norm, finite check, metrics, update), in sequential mode (one pass per dataset) and in
fused mode (one pass). The variants take turns, so that other load meets all of them, and their losses must agree.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --processor-time      # on a machine that does other work meanwhile
    python benchmarks/train_step.py --classes 171 171 --size 256 256 --repeats 4
    python benchmarks/train_step.py --device cuda --depth 50 --size 512 512 --images 4 --amp
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import multiseg_d2.modeling  # noqa: F401  # isort: skip  (first: it lets Detectron2 be imported, and registers)
import detectron2
from detectron2.data import MetadataCatalog
from detectron2.modeling import SemanticSegmentor, build_model
from detectron2.utils.events import EventStorage

from multiseg_d2.engine import load_config
from multiseg_d2.engine.step import TrainStep
from multiseg_d2.label_space import LabelSpace, raw_to_local_table

#: Classes of each made-up dataset, as of Cityscapes and CamVid; --classes gives others.
DATASETS = {"first": 19, "second": 11}


class Detectron2Head(nn.Module):
    """Our layers in a head as Detectron2's own are written: losses from features and targets of one dataset."""

    ignore_value = 255

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.trunk, self.classifiers = ours.trunk, ours.classifiers
        self.auxiliary_classifiers = ours.auxiliary_classifiers
        self.dataset = ""

    def forward(self, features: dict[str, Tensor], targets: Tensor):
        """As ``SemSegFPNHead``: (None, losses)."""
        main = self.classifiers[self.dataset](self.trunk(features))
        side = self.auxiliary_classifiers[self.dataset](self.trunk.auxiliary_features(features))
        return None, {"loss": self.loss(main, targets), "loss_aux": 0.4 * self.loss(side, targets)}

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over labelled pixels."""
        logits = F.interpolate(logits.float(), size=targets.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, targets, reduction="mean", ignore_index=self.ignore_value)


def register() -> None:
    """Puts the made-up datasets into Detectron2's catalog."""
    for name, count in DATASETS.items():
        classes, table = tuple(f"class {i}" for i in range(count)), raw_to_local_table([[i] for i in range(count)])
        space = LabelSpace(name, classes, np.zeros((count, 3), np.uint8), table, np.eye(count, dtype=bool))
        MetadataCatalog.get(f"{name}_benchmark").set(label_space=space, dataset=name)


def make_model(args: argparse.Namespace, dataset_norm: bool) -> nn.Module:
    """PSPNet with an auxiliary branch; no dropout, so that losses can be compared."""
    cfg = load_config()
    cfg.merge_from_list(
        ["MODEL.META_ARCHITECTURE", "MultiDatasetSegmentor", "MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone"]
        + ["MODEL.DEVICE", args.device, "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RESNETS.DEPTH", args.depth]
        + ["MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", False]
        + ["MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res5"]]
        + ["MODEL.SEM_SEG_HEAD.NAME", "PerDatasetHead", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 128]
        + ["MODEL.SEM_SEG_HEAD.NORM", "BN", "MODEL.SEM_SEG_HEAD.DROPOUT", 0.0]
        + ["MODEL.DATASET_NORM.ENABLED", dataset_norm, "DATASETS.TRAIN", tuple(f"{n}_benchmark" for n in DATASETS)]
    )
    torch.manual_seed(0)
    model = build_model(cfg).train()
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def make_samples(args: argparse.Namespace) -> list[dict]:
    """Random images and labels, grouped by dataset, as a loader gives them."""
    rng = torch.Generator().manual_seed(0)
    height, width = args.size
    return [
        {
            "image": torch.randint(0, 256, (3, height, width), generator=rng, dtype=torch.uint8),
            "sem_seg": torch.randint(0, count, (height, width), generator=rng, dtype=torch.uint8),
            "dataset": name,
            "file_name": f"{name}_{i}",
        }
        for name, count in DATASETS.items()
        for i in range(args.images)
    ]


Step = Callable[[], dict[str, float]]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


def detectron2_step(model: nn.Module, samples: list[dict], amp: torch.dtype | None) -> Step:
    """Two batches through Detectron2's segmentor, one update."""
    mean, std = (value.flatten().tolist() for value in (model.pixel_mean, model.pixel_std))
    plain = SemanticSegmentor(
        backbone=model.backbone, sem_seg_head=Detectron2Head(model.sem_seg_head), pixel_mean=mean, pixel_std=std
    ).to(model.device)
    plain.train()
    optimizer = optimizer_of(plain)
    # Detectron2's mapper hands out int64 labels
    batches = {d: [dict(s, sem_seg=s["sem_seg"].long()) for s in samples if s["dataset"] == d] for d in DATASETS}

    def step() -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        results = {}
        for dataset, batch in batches.items():
            plain.sem_seg_head.dataset = dataset
            with torch.autocast(model.device.type, amp, enabled=amp is not None):
                losses = plain(batch)
            sum(losses.values()).backward()
            results |= {f"{name}_{dataset}": loss.detach() for name, loss in losses.items()}
        optimizer.step()
        return {name: loss.item() for name, loss in results.items()}

    return step


def our_step(model: nn.Module, samples: list[dict], mode: str, amp: torch.dtype | None) -> Step:
    """The engine's step on the same images."""
    train_step = TrainStep(
        model, optimizer_of(model), lambda _first: iter(lambda: samples, None), seed=0, mode=mode, amp_dtype=amp
    )
    storage = EventStorage()

    def step() -> dict[str, float]:
        with storage:
            train_step.run(storage.iter)
        latest = {name: value for name, (value, _) in storage.latest().items() if name.startswith("loss_")}
        storage.step()
        return latest

    return step


def timed(step: Step, clock: Callable[[], float]) -> tuple[float, dict[str, float]]:
    """Seconds of one step, and its losses (reading them waits for a GPU to finish the forward passes)."""
    started = clock()
    losses = step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started, losses


def measure(steps: dict[str, Step], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each step, in turns that start with another one each round, after two rounds that are not counted.

    Raises:
        AssertionError: the first losses of two variants with the same norms differ.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for round_number in range(repeats + 2):
        losses = {}
        for i in range(len(names)):
            name = names[(round_number + i) % len(names)]
            seconds, losses[name] = timed(steps[name], clock)
            if round_number >= 2:
                times[name].append(seconds)
        if round_number == 0:
            check_losses(losses)
    return times


def check_losses(losses: dict[str, dict[str, float]]) -> None:
    """Sequential shared norms are Detectron2's; norms per dataset are the same in training mode, fused or not."""
    reference = sorted(losses["Detectron2, two passes"].values())
    for name in losses:
        if "fused, shared" not in name:  # one batch norm over both datasets' images is another method
            torch.testing.assert_close(sorted(losses[name].values()), reference, rtol=0.02, atol=0.01)


def report(times: dict[str, list[float]]) -> None:
    """Medians, quartiles, and the ratio to Detectron2 within each round."""
    base = times["Detectron2, two passes"]
    print(f"{'':38}{'median ms':>11}{'quartiles':>18}{'ratio':>9}{'its quartiles':>19}")
    for name, seconds in times.items():
        low, middle, high = (1000 * q for q in statistics.quantiles(seconds, n=4))
        ratios = [a / b for a, b in zip(seconds, base)]
        r_low, r_middle, r_high = statistics.quantiles(ratios, n=4)
        print(f"{name:38}{middle:11.1f}{low:10.1f} -{high:6.1f}{r_middle:9.3f}{r_low:11.3f} -{r_high:6.3f}")
    best = {name: min(seconds) for name, seconds in times.items()}
    print("ratio of the fastest steps: " + ", ".join(f"{n} {b / min(base):.3f}" for n, b in best.items()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--images", type=int, default=2, help="per dataset")
    parser.add_argument("--classes", type=int, nargs=2, default=list(DATASETS.values()), help="of the two datasets")
    parser.add_argument("--size", type=int, nargs=2, default=(192, 192), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--processor-time", action="store_true", help="of all threads, instead of wall time")
    args = parser.parse_args()
    DATASETS.update(zip(DATASETS, args.classes))
    register()
    samples, amp = make_samples(args), torch.bfloat16 if args.amp else None
    shared, per_dataset = make_model(args, dataset_norm=False), make_model(args, dataset_norm=True)
    steps = {
        "Detectron2, two passes": detectron2_step(copy.deepcopy(shared), samples, amp),
        "ours, sequential, shared norms": our_step(copy.deepcopy(shared), samples, "sequential", amp),
        "ours, fused, shared norms": our_step(copy.deepcopy(shared), samples, "fused", amp),
        "ours, sequential, norms per dataset": our_step(copy.deepcopy(per_dataset), samples, "sequential", amp),
        "ours, fused, norms per dataset": our_step(copy.deepcopy(per_dataset), samples, "fused", amp),
    }
    print(
        f"torch {torch.__version__}, detectron2 {detectron2.__version__}, {args.device}, {torch.get_num_threads()} "
        f"threads, {os.cpu_count()} cores, {'processor' if args.processor_time else 'wall'} time; "
        f"ResNet-{args.depth}, {args.classes} classes, {len(DATASETS)} x {args.images} images of {tuple(args.size)}, "
        f"{args.repeats} rounds"
    )
    report(measure(steps, args.repeats, time.process_time if args.processor_time else time.perf_counter))


if __name__ == "__main__":
    main()
