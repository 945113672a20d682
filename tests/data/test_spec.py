"""Spec files: what they mean, and what is refused with file and key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from multiseg_d2.data.spec import SpecError, load_spec, packaged_specs
from multiseg_d2.label_space import IGNORE, ILLEGAL

MINIMAL = {
    "name": "my_city",
    "classes": [{"name": "road", "raw": [7, 8]}, {"name": "sky", "raw": 23}],
    "splits": {"train": {"images": "a/{id}.jpg", "labels": "b/{id}.png"}},
}


def write(folder, content, name="spec.yaml"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def load(folder, **changes):
    return load_spec(write(folder, {k: v for k, v in {**MINIMAL, **changes}.items() if v is not None}))


def test_example_in_the_documentation(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "dataset_specs.md").read_text(encoding="utf-8")
    spec = load_spec(write(tmp_path, text.split("```yaml\n", 1)[1].split("```")[0]))
    assert (spec.name, spec.dataset, spec.encoding, spec.unlisted) == ("my_city", "my_city", "index", "error")
    assert spec.class_names == ("road", "sky", "thing")
    assert spec.classes[0].covers == ("road",) and spec.classes[1].covers is None
    assert spec.raw_to_local[[7, 8, 23, 30, 0, 255, 9]].tolist() == [0, 0, 1, 2, IGNORE, IGNORE, ILLEGAL]
    train, val, test = (spec.splits[s] for s in ("train", "val", "test"))
    assert (train.count, train.annotation, train.entry) == (300, "pixel", "my_city_train")
    assert val.images == ("my_city/a/{id}.jpg", "my_city/b/{id}.png") and val.ids == "my_city/val.txt"
    assert test.labels == () and test.annotation == "none"


def test_colors_are_taken_or_made(tmp_path):
    spec = load(tmp_path, classes=[{"name": "a", "raw": 1, "color": [1, 2, 3]}, {"name": "b", "raw": 2}])
    assert spec.colors.dtype == np.uint8 and spec.colors[0].tolist() == [1, 2, 3]
    many = load(tmp_path, classes=[{"name": f"c{i}", "raw": i} for i in range(254)])
    assert len({tuple(c) for c in many.colors.tolist()}) == 254  # all different
    assert not (many.colors == 0).all(1).any()  # black is for what is ignored


def test_raw_ids_by_position(tmp_path):
    spec = load(tmp_path, raw_ids="position", classes=["road", "sky"], ignore=[255])
    assert spec.raw_to_local[[0, 1, 2, 255]].tolist() == [0, 1, ILLEGAL, IGNORE]


def test_unlisted_ids_are_errors_unless_the_spec_says_ignore(tmp_path):
    assert load(tmp_path).raw_to_local[5] == ILLEGAL
    assert load(tmp_path, unlisted="ignore").raw_to_local[5] == IGNORE


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=5), min_size=2, max_size=12), st.booleans())
def test_table_says_what_the_lists_say(tmp_path_factory, lists, ignore_rest):
    taken: set[int] = set()
    lists = [[i for i in dict.fromkeys(ids) if not (i in taken or taken.add(i))] for ids in lists]
    *classes, ignored = lists
    classes = [ids for ids in classes if ids]
    if not classes:
        return
    spec = load(
        tmp_path_factory.mktemp("spec"),
        classes=[{"name": f"c{i}", "raw": ids} for i, ids in enumerate(classes)],
        ignore=ignored,
        unlisted="ignore" if ignore_rest else "error",
    )
    for raw_id in {0, 65535, *taken, *(min(i + 1, 65535) for i in taken)}:
        owners = [local for local, ids in enumerate(classes) if raw_id in ids]
        rest = IGNORE if raw_id in ignored or ignore_rest else ILLEGAL
        assert spec.raw_to_local[raw_id] == (owners[0] if owners else rest)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=3, max_size=12, unique=True))
def test_color_table_says_what_the_lists_say(tmp_path_factory, colors):
    *first, second, ignored = [list(c) for c in colors]
    spec = load(
        tmp_path_factory.mktemp("spec"),
        encoding="color",
        classes=[{"name": "a", "raw_colors": first}, {"name": "b", "raw_colors": [second]}],
        ignore=[ignored],
    )
    packed, raw_ids = spec.color_table()
    assert packed.dtype == np.uint32 and raw_ids.dtype == np.uint16
    assert (np.diff(packed.astype(np.int64)) > 0).all()
    meaning = {tuple(c): 0 for c in first} | {tuple(second): 1, tuple(ignored): IGNORE}
    found = {
        (p >> 16, p >> 8 & 255, p & 255): int(spec.raw_to_local[r]) for p, r in zip(packed.tolist(), raw_ids.tolist())
    }
    assert found == meaning
    assert spec.raw_to_local[len(packed)] == ILLEGAL  # the raw id of every other colour
    assert spec.colors[1].tolist() == second  # shown as it is in the files, unless the spec says otherwise


def test_extends_takes_what_is_not_given(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    base = {**MINIMAL, "dataset": "city", "licence": "L", "ignore": [0]}
    base["splits"] = {"train": {"images": "./a/{id}.jpg", "labels": "../b/{id}.png", "ids": "./train.txt"}}
    write(folder, base, "base.yaml")
    spec = load_spec(write(tmp_path, {"name": "variant", "extends": "base/base.yaml", "ignore": [255]}))
    assert (spec.name, spec.dataset, spec.licence) == ("variant", "city", "L")
    assert spec.ignore_ids == (255,) and spec.class_names == ("road", "sky")
    train = spec.splits["train"]  # paths start from the file in which they stand
    assert train.images == (f"{folder}/a/{{id}}.jpg",) and train.ids == f"{folder}/train.txt"
    assert train.entry == "variant_train"


def test_extends_a_packaged_spec_and_other_files_in_a_chain(tmp_path):
    write(tmp_path, {"name": "first", "extends": "camvid", "ignore": [11, 255]}, "first.yaml")
    spec = load_spec(write(tmp_path, {"name": "second", "extends": "./first.yaml", "raw_ids": "position"}))
    assert (
        spec.dataset == "camvid"
        and len(spec.classes) == 11
        and spec.raw_to_local[[10, 11, 255]].tolist() == [10, 255, 255]
    )


def test_spec_that_extends_must_keep_the_classes_of_its_dataset(tmp_path):
    other = {"name": "mine", "extends": "camvid", "classes": [{"name": "Sky", "raw": 1}]}
    with pytest.raises(SpecError, match=r"spec.yaml: dataset: the classes differ .*'Building'.*`dataset` of its own"):
        load_spec(write(tmp_path, other))
    assert load_spec(write(tmp_path, {**other, "dataset": "mine"})).dataset == "mine"


def test_circle_of_specs(tmp_path):
    write(tmp_path, {"name": "a", "extends": "b.yaml"}, "a.yaml")
    write(tmp_path, {"name": "b", "extends": "a.yaml"}, "b.yaml")
    with pytest.raises(SpecError, match="extends: specs extend each other in a circle: .*a.yaml > .*b.yaml > .*a.yaml"):
        load_spec(tmp_path / "a.yaml")


def test_weak_annotations(tmp_path):
    split = {"images": "a/{id}.jpg", "annotation_file": "boxes.json"}
    spec = load(
        tmp_path, annotation="box", splits={"train": split, "more": {"images": "c/{id}.jpg", "annotation": "none"}}
    )
    assert spec.splits["train"].annotation == "box" and spec.splits["more"].annotation == "none"
    mixed = load(tmp_path, splits={**MINIMAL["splits"], "tags": {**split, "annotation": "tag"}})
    assert [s.annotation for s in mixed.splits.values()] == ["pixel", "tag"]


def road(**more):
    return {"classes": [{"name": "road", "raw": [7], **more}, {"name": "sky", "raw": [23]}]}


def split(**more):
    return {"splits": {"val": {"images": "a/{id}.jpg", "labels": "b/{id}.png", **more}}}


REFUSED: dict[str, tuple[dict, str]] = {
    "unknown key": ({"clases": []}, "'clases' (did you mean 'classes'?)"),
    "unknown key of a class": (road(colour=[1, 2, 3]), "classes.0: unknown key 'colour' (did you mean 'color'"),
    "unknown key of a split": (split(image="x"), "splits.val: unknown key 'image' (did you mean 'images'?)"),
    "unknown key of evaluation": (
        {"evaluation": {"oficial": "idd"}},
        "evaluation: unknown key 'oficial' (did you mean 'official'?)",
    ),
    "no name": ({"name": None}, "the key `name` is missing"),
    "no classes": ({"classes": None}, "the key `classes` is missing"),
    "no splits": ({"splits": {}}, "splits: there is none"),
    "name that is no key": ({"name": "my.city"}, "name: 'my.city' may hold letters"),
    "dataset that is no key": ({"dataset": "a/b"}, "dataset: 'a/b' may hold letters"),
    "encoding": ({"encoding": "colour"}, "first_channel (did you mean 'color'"),
    "unlisted": ({"unlisted": "ignored"}, "unlisted: 'ignored' is none of error, ignore (did you mean 'ignore'?)"),
    "annotation": ({"annotation": "boxes"}, "splits.train.annotation: 'boxes' is none of pixel, box, tag, none"),
    "official rule": ({"evaluation": {"official": "cityscape"}}, "evaluation.official: 'cityscape' is none of"),
    "raw_ids": ({"raw_ids": "index"}, "raw_ids: 'index' is neither listed nor position"),
    "raw_ids twice": ({"raw_ids": "position"}, "raw_ids: `position` says that raw ids are positions in `classes`"),
    "class name twice": (
        {"classes": [{"name": "x", "raw": 1}, {"name": "x", "raw": 2}]},
        "classes: the name 'x' stands twice",
    ),
    "too many classes": (
        {"classes": [{"name": f"c{i}", "raw": i} for i in range(255)]},
        "classes: 255 classes, but 1 to 254 are possible",
    ),
    "no class": ({"classes": []}, "classes: 0 classes"),
    "raw id in two classes": (
        road(raw=[7, 23]),
        "classes: raw id 23 is listed for class 'road' and again for class 'sky'",
    ),
    "raw id twice in a class": (road(raw=[7, 7]), "raw id 7 is listed for class 'road' and again for class 'road'"),
    "raw id class and ignored": ({"ignore": [23]}, "ignore: raw id 23 is listed for class 'sky' and again for ignore"),
    "raw id ignored twice": ({"ignore": [0, 0]}, "ignore: raw id 0 is listed for ignore and again for ignore"),
    "raw id too large": (road(raw=[65536]), "classes.road.raw: 65536 is no raw id"),
    "raw id negative": ({"ignore": [-1]}, "ignore: -1 is no raw id: a whole number from 0 to 65535"),
    "raw id that YAML reads as truth": (road(raw=[True]), "classes.road.raw: True is no raw id"),
    "class without raw ids": ({"classes": ["road"]}, "classes: class 'road' has no raw id"),
    "class without a name": ({"classes": [{"raw": 1}]}, "classes.0: the key `name` is missing"),
    "class name that YAML reads as truth": (
        {"classes": [{"name": True, "raw": 1}]},
        "must be text, not True; put it in quotes",
    ),
    "classes as a mapping": ({"classes": {"road": 7}}, "classes: must be a list"),
    "raw colours with index": (road(raw_colors=[[1, 2, 3]]), "raw_colors: belongs to `encoding: color`"),
    "colour out of range": (road(color=[1, 2, 256]), "classes.road.color: [1, 2, 256] is no colour"),
    "colour too short": (road(color=[1, 2]), "classes.road.color: [1, 2] is no colour"),
    "covers nothing": (road(covers=[]), "classes.road.covers: is empty"),
    "pattern without id": (split(labels="b/*.png"), "splits.val: pattern 'b/*.png' must hold {id} exactly once"),
    "pattern with two ids": (split(labels="{id}/{id}.png"), "pattern '{id}/{id}.png' must hold {id} exactly once"),
    "pattern with other braces": (
        split(labels="{city}/{id}.png"),
        "pattern '{city}/{id}.png' must hold {id} exactly once",
    ),
    "no images": ({"splits": {"val": {"labels": "b/{id}.png"}}}, "splits.val: the key `images` is missing"),
    "count": (split(count=0), "splits.val.count: 0 is no number of images: a whole number from 1"),
    "ids that YAML reads as numbers": (split(ids=[10]), "splits.val.ids: must be text, not 10; put it in quotes"),
    "labels of boxes": (split(annotation="box"), "splits.val.labels: annotation 'box' has no label files"),
    "boxes without a file": (
        {"splits": {"val": {"images": "a/{id}.jpg", "annotation": "box"}}},
        "splits.val.annotation_file: annotation 'box' with encoding 'index' needs one",
    ),
    "a file without boxes": (
        split(annotation_file="x.json"),
        "annotation_file: annotation 'pixel' with encoding 'index' has none",
    ),
    "pixel without labels": (
        {"splits": {"val": {"images": "a/{id}.jpg", "annotation": "pixel"}}},
        "splits.val.labels: annotation 'pixel' needs label files",
    ),
    "panoptic without void": (
        {"encoding": "panoptic", **split(annotation_file="x.json")},
        "ignore: raw id 0 is missing: with encoding panoptic it stands for pixels that belong to no segment",
    ),
    "panoptic without a file": (
        {"encoding": "panoptic", "ignore": [0]},
        "annotation_file: annotation 'pixel' with encoding 'panoptic' needs",
    ),
    "submission ids": ({"evaluation": {"submission_ids": [1]}}, "evaluation.submission_ids: 1 ids for 2 classes"),
    "grouping of what is no class": (
        {"evaluation": {"groupings": {"category": {"flat": ["raod"]}}}},
        "evaluation.groupings.category: 'raod' is no class (did you mean 'road'?)",
    ),
    "class in two groups": (
        {"evaluation": {"groupings": {"category": {"flat": ["road"], "rest": ["road", "sky"]}}}},
        "evaluation.groupings.category: 'road' is in two groups",
    ),
    "empty list of ids": (split(ids=[]), "splits.val.ids: is empty"),
    "file name of a submission": (
        {"evaluation": {"submission_name": "{stm}.png"}},
        "evaluation.submission_name: '{stm}.png' must hold {stem} or {id}, and no other braces",
    ),
    "one file name for all": ({"evaluation": {"submission_name": "a.png"}}, "'a.png' must hold {stem} or {id}"),
    "unknown base": (
        {"extends": "cityscape"},
        "extends: no packaged dataset spec is called 'cityscape' (did you mean 'cityscapes'",
    ),
    "base that is not there": ({"extends": "other.yaml"}, "other.yaml: cannot be read"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(tmp_path, changes, message):
    with pytest.raises(SpecError) as error:
        load(tmp_path, **changes)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'spec.yaml'}: ")


COLOR = {
    "encoding": "color",
    "classes": [{"name": "a", "raw_colors": [[1, 2, 3]]}, {"name": "b", "raw_colors": [[4, 5, 6]]}],
}
REFUSED_COLORS: dict[str, tuple[dict, str]] = {
    "in two classes": (
        {"classes": [*COLOR["classes"], {"name": "c", "raw_colors": [[1, 2, 3]]}]},
        "(1, 2, 3) is listed for class 'a' and again for class 'c'",
    ),
    "in a class and ignored": (
        {"ignore": [[4, 5, 6]]},
        "ignore: raw colour (4, 5, 6) is listed for class 'b' and again for ignore",
    ),
    "twice": ({"ignore": [[0, 0, 0], [0, 0, 0]]}, "raw colour (0, 0, 0) is listed for ignore and again for ignore"),
    "missing": ({"classes": [{"name": "a", "raw": 3}]}, "class 'a' has no raw colour"),
    "ignored by id": ({"ignore": [255]}, "ignore: 255 is no colour"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_COLORS.values(), ids=REFUSED_COLORS.keys())
def test_refused_colors(tmp_path, changes, message):
    with pytest.raises(SpecError) as error:
        load(tmp_path, **{**COLOR, **changes})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "line 1: names twice: ['name']"),
        ("name: a\nsplits:\n  val: {images: x}\n  val: {images: y}\n", "line 3: names twice: ['val']"),
        ("name: [a\n", "not valid YAML"),
        ("", "must be a mapping"),
        ("- a\n", "must be a mapping"),
        ("name: a\n1: b\n", "the key 1 is not text"),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_refused_files(tmp_path, text, message):
    with pytest.raises(SpecError) as error:
        load_spec(write(tmp_path, text))
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path / "spec.yaml"))


def test_yaml_anchors_and_merges_save_typing(tmp_path):
    text = """
