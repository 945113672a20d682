"""datasets/prepare_gta5.py: the list of images whose label has their size."""

from __future__ import annotations

import numpy as np
from label_files import picture, save

from multiseg_d2.data.files import list_pairs
from multiseg_d2.data.spec import load_spec


def test_gta5_labels_of_another_size_are_left_out_and_named(script, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number, (image, label) in enumerate([((6, 8), (6, 8)), ((6, 8), (8, 6)), ((7, 9), (7, 9)), ((6, 8), None)], 1):
        save(tmp_path / f"gta5/images/{number:05d}.png", picture(rng, *image))
        path = tmp_path / f"gta5/labels/{number:05d}.png"
        if label is None:
            path.write_bytes(b"no picture")
        else:
            save(path, np.full(label, 7, np.uint8))
    arguments = ["--root", str(tmp_path), "--workers", "1"]
    assert script("prepare_gta5").main(arguments) == 1  # for the broken one: label maps of another size are known
    out, err = capsys.readouterr()
    assert "00002.png: is 6x8, its image 8x6" in out and "00004.png: UnidentifiedImageError" in err
    paired = list_pairs(load_spec("gta5").splits["paired"], str(tmp_path))
    assert [record["image_id"] for record in paired] == ["00001", "00003"]
    save(tmp_path / "gta5/labels/00002.png", np.full((6, 8), 7, np.uint8))
    assert script("prepare_gta5").main(arguments) == 1  # another list is there
    save(tmp_path / "gta5/labels/00004.png", np.full((9, 9), 7, np.uint8))
    assert script("prepare_gta5").main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "gta5/paired.txt").read_text().split() == ["00001", "00002", "00003"]


def test_gta5_nothing_there_is_said(script, tmp_path, capsys):
    assert script("prepare_gta5").main(["--root", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err
