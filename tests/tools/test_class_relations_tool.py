"""tools/class_relations.py from measuring to a line of the taxonomy, on the toy sets."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from multiseg_d2.class_relations import ClassResponses
from multiseg_d2.engine import Trainer, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "uniseg" / "toy.yaml")
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone", "MODEL.RESNETS.OUTPUT_STRIDE", "32"),
    *("DATASETS.TRAIN", "('toy_day_train', 'toy_dusk_train')", "DATASETS.TEST", "('toy_day_val',)"),
]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("class_relations_tool", ROOT / "tools" / "class_relations.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["class_relations_tool"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["class_relations_tool"]


@pytest.fixture(scope="module")
def measured(tool, toy_root, tmp_path_factory):
    """Responses of a model of random weights, measured on the toy sets."""
    folder = tmp_path_factory.mktemp("relations")
    options = [*SMALL, "OUTPUT_DIR", str(folder)]
    torch.manual_seed(0)
    model = Trainer.build_model(load_config(CONFIG, options))
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    options[options.index("MODEL.WEIGHTS") + 1] = str(folder / "model.pth")
    assert tool.main(["measure", "--config-file", CONFIG, *options]) == 0
    return folder / "class_responses.npz"


def test_measuring_counts_every_labelled_pixel(measured, toy_root):
    responses = ClassResponses.load(measured)
    assert list(responses.present) == ["toy_day", "toy_dusk"]
    for pixels, present in zip(responses.pixels.values(), responses.present.values()):
        assert 0.5 * 8 * 64 * 128 < pixels.sum() <= 8 * 64 * 128 and not pixels[~present].any()
    for cosines in responses.responses.values():
        assert (np.abs(cosines) <= 1).all() and np.abs(cosines).max() > 0


def test_another_threshold_is_saved_and_drawn(tool, measured, tmp_path, capsys):
    path, picture = tmp_path / "new.npz", tmp_path / "graph.png"
    args = ["list", str(measured), "--threshold", "0.9", "--save", str(path), "--graph", str(picture)]
    assert tool.main(args) == 0
    assert "toy_day: no relations" in capsys.readouterr().out and picture.stat().st_size > 1000
    assert ClassResponses.load(path).threshold == 0.9


def test_the_report_compares_with_the_taxonomy(tool, measured, tmp_path, capsys):
    """Relations planted into the responses come out where the taxonomy puts them."""
    responses = ClassResponses.load(measured)
    names, planted = responses.classes, {}
    pairs = {"toy_dusk": [("bicyclist", "rider"), ("bus", "bicycle")], "toy_day": [("car", "vehicle")]}
    for dataset, relations in pairs.items():
        planted[dataset] = np.full((len(names), len(names)), -0.5)
        for inner, outer in relations:
            planted[dataset][names.index(inner), names.index(outer)] = 0.5
    path = tmp_path / "planted.npz"
    pixels = {d: np.where(p, 9, 0) for d, p in responses.present.items()}
    ClassResponses(names, responses.present, planted, pixels, 0.0).save(path)
    crops = tmp_path / "crops"
    assert tool.main(["report", str(path), "--config-file", CONFIG, "--crops", str(crops), "--opts", *SMALL]) == 0
    day, dusk = capsys.readouterr().out.split("toy_dusk:")
    assert "confirmed: 1\n    bicyclist -> rider" in dusk and "contradicted: 1\n    bus -> bicycle" in dusk
    assert "confirmed: 1\n    car -> vehicle" in day and "truck -> vehicle" in day.split("missing")[1]
    assert not list(crops.glob("*rider*"))  # nobody has to look at what is confirmed


def test_acceptance_prints_a_line_or_says_why_not(tool, capsys):
    assert tool.main(["accept", "mapillary_vistas: Trailer", "cityscapes: truck"]) == 0
    assert "parents: [" in capsys.readouterr().out
    assert tool.main(["accept", "cityscapes: truk", "cityscapes: truck"]) == 2
    assert "truk" in capsys.readouterr().err
