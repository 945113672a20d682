"""datasets/prepare_camvid.py: index PNGs against the colour maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from label_files import save

from multiseg_d2.data.files import list_pairs
from multiseg_d2.data.labels import read_local_label
from multiseg_d2.data.register import register_dataset
from multiseg_d2.data.spec import load_spec

FOLDER = Path(__file__).resolve().parent.parent.parent / "datasets"


def test_camvid_index_equals_the_colour_maps(script, tmp_path, capsys):
    """camvid_index must give what camvid_full gives, for every colour, void and colours that nobody lists."""
    spec = load_spec("camvid_full")
    colors = [color for c in spec.classes for color in c.raw_colors] + [(0, 0, 0)]
    assert len(colors) == 32
    pixels = np.array(colors, np.uint8).reshape(4, 8, 3).repeat(2, 0)
    ids = [line for line in (FOLDER.parent / "multiseg_d2/data/specs/ids/camvid_val.txt").read_text().split() if line]
    for number, image_id in enumerate(ids):
        save(tmp_path / f"camvid/LabeledApproved_full/{image_id}_L.png", np.roll(pixels, number, axis=0))
        save(tmp_path / f"camvid/701_StillsRaw_full/{image_id}.png", pixels)
    odd = pixels.copy()
    odd[0, 0] = (1, 2, 3)
    save(tmp_path / f"camvid/LabeledApproved_full/{ids[0]}_L.png", odd)
    assert script("prepare_camvid").main(["--root", str(tmp_path), "--workers", "2"]) == 0
    assert "in 1 files: some colours are in no table" in capsys.readouterr().out
    register_dataset("camvid_full"), register_dataset("camvid_index")
    pairs = [list_pairs(load_spec(name).splits["val"], str(tmp_path)) for name in ("camvid_full", "camvid_index")]
    assert len(pairs[0]) == len(pairs[1]) == 101
    for full, index in zip(*pairs):
        assert full["image_id"] == index["image_id"]
        np.testing.assert_array_equal(read_local_label(full), read_local_label(index))