name: a
classes: [{name: road, raw: 7}]
splits:
  train: &files {images: "train/{id}.jpg", labels: "labels/{id}.png", count: 3}
  val: {<<: *files, images: "val/{id}.jpg"}
"""
    val = load_spec(write(tmp_path, text)).splits["val"]
    assert val.images == ("val/{id}.jpg",) and val.labels == ("labels/{id}.png",) and val.count == 3
    with pytest.raises(SpecError, match=r"line 6: names twice: \['images'\]"):
        load_spec(write(tmp_path, text.replace('images: "val', 'images: x, images: "val')))


def test_all_problems_are_listed_at_once(tmp_path):
    with pytest.raises(SpecError, match="encoding: .*; ignore: raw id 7 .*; splits.val: pattern"):
        load(tmp_path, encoding="indexed", ignore=[7], **split(labels="b/*.png"))


def test_missing_file_and_unknown_name(tmp_path):
    with pytest.raises(SpecError, match="nowhere.yaml: cannot be read: No such file"):
        load_spec(tmp_path / "nowhere.yaml")
    with pytest.raises(SpecError, match=r"no packaged dataset spec is called 'camvd' \(did you mean 'camvid'"):
        load_spec("camvd")
    assert load_spec("camvid").path.endswith("camvid.yaml") and "camvid" in packaged_specs()
