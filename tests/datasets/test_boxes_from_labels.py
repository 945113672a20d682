"""Boxes and tags made of labels: against scipy's components, and read back through the spec that is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from label_files import picture, save
from scipy import ndimage

from multiseg_d2.data import register

CLASSES = """classes:
  - {name: road, color: [1, 2, 3], raw: [7], covers: [road]}
  - {name: car, color: [4, 5, 6], raw: [26], covers: [car]}
  - {name: person, color: [7, 8, 9], raw: [24], covers: [person]}
"""


@pytest.fixture
def tool(script):
    return script("boxes_from_labels")


@pytest.fixture
def names():
    """Registers spec files, and forgets them and what the test registers by hand."""
    known = []
    yield known
    for name in known:
        register.unregister_dataset(name)


@pytest.fixture
def pixels(tmp_path, monkeypatch, names):
    """Three images of raw ids 7, 24, 26, as the registered set boxed."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    rng, labels = np.random.default_rng(3), {}
    for name in ("a", "b", "sub/c"):
        labels[name] = np.kron(rng.choice([7, 7, 24, 26], (9, 11)), np.ones((2, 2))).astype(np.uint8)
        save(tmp_path / f"boxed/images/{name}.jpg", picture(rng, 18, 22))
        save(tmp_path / f"boxed/labels/{name}.png", labels[name])
    split = 'splits: {train: {images: "boxed/images/{id}.jpg", labels: "boxed/labels/{id}.png"}}\n'
    (tmp_path / "boxed.yaml").write_text(f"name: boxed\n{CLASSES}{split}")
    register.register_dataset(tmp_path / "boxed.yaml")
    names.append("boxed")
    return labels


def oracle(labels: np.ndarray, value: int, least: int) -> set[tuple[int, int, int, int]]:
    parts, _ = ndimage.label(labels == value, structure=np.ones((3, 3)))
    return {
        (c.start, r.start, c.stop, r.stop)
        for i, (r, c) in enumerate(ndimage.find_objects(parts), 1)
        if (parts == i).sum() >= least
    }


def test_components_are_those_of_scipy(tool):
    labels = np.random.default_rng(0).choice(4, (40, 50), p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8)
    for least in (1, 3):
        boxes = tool.boxes_of_components(labels, [1, 3], least)
        assert {b[0] for b in boxes} == {1, 3}
        for local_id in (1, 3):
            found = [(x, y, x + w, y + h) for i, x, y, w, h, _ in boxes if i == local_id]
            assert len(found) > 9 and set(found) == oracle(labels, local_id, least)


def test_boxes_read_back_by_the_spec(tool, pixels, tmp_path, names, capsys):
    assert tool.main(["boxed_train", "--classes", "car", "person", "--min-size", "5", "--output", str(tmp_path)]) == 0
    assert "boxes of boxed_train" in capsys.readouterr().err
    names.append("boxed_train_box")
    assert register.register_dataset(tmp_path / "boxed_train_box.yaml") == ["boxed_train_box_train"]
    records, metadata = DatasetCatalog.get("boxed_train_box_train"), MetadataCatalog.get("boxed_train_box_train")
    assert metadata.stuff_classes == ["car", "person"] and metadata.annotation == "box"
    space, full = metadata.label_space, MetadataCatalog.get("boxed_train").label_space
    assert (space.membership == full.membership[1:, : space.membership.shape[1]]).all()
    for record in records:
        assert (record["height"], record["width"]) == (18, 22)
        for local_id, value in enumerate((26, 24)):
            found = {tuple(a["bbox"]) for a in record["annotations"] if a["category_id"] == local_id}
            assert found == oracle(pixels[record["image_id"]], value, 5) and found


def test_tags_of_a_view(tool, pixels, tmp_path, names):
    assert tool.main(["boxed_train[:2]", "--tags", "--workers", "1", "--output", str(tmp_path)]) == 0
    names.append("boxed_train_2_tag")
    register.register_dataset(tmp_path / "boxed_train_2_tag.yaml")
    records = DatasetCatalog.get("boxed_train_2_tag_train")
    assert len(records) == 2
    for record in records:
        shown = pixels[record["image_id"]]
        expected = [i for i, raw in enumerate((7, 26, 24)) if oracle(shown, raw, 16)]
        assert record["image_tags"] == expected


def test_segments_are_boxes_of_their_own(tool, tmp_path, monkeypatch, names):
    """Two cars that touch: one component, two segments; a third segment is too small."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    segments = np.zeros((8, 10), np.int64)
    segments[1:5, 1:4], segments[1:7, 4:9], segments[7, 0] = 300, 70000, 5
    png = np.stack([segments % 256, segments // 256 % 256, segments // 65536], axis=-1).astype(np.uint8)
    save(tmp_path / "p/l/x.png", png)
    save(tmp_path / "p/i/x.jpg", picture(np.random.default_rng(0), 8, 10))
    listed = [{"id": 300, "category_id": 26}, {"id": 70000, "category_id": 26}, {"id": 5, "category_id": 24}]
    content = {"annotations": [{"file_name": "x.png", "segments_info": listed}]}
    (tmp_path / "p.json").write_text(json.dumps(content))
    split = 'splits: {train: {images: "p/i/{id}.jpg", labels: "p/l/{id}.png", annotation_file: "p.json"}}\n'
    (tmp_path / "seg.yaml").write_text(f"name: segmented\nencoding: panoptic\nignore: [0]\n{CLASSES}{split}")
    names.append("segmented")
    argv = ["segmented_train", "--specs", str(tmp_path / "seg.yaml"), "--min-size", "2", "--output", str(tmp_path)]
    assert tool.main(argv) == 0
    boxes = json.loads((tmp_path / "segmented_train_box.json").read_text())["annotations"]
    assert sorted((b["category_id"], *b["bbox"], b["area"]) for b in boxes) == [
        (2, 1, 1, 3, 4, 12),
        (2, 4, 1, 5, 6, 30),
    ]


def test_a_broken_label_file_ends_it_and_nothing_is_written(tool, pixels, tmp_path, capsys):
    (tmp_path / "boxed/labels/b.png").write_bytes(b"no picture")
    assert tool.main(["boxed_train", "--workers", "1", "--output", str(tmp_path / "out")]) == 1
    assert "b.png" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["boxd_train"], "did you mean 'boxed_train'"),
        (["boxed_train", "--classes", "cra"], "has no class 'cra'"),
        (["toy_box_train"], "has no pixel labels"),
    ],
)
def test_what_cannot_be_made_is_said(tool, pixels, argv, message, capsys):
    assert tool.main(argv) == 1
    assert message in capsys.readouterr().err
