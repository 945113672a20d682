"""The command that makes spatial priors, on drawn scenes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import spatial_prior


def test_priors_of_drawn_streets(toy_root, tmp_path, capsys):
    path = tmp_path / "prior.npz"
    assert spatial_prior.main(["toy_day_train", "--size", "32", "64", "--output", str(path)]) == 0
    with np.load(path) as file:
        prior, classes = file["prior"], file["classes"].tolist()
    assert prior.shape == (len(classes), 32, 64)
    road, sky = prior[classes.index("road")], prior[classes.index("sky")]
    assert road[-4:].mean() > 10 * road[:4].mean()
    assert sky[:4].mean() > 10 * sky[-4:].mean()
    assert min(Image.open(path.with_suffix(".png")).size) > 200


def test_an_entry_that_is_not_there(tmp_path, capsys):
    code = spatial_prior.main(["toy_dya_train", "--size", "8", "8", "--output", str(tmp_path / "p.npz")])
    assert code == 2
    assert "toy_day_train" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
