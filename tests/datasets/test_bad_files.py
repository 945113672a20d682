"""Every conversion goes on after a bad file, names it, exits 1, and leaves nothing half-written of it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from label_files import picture, save
from PIL import Image

RNG = np.random.default_rng(0)
NAMES = ("a", "b", "c")  # b is the bad one


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def camvid(root: Path) -> list[str]:
    for name in NAMES:
        save(root / f"camvid/LabeledApproved_full/{name}_L.png", np.full((6, 8, 3), 128, np.uint8))
    cut(root / "camvid/LabeledApproved_full/b_L.png")
    return [f"camvid/Labeled_index/{name}.png" for name in NAMES]


def cityscapes(root: Path) -> list[str]:
    for name in NAMES:
        save(root / f"cityscapes/gtFine/val/ulm/{name}_gtFine_labelIds.png", np.full((6, 8), 7, np.uint8))
    cut(root / "cityscapes/gtFine/val/ulm/b_gtFine_labelIds.png")
    return [f"cityscapes/gtFine/val/ulm/{name}_gtFine_labelTrainIds.png" for name in NAMES]


def coco_stuff(root: Path) -> list[str]:
    names = [f"val2017/{number:012d}.png" for number in (1, 2, 3)]
    with zipfile.ZipFile(root / "maps.zip", "w") as archive:
        for name in names:
            path = save(root / "one.png", np.full((6, 8), 3, np.uint8))
            archive.writestr(name, path.read_bytes() if name != names[1] else path.read_bytes()[:40])
    return [f"coco/annotations/{name}" for name in names]


def idd(root: Path) -> list[str]:
    square = {"label": "sky", "polygon": [[0, 0], [9, 0], [9, 9]]}
    for name in NAMES:
        path = root / f"idd/gtFine/val/7/{name}_gtFine_polygons.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"imgWidth": 20, "imgHeight": 10, "objects": [square]}))
    cut(root / "idd/gtFine/val/7/b_gtFine_polygons.json")
    return [f"idd/gtFine/val/7/{name}_gtFine_labelids.png" for name in NAMES]


def sun_rgbd(root: Path) -> list[str]:
    for number in (1, 2, 3, 4):
        save(root / f"down/labels/img-{number:06d}.png", np.full((6, 8), number, np.uint8))
    for split, count in (("test", 1), ("train", 3)):
        for number in range(1, count + 1):
            save(root / f"down/{split}/img-{number:06d}.jpg", picture(RNG))
    cut(root / "down/labels/img-000003.png")  # of the second training image
    return [f"sun_rgbd/label37/train/{number:08d}.png" for number in (1, 2, 3)]


def wilddash2(root: Path) -> list[str]:
    entries = []
    for name in NAMES:
        save(root / f"wilddash2/images/{name}.jpg", picture(RNG))
        save(root / f"wilddash2/panoptic/{name}.png", np.full((6, 8, 3), (7, 0, 0), np.uint8))
        entries.append({"file_name": f"{name}.png", "segments_info": [{"id": 7, "category_id": 7}]})
    (root / "wilddash2/panoptic.json").write_text(json.dumps({"annotations": entries}))
    cut(root / "wilddash2/panoptic/b.png")
    return [f"wilddash2/labels_index/{name}.png" for name in NAMES]


CASES = {
    camvid: (),
    cityscapes: (),
    coco_stuff: ("{root}/maps.zip",),
    idd: (),
    sun_rgbd: ("archives", "--labels={root}/down/labels")
    + ("--train-images={root}/down/train", "--test-images={root}/down/test"),
    wilddash2: ("--index",),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_bad_file_is_named_and_the_others_are_converted(case, workers, script, tmp_path, capsys, monkeypatch):
    module = script(f"prepare_{case.__name__}")
    if case is sun_rgbd:
        monkeypatch.setattr(module, "TEST_COUNT", 1)
    good, bad, also_good = case(tmp_path)
    arguments = [argument.format(root=tmp_path) for argument in CASES[case]]
    assert module.main([*arguments, "--root", str(tmp_path), "--workers", str(workers)]) == 1
    err = capsys.readouterr().err
    assert Path(bad).name in err and not any(Path(name).name in err for name in (good, also_good))
    for name in (good, also_good):
        assert np.asarray(Image.open(tmp_path / name)).ndim == 2
    assert not (tmp_path / bad).exists() and not list(tmp_path.rglob(".*.tmp"))


def test_official_sun_rgbd_with_a_broken_matlab_file(script, tmp_path, capsys):
    for name in ("traintestSUNRGBD/allsplit.mat", "Metadata/SUNRGBDMeta.mat"):
        path = tmp_path / "toolbox" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    options = ["--images", str(tmp_path), "--toolbox", str(tmp_path / "toolbox"), "--root", str(tmp_path)]
    assert script("prepare_sun_rgbd").main(["official", *options]) == 1
    assert "allsplit.mat" in capsys.readouterr().err
