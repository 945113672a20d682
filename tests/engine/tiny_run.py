"""A whole run on a tiny network and tiny made-up pictures: train_net.py with faults to order.

The data path, model, trainer, step, checkpoints and launch are the real ones. The environment variable TINY_FAULT
orders faults: ``what@step`` or ``what@step@rank``, several separated by commas.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch._dynamo  # the first optimizer imports it, in seconds: once for all forked processes
from torch import nn

import multiseg_d2  # noqa: F401  (stand-ins, before detectron2)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from detectron2.engine import HookBase  # noqa: E402
from detectron2.layers import ShapeSpec, get_norm  # noqa: E402
from detectron2.modeling import BACKBONE_REGISTRY, Backbone  # noqa: E402
from detectron2.utils import comm  # noqa: E402

import train_net  # noqa: E402
from multiseg_d2.engine import Trainer, argument_parser, launch  # noqa: E402
from multiseg_d2.engine.ranks import unwrapped  # noqa: E402
from multiseg_d2.engine.self_training.labelling import LabelWriter  # noqa: E402

CLASSES = {"tiny_a": ("dark", "grey", "light"), "tiny_b": ("low", "high"), "tiny_c": ("black", "white")}
CONFIG = """
_BASE_: "{root}/configs/base.yaml"
DATASETS:
  SPECS: ["{folder}/tiny_a.yaml", "{folder}/tiny_b.yaml", "{folder}/tiny_c.yaml"]
  TRAIN: ["tiny_a_train", "tiny_b_train"]
  TEST: []
INPUT: {{SCALE_RANGE: [0.8, 1.5], CROP: {{SIZE: [32, 40]}}, COLOR_JITTER: 0.2}}
MODEL:
  DEVICE: "cpu"
  BACKBONE: {{NAME: "build_tiny_backbone"}}
  SEM_SEG_HEAD: {{CONVS_DIM: 8, DROPOUT: 0.3}}
  DATASET_NORM: {{ENABLED: True}}
SOLVER: {{IMS_PER_BATCH: 2, BASE_LR: 0.05, MAX_ITER: 6, CHECKPOINT_PERIOD: 1000}}
DATALOADER: {{NUM_WORKERS: 0}}
TEST: {{NUM_PICTURES: 0}}
SEED: 7
"""


@BACKBONE_REGISTRY.register()
def build_tiny_backbone(cfg, input_shape):
    return TinyBackbone(cfg.MODEL.RESNETS.NORM)


class TinyBackbone(Backbone):
    """Two convolutions with norms: features res4 (stride 4) and res5 (stride 8)."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.res4 = nn.Sequential(nn.Conv2d(3, 6, 5, stride=4, padding=2), get_norm(norm, 6) or nn.Identity())
        self.res5 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), get_norm(norm, 8) or nn.Identity())

    def forward(self, images):
        res4 = self.res4(images).relu()
        return {"res4": res4, "res5": self.res5(res4).relu()}

    def output_shape(self):
        return {"res4": ShapeSpec(channels=6, stride=4), "res5": ShapeSpec(channels=8, stride=8)}


def write_tiny(folder: Path) -> Path:
    """Writes pictures, specs and a config; returns the config's path."""
    for seed, (name, classes) in enumerate(CLASSES.items()):
        rng = np.random.default_rng(seed)
        for split in ("train", "val"):
            for i in range(5):
                label = cv2.resize(rng.integers(0, len(classes), (5, 6), np.uint8), (48, 40), interpolation=0)
                label[0, :] = 255
                image = label[..., None] * 60 + rng.integers(0, 60, (40, 48, 3), np.uint8)
                for kind, pixels in (("images", image), ("labels", label)):
                    path = folder / name / split / kind / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(path), pixels)
        lines = [f"name: {name}", "annotation: pixel", "encoding: index", "ignore: [255]", "classes:"]
        lines += [f"  - {{name: {c}, color: [{i}, 0, 0], raw: [{i}]}}" for i, c in enumerate(classes)]
        lines += ["splits:"]
        for split in ("train", "val"):
            patterns = ", ".join(f'{k}: "{name}/{split}/{k}/{{id}}.png"' for k in ("images", "labels"))
            lines.append(f"  {split}: {{{patterns}}}")
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    config = folder / "tiny.yaml"
    config.write_text(CONFIG.format(root=ROOT, folder=folder))
    return config


# ---- faults ----------------------------------------------------------------------------------------------------------
def poison(samples: list[dict]) -> None:
    samples[0]["image"] = torch.full(samples[0]["image"].shape, torch.nan)


