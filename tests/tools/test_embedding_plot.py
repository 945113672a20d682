"""tools/embedding_plot.py: pictures and tables of a model, and the nearest classes by hand."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from multiseg_d2.engine import Trainer, load_config
from multiseg_d2.evaluation.embedding_plot import PixelSample, nearest_classes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "universal_semi" / "toy.yaml")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("embedding_plot_tool", ROOT / "tools" / "embedding_plot.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["embedding_plot_tool"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["embedding_plot_tool"]


def test_nearest_classes_by_hand():
    rng = np.random.default_rng(0)
    directions = {"road": [1.0, 0, 0], "sky": [0, 1.0, 0], "car": [0, 0, 1.0]}
    names = {"a": ("road", "sky", "car"), "b": ("firmament", "ground")}
    of = {"a": names["a"], "b": ("sky", "road")}  # what b's classes look like
    pixels = {d: [np.array(directions[n]) + 0.05 * rng.normal(size=(30, 3)) for n in of[d]] for d in names}
    sample = PixelSample.of(pixels, names, 20)
    assert len(sample.features) == 5 * 20 and (np.bincount(sample.datasets) == [60, 40]).all()
    found = {(r["dataset"], r["class"]): (r["other"], r["nearest"]) for r in nearest_classes(sample)}
    assert found["a", "road"] == ("b", "ground") and found["a", "sky"] == ("b", "firmament")
    assert found["b", "ground"] == ("a", "road") and found["b", "firmament"] == ("a", "sky")
    with pytest.raises(ValueError, match="no labelled pixel"):
        PixelSample.of({"a": [np.zeros((0, 3))]}, names, 20)


def test_pictures_and_tables_of_a_model(tool, toy_root, tmp_path):
    small = [
        *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path)),
        *("MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone", "MODEL.RESNETS.OUTPUT_STRIDE", "32"),
    ]
    torch.manual_seed(0)
    model = Trainer.build_model(load_config(CONFIG, small))
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    small[small.index("MODEL.WEIGHTS") + 1] = str(tmp_path / "model.pth")
    assert tool.main(["--config-file", CONFIG, "--pixels", "6", *small]) == 0
    for name in ("decoder", "module"):
        assert cv2.imread(str(tmp_path / "embedding" / f"{name}.png")).std() > 5
        points = list(csv.DictReader((tmp_path / "embedding" / f"{name}.csv").open()))
        counts = {}
        for point in points:
            counts[point["dataset"], point["class"]] = counts.get((point["dataset"], point["class"]), 0) + 1
        assert {dataset for dataset, _ in counts} == {"toy_day", "toy_dusk"} and max(counts.values()) == 6
        nearest = list(csv.DictReader((tmp_path / "embedding" / f"{name}_nearest.csv").open()))
        assert len(nearest) == len(counts) and all(-1.001 <= float(row["cosine"]) <= 1.001 for row in nearest)
