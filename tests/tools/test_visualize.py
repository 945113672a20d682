"""tools/visualize.py on made-up entries with pixel labels, boxes, tags and nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from multiseg_d2.data.register import unregister_dataset

TOOL = Path(__file__).resolve().parents[2] / "tools" / "visualize.py"
SPEC = """
name: shown
ignore: [255]
classes:
  - {{name: street, color: [128, 64, 128], raw: [1]}}
  - {{name: sign, color: [220, 220, 0], raw: [2]}}
annotation: {annotation}
splits:
  train: {{images: "shown/images/{{id}}.png"{more}}}
"""


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tool_visualize", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def show(tool, tmp_path, monkeypatch):
    """Writes six images and a spec of the given annotation, and runs the tool."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / "shown" / kind).mkdir(parents=True)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3)).astype(np.uint8)).save(tmp_path / f"shown/images/{i}.png")
        label = np.ones((40, 60), np.uint8)
        label[:20] = 2
        Image.fromarray(label).save(tmp_path / f"shown/labels/{i}.png")
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(6)],
        "categories": [{"id": 1, "name": "street"}, {"id": 2, "name": "sign"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 2, "bbox": [10, 5, 20, 10], "iscrowd": 0, "area": 200}
            for i in range(6)
        ],
    }
    (tmp_path / "shown/annotations.json").write_text(json.dumps(coco))
    more = {
        "pixel": ', labels: "shown/labels/{id}.png"',
        "box": ', annotation_file: "shown/annotations.json"',
        "tag": ', annotation_file: "shown/annotations.json"',
        "none": "",
    }

    def run(*arguments, annotation="pixel") -> int:
        spec = tmp_path / "shown.yaml"
        spec.write_text(SPEC.format(annotation=annotation, more=more[annotation]))
        return tool.main(["shown_train", "--specs", str(spec), "--output", str(tmp_path / "out"), *arguments])

    yield run
    if "shown_train" in MetadataCatalog.list():
        unregister_dataset("shown")


def written(tmp_path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "out/shown_train").glob("*"))


def test_labels_of_a_spec_of_ones_own(show, tmp_path):
    assert show("--number", "3") == 0
    assert written(tmp_path) == ["000001_1.png", "000003_3.png", "000005_5.png"]
    page = np.asarray(Image.open(tmp_path / "out/shown_train/000001_1.png")).astype(int)
    assert page.shape[1] > 2 * 480  # image and label side by side, enlarged
    height, width = 320, 480
    label = page[-20 - 8 - 8 - height : -20 - 8 - 8, 8 + width + 8 : 8 + 2 * width + 8]
    upper, lower = np.median(label[20:140].reshape(-1, 3), 0), np.median(label[180:300].reshape(-1, 3), 0)
    assert upper[0] > 150 and upper[1] > 150 and upper[2] < 60  # sign: yellow
    assert lower[0] > lower[1] and lower[2] > lower[1]  # street: purple


def test_all_and_named_images(show, tmp_path):
    assert show("--number", "0") == 0 and len(written(tmp_path)) == 6


def test_named_images(show, tmp_path, capsys):
    assert show("--images", "4", "2") == 0
    assert written(tmp_path) == ["000002_2.png", "000004_4.png"]
    assert show("--images", "9") == 2 and "no image '9'" in capsys.readouterr().err


def test_boxes_lie_where_the_annotation_says(tool, show, tmp_path):
    assert show("--number", "1", annotation="box") == 0 and len(written(tmp_path)) == 1
    image = np.zeros((400, 600, 3), np.uint8)
    space = MetadataCatalog.get("shown_train").label_space
    (record, *_) = DatasetCatalog.get("shown_train")
    scaled = [dict(a, bbox=[10 * v for v in a["bbox"]]) for a in record["annotations"]]
    drawn = tool.draw_boxes(image, scaled, space)
    factor = drawn.shape[1] // 600
    yellow = np.argwhere((drawn == [220, 220, 0]).all(-1))
    (top, left), (bottom, right) = yellow.min(0), yellow.max(0)
    assert [left, top, right + 1, bottom + 1] == [factor * v for v in (100, 50, 300, 150)]


def test_tags_and_unlabelled_images(show, tmp_path):
    assert show("--number", "1", annotation="tag") == 0 and len(written(tmp_path)) == 1


def test_unlabelled_images(show, tmp_path):
    assert show("--number", "1", annotation="none") == 0 and len(written(tmp_path)) == 1


@pytest.mark.parametrize("fault", ["illegal id", "broken image", "other size"])
def test_bad_files_are_named_and_the_others_drawn(show, tmp_path, capsys, fault):
    if fault == "illegal id":
        Image.fromarray(np.full((40, 60), 9, np.uint8)).save(tmp_path / "shown/labels/3.png")
    elif fault == "broken image":
        (tmp_path / "shown/images/3.png").write_bytes(b"\x89PNG nonsense")
    else:
        Image.fromarray(np.ones((10, 60), np.uint8)).save(tmp_path / "shown/labels/3.png")
    assert show("--number", "0") == 1
    assert re.search(r"not drawn:.*3\.png", "".join(capsys.readouterr().err.split("\n")))
    assert len(written(tmp_path)) == 5


def test_unknown_entries_get_a_suggestion(tool, tmp_path, capsys):
    assert tool.main(["camvid_trian", "--output", str(tmp_path)]) == 2
    assert "did you mean 'camvid_train'" in capsys.readouterr().err


def test_the_specs_of_the_config_are_known(tool, show, tmp_path, monkeypatch):
    """An entry that only DATASETS.SPECS of the config names is found, and asked for by its dataset."""
    assert show() == 0  # writes the spec and the files
    specs = tmp_path / "shown.yaml"
    unregister_dataset("shown")
    config = tmp_path / "config" / "cfg.yaml"
    config.parent.mkdir()
    config.write_text(f'DATASETS: {{TRAIN: ["shown_train"], SPECS: ["{specs}"]}}')
    asked = []

    class Predictor:
        image_format = "RGB"

        def __init__(self, cfg, space, norm):
            asked.append((tuple(cfg.DATASETS.SPECS), space, norm))

        def __call__(self, image, name):
            return np.zeros(image.shape[:2], np.uint8)

    monkeypatch.setattr(tool, "Predictor", Predictor)
    out = tmp_path / "again"
    assert tool.main(["shown_train", "--config-file", str(config), "--output", str(out)]) == 0
    assert asked == [((str(specs),), "shown", "")] and list(out.rglob("*.png"))
