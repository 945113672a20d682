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
    assert picture.shape[0] > picture.shape[1] / 3 and picture.shape[1] > 2 * 480  # two rows of two readable panels
    assert len(names["labelled"]) == 4 and "toy_day_train" in DatasetCatalog.list()


def test_a_panel_for_each_label_space_in_its_own_colours():
    image, colors = np.full((300, 500, 3), 100, np.uint8), np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    ids, names = np.zeros((300, 500), np.uint8), ["one", "other"]
    page = in_label_spaces(image, {str(i): (ids + i % 2, names, colors) for i in range(4)})
    height, width = page.shape[0] // 2, page.shape[1] // 2
    for panel in range(4):
        rows, columns = slice(panel // 2 * height, None), slice(panel % 2 * width, None)
        pixels = page[rows, columns][60 : height - 60, 60 : width - 60].reshape(-1, 3).astype(int)
        red, green = (np.median(pixels[:, channel]) for channel in (0, 1))
        assert (red > green + 100) == (panel % 2 == 0) and (green > red + 100) == (panel % 2 == 1)
