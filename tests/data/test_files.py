"""Pairing of files and what the annotation files add, against Detectron2's own loaders and plain listings."""

from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import yaml
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_sem_seg
from detectron2.structures import BoxMode
from PIL import Image

from multiseg_d2.data.files import DatasetFilesError, data_root, list_pairs, pair_files
from multiseg_d2.data.spec import SplitSpec, load_spec

SAMPLE_SPECS = Path(__file__).parents[2] / "datasets" / "samples"


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def make_split(tmp_path: Path, images="im/{id}.jpg", labels="gt/{id}.png", *, top=None, **more) -> SplitSpec:
    """The split ``val`` of a spec in ``tmp_path``; None leaves a key out."""
    split = {"images": images, "labels": labels, **more}
    content = {
        "name": "city",
        "classes": [{"name": "a", "raw": 1}, {"name": "b", "raw": 3}],
        "ignore": [0, 2],
        **(top or {}),
    }
    content["splits"] = {"val": {key: value for key, value in split.items() if value is not None}}
    path = tmp_path / "city.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_spec(path).splits["val"]


# ---- pairing ----


def test_pairs_have_equal_ids_in_a_stable_order(tmp_path):
    ids = ["b/2", "a/10", "a/9", "c"]
    random.Random(0).shuffle(ids)
    touch(tmp_path, *[f"im/{i}_left.jpg" for i in ids], *[f"gt/fine/{i}_id.png" for i in reversed(ids)])
    touch(
        tmp_path, "im/a/readme.txt", "gt/fine/c_color.png", "im/.cache/x_left.jpg", "im/a/._9_left.jpg"
    )  # not looked at
    split = make_split(tmp_path, "im/{id}_left.jpg", "gt/fine/{id}_id.png")
    records = list_pairs(split, str(tmp_path))
    assert [r["image_id"] for r in records] == sorted(ids)
    for record in records:
        i = record["image_id"]
        assert record == {
            "file_name": f"{tmp_path}/im/{i}_left.jpg",
            "sem_seg_file_name": f"{tmp_path}/gt/fine/{i}_id.png",
            "image_id": i,
            "dataset": "city",
            "entry": "city_val",
            "annotation": "pixel",
        }
    assert list_pairs(split, str(tmp_path)) == records


def test_strays_with_equal_counts_are_named_on_both_sides(tmp_path):
    """Sorted lists would pair these four files shifted, without a word."""
    touch(tmp_path, "im/1.jpg", "im/2.jpg", "im/3.jpg", "gt/2.png", "gt/3.png", "gt/4.png")
    with pytest.raises(
        DatasetFilesError, match="city_val: 1 images without label: 1; 1 labels without image: 4; looked for"
    ):
        list_pairs(make_split(tmp_path), str(tmp_path))
    found = pair_files(make_split(tmp_path), str(tmp_path))
    assert (found.without_label, found.without_image) == (("1",), ("4",))


@pytest.mark.parametrize("seed", range(8))
def test_strays_are_exactly_the_ids_on_one_side_only(tmp_path, seed):
    rng = random.Random(seed)
    names = [f"{rng.randrange(3)}/{rng.randrange(40)}" for _ in range(40)]
    images, labels = set(rng.sample(names, 25)), set(rng.sample(names, 25))
    touch(tmp_path, *[f"im/{i}.jpg" for i in images], *[f"gt/{i}.png" for i in labels])
    found = pair_files(make_split(tmp_path), str(tmp_path))
    assert set(found.without_label) == {i for i in images if i not in labels}
    assert set(found.without_image) == {i for i in labels if i not in images}


def test_many_strays_are_counted(tmp_path):
    touch(tmp_path, *[f"im/{i:02}.jpg" for i in range(30)], "gt/00.png")
    with pytest.raises(DatasetFilesError, match="29 images without label: 01, 02, .* 10 and 19 more;"):
        list_pairs(make_split(tmp_path), str(tmp_path))


