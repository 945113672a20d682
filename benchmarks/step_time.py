"""Where the time of a training step goes, for a config: reading, forward, loss, backward, update.

Images are read in this process (in training, workers do that meanwhile), the rest is done on the config's device as in
a fused step. "forward" are backbone, decoder and classifiers, "loss" is what the head does outside its modules. The
mean of all steps after the first is printed, in processor time unless asked otherwise. Without a config, that of the
quickstart is measured on drawn images.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --config-file configs/quickstart/four_datasets.yaml MODEL.DEVICE cpu
    python benchmarks/step_time.py --config-file configs/cdcl/cs_bdd_r18.yaml --wall-time --steps 20
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

import multiseg_d2.modeling  # noqa: F401  isort: skip  (first: it lets Detectron2 be imported, and registers)
from detectron2.utils.events import EventStorage

from multiseg_d2.data.files import DATA_ROOT_VARIABLE
from multiseg_d2.data.loader import build_train_loader
from multiseg_d2.data.register import register_from_config
from multiseg_d2.engine import load_config
from multiseg_d2.engine.solver import build_optimizer
from multiseg_d2.engine.trainer import Trainer
from multiseg_d2.modeling.active import active_datasets
from multiseg_d2.toy import write_toy

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart" / "toy.yaml"

PARTS = ("reading", "forward", "loss", "backward", "update")


class Parts:
    """Seconds by part."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self.moved, self.source, self.target = clock, defaultdict(list), 0.0, "", ""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Context whose time goes to a part."""
        synchronize()
        start, self.moved = self.clock(), 0.0
        yield
        synchronize()
        self.seconds[name].append(self.clock() - start)
        if name == self.source:
            self.seconds[name][-1] -= self.moved
            self.seconds[self.target][-1] += self.moved

    def move_calls(self, module: nn.Module, source: str, target: str) -> None:
        """What happens inside calls of a module's parts, while ``source`` is timed, is counted as ``target``."""
        starts: list[float] = []

        def enter(*_) -> None:
            synchronize()
            starts.append(self.clock())

        def leave(*_) -> None:
            synchronize()
            taken = self.clock() - starts.pop()
            if not starts:  # the outermost call
                self.moved += taken

        for part in module.modules():
            if part is not module:
                part.register_forward_pre_hook(enter)
                part.register_forward_hook(leave)
        self.source, self.target = source, target


def synchronize() -> None:
    """Waits for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(cfg, steps: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each part in every step but the first."""
    model = Trainer.build_model(cfg).train()
    head, parts = model.sem_seg_head, Parts(clock)
    parts.move_calls(head, "loss", "forward")
    optimizer = build_optimizer(cfg, model)
    batches = iter(build_train_loader(cfg))
    with EventStorage():
        for _ in range(steps + 1):
            with parts.timed("reading"):
                samples = next(batches)
            with parts.timed("forward"):
                batch = model.make_batch(samples)
                with active_datasets(batch.groups):
                    features = model.backbone(batch.images)
            with parts.timed("loss"), active_datasets(batch.groups):
                losses = head.losses(features, batch)
            with parts.timed("backward"):
                sum(losses.values()).backward()
            with parts.timed("update"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return {name: values[1:] for name, values in parts.seconds.items()}


@contextmanager
def drawn_images() -> Iterator[None]:
    """Context in which the data root is a temporary folder with the toy datasets."""
    before = os.environ.get(DATA_ROOT_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        write_toy(folder, images=8)
        os.environ[DATA_ROOT_VARIABLE] = folder
        yield
    os.environ.pop(DATA_ROOT_VARIABLE)
    if before is not None:
        os.environ[DATA_ROOT_VARIABLE] = before


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", help="default: the quickstart's, on drawn images")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--wall-time", action="store_true")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config, last")
    args = parser.parse_args()
    config_file = args.config_file or str(QUICKSTART)
    default_device = [] if torch.cuda.is_available() else ["MODEL.DEVICE", "cpu"]
    cfg = load_config(config_file, default_device + args.opts)
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0  # so that reading is seen
    register_from_config(cfg)
    with ExitStack() as stack:
        if not args.config_file:
            stack.enter_context(drawn_images())
        seconds = measure(cfg, args.steps, time.perf_counter if args.wall_time else time.process_time)
    total = sum(sum(values) for values in seconds.values())
    kind = "wall" if args.wall_time else "processor"
    print(f"{config_file}: {args.steps} steps, {torch.get_num_threads()} threads, {kind} time per step")
    for name in PARTS:
        mean = sum(seconds[name]) / len(seconds[name])
        print(f"  {name:10}{1000 * mean:9.1f} ms{100 * sum(seconds[name]) / total:7.1f} %")
    print(f"  {'together':10}{1000 * total / args.steps:9.1f} ms")


if __name__ == "__main__":
    main()
