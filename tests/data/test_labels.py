"""Label maps of every encoding against loops over single pixels, through registered specs."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import detection_utils as d2_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from multiseg_d2.data.decode import BadFileError, read_image
from multiseg_d2.data.labels import (
    ExactLookup,
    IllegalColorError,
    LabelReader,
    UnknownSegmentError,
    read_label,
    read_local_label,
)
from multiseg_d2.data.register import register_dataset, unregister_dataset
from multiseg_d2.label_space import IGNORE, IllegalLabelError


@pytest.fixture
def register(tmp_path):
    """Registers a spec given as a dict and returns the names of its entries; taken back after the test."""
    names = []

    def register(**spec):
        names.append(spec["name"])
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
        return register_dataset(tmp_path / "spec.yaml")

    yield register
    for name in names:
        unregister_dataset(name)


def split(folder) -> dict:
    return {"images": f"{folder}/images/{{id}}.png", "labels": f"{folder}/labels/{{id}}.png"}


def save(folder, name, label, image=None) -> None:
    for kind, pixels in (
        ("images", np.zeros((*label.shape[:2], 3), np.uint8) if image is None else image),
        ("labels", label),
    ):
        (folder / kind).mkdir(exist_ok=True)
        (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(folder / kind / f"{name}.png")


INDEX = {
    "name": "reader_index",
    "ignore": [0, 255],
    "classes": [{"name": "road", "raw": [7, 300]}, {"name": "sky", "raw": [23]}, {"name": "car", "raw": [26]}],
}
TABLE = {0: IGNORE, 255: IGNORE, 7: 0, 300: 0, 23: 1, 26: 2}


@pytest.mark.parametrize("kind", ["8 bit", "16 bit", "palette"])
def test_index_labels(tmp_path, register, kind):
    raw_ids = [i for i in TABLE if i < 256 or kind == "16 bit"]
    raw = np.random.default_rng(0).choice(raw_ids, (20, 31)).astype(np.uint16 if kind == "16 bit" else np.uint8)
    label = Image.fromarray(raw)
    if kind == "palette":
        label.putpalette(np.random.default_rng(1).integers(0, 256, 768).astype(np.uint8).tobytes())
    save(tmp_path, "a", raw, label)  # the label as image too: its size is that of the label
    label.save(tmp_path / "labels" / "a.png")
    (entry,) = register(**INDEX, splits={"train": split(tmp_path)})
    (dataset_dict,) = DatasetCatalog.get(entry)
    assert read_label(dataset_dict).tolist() == raw.tolist()
    local = read_local_label(dataset_dict)
    assert local.dtype == np.uint8
    assert local.tolist() == [[TABLE[i] for i in row] for row in raw.tolist()]


def test_an_illegal_id_is_an_error_with_file_id_and_count(tmp_path, register):
    raw = np.full((8, 9), 7, np.uint8)
    raw[3, 4:6], raw[0, 0] = 77, 78
    save(tmp_path, "street_42", raw)
    (entry,) = register(**INDEX, splits={"train": split(tmp_path)})
    (dataset_dict,) = DatasetCatalog.get(entry)
    with pytest.raises(IllegalLabelError, match=r"street_42\.png.*77 \(2 pixels\).*78 \(1 pixels\)") as error:
        read_local_label(dataset_dict)
    assert error.value.counts == {77: 2, 78: 1}


def test_ids_in_three_channels_are_refused_by_name(tmp_path, register):
    save(tmp_path, "a", np.full((8, 9, 3), 7, np.uint8))
    (entry,) = register(**INDEX, splits={"train": split(tmp_path)})
    with pytest.raises(BadFileError, match=r"a\.png.*encoding: index.*RGB PNG"):
        read_local_label(DatasetCatalog.get(entry)[0])


COLORS = {
    "encoding": "color",
    "ignore": [[0, 0, 0]],
    "classes": [
        {"name": "road", "raw_colors": [[128, 64, 128], [64, 128, 64]]},
        {"name": "sky", "raw_colors": [[128, 128, 128]]},
        {"name": "car", "raw_colors": [[128, 128, 64], [64, 128, 128]]},  # red and blue swapped: two colours, one class
        {"name": "lane", "raw_colors": [[1, 2, 3]]},
        {"name": "kerb", "raw_colors": [[3, 2, 1]]},  # red and blue of lane swapped: another class
    ],
}


def color_labels(extra=()) -> tuple[np.ndarray, list[list[int]]]:
    local = {tuple(c): i for i, entry in enumerate(COLORS["classes"]) for c in entry["raw_colors"]}
    local |= {(0, 0, 0): IGNORE, **dict(extra)}
    picks = np.random.default_rng(3).integers(0, len(local), (17, 23))
    colors = np.array(list(local), np.uint8)[picks]
    return colors, [[local[tuple(pixel)] for pixel in row] for row in colors.tolist()]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_color_labels(tmp_path, register, mode):
    colors, expected = color_labels()
    label = Image.fromarray(colors)
    save(tmp_path, "a", colors, colors)
    (label.quantize(64) if mode == "P" else label.convert(mode)).save(tmp_path / "labels" / "a.png")
    (entry,) = register(name="reader_color", **COLORS, splits={"train": split(tmp_path)})
    assert read_local_label(DatasetCatalog.get(entry)[0]).tolist() == expected


def test_an_unlisted_color_is_an_error_with_file_color_and_count(tmp_path, register):
    colors, _ = color_labels()
    colors[2, 3:6] = (200, 100, 50)
    save(tmp_path, "street", colors)
    (entry,) = register(name="reader_color", **COLORS, splits={"train": split(tmp_path)})
    with pytest.raises(IllegalColorError, match=r"street\.png.*\(200, 100, 50\): 3 pixels.*raw_colors") as error:
        read_local_label(DatasetCatalog.get(entry)[0])
    assert error.value.counts == {(200, 100, 50): 3}


def test_unlisted_colors_are_ignored_where_the_spec_says_so(tmp_path, register):
    colors, expected = color_labels(extra={(200, 100, 50): IGNORE}.items())
    save(tmp_path, "a", colors)
    (entry,) = register(name="reader_color", **COLORS, unlisted="ignore", splits={"train": split(tmp_path)})
    assert read_local_label(DatasetCatalog.get(entry)[0]).tolist() == expected


def test_grey_labels_with_encoding_color_are_refused_by_name(tmp_path, register):
    save(tmp_path, "a", np.full((8, 9), 7, np.uint8))
    (entry,) = register(name="reader_color", **COLORS, splits={"train": split(tmp_path)})
    with pytest.raises(BadFileError, match=r"a\.png.*encoding: color.*grey PNG.*encoding: index"):
        read_local_label(DatasetCatalog.get(entry)[0])


PANOPTIC = {
    "name": "reader_panoptic",
    "encoding": "panoptic",
    "ignore": [0, 9],
    "classes": [{"name": "road", "raw": [7]}, {"name": "car", "raw": [26, 300]}],
}
SEGMENTS = {255: 7, 256: 26, 65536: 300, 0x030201: 26, 0x010203: 9, 16777215: 7}  # segment id -> category id


def panoptic_dict(tmp_path, register, segments=SEGMENTS) -> tuple[dict, np.ndarray]:
    ids = np.random.default_rng(5).choice([0, *segments], (19, 21))
    colors = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=2).astype(np.uint8)
    save(tmp_path, "a", colors)
    listed = [{"id": i, "category_id": c} for i, c in SEGMENTS.items()]
    images = [{"id": 1, "file_name": "a.png", "width": 21, "height": 19}]
    annotations = [{"image_id": 1, "file_name": "a.png", "segments_info": listed}]
    (tmp_path / "pan.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    entries = register(**PANOPTIC, splits={"train": {**split(tmp_path), "annotation_file": str(tmp_path / "pan.json")}})
    return DatasetCatalog.get(entries[0])[0], ids


def test_panoptic_labels(tmp_path, register):
    dataset_dict, ids = panoptic_dict(tmp_path, register)
    category = {0: 0, **SEGMENTS}
    local = {0: IGNORE, 9: IGNORE, 7: 0, 26: 1, 300: 1}
    assert read_label(dataset_dict).tolist() == [[category[i] for i in row] for row in ids.tolist()]
    assert read_local_label(dataset_dict).tolist() == [[local[category[i]] for i in row] for row in ids.tolist()]


def test_a_segment_that_the_json_does_not_list_is_an_error(tmp_path, register):
    dataset_dict, ids = panoptic_dict(tmp_path, register, {**SEGMENTS, 4711: 7})
    count = int((ids == 4711).sum())
    with pytest.raises(UnknownSegmentError, match=rf"a\.png.*segments_info.*4711: {count} pixels"):
        read_local_label(dataset_dict)


def test_a_category_that_the_spec_does_not_list_is_an_error(tmp_path, register):
    dataset_dict, _ = panoptic_dict(tmp_path, register)
    dataset_dict["segments_info"][0]["category_id"] = 8
    with pytest.raises(IllegalLabelError, match=r"a\.png.*: 8 \("):
        read_local_label(dataset_dict)


@pytest.mark.parametrize(
    "change", [{"category_id": 70000}, {"category_id": None}, {"id": -1}, {"id": "7"}, {"id": 2**24}]
)
def test_segments_of_another_form_are_refused_by_file(tmp_path, register, change):
    dataset_dict, _ = panoptic_dict(tmp_path, register)
    dataset_dict["segments_info"][0].update(change)
    with pytest.raises(BadFileError, match=r"a\.png: its `segments_info` in the annotation file is not in COCO's form"):
        read_local_label(dataset_dict)


def test_a_reader_survives_pickling_for_worker_processes(tmp_path, register):
    colors, expected = color_labels()
    save(tmp_path, "a", colors)
    (entry,) = register(name="reader_color", **COLORS, splits={"train": split(tmp_path)})
    reader = pickle.loads(pickle.dumps(LabelReader.from_entry(entry)))
    (dataset_dict,) = DatasetCatalog.get(entry)
    assert reader.to_local(reader.read(dataset_dict), dataset_dict).tolist() == expected


def test_an_image_without_label_says_so():
    reader = LabelReader("index", np.zeros(65536, np.uint8))
    with pytest.raises(BadFileError, match=r"a\.png: this image has no label map"):
        reader.read({"file_name": "a.png"})


def test_read_image_is_contiguous_and_writable_colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=tags)
    for order in ("RGB", "BGR"):
        image = read_image(str(tmp_path / "a.png"), order)
        assert image.flags.c_contiguous
        np.testing.assert_array_equal(image, d2_utils.read_image(str(tmp_path / "a.png"), order))


# ---- real files ----


def test_bdd100k_palette_labels_are_train_ids(samples):
    for path in sorted((samples / "bdd100k/labels/train").iterdir())[:4]:
        with Image.open(path) as image:
            assert image.mode == "P"
            expected = np.asarray(image)
        dataset_dict = {"entry": "bdd100k_train", "sem_seg_file_name": str(path)}
        np.testing.assert_array_equal(read_label(dataset_dict), expected)
        local = read_local_label(dataset_dict)
        assert set(np.unique(local)) <= {*range(19), IGNORE}
        np.testing.assert_array_equal(local[expected < 19], expected[expected < 19])


@pytest.mark.parametrize(
    ("folder", "entry", "shift"),
    [("camvid/labels/val", "camvid_val", 0), ("coco_stuff/labels/val", "coco_stuff_val", None)],
)
def test_real_grey_labels(samples, folder, entry, shift):
    classes = len(MetadataCatalog.get(entry).stuff_classes)
    for path in sorted((samples / folder).iterdir())[:5]:
        dataset_dict = {"entry": entry, "sem_seg_file_name": str(path)}
        local, raw = read_local_label(dataset_dict), np.asarray(Image.open(path))
        assert local[local != IGNORE].max() < classes
        if shift is not None:
            np.testing.assert_array_equal(local, np.where(raw == 11, IGNORE, raw))
        else:  # 171 of 182 ids, order kept, 255 ignored
            np.testing.assert_array_equal(local == IGNORE, raw == 255)
            pairs = np.unique(np.stack([raw[raw < 255], local[raw < 255]]), axis=1)
            assert (np.diff(pairs[0].astype(int)) > 0).all() and (np.diff(pairs[1].astype(int)) > 0).all()


def test_kitti_labels_are_label_ids(samples):
    train_ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    train_ids |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    for path in sorted((samples / "kitti_semantic/labels/train").iterdir()):
        raw = np.asarray(Image.open(path))
        local = read_local_label({"entry": "kitti_train", "sem_seg_file_name": str(path)})
        for raw_id in np.unique(raw).tolist():
            assert set(np.unique(local[raw == raw_id])) == {train_ids.get(raw_id, IGNORE)}


def test_coco_panoptic_areas_are_those_of_the_json(samples, register, tmp_path):
    path = samples / "coco_panoptic/annotations/panoptic_val.json"
    content = json.loads(path.read_text())
    ids = [c["id"] for c in content["categories"]]
    place = {"images": str(samples / "coco_panoptic/images/val/{id}.jpg"), "annotation_file": str(path)}
    place["labels"] = str(samples / "coco_panoptic/labels/val/{id}.png")
    (entry,) = register(
        name="reader_coco",
        encoding="panoptic",
        ignore=[0],
        classes=[{"name": str(i), "raw": [i]} for i in ids],
        splits={"val": place},
    )
    dicts = DatasetCatalog.get(entry)
    assert len(dicts) == 3
    for dataset_dict in dicts:
        areas = np.zeros(256, np.int64)
        for segment in dataset_dict["segments_info"]:
            areas[ids.index(segment["category_id"])] += segment["area"]
        local = read_local_label(dataset_dict)
        areas[IGNORE] = local.size - areas.sum()
        np.testing.assert_array_equal(np.bincount(local.ravel(), minlength=256), areas)


def test_comma10k_colours(samples, register):
    colors = [[64, 32, 32], [255, 0, 0], [128, 128, 96], [0, 255, 102], [204, 0, 255]]
    place = {kind: str(samples / f"comma10k/{kind}/val/{{id}}.png") for kind in ("images", "labels")}
    classes = [{"name": str(i), "raw_colors": [c]} for i, c in enumerate(colors)]
    (entry,) = register(name="reader_comma", encoding="color", classes=classes, splits={"val": place})
    for dataset_dict in DatasetCatalog.get(entry):
        rgb = np.asarray(Image.open(dataset_dict["sem_seg_file_name"]).convert("RGB"))
        local = read_local_label(dataset_dict)
        for i, color in enumerate(colors):
            np.testing.assert_array_equal(local == i, (rgb == color).all(axis=2))


# ---- 24-bit keys, against a dict ----

KEYS = st.integers(0, (1 << 24) - 1)


@settings(max_examples=60, deadline=None)
@given(known=st.dictionaries(KEYS, st.integers(0, 65535), max_size=300), others=st.lists(KEYS, max_size=50))
def test_lookup_equals_a_dict(known, others):
    lookup = ExactLookup(np.array(list(known), np.uint32), np.array(list(known.values()), np.int64))
    asked = np.array([*known, *others], np.uint32)
    values, found = lookup(asked)
    for key, value, hit in zip(asked.tolist(), values.tolist(), found.tolist()):
        assert hit == (key in known)
        if hit:
            assert value == known[key]


@pytest.mark.parametrize("step", [1, 256, 65536, 4095])
def test_regular_keys_find_slots_of_their_own(step):
    keys = np.arange(0, min(1 << 24, 400 * step), step, dtype=np.uint32)
    values, found = ExactLookup(keys, np.arange(len(keys)))(keys.reshape(1, -1))
    assert found.all() and (values[0] == np.arange(len(keys))).all()


def test_what_does_not_fit_is_refused():
    for keys, values in (([1, 1], [0, 0]), ([1 << 24], [0]), ([-1], [0]), ([1], [65536]), ([1], [-1])):
        with pytest.raises(ValueError, match="distinct|must lie in"):
            ExactLookup(np.array(keys, np.int64), np.array(values))
