"""The example runs as it stands, with two steps."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog
from PIL import Image

from multiseg_d2.evaluation.pictures import in_label_spaces

ROOT = Path(__file__).resolve().parents[1]


def test_one_picture_in_four_label_spaces(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("EXAMPLE_OUTPUT", str(tmp_path))
    monkeypatch.setenv("EXAMPLE_STEPS", "2")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    names = runpy.run_path(str(ROOT / "examples" / "four_label_spaces.py"))
    said = capsys.readouterr().out
    assert "toy_day 'rider' is superset of toy_dusk 'bicyclist'" in said and "MB" in said
    assert (tmp_path / "shared.pth").stat().st_size < 15e6
    picture = np.asarray(Image.open(tmp_path / "four_label_spaces.png"))
    height, width = names["picture"].shape[:2]
    assert picture.shape == (2 * (height + 24), 2 * width, 3)
    assert len(names["labelled"]) == 4 and "toy_day_train" in DatasetCatalog.list()


def test_panels_in_rows():
    image, colors = np.full((30, 50, 3), 100, np.uint8), np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    ids = np.zeros((30, 50), np.uint8)
    page = in_label_spaces(image, {"a": (ids, colors), "b": (ids + 1, colors), "c": (ids, colors)})
    assert page.shape == (108, 100, 3)
    assert page[40, 25, 0] > page[40, 25, 1] and page[40, 75, 1] > page[40, 75, 0]
    assert not page[60:, 50:].any()
