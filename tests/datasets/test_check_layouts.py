"""datasets/check.py on files as datasets store them: palettes, 16-bit colours, 0 for "other", several folders."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def indexed(path: Path, ids: np.ndarray) -> None:
    """A palette PNG whose colours say nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids).convert("P")
    image.putdata(ids.ravel().tolist())
    image.putpalette([255 - i // 3 for i in range(768)])
    image.save(path)


def test_gta5_files(script, tmp_path, capsys):
    """Palette indices up to 34, images of several sizes; a label of another size than its image is named."""
    rng, sizes = np.random.default_rng(0), [(10, 19), (12, 18), (10, 19)]
    for number, (height, width) in enumerate(sizes, 1):
        image = tmp_path / f"gta5/images/{number:05d}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(image)
        ids = np.full((height, width), 7, np.uint8)
        ids[0], ids[1], ids[2] = 34, 26, 0  # licence plate, car, unlabeled
        indexed(tmp_path / f"gta5/labels/{number:05d}.png", ids)
    arguments = [
        "gta5_train",
        "--root",
        str(tmp_path),
        "--workers",
        "1",
        "--part",
        "--json",
        str(tmp_path / "report.json"),
    ]
    assert script("check").main(arguments) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())["splits"]["gta5_train"]
    assert {n: c for n, c in report["class_pixels"].items() if c} == {"road": 2 * 7 * 19 + 9 * 18, "car": 19 * 2 + 18}
    assert report["ignored_pixels"] == 2 * (19 * 2 + 18)
    indexed(tmp_path / "gta5/labels/00002.png", np.full((12, 17), 7, np.uint8))
    assert script("check").main(arguments) == 1 and "00002.png" in capsys.readouterr().out


def test_synthia_files(script, tmp_path, capsys):
    """The class is the first of three 16-bit channels; files that were cut to 8 bits are refused, not read as void."""
    image, label = tmp_path / "synthia/RGB/0000000.png", tmp_path / "synthia/GT/LABELS/0000000.png"
    for path in (image, label):
        path.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(image)
    stored = np.zeros((6, 8, 3), np.uint16)  # OpenCV writes BGR
    stored[..., 2], stored[..., 1] = 3, np.arange(48).reshape(6, 8) * 700  # road; instances
    stored[0, :, 2], stored[1, :, 2], stored[2, 0, 2] = 22, 13, 17  # lane marking, parking slot, rider
    cv2.imwrite(str(label), stored)
    arguments = [
        *("synthia", "--root", str(tmp_path), "--workers", "1", "--part"),
        *("--json", str(tmp_path / "report.json")),
    ]
    assert script("check").main(arguments) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())["splits"]["synthia_train"]
    assert {n: c for n, c in report["class_pixels"].items() if c} == {"road": 8 + 31, "rider": 1}
    assert report["ignored_pixels"] == 8
    cut = np.array(Image.open(label))  # what Pillow makes of 16-bit colours
    assert cut.dtype == np.uint8 and cut[..., 0].max() == 0
    Image.fromarray(cut).save(label)
    assert script("check").main(arguments) == 1
    assert "8-bit RGB PNG" in capsys.readouterr().out


def test_ade20k_files_hold_zero_for_other(script, tmp_path, capsys):
    """0 is ignored, 1 is the first class; what another program has shifted already is an error where it shows."""
    base = tmp_path / "ade20k/ADEChallengeData2016"
    image, label = base / "images/validation/ADE_val_00000001.jpg", base / "annotations/validation/ADE_val_00000001.png"
    for path in (image, label):
        path.parent.mkdir(parents=True)
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(image)
    ids = np.repeat(np.array([[0], [1], [1], [150], [7], [7]], np.uint8), 8, 1)
    Image.fromarray(ids).save(label)
    arguments = ["ade20k_val", "--root", str(tmp_path), "--workers", "1", "--part"]
    arguments += ["--json", str(tmp_path / "report.json")]
    assert script("check").main(arguments) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())["splits"]["ade20k_val"]
    assert {n: c for n, c in report["class_pixels"].items() if c} == {"wall": 16, "road": 16, "flag": 8}
    assert report["ignored_pixels"] == 8
    Image.fromarray(ids - np.uint8(1)).save(label)  # 255, 0, 0, 149, ...
    assert script("check").main(arguments) == 1 and "255 (8 pixels)" in capsys.readouterr().out


def test_acdc_files(script, tmp_path, capsys):
    """Each condition is a split, all together are one; pictures of the same places in normal weather are none of it."""
    for condition, split, number in (
        ("fog", "train", 1),
        ("night", "train", 2),
        ("rain", "train", 3),
        ("snow", "train", 4),
    ):
        for kind in (split, f"{split}_ref"):
            end = "rgb_anon" if kind == split else "rgb_ref_anon"
            image = tmp_path / f"acdc/rgb_anon/{condition}/{kind}/GP{number}/GP{number}_frame_000001_{end}.png"
            image.parent.mkdir(parents=True)
            Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(image)
        label = tmp_path / f"acdc/gt/{condition}/{split}/GP{number}/GP{number}_frame_000001_gt_labelTrainIds.png"
        label.parent.mkdir(parents=True)
        ids = np.full((6, 8), number, np.uint8)
        ids[0] = 255
        Image.fromarray(ids).save(label)
        Image.fromarray(np.ones((6, 8), np.uint8)).save(str(label).replace("_labelTrainIds", "_invIds"))
    names = ["acdc_train", "acdc_fog_train", "acdc_night_train", "acdc_rain_train", "acdc_snow_train"]
    arguments = [*names, "--root", str(tmp_path), "--workers", "1", "--part", "--json", str(tmp_path / "report.json")]
    assert script("check").main(arguments) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())["splits"]
    assert [report[name]["images"] for name in names] == [4, 1, 1, 1, 1]
    counted = {n: c for n, c in report["acdc_train"]["class_pixels"].items() if c}
    assert counted == dict.fromkeys(("sidewalk", "building", "wall", "fence"), 40)
    assert {n for n, c in report["acdc_night_train"]["class_pixels"].items() if c} == {"building"}


def test_mapillary_vistas_v20_files(script, tmp_path, capsys):
    """Palette PNG: the same number means another class than in v1.2, and 8 of the 124 labels are not evaluated."""
    base = tmp_path / "mapillary_vistas/validation"
    (base / "images").mkdir(parents=True)
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(base / "images/-a_B.jpg")
    ids = np.repeat(np.array([[13], [21], [2], [123], [116], [58]], np.uint8), 8, 1)
    indexed(base / "v2.0/labels/-a_B.png", ids)
    arguments = ["mapillary_vistas_v20_val", "--root", str(tmp_path), "--workers", "1", "--part"]
    arguments += ["--json", str(tmp_path / "report.json")]
    assert script("check").main(arguments) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())["splits"]["mapillary_vistas_v20_val"]
    counted = {n for n, c in report["class_pixels"].items() if c}
    assert counted == {"Bike Lane", "Road", "Wheeled Slow", "Lane Marking (only) - Test"}
    assert report["ignored_pixels"] == 16
    indexed(base / "v2.0/labels/-a_B.png", ids + np.uint8(2))
    assert script("check").main(arguments) == 1 and "125 (8 pixels)" in capsys.readouterr().out
