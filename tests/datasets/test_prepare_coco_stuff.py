"""datasets/prepare_coco_stuff.py: unpacking the archive of label maps."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from label_files import save
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent.parent / "datasets"


def test_coco_stuff_unpacks_checked_maps(script, samples, tmp_path, capsys):
    source = sorted((samples / "coco_stuff/labels/val").glob("*.png"))[:3]
    archive = tmp_path / "maps.zip"
    with zipfile.ZipFile(archive, "w") as content:
        for path in source:
            content.write(path, f"stuffthingmaps/val2017/{path.name}")
        content.writestr("../../evil/val2017/000000000001.txt", "outside")
    arguments = [str(archive), "--root", str(tmp_path), "--workers", "2"]
    assert script("prepare_coco_stuff").main(arguments) == 0
    for path in source:
        assert (tmp_path / "coco/annotations/val2017" / path.name).read_bytes() == path.read_bytes()
    assert script("prepare_coco_stuff").main(arguments) == 0 and "3 kept" in capsys.readouterr().out

    wrong = np.array(Image.open(source[0]))
    wrong[:2, :2] = 11  # COCO id 12, which never occurs
    with zipfile.ZipFile(archive, "w") as content:
        content.write(save(tmp_path / "wrong.png", wrong), "val2017/000000000009.png")
    assert script("prepare_coco_stuff").main(arguments) == 1
    err = capsys.readouterr().err
    assert "000000000009.png" in err and "11 (4 pixels)" in err
    assert not (tmp_path / "coco/annotations/val2017/000000000009.png").exists()


@pytest.mark.parametrize("content", ["absent", "cut", "other"])
def test_coco_stuff_names_a_bad_archive(script, tmp_path, capsys, content):
    archive = tmp_path / "maps.zip"
    if content != "absent":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("README.txt", "hello")
    if content == "cut":
        archive.write_bytes(archive.read_bytes()[:40])
    assert script("prepare_coco_stuff").main([str(archive), "--root", str(tmp_path)]) == 1
    assert str(archive) in capsys.readouterr().err


def test_coco_stuff_members_that_collide_or_go_nowhere_are_said(script):
    module = script("prepare_coco_stuff")
    name = "val2017/000000000009.png"
    found, others = module.members([f"a/{name}", "val2017/", "val2017/9.png", "LICENSE", "b/val2017/000000000009.PNG"])
    assert found == {name: f"a/{name}"} and others == ["val2017/9.png", "b/val2017/000000000009.PNG"]
    with pytest.raises(module.ConversionError, match="twice: as a/.* and as b/"):
        module.members([f"a/{name}", f"b/{name}"])
