"""Views of entries: which images they hold, what they read, and where their names are understood."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from multiseg_d2.config import add_multiseg_config
from multiseg_d2.data.files import DatasetFilesError
from multiseg_d2.data.labels import read_local_label
from multiseg_d2.data.loader import build_test_loader, build_train_loader
from multiseg_d2.data.mapper import TrainMapper
from multiseg_d2.data.register import (
    RegistrationError,
    register_dataset,
    register_from_config,
    unregister_dataset,
    use_taxonomy,
)
from multiseg_d2.data.views import register_views
from multiseg_d2.engine.config_check import check_config
from multiseg_d2.evaluation import build_evaluator
from multiseg_d2.modeling.catalog import catalog_space
from multiseg_d2.user_error import ConfigError
from multiseg_d2.view_name import ViewName, ViewNameError, parse_view

IDS = [f"{chr(97 + i % 5)}/{i:02d}" for i in range(20)]


def write_images(folder, labels: bool = True) -> None:
    for number, image_id in enumerate(IDS):
        for kind, array in (("im", np.full((6, 8, 3), number)), ("gt", np.full((6, 8), number % 3))):
            if labels or kind == "im":
                path = folder / kind / f"{image_id}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(path)


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """``viewed_train``: 20 images in 5 folders, with labels."""
    write_images(tmp_path)
    spec = {
        "name": "viewed",
        "classes": ["x", "y", "z"],
        "raw_ids": "position",
        "splits": {"train": {"images": "im/{id}.png", "labels": "gt/{id}.png", "count": 20}},
    }
    (tmp_path / "viewed.yaml").write_text(yaml.safe_dump(spec))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_dataset(tmp_path / "viewed.yaml")
    yield "viewed_train"
    unregister_dataset("viewed")


def records(name: str) -> list[dict]:
    register_views([name])
    return DatasetCatalog.get(name)


def ids(name: str) -> list[str]:
    return [record["image_id"] for record in records(name)]


def by_hash(image_ids) -> list[str]:
    return sorted(image_ids, key=lambda i: hashlib.blake2b(i.encode(), digest_size=16).hexdigest())


# ---- names ----


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("a_train", None),
        ("other/code/a", None),
        ("a_train[:30]", ViewName("a_train", 0, 30)),
        ("a_train[30:]", ViewName("a_train", 30)),
        ("a_train[3:5]/unlabelled", ViewName("a_train", 3, 5, False)),
        ("a_train/unlabelled", ViewName("a_train", labelled=False)),
        ("own/a/unlabelled", ViewName("own/a", labelled=False)),
    ],
)
def test_names(name, view):
    assert parse_view(name) == view


@pytest.mark.parametrize(
    "name",
    ["a[30]", "a[:30", "a[-5:]", "a[::2]", "a[:1.5]", "a[:x]", "a/unlabeled", "a/unlabelled[:3]", "[:3]", "a[:3][:2]"]
    + ["a[:3]/unlabelled/unlabelled", "a[:3]/labelled", "a [: 3]", "a]"],
)
def test_malformed_names(name):
    with pytest.raises(ViewNameError, match=r"no view of a dataset. Views are called ENTRY\[:30\]"):
        parse_view(name)


@pytest.mark.parametrize("name", ["a[30:30]", "a[5:3]/unlabelled", "a[:0]"])
def test_slices_of_nothing(name):
    with pytest.raises(ViewNameError, match="holds no image"):
        parse_view(name)


@given(st.integers(0, 99), st.integers(1, 99), st.booleans())
def test_names_say_what_they_are_made_of(start, more, labelled):
    name = f"x_val[{start}:{start + more}]" + ("" if labelled else "/unlabelled")
    assert parse_view(name) == ViewName("x_val", start, start + more, labelled)


# ---- which images ----


def test_slices_are_nested_and_together_everything(entry):
    first, rest = ids(f"{entry}[:7]"), ids(f"{entry}[7:]")
    assert first == by_hash(IDS)[:7] and rest == by_hash(IDS)[7:]
    assert ids(f"{entry}[:12]")[:7] == first and ids(f"{entry}[3:7]") == first[3:]
    assert ids(f"{entry}[:20]") == by_hash(IDS) and ids(entry) == sorted(IDS)


def test_the_order_is_that_of_the_ids_alone(entry, tmp_path, monkeypatch):
    """Another folder, another file system order, another list of ids: the same images."""
    before = ids(f"{entry}[:5]")
    scan = os.scandir

    class Backwards:
        def __init__(self, folder):
            self.entries = sorted(scan(folder), key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr("os.scandir", Backwards)
    assert ids(f"{entry}[:5]") == before
    spec = yaml.safe_load((tmp_path / "viewed.yaml").read_text())
    spec["splits"]["train"]["ids"] = IDS[::-1]
    (tmp_path / "listed.yaml").write_text(yaml.safe_dump({**spec, "name": "listed", "dataset": "viewed"}))
    register_dataset(tmp_path / "listed.yaml")
    try:
        assert ids("listed_train[:5]") == before
    finally:
        unregister_dataset("listed")


def test_accents_in_either_form_give_one_order(tmp_path):
    from multiseg_d2.data.views import _place

    assert _place("Zürich_\u0041\u030a") == _place("Zu\u0308rich_\u00c5")


def test_records_say_that_they_belong_to_the_view(entry):
    name = f"{entry}[:3]"
    for record in records(name):
        assert (record["entry"], record["dataset"], record["annotation"]) == (name, "viewed", "pixel")
        assert read_local_label(record).tolist() == np.full((6, 8), IDS.index(record["image_id"]) % 3).tolist()
    metadata = MetadataCatalog.get(name)
    assert metadata.name == name and metadata.label_space is MetadataCatalog.get(entry).label_space


# ---- without labels ----


@pytest.mark.parametrize("view", ["/unlabelled", "[:6]/unlabelled"])
def test_unlabelled_views_need_no_labels_and_read_none(entry, tmp_path, view):
    shutil.rmtree(tmp_path / "gt")
    found = records(entry + view)
    assert len(found) == (20 if view == "/unlabelled" else 6)
    assert all(set(r) == {"file_name", "image_id", "dataset", "entry", "annotation"} for r in found)
    assert {r["annotation"] for r in found} == {MetadataCatalog.get(entry + view).annotation} == {"none"}
    with pytest.raises(DatasetFilesError):
        DatasetCatalog.get(entry)
    sample = TrainMapper(config([entry + view]))(found[0], np.random.default_rng(0))
    assert "sem_seg" not in sample and sample["annotation"] == "none"


def test_unlabelled_and_labelled_slices_hold_the_same_images(entry):
    assert ids(f"{entry}[4:9]/unlabelled") == ids(f"{entry}[4:9]")


@pytest.mark.parametrize("annotation", ["box", "tag"])
def test_weak_labels_of_a_slice_and_of_none(tmp_path, monkeypatch, annotation):
    write_images(tmp_path, labels=False)
    images = [{"id": n, "file_name": f"{i}.png", "width": 8, "height": 6} for n, i in enumerate(IDS)]
    objects = [{"id": n, "image_id": n, "category_id": n % 3, "bbox": [1, 1, 2, 2]} for n in range(20)]
    (tmp_path / "weak.json").write_text(json.dumps({"images": images, "annotations": objects}))
    split = {"images": "im/{id}.png", "annotation_file": "weak.json"}
    spec = {"name": "weak", "annotation": annotation, "classes": ["x", "y", "z"], "raw_ids": "position"}
    (tmp_path / "weak.yaml").write_text(yaml.safe_dump({**spec, "splits": {"train": split}}))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_dataset(tmp_path / "weak.yaml")
    try:
        for record in records("weak_train[:4]"):
            category = IDS.index(record["image_id"]) % 3
            known = record["image_tags"] if annotation == "tag" else [a["category_id"] for a in record["annotations"]]
            assert known == [category] and record["annotation"] == annotation
        (tmp_path / "weak.json").unlink()
        assert len(records("weak_train/unlabelled")) == 20
    finally:
        unregister_dataset("weak")


def test_entries_of_other_code(tmp_path):
    plain = [{"file_name": f"{i}.png", "image_id": i, "sem_seg_file_name": f"{i}_gt.png"} for i in IDS]
    DatasetCatalog.register("other_code", lambda: plain)
    try:
        found = records("other_code[:4]/unlabelled")
        assert [r["image_id"] for r in found] == by_hash(IDS)[:4]
        assert all("sem_seg_file_name" not in r and r["annotation"] == "none" for r in found)
        assert records("other_code[:4]")[0]["sem_seg_file_name"] == f"{by_hash(IDS)[0]}_gt.png"
    finally:
        for name in ("other_code", "other_code[:4]", "other_code[:4]/unlabelled"):
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)


# ---- where names are understood ----


def config(train=(), test=(), **keys):
    cfg = get_cfg()
    add_multiseg_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SEM_SEG_HEAD.NAME = "MultiDatasetSegmentor", "PerDatasetHead"
    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.ENABLED = "absolute", True
    cfg.INPUT.CROP.SIZE, cfg.INPUT.SCALE_RANGE = [6, 8], (1.0, 1.0)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TEST, cfg.DATALOADER.NUM_WORKERS = "none", 0, 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.SOLVER.CHECKPOINT_PERIOD = 2, 3, 1
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    return cfg


@pytest.mark.parametrize("name", ["viewed_train[:6]", "viewed_train[6:]", "viewed_train[2:4]"])
def test_views_pass_wherever_entries_do(entry, tmp_path, name):
    cfg = config([name, entry], [name])
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    register_from_config(cfg)
    check_config(cfg)
    assert catalog_space(name) == catalog_space(entry)
    assert len(build_test_loader(cfg, name)) == len(ids(name))
    build_evaluator(cfg, name, str(tmp_path / "scores"))
    samples = next(iter(build_train_loader(cfg)))
    assert {s["entry"] for s in samples} == {name, entry} and {s["dataset"] for s in samples} == {"viewed"}


def test_a_model_knows_the_space_of_a_view_that_nobody_registered(entry):
    assert catalog_space(f"{entry}[:19]/unlabelled") == catalog_space(entry)


def test_views_follow_the_taxonomy(entry, tmp_path):
    name = f"{entry}[:6]"
    register_from_config(config([name]))
    use_taxonomy("exact_names", [name])
    try:
        spaces = [MetadataCatalog.get(n).label_space for n in (name, entry)]
        assert spaces[0] is spaces[1] and spaces[0].membership.shape == (3, 3)
    finally:
        use_taxonomy()
    unregister_dataset("viewed")
    assert name not in DatasetCatalog.list() and name not in MetadataCatalog.list()
    register_dataset(tmp_path / "viewed.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("viewed_train[6]", "DATASETS.TRAIN: .*no view of a dataset"),
        ("viewed_train[6:6]", "DATASETS.TRAIN: .*holds no image"),
        ("viewd_train[:6]", "DATASETS.TRAIN: 'viewd_train' is not registered.*did you mean 'viewed_train'"),
    ],
)
def test_wrong_names_in_a_config(entry, name, message):
    with pytest.raises(RegistrationError, match=message):
        register_from_config(config([name]))


@pytest.mark.parametrize("view", ["[:21]", "[20:]", "[5:99]/unlabelled"])
def test_slices_that_ask_for_more_than_there_is(entry, view):
    register_views([entry + view])
    with pytest.raises(DatasetFilesError, match=r"viewed_train\[.*: viewed_train has only 20 images"):
        DatasetCatalog.get(entry + view)


def test_an_unlabelled_view_is_refused_where_labels_are_needed(entry):
    cfg = config([f"{entry}/unlabelled"], [f"{entry}[:3]/unlabelled"])
    register_from_config(cfg)
    with pytest.raises(ConfigError, match="(?s)has no pixel labels to evaluate.*learns from pixel only"):
        check_config(cfg)


def test_the_images_of_views_are_written_down(entry, tmp_path):
    first, rest = f"{entry}[:4]", f"{entry}[4:]/unlabelled"
    cfg = config([first, rest, entry])
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    build_train_loader(cfg)
    written = json.loads((tmp_path / "out" / "views.json").read_text())
    assert written == {first: by_hash(IDS)[:4], rest: by_hash(IDS)[4:]}
    build_train_loader(cfg, 7, entries=[f"{entry}[:2]", entry], origin=7)  # a later round
    written = json.loads((tmp_path / "out" / "views.json").read_text())
    assert set(written) == {first, rest, f"{entry}[:2]"}
    build_train_loader(cfg, 3)
    new = by_hash([*IDS, *(f"new_{i}" for i in range(60))])[0]
    assert new not in IDS  # one of them comes first
    for kind in ("im", "gt"):
        (tmp_path / kind / f"{IDS[0]}.png").rename(tmp_path / kind / f"{new}.png")
    with pytest.raises(DatasetFilesError, match="other images than when this run began"):
        build_train_loader(cfg, 3)
    build_train_loader(cfg, 0)  # a run of its own


def test_nothing_is_written_without_views(entry, tmp_path):
    cfg = config([entry])
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    build_train_loader(cfg)
    assert not (tmp_path / "out").exists()
