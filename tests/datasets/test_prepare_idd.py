"""datasets/prepare_idd.py: draws polygons: against counting crossings, names, order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from label_files import ids_in, picture, save

from multiseg_d2.data.files import list_pairs
from multiseg_d2.data.labels import read_local_label
from multiseg_d2.data.register import register_dataset
from multiseg_d2.data.spec import load_spec

FOLDER = Path(__file__).resolve().parent.parent.parent / "datasets"


def polygon_file(path: Path, objects: list[tuple[str, list]], size=(40, 30), **extra) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    items = [{"label": label, "polygon": polygon, "deleted": 0} | extra.get(label, {}) for label, polygon in objects]
    path.write_text(json.dumps({"imgWidth": size[0], "imgHeight": size[1], "objects": items}))
    return path


def inside(polygon: list, x: float, y: float) -> bool:
    """Even-odd rule by counting crossings."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1]):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            crossings += 1
    return crossings % 2 == 1


def near_an_edge(polygon: list, x: float, y: float) -> bool:
    point = np.array([x, y])
    for a, b in zip(np.array(polygon, float), np.array(polygon[1:] + polygon[:1], float)):
        along = np.clip(np.dot(point - a, b - a) / max(np.dot(b - a, b - a), 1e-9), 0, 1)
        if np.linalg.norm(point - a - along * (b - a)) < 1.0:
            return True
    return False


def test_idd_polygons_against_counting_crossings(script, tmp_path):
    """Random triangles to hexagons, later ones over earlier ones; pixels near an edge may go either way."""
    rng = np.random.default_rng(0)
    names = ["road", "sky", "cargroup", "obs-str-bar-fallback", "person", "fallback background", "tunnel"]
    known = {"road": 0, "sky": 33, "cargroup": 12, "obs-str-bar-fallback": 28, "person": 6, "tunnel": 31}
    known["fallback background"] = 34
    for number in range(6):
        count = rng.integers(1, 6)
        shapes = [
            (rng.choice(names), rng.integers(0, [40, 30], (rng.integers(3, 7), 2)).tolist()) for _ in range(count)
        ]
        path = polygon_file(tmp_path / f"idd/gtFine/train/{number}/frame_gtFine_polygons.json", shapes)
        assert script("prepare_idd").main(["--root", str(tmp_path), "--workers", "1"]) == 0
        drawn = ids_in(path.parent / "frame_gtFine_labelids.png")
        assert drawn.shape == (30, 40)
        compared = 0
        for y in range(30):
            for x in range(40):
                if any(near_an_edge(polygon, x, y) for _, polygon in shapes):
                    continue
                expected = [known[name] for name, polygon in shapes if inside(polygon, x, y)]
                assert drawn[y, x] == (expected[-1] if expected else 35), (number, x, y)
                compared += 1
        assert compared > 100


def test_idd_order_skipped_objects_and_names(script, tmp_path, capsys):
    square = [[5, 5], [20, 5], [20, 20], [5, 20]]
    everything = [[0, 0], [40, 0], [40, 30], [0, 30]]
    objects = [
        ("sky", everything),
        ("road", square),
        ("bus", [[1, 1], [9, 9]]),
        ("truck", square),
        ("ground", [[25, 5], [35, 5], [35, 15], [25, 15]]),
        ("ground", [[8, 8], [15, 8], [15, 15], [8, 15]]),
    ]
    folder = tmp_path / "IDD_Segmentation/gtFine/val/7"
    polygon_file(folder / "a_gtFine_polygons.json", objects, truck={"deleted": 1})
    assert script("prepare_idd").main(["--root", str(tmp_path), "--folder", "IDD_Segmentation", "--workers", "1"]) == 0
    drawn = ids_in(folder / "a_gtFine_labelids.png")
    assert drawn[2, 2] == 33 and drawn[10, 30] == 33 and set(np.unique(drawn)) == {0, 33}  # the bus is a line
    assert (drawn[5:20, 5:20] == 0).all()  # the truck is deleted; a ground polygon leaves the road beneath it
    assert "'ground'" in capsys.readouterr().out

    polygon_file(folder / "b_gtFine_polygons.json", [("spaceship", square)])
    (folder / "c_gtFine_polygons.json").write_text("{}")
    assert script("prepare_idd").main(["--root", str(tmp_path), "--folder", "IDD_Segmentation", "--workers", "1"]) == 1
    err = capsys.readouterr().err
    assert "'spaceship'" in err and "b_gtFine_polygons.json" in err and "c_gtFine_polygons.json" in err
    assert not (folder / "b_gtFine_labelids.png").exists()


