"""A dataset of one's own is one YAML file: images and labels in a folder, no code, up to losses and scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from multiseg_d2.data.labels import read_local_label
from multiseg_d2.data.loader import build_train_loader
from multiseg_d2.data.register import register_from_config, unregister_dataset
from multiseg_d2.engine.config_file import load_config
from multiseg_d2.label_space import IGNORE, remap

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["asphalt", "cyclist", "fountain"]
#: What stands for the three classes and for pixels that are not scored, on disk.
IDS = {"index": [7, 300, 25, 0], "palette": [2, 0, 1, 3], "panoptic": [11, 12, 13, 0]}
COLORS = [[128, 64, 128], [255, 0, 0], [0, 0, 9], [0, 0, 0]]


def write_label(path: Path, kind: str, local: np.ndarray) -> list[dict]:
    """Writes (H, W) local ids the way ``kind`` stores them; returns the segments of encoding panoptic."""
    position = np.where(local == IGNORE, 3, local)
    segments = []
    if kind == "color":
        Image.fromarray(np.array(COLORS, np.uint8)[position]).save(path)
    elif kind == "panoptic":  # two segments of each class: the left half and the right half of the picture
        right = np.arange(local.shape[1]) >= local.shape[1] // 2
        numbers = np.where(local == IGNORE, 0, 1 + 2 * position.astype(int) + 70000 * right)
        for number in np.unique(numbers[numbers > 0]):
            segments.append({"id": int(number), "category_id": IDS[kind][(int(number) % 70000 - 1) // 2]})
        rgb = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=2)
        Image.fromarray(rgb.astype(np.uint8)).save(path)
    else:
        ids = np.array(IDS[kind])[position]
        picture = Image.fromarray(ids.astype(np.uint16 if ids.max() > 255 else np.uint8))
        if kind == "palette":
            picture = picture.convert("P")
            picture.putdata(ids.ravel().tolist())
            picture.putpalette(np.ravel(COLORS).tolist())
        picture.save(path)
    return segments


def write_dataset(root: Path, kind: str) -> dict[str, np.ndarray]:
    """Draws three training and two validation images and writes ``my_city.yaml``; returns the truth by label file."""
    rng = np.random.default_rng(7)
    truth, splits = {}, {}
    for split, count in (("train", 3), ("val", 2)):
        annotations = []
        for number in range(count):
            image = root / f"my_city/{split}/photos/week1/{number}.jpg"
            label = root / f"my_city/{split}/maps/week1/{number}_ids.png"
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            height, width = 40 + number, 60 - number
            local = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (height // 4 + 1, width // 4 + 1))
            local = local.repeat(4, 0).repeat(4, 1)[:height, :width]
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(image)
            annotations.append({"file_name": f"week1/{label.name}", "segments_info": write_label(label, kind, local)})
            truth[str(label)] = local
        splits[split] = {
            "images": f"my_city/{split}/photos/{{id}}.jpg",
            "labels": f"my_city/{split}/maps/{{id}}_ids.png",
        }
        if kind == "panoptic":
            splits[split]["annotation_file"] = f"my_city/{split}/panoptic.json"
            (root / f"my_city/{split}/panoptic.json").write_text(json.dumps({"annotations": annotations}))
    key, values = ("raw_colors", COLORS) if kind == "color" else ("raw", IDS[kind])
    classes = [{"name": name, key: [value]} for name, value in zip(CLASSES, values)]
    classes[0]["covers"], classes[1]["covers"] = ["road"], ["rider"]
    encoding = "index" if kind == "palette" else kind
    spec = {"name": "my_city", "encoding": encoding, "ignore": values[3:], "classes": classes, "splits": splits}
    (root / "my_city.yaml").write_text(yaml.safe_dump(spec))
    return truth


@pytest.fixture(params=["index", "palette", "color", "panoptic"])
def my_city(request, tmp_path, monkeypatch):
    """(config, truth by label file): what the command line ``DATASETS.SPECS ...`` gives, nothing else."""
    truth = write_dataset(tmp_path, request.param)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    keys = {
        "DATASETS.SPECS": f'("{tmp_path / "my_city.yaml"}",)',
        "DATASETS.TRAIN": '("my_city_train",)',
        "DATASETS.TEST": '("my_city_val",)',
        "DATALOADER.NUM_WORKERS": "0",
        "SOLVER.IMS_PER_BATCH": "2",
        "INPUT.CROP.SIZE": "(48, 64)",
        "INPUT.SCALE_RANGE": "(1.0, 1.0)",
        "INPUT.RANDOM_FLIP": "none",
        "MODEL.DEVICE": "cpu",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": "8",
    }
    cfg = load_config(str(ROOT / "configs/base.yaml"), [word for pair in keys.items() for word in pair])
    register_from_config(cfg)
    yield cfg, truth
    unregister_dataset("my_city")


def test_labels_are_read_for_evaluation(my_city):
    _, truth = my_city
    records = DatasetCatalog.get("my_city_val")
    assert [record["image_id"] for record in records] == ["week1/0", "week1/1"]
    for record in records:
        path = record.get("sem_seg_file_name") or record["pan_seg_file_name"]
        np.testing.assert_array_equal(read_local_label(record), truth[path])


def test_batches_hold_local_ids(my_city):
    cfg, truth = my_city
    batches = iter(build_train_loader(cfg))
    seen = set()
    for _ in range(3):  # 6 draws of 3 images: two epochs
        for sample in next(batches):
            path = sample.get("sem_seg_file_name") or sample["pan_seg_file_name"]
            height, width = truth[path].shape
            np.testing.assert_array_equal(sample["sem_seg"][:height, :width].numpy(), truth[path])
            assert sample["image"].shape == (3, 48, 64) and sample["dataset"] == "my_city"
            assert (sample["sem_seg"][height:] == IGNORE).all() and (sample["sem_seg"][:, width:] == IGNORE).all()
            seen.add(path)
    assert len(seen) == 3


def test_the_check_script_finds_nothing_wrong(my_city, tmp_path, monkeypatch, capsys):
    _, truth = my_city
    monkeypatch.syspath_prepend(str(ROOT / "datasets"))
    monkeypatch.delitem(sys.modules, "check", raising=False)
    import check

    report = tmp_path / "report.json"
    assert check.main([str(tmp_path / "my_city.yaml"), "--workers", "1", "--json", str(report)]) == 0
    counts = json.loads(report.read_text())["splits"]["my_city_train"]
    labels = [local for path, local in truth.items() if "/train/" in path]
    assert counts["class_pixels"] == {name: sum(int((x == i).sum()) for x in labels) for i, name in enumerate(CLASSES)}
    assert counts["ignored_pixels"] == sum(int((x == IGNORE).sum()) for x in labels)
    assert "no errors" in capsys.readouterr().out


@pytest.mark.parametrize("my_city", ["index"], indirect=True)
def test_metadata_model_and_relations_follow(my_city):
    cfg, _ = my_city
    metadata = MetadataCatalog.get("my_city_train")
    assert metadata.stuff_classes == CLASSES and len(metadata.stuff_colors) == 3 and metadata.ignore_label == 255
    cityscapes = MetadataCatalog.get("cityscapes_train").label_space
    road, rider = (cityscapes.classes.index(name) for name in ("road", "rider"))
    assert remap(metadata.label_space, cityscapes).tolist() == [road, rider, IGNORE]  # nobody says what a fountain is
    model = build_model(cfg)
    samples = next(iter(build_train_loader(cfg)))
    losses = model(samples)
    assert all(name.startswith("loss") and torch.isfinite(value) for name, value in losses.items()) and losses
    model.eval()
    with torch.no_grad():
        (result,) = model(samples[:1])
    assert result["sem_seg"].shape[0] == 3