def fail(_samples: list[dict]) -> None:
    raise ZeroDivisionError("made to fail")


def send(number: int):
    return lambda _samples: os.kill(os.getpid(), number)


def signal_group(number: int) -> None:
    """As a scheduler or a terminal does: from another process, to the loader's worker processes as well."""
    assert os.environ["TINY_SESSION"] == str(os.getsid(0)), "only in a session of its own"
    if os.fork() == 0:
        os.killpg(os.getpgrp(), number)
        os._exit(0)


def save_half_and_die(_samples: list[dict]) -> None:
    whole = torch.save

    def half(content, file) -> None:
        whole(content, file)
        file.flush()
        file.truncate(file.tell() // 2)
        os.fsync(file.fileno())
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


FAULTS = {
    "nan": poison,
    "raise": fail,
    "term": send(signal.SIGTERM),
    "term_all": lambda _samples: signal_group(signal.SIGTERM),
    "int_all": lambda _samples: signal_group(signal.SIGINT),
    "usr1": send(signal.SIGUSR1),
    "int": send(signal.SIGINT),
    "kill": send(signal.SIGKILL),
    "half_save": save_half_and_die,
}


def ordered_faults() -> dict[int, list]:
    """Step -> what to do to the samples of this process."""
    faults: dict[int, list] = {}
    for order in filter(None, os.environ.get("TINY_FAULT", "").split(",")):
        what, step, rank = (*order.split("@"), "0", "0")[:3]
        if int(rank) == comm.get_rank() and what in FAULTS:
            faults.setdefault(int(step), []).append(FAULTS[what])
    return faults


def is_ordered(what: str) -> bool:
    """Whether this process has a fault on order that no step brings about."""
    for order in os.environ.get("TINY_FAULT", "").split(","):
        name, _step, rank = (*order.split("@"), "0", "0")[:3]
        if name == what and int(rank) == comm.get_rank():
            return True
    return False


def terminate_at_exit() -> None:
    """A second SIGTERM while the interpreter shuts down."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)


def signal_group_once_there_are_workers() -> None:
    """Ctrl-C as soon as the first worker process exists."""
    while not multiprocessing.active_children():
        time.sleep(0.001)
    signal_group(signal.SIGINT)


def kill_in_labels(images: int) -> None:
    """Dies without a word after so many label files of self-training."""
    process, written = LabelWriter.process, []

    def counted(self, inputs, outputs) -> None:
        if len(written) == images:
            os.kill(os.getpid(), signal.SIGKILL)
        process(self, inputs, outputs)
        written.append(1)

    LabelWriter.process = counted


def signal_in(phase: str) -> None:
    """Sends the signal that is on order for this process in a phase of the run, once.

    ``term_in@phase@rank`` is SIGTERM to this process, ``int_in@...`` Ctrl-C to the whole group, ``ints_in@...`` twice.
    """
    for order in filter(None, os.environ.get("TINY_FAULT", "").split(",")):
        what, where, rank = (*order.split("@"), "0", "0")[:3]
        if where != phase or int(rank) != comm.get_rank() or what not in ("term_in", "int_in", "ints_in"):
            continue
        os.environ["TINY_FAULT"] = ""
        if what == "term_in":
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range({"term_in": 0, "int_in": 1, "ints_in": 2}[what]):
            signal_group(signal.SIGINT)
            time.sleep(0.2)  # two that are sent at once arrive as one


def signals_in_phases(labels: int = 7) -> None:
    """Lets :func:`signal_in` happen while labels of self-training and checkpoints are written."""
    process, written, save = LabelWriter.process, [], torch.save

    def process_and_signal(self, inputs, outputs) -> None:
        process(self, inputs, outputs)
        written.append(1)
        if len(written) == labels // comm.get_world_size() + 1:  # of the second round
            signal_in("labelling")

    def save_and_signal(content, file) -> None:
        save(content, file)
        signal_in("writing")

    LabelWriter.process, torch.save = process_and_signal, save_and_signal


class WaitingMapper:
    """A worker's mapper that has the training process signalled while it waits for the third image."""

    def __init__(self, mapper, folder: str) -> None:
        self.mapper, self.calls, self.sent = mapper, 0, Path(folder, f"sent_{comm.get_rank()}")

    def __call__(self, dataset_dict, rng):
        self.calls += 1
        if self.calls == 3 and not self.sent.exists():
            self.sent.touch()
            time.sleep(1.0)
        return self.mapper(dataset_dict, rng)


def signal_once(condition, phase: str) -> None:
    """From a thread of its own: as soon as something is the case."""

    def wait() -> None:
        while not condition():
            time.sleep(0.001)
        signal_in(phase)

    threading.Thread(target=wait, daemon=True).start()


class RecordingLoader:
    """A training loader with the faults that are on order, and a record of what it gave."""

    def __init__(self, loader, folder: str, start_step: int) -> None:
        self.loader, self.schedule, self.start_step = loader, loader.schedule, start_step
        self.record = Path(folder, f"draws_{comm.get_rank()}.jsonl")

    def __iter__(self):
        faults = ordered_faults()
        for step, samples in enumerate(self.loader, start=self.start_step):
            for fault in faults.get(step, ()):
                fault(samples)
            with self.record.open("a") as file:
                drawn = [[s["file_name"], s["draw"].seed] for s in samples]
                file.write(json.dumps([step, drawn]) + "\n")
            yield samples


class SlowMapper:
    """A worker's mapper that sends Ctrl-C to all processes at its third image, once, and then takes its time."""

    def __init__(self, mapper, folder: str) -> None:
        self.mapper, self.calls, self.sent = mapper, 0, Path(folder, "sent")

    def __call__(self, dataset_dict, rng):
        self.calls += 1
        with contextlib.suppress(FileExistsError):
            if self.calls != 3:
                return self.mapper(dataset_dict, rng)
            self.sent.touch(exist_ok=False)  # of two workers, one
            signal_group(signal.SIGINT)
            time.sleep(1.0)
        return self.mapper(dataset_dict, rng)


class Rounds(HookBase):
    """As self-training does: other training data from a step on; TINY_ROUNDS is ``step:entries;step:entries``."""

    def before_step(self):
        for part in os.environ["TINY_ROUNDS"].split(";"):
            first, entries = part.split(":")
            if self.trainer.iter == int(first):
                self.trainer.use_training_data(entries.split(","), origin=int(first))


class FaultyTrainer(Trainer):
    """The trainer with a :class:`RecordingLoader`, and rounds where they are on order."""

    def build_hooks(self):
        return [*super().build_hooks(), Rounds() if os.environ.get("TINY_ROUNDS") else None]

    def after_train(self):
        super().after_train()
        if is_ordered("show_buffers"):
            buffers = dict(unwrapped(self.model).named_buffers())
            torch.save(buffers, Path(self.cfg.OUTPUT_DIR, f"buffers_{comm.get_rank()}.pth"))

    @classmethod
    def build_train_loader(cls, cfg, start_step=0, **data):
        loader = super().build_train_loader(cfg, start_step, **data)
        if is_ordered("int_from_worker"):
            loader.dataset.mapper = SlowMapper(loader.dataset.mapper, cfg.OUTPUT_DIR)
        if "@workers" in os.environ.get("TINY_FAULT", ""):
            signal_once(multiprocessing.active_children, "workers")
        if "@waiting" in os.environ.get("TINY_FAULT", ""):
            loader.dataset.mapper = WaitingMapper(loader.dataset.mapper, cfg.OUTPUT_DIR)
            signal_once(Path(cfg.OUTPUT_DIR, f"sent_{comm.get_rank()}").exists, "waiting")
        if is_ordered("int_at_start"):
            threading.Timer(0.0, signal_group_once_there_are_workers).start()
        return RecordingLoader(loader, cfg.OUTPUT_DIR, start_step)

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        if is_ordered("term_in_test"):
            os.kill(os.getpid(), signal.SIGTERM)
        signal_in("evaluation")
        return super().test(cfg, model, evaluators)


train_net.Trainer = FaultyTrainer


def run(argv: list[str]) -> int:
    """The program."""
    return launch(main, argument_parser().parse_args(argv))


def main(args) -> object:
    if is_ordered("kill_in_labels"):
        kill_in_labels(int(os.environ["TINY_FAULT"].split("@")[1]))
    if "_in@" in os.environ.get("TINY_FAULT", ""):
        signals_in_phases()
    try:
        return train_net.main(args)
    finally:
        if is_ordered("term_at_exit"):
            terminate_at_exit()


def run_redirected(argv: list[str], environment: dict[str, str], log: str) -> None:
    """The program as the target of a new process, with its output in a file."""
    os.setsid()
    os.environ["TINY_SESSION"] = str(os.getpid())
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.modules["multiseg_d2.engine.launch"]._START_METHOD = "fork"  # where it starts others: without new imports
    sys.exit(run(argv))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
