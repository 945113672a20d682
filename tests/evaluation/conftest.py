"""Fixtures of the evaluation tests."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from multiseg_d2 import compat, register_dataset
from multiseg_d2.data.register import unregister_dataset


@pytest.fixture(scope="session")
def classification():
    """``torchmetrics.functional.classification``, an independent count.

    torchmetrics imports more of torchvision than the stand-in has, and nothing where there is no torchvision at all.
    """
    hidden = {name: sys.modules.pop(name) for name in compat.stand_ins() if name.startswith("torchvision")}
    try:
        return importlib.import_module("torchmetrics.functional.classification")
    finally:
        sys.modules.update(hidden)


SPEC = """
name: tiny
annotation: pixel
encoding: index
ignore: [255]
classes:
  - {name: sky, color: [70, 130, 180], raw: [0]}
  - {name: road, color: [128, 64, 128], raw: [1]}
  - {name: car, color: [0, 0, 142], raw: [2]}
  - {name: bus, color: [0, 60, 100], raw: [3]}
splits:
  val: {images: "tiny/images/{id}.png", labels: "tiny/labels/{id}.png"}
  test: {images: "tiny/images/{id}.png"}
evaluation:
  official: cityscapes
  groupings: {category: {vehicle: [car, bus], rest: [sky, road]}}
"""
SIZE = (24, 36)


@dataclass
class Tiny:
    """A registered dataset of 7 pictures, four classes; raw ids are local ids."""

    root: Path
    catalog: str = "tiny_val"
    num_classes: int = 4

    def samples(self) -> list[dict]:
        return [dict(d, height=SIZE[0], width=SIZE[1]) for d in DatasetCatalog.get(self.catalog)]

    def truth(self, sample: dict) -> np.ndarray:
        return np.asarray(Image.open(sample["sem_seg_file_name"]))

    def logits(self, seed: int = 0, count: int | None = None) -> list[torch.Tensor]:
        """Scores that are right on most pixels."""
        generator = torch.Generator().manual_seed(seed)
        noise = [torch.randn(4, *SIZE, generator=generator) for _ in range(count or 7)]
        if count:
            return noise
        truths = [torch.from_numpy(self.truth(s).copy()).long() for s in self.samples()]
        one_hot = [torch.nn.functional.one_hot(t.clamp(max=3), 4).permute(2, 0, 1) for t in truths]
        return [n + 1.5 * o for n, o in zip(noise, one_hot)]


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tiny_root")
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (root / "tiny" / kind).mkdir(parents=True)
    for i in range(7):
        coarse = rng.integers(0, 4, (SIZE[0] // 6, SIZE[1] // 6)).astype(np.uint8)
        label = coarse.repeat(6, 0).repeat(6, 1)
        label[:3] = 255
        Image.fromarray(label).save(root / "tiny/labels" / f"{i:03d}.png")
        photo = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        Image.fromarray(photo).save(root / "tiny/images" / f"{i:03d}.png")
    (root / "tiny.yaml").write_text(SPEC)
    return root


@pytest.fixture
def tiny(tiny_root, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tiny_root))
    register_dataset(tiny_root / "tiny.yaml")
    yield Tiny(tiny_root)
    unregister_dataset("tiny")