def test_several_patterns(tmp_path):
    touch(tmp_path, "im/1.jpg", "im/2.png", "gt/1.png", "gt/2.png")
    split = make_split(tmp_path, ["im/{id}.jpg", "im/{id}.png"])
    assert [Path(r["file_name"]).name for r in list_pairs(split, str(tmp_path))] == ["1.jpg", "2.png"]
    touch(tmp_path, "im/2.jpg")
    with pytest.raises(DatasetFilesError, match="two files have the id '2': .*2.jpg and .*2.png"):
        list_pairs(split, str(tmp_path))


def test_special_characters_are_literal(tmp_path):
    touch(tmp_path, "i.m(1)/-x_y+.jpg", "i.m(1)/axjpg", "gt/-x_y+.png")
    (record,) = list_pairs(make_split(tmp_path, "i.m(1)/{id}.jpg"), str(tmp_path))
    assert record["image_id"] == "-x_y+"


def test_linked_folders_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/1.jpg", "gt/drive/1.png")
    (tmp_path / "im").mkdir()
    (tmp_path / "im" / "drive").symlink_to(tmp_path / "elsewhere")
    assert [r["image_id"] for r in list_pairs(make_split(tmp_path), str(tmp_path))] == ["drive/1"]


def test_paths_beside_the_spec_and_absolute_paths(tmp_path):
    touch(tmp_path, "here/1.jpg", "there/1.png")
    split = make_split(tmp_path, "./here/{id}.jpg", f"{tmp_path}/there/{{id}}.png")
    (record,) = list_pairs(split, "/no/such/root")
    assert os.path.samefile(record["file_name"], tmp_path / "here/1.jpg")
    assert record["sem_seg_file_name"] == f"{tmp_path}/there/1.png"


def test_missing_folder_names_root_pattern_and_variable(tmp_path):
    touch(tmp_path, "im/1.jpg")
    with pytest.raises(DatasetFilesError) as error:
        list_pairs(make_split(tmp_path), str(tmp_path))
    for part in (
        "city_val",
        f"the folder {tmp_path}/gt does not exist",
        "gt/{id}.png",
        repr(str(tmp_path)),
        "DETECTRON2_DATASETS",
    ):
        assert part in str(error.value)


def test_empty_split_is_refused_with_an_example_of_what_is_there(tmp_path):
    touch(tmp_path, "im/1.jpeg", "gt/1.png")
    with pytest.raises(DatasetFilesError, match=r"no image found.*There is, for example, .*/im/1.jpeg"):
        list_pairs(make_split(tmp_path), str(tmp_path))
    (tmp_path / "im" / "1.jpeg").unlink()
    with pytest.raises(DatasetFilesError, match="no image found.*There is no file at all"):
        list_pairs(make_split(tmp_path), str(tmp_path))


def test_split_without_labels_has_no_label_key(tmp_path):
    touch(tmp_path, "im/1.jpg", "gt/1.png")
    assert list_pairs(make_split(tmp_path, labels=None), str(tmp_path)) == [
        {
            "file_name": f"{tmp_path}/im/1.jpg",
            "image_id": "1",
            "dataset": "city",
            "entry": "city_val",
            "annotation": "none",
        }
    ]


def test_other_count_than_the_official_one_is_only_a_warning(tmp_path, caplog):
    touch(tmp_path, "im/1.jpg", "gt/1.png")
    with caplog.at_level(logging.WARNING, "multiseg_d2.data.files"):
        assert len(list_pairs(make_split(tmp_path, count=1), str(tmp_path))) == 1
        assert not caplog.records
        assert len(list_pairs(make_split(tmp_path, count=5), str(tmp_path))) == 1
    assert "city_val: 1 images found, 5 expected" in caplog.text


