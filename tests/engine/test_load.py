"""Memory over many images: an evaluation and a labelling pass keep counts and names, not scores or label maps."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.evaluation import DatasetEvaluator

from multiseg_d2.data.register import register_dataset, unregister_dataset
from multiseg_d2.engine import Trainer
from multiseg_d2.engine.dataset_pass import run_over
from multiseg_d2.engine.self_training.labelling import ConfidenceCollector, LabelWriter
from multiseg_d2.engine.self_training.thresholds import ConfidenceSamples
from multiseg_d2.evaluation import MultiDatasetEvaluator
from multiseg_d2.modeling.inference import Prediction

SIDE = 96  # a label map has 9 KiB, the scores of three classes 108 KiB
#: Bytes per image; a pass that kept label maps would have nine times as many.
LIMIT = 1024


class Watched(DatasetEvaluator):
    """An evaluator, and this process's memory (bytes) as it goes on: (images, bytes), 25 times."""

    def __init__(self, inner: DatasetEvaluator, images: int) -> None:
        self.inner, self.every, self.seen, self.memory = inner, max(images // 25, 1), 0, []

    def reset(self):
        self.inner.reset()

    def process(self, inputs, outputs):
        self.inner.process(inputs, outputs)
        self.seen += 1
        if self.seen % self.every == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory.append((self.seen, pages * os.sysconf("SC_PAGESIZE")))

    def evaluate(self):
        return self.inner.evaluate()

    def slope(self) -> float:
        """Bytes per image by least squares, after the first third, in which buffers find their size."""
        images, memory = np.array(self.memory[len(self.memory) // 3 :]).T
        return float(np.polyfit(images, memory, 1)[0])


class Hoarder(DatasetEvaluator):
    """Keeps every label map, as an evaluator must not; in pages of their own, as freed memory may be used again."""

    def reset(self):
        self.kept = []

    def process(self, inputs, outputs):
        for output in outputs:
            self.kept.append(mmap.mmap(-1, SIDE * SIDE))
            self.kept[-1].write((output["sem_seg_labels"].numpy() + np.uint8(1)).tobytes())

    def evaluate(self):
        return {}


@pytest.fixture
def many(tiny_root, tmp_path):
    """Registers an entry with many names of one image and its label; gone afterwards."""
    registered = []

    def register(count: int) -> str:
        rng = np.random.default_rng(0)
        for kind, pixels in (("images", (SIDE, SIDE, 3)), ("labels", (SIDE, SIDE))):
            folder = tmp_path / "many" / kind
            folder.mkdir(parents=True)
            cv2.imwrite(
                str(folder / "000000.png"), rng.integers(0, 3, pixels, np.uint8) * (60 if kind == "images" else 1)
            )
            for i in range(1, count):
                os.link(folder / "000000.png", folder / f"{i:06d}.png")
        spec = yaml.safe_load((tiny_root / "tiny_a.yaml").read_text())
        patterns = {kind: f"{tmp_path}/many/{kind}/{{id}}.png" for kind in ("images", "labels")}
        (tmp_path / "many.yaml").write_text(
            yaml.safe_dump(spec | {"name": "many", "dataset": "tiny_a", "splits": {"val": patterns}})
        )
        registered.extend(register_dataset(tmp_path / "many.yaml"))
        return "many_val"

    yield register
    if registered:
        unregister_dataset("many")


@pytest.mark.parametrize("images", [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_memory_is_flat_in_an_evaluation_and_a_labelling(images, many, tiny_cfg, tmp_path, monkeypatch):
    """Files are read, counted and written as ever; the network answers with the scores of one image, to be quick."""
    cfg = tiny_cfg()
    entry, model = many(images), Trainer.build_model(cfg).eval()
    scores = model.inference([{"image": torch.zeros(3, SIDE, SIDE), "dataset": "tiny_a"}])[0].scores
    monkeypatch.setattr(model, "inference", lambda samples: [Prediction(scores, False) for _ in samples])
    samples = ConfidenceSamples(3, tmp_path)
    passes = {
        "evaluation": MultiDatasetEvaluator(entry),
        "confidences": ConfidenceCollector(samples),
        "labels": LabelWriter(tmp_path / "written", np.full(3, 0.4, np.float32)),
        "hoarding": Hoarder(),
    }
    gc.collect()
    gc.freeze()  # what is there now need not be looked at at every reading
    slopes = {}
    for name, evaluator in passes.items():
        watched = Watched(evaluator, images)
        run_over(cfg, model, entry, watched)
        slopes[name] = watched.slope()
    gc.unfreeze()
    samples.close()
    print({name: round(slope) for name, slope in slopes.items()}, "bytes per image")
    assert len(os.listdir(tmp_path / "written" / "labels")) == images
    assert slopes.pop("hoarding") > 4 * LIMIT  # what this test would see if it were not flat
    assert max(slopes.values()) < LIMIT