@pytest.mark.parametrize(
    "objects",
    [
        5,
        ["road"],
        [{"label": "road"}],
        [{"polygon": [[0, 0], [9, 0], [9, 9]]}],
        [{"label": "road", "polygon": [0, 0, 9, 0, 9, 9]}],
        [{"label": "road", "polygon": [["a", 0], [9, 0], [9, 9]]}],
        [{"label": ["road"], "polygon": [[0, 0], [9, 0], [9, 9]]}],
    ],
)
def test_idd_files_of_another_form_are_named(script, tmp_path, capsys, objects):
    path = tmp_path / "idd/gtFine/val/7/odd_gtFine_polygons.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"imgWidth": 20, "imgHeight": 10, "objects": objects}))
    polygon_file(path.with_name("sound_gtFine_polygons.json"), [("sky", [[0, 0], [40, 0], [40, 30]])])
    assert script("prepare_idd").main(["--root", str(tmp_path), "--workers", "1"]) == 1
    err = capsys.readouterr().err
    assert "odd_gtFine_polygons.json: not a polygon file of IDD" in err and "sound" not in err
    assert [file.name for file in path.parent.glob("*.png")] == ["sound_gtFine_labelids.png"]


NOT_A_NUMBER = '{"imgWidth": 9, "imgHeight": 9, "objects": [{"label": "sky", "polygon": [[NaN, 0], [9, 0], [9, 9]]}]}'


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"imgWidth": 9999999, "imgHeight": 9999999, "objects": []}', "\xff\xfe", NOT_A_NUMBER]
)
def test_idd_files_that_break_their_reader_do_not_end_the_run(script, tmp_path, capsys, text):
    """Too deep for the parser, larger than memory, no UTF-8, NaN: named, and the next file is drawn."""
    folder = tmp_path / "idd/gtFine/val/7"
    polygon_file(folder / "sound_gtFine_polygons.json", [("sky", [[0, 0], [40, 0], [40, 30]])])
    (folder / "broken_gtFine_polygons.json").write_text(text, encoding="latin-1")
    assert script("prepare_idd").main(["--root", str(tmp_path), "--workers", "1"]) == 1
    assert "broken_gtFine_" in capsys.readouterr().err
    assert [file.name for file in folder.glob("*.png")] == ["sound_gtFine_labelids.png"]


def test_idd_ids_are_those_of_the_specs(script):
    """A class of level 4 that stands for one raw id has that id's name."""
    names = script("prepare_idd").NAMES
    assert len(names) == 40
    spec = load_spec("idd_level4")
    single = [c for c in spec.classes if len(c.raw_ids) == 1]
    assert len(single) > 20 and all(names[c.raw_ids[0]] == c.name for c in single)
    used = {i for c in spec.classes for i in c.raw_ids} | set(spec.ignore_ids)
    assert set(range(40)) <= used


def test_idd_is_read_through_its_spec(script, tmp_path):
    polygon_file(
        tmp_path / "idd/gtFine/train/0/000001_gtFine_polygons.json",
        [("sky", [[0, 0], [40, 0], [40, 30], [0, 30]]), ("animal", [[5, 5], [20, 5], [20, 20], [5, 20]])],
    )
    save(tmp_path / "idd/leftImg8bit/train/0/000001_leftImg8bit.png", picture(np.random.default_rng(0), 30, 40))
    script("prepare_idd").main(["--root", str(tmp_path), "--workers", "1"])
    register_dataset("idd")
    (record,) = list_pairs(load_spec("idd").splits["train"], str(tmp_path))
    local = read_local_label(record)
    assert (
        load_spec("idd").class_names[local[10, 10]] == "person" and load_spec("idd").class_names[local[0, 0]] == "sky"
    )