def test_data_root(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/data")
    assert data_root() == os.path.expanduser("~/data")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert data_root() == "datasets"


# ---- lists of ids ----


@pytest.mark.parametrize("as_file", [False, True])
def test_ids_choose_files_in_their_order(tmp_path, as_file):
    touch(tmp_path, *[f"im/{i}.jpg" for i in "12345"], *[f"gt/{i}.png" for i in "12349"])
    (tmp_path / "list.txt").write_text("4\n1\n\n3\n")
    split = make_split(tmp_path, ids="list.txt" if as_file else ["4", "1", "3"])
    assert [r["image_id"] for r in list_pairs(split, str(tmp_path))] == ["4", "1", "3"]


def test_ids_that_are_not_there_or_stand_twice(tmp_path):
    touch(tmp_path, *[f"im/{i}.jpg" for i in "123"], "gt/1.png", "gt/2.png")
    with pytest.raises(DatasetFilesError, match="city_val: no images for 7; looked for"):
        list_pairs(make_split(tmp_path, ids=["1", "7"]), str(tmp_path))
    with pytest.raises(DatasetFilesError, match="city_val: no labels for 3; looked for"):
        list_pairs(make_split(tmp_path, ids=["1", "3"]), str(tmp_path))
    with pytest.raises(DatasetFilesError, match="the spec .*city.yaml lists twice: 1"):
        list_pairs(make_split(tmp_path, ids=["1", "2", "1"]), str(tmp_path))
    with pytest.raises(
        DatasetFilesError, match="the list of ids .*val.txt: cannot be read: .* written by a script in datasets/"
    ):
        list_pairs(make_split(tmp_path, ids="val.txt"), str(tmp_path))


# ---- panoptic ----


def panoptic(tmp_path, entries, **more):
    names = [
        {"file_name": name, "image_id": 1, "segments_info": [{"id": n, "category_id": 3}]}
        for n, name in enumerate(entries)
    ]
    (tmp_path / "pan.json").write_text(json.dumps({"images": [], "annotations": names, "categories": []}))
    return make_split(tmp_path, top={"encoding": "panoptic"}, annotation_file="pan.json", **more)


def test_panoptic_entries_are_matched_by_name(tmp_path):
    touch(tmp_path, *[f"im/{i}.jpg" for i in "123"], *[f"gt/{i}.png" for i in "123"])
    records = list_pairs(panoptic(tmp_path, ["3.png", "1.png", "2.png"]), str(tmp_path))
    assert [r["segments_info"] for r in records] == [[{"id": n, "category_id": 3}] for n in (1, 2, 0)]
    assert records[0]["pan_seg_file_name"] == f"{tmp_path}/gt/1.png" and "sem_seg_file_name" not in records[0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["1.png", "2.png"], "city_val: .*pan.json has no entry for .*/gt/3.png"),
        (["1.png", "2.png", "3.png", "4.png"], "pan.json has entries for which there is no file in .*gt: 4.png"),
        (["1.png", "2.png", "3.png", "3.png"], "pan.json has several entries for 3.png"),
    ],
)
def test_panoptic_strays(tmp_path, entries, message):
    touch(tmp_path, *[f"im/{i}.jpg" for i in "123"], *[f"gt/{i}.png" for i in "123"])
    with pytest.raises(DatasetFilesError, match=message):
        list_pairs(panoptic(tmp_path, entries), str(tmp_path))


def test_panoptic_with_a_list_of_ids_needs_only_those(tmp_path):
    touch(tmp_path, *[f"im/{i}.jpg" for i in "123"], *[f"gt/{i}.png" for i in "123"])
    records = list_pairs(panoptic(tmp_path, ["3.png", "9.png"], ids=["3"]), str(tmp_path))
    assert [r["image_id"] for r in records] == ["3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "pan.json: cannot be read: No such file"),
        ("{", "not valid JSON"),
        ("[]", "is not in COCO's form: it needs the keys"),
    ],
)
def test_bad_annotation_file(tmp_path, content, message):
    touch(tmp_path, "im/1.jpg", "gt/1.png")
    split = panoptic(tmp_path, ["1.png"])
    (tmp_path / "pan.json").unlink() if content is None else (tmp_path / "pan.json").write_text(content)
    with pytest.raises(DatasetFilesError, match=message):
        list_pairs(split, str(tmp_path))


@pytest.mark.parametrize("entry", ["1.png", {"segments_info": []}, {"file_name": "1.png"}, {"file_name": ["1.png"]}])
def test_odd_entries_of_an_annotation_file(tmp_path, entry):
    touch(tmp_path, "im/1.jpg", "gt/1.png")
    split = panoptic(tmp_path, ["1.png"])
    (tmp_path / "pan.json").write_text(json.dumps({"annotations": [entry]}))
    with pytest.raises(DatasetFilesError, match=r"val: .*pan.json is not in COCO's form \((Key|Type)Error"):
        list_pairs(split, str(tmp_path))


# ---- boxes and tags ----


def instances(tmp_path, *, categories=(1, 3), boxes=True):
    """Three images, 40 random annotations, as a COCO instance JSON; image ids are not in file order."""
    rng = random.Random(1)
    images = [
        {"id": n, "file_name": f"{name}.jpg", "width": 64, "height": 48} for n, name in ((7, "a"), (5, "d/b"), (6, "c"))
    ]
    items = []
    for n in range(40):
        box = (
            {"bbox": [rng.uniform(0, 30), rng.uniform(0, 20), rng.uniform(1, 20), rng.uniform(1, 20)]} if boxes else {}
        )
        extra = {"area": 1, "iscrowd": int(n % 9 == 0)} if boxes else {}
        items.append(
            {"id": n + 1, "image_id": rng.choice([7, 5]), "category_id": rng.choice(categories), **box, **extra}
        )
    content = {
        "images": images,
        "annotations": items,
        "categories": [{"id": c, "name": str(c)} for c in sorted(set(categories))],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    touch(tmp_path, "im/a.jpg", "im/d/b.jpg", "im/c.jpg")
    return content


def weak(tmp_path, annotation, **more):
    return make_split(tmp_path, labels=None, annotation=annotation, annotation_file="boxes.json", **more)


def test_boxes_agree_with_detectron2(tmp_path):
    instances(tmp_path)
    records = list_pairs(weak(tmp_path, "box"), str(tmp_path))
    expected = load_coco_json(str(tmp_path / "boxes.json"), str(tmp_path / "im"), "boxes_of_a_test")  # ids 1, 3 -> 0, 1
    MetadataCatalog.pop("boxes_of_a_test")
    assert [r["image_id"] for r in records] == ["a", "c", "d/b"]
    assert sum(len(r["annotations"]) for r in records) == 40
    for theirs in expected:
        (ours,) = (r for r in records if r["file_name"] == theirs["file_name"])
        assert (ours["width"], ours["height"]) == (theirs["width"], theirs["height"])
        assert len(ours["annotations"]) == len(theirs["annotations"])
        for a, b in zip(ours["annotations"], theirs["annotations"]):
            assert a["bbox_mode"] == BoxMode.XYXY_ABS
            np.testing.assert_allclose(a["bbox"], BoxMode.convert(b["bbox"], b["bbox_mode"], BoxMode.XYXY_ABS))
            assert (a["category_id"], a["iscrowd"]) == (b["category_id"], b["iscrowd"])


def test_tags_are_the_categories_of_an_image(tmp_path):
    content = instances(tmp_path, boxes=False)
    records = list_pairs(weak(tmp_path, "tag"), str(tmp_path))
    for record in records:
        image_id = {"a": 7, "d/b": 5, "c": 6}[record["image_id"]]
        tags = {i["category_id"] for i in content["annotations"] if i["image_id"] == image_id}
        assert record["image_tags"] == sorted({1: 0, 3: 1}[c] for c in tags)
    assert records[1]["image_tags"] == []  # image c has none


def test_ignored_categories_and_empty_boxes_are_left_out(tmp_path, caplog):
    content = instances(tmp_path, categories=(1, 2, 3))
    content["annotations"][0].update(category_id=1, bbox=[1, 2, 0, 4])
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    kept = [i for i in content["annotations"][1:] if i["category_id"] != 2]
    records = list_pairs(weak(tmp_path, "box"), str(tmp_path))
    assert sum(len(r["annotations"]) for r in records) == len(kept)
    assert "1 boxes without area left out" in caplog.text
    assert {t for r in list_pairs(weak(tmp_path, "tag"), str(tmp_path)) for t in r["image_tags"]} == {0, 1}


def test_unknown_categories_are_counted(tmp_path):
    content = instances(tmp_path, categories=(1, 3, 99))
    count = sum(i["category_id"] == 99 for i in content["annotations"])
    for annotation in ("box", "tag"):
        with pytest.raises(
            DatasetFilesError, match=rf"category ids that the spec does not list: 99 \({count} annotations\)"
        ):
            list_pairs(weak(tmp_path, annotation), str(tmp_path))


@pytest.mark.parametrize("category", [None, "3", [3], 3.5, True, float("nan")])
def test_categories_that_are_no_numbers(tmp_path, category):
    content = instances(tmp_path)
    content["annotations"][0]["category_id"] = category
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(
        DatasetFilesError, match="boxes.json: .*category_id.* (is .* not a whole|has NaN, which is no) number"
    ):
        list_pairs(weak(tmp_path, "box"), str(tmp_path))


def test_strays_of_boxes(tmp_path):
    instances(tmp_path)
    touch(tmp_path, "im/e.jpg")
    with pytest.raises(DatasetFilesError, match="boxes.json has no entry for .*/im/e.jpg"):
        list_pairs(weak(tmp_path, "box"), str(tmp_path))
    (tmp_path / "im/e.jpg").unlink()
    (tmp_path / "im/c.jpg").unlink()
    with pytest.raises(DatasetFilesError, match="boxes.json has entries for which there is no file in .*/im: c.jpg"):
        list_pairs(weak(tmp_path, "tag"), str(tmp_path))
    assert [r["image_id"] for r in list_pairs(weak(tmp_path, "tag", ids=["a"]), str(tmp_path))] == ["a"]


def test_box_of_another_form(tmp_path):
    content = instances(tmp_path)
    content["annotations"][3]["bbox"] = [1, 2, 3]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(DatasetFilesError, match=r"annotation 4 of .*jpg: bbox is \[1, 2, 3\], not \[x, y, w, h\]"):
        list_pairs(weak(tmp_path, "box"), str(tmp_path))


# ---- real files ----


@pytest.mark.parametrize(
    ("name", "folder", "ext"),
    [
        ("camvid_sample", "camvid", "jpg"),
        ("bdd100k_sample", "bdd100k", "jpg"),
        ("coco_stuff_sample", "coco_stuff", "jpg"),
        ("kitti_sample", "kitti_semantic", "png"),
        ("comma10k_sample", "comma10k", "png"),
    ],
)
def test_real_pairs_agree_with_detectron2(samples, name, folder, ext):
    spec = load_spec(SAMPLE_SPECS / f"{name}.yaml")
    for split in spec.splits.values():
        ours = {(r["file_name"], r["sem_seg_file_name"]) for r in list_pairs(split, str(samples))}
        gt, images = samples / folder / "labels" / split.name, samples / folder / "images" / split.name
        theirs = load_sem_seg(str(gt), str(images), image_ext=ext)  # pairs by equal names where the counts agree
        assert ours == {(r["file_name"], r["sem_seg_file_name"]) for r in theirs}
        assert len(ours) == split.count == len(os.listdir(images))


def test_real_panoptic(samples):
    spec = load_spec(SAMPLE_SPECS / "coco_panoptic_sample.yaml")
    records = list_pairs(spec.splits["val"], str(samples))
    assert len(records) == 3
    for record in records:
        assert Path(record["file_name"]).stem == Path(record["pan_seg_file_name"]).stem == record["image_id"]
        rgb = np.asarray(Image.open(record["pan_seg_file_name"])).astype(np.int64)
        ids, counts = np.unique(rgb @ [1, 256, 65536], return_counts=True)
        areas = {s["id"]: s["area"] for s in record["segments_info"]}
        assert {i: n for i, n in zip(ids.tolist(), counts.tolist()) if i} == areas  # this JSON belongs to this picture
