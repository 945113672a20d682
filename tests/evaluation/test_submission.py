"""Submission ids and names of the packaged datasets, against their servers' tables."""

from __future__ import annotations

import numpy as np
import pytest
from cityscapesscripts.helpers.labels import trainId2label
from detectron2.data import DatasetCatalog, MetadataCatalog

from multiseg_d2.data.spec import packaged_specs
from multiseg_d2.evaluation.submission import SubmissionError, image_id_of, submission_ids, submission_name


@pytest.mark.parametrize("catalog", ["cityscapes_test", "kitti_test"])
def test_cityscapes_label_ids(catalog):
    labels = np.array([[*range(19), 255]], np.uint8)
    sent = submission_ids(labels, MetadataCatalog.get(catalog).spec)
    assert sent.dtype == np.uint8
    assert sent[0].tolist() == [*(trainId2label[i].id for i in range(19)), 0]  # 255 would stop the official script


@pytest.mark.parametrize("catalog, void", [("bdd100k_test", 255), ("idd_test", 255), ("mapillary_vistas_test", 65)])
def test_servers_that_take_local_ids(catalog, void):
    spec = MetadataCatalog.get(catalog).spec
    labels = np.array([[0, 1, len(spec.classes) - 1, 255]], np.uint8)
    assert submission_ids(labels, spec)[0].tolist() == [0, 1, len(spec.classes) - 1, void]


def test_names():
    spec = {name: MetadataCatalog.get(f"{name}_test").spec for name in ("kitti", "idd", "bdd100k")}
    assert submission_name("image_2/000003_10.png", spec["kitti"]) == "semantic/000003_10.png"
    name = submission_name("leftImg8bit/test/119/903127_leftImg8bit.png", spec["idd"], "119/903127")
    assert name == "119/903127_gtFine_labellevel3Ids.png"
    assert submission_name("10k/test/ab-cd.jpg", spec["bdd100k"]) == "ab-cd.png"


def test_refusals():
    labels = np.zeros((1, 2), np.uint8)
    with pytest.raises(ValueError, match="camvid: its spec names no submission ids"):
        submission_ids(labels, MetadataCatalog.get("camvid_test").spec)
    labels[0, 1] = 19
    with pytest.raises(ValueError, match=r"kitti: ids beyond its 19 classes: \[19\]"):
        submission_ids(labels, MetadataCatalog.get("kitti_test").spec)


# ---- one rule for a registered split and for a folder ---------------------------------------------------------------


def of_a_packaged_spec(entry: str) -> bool:
    return getattr(MetadataCatalog.get(entry).get("spec"), "name", "") in packaged_specs()


SPLITS = [entry for entry in DatasetCatalog.list() if of_a_packaged_spec(entry)]


@pytest.mark.parametrize("entry", SPLITS)
def test_a_folder_gives_the_names_that_the_split_gives(entry, tmp_path):
    """Whichever folder of the dataset is named, and wherever the dataset lies."""
    metadata = MetadataCatalog.get(entry)
    (pattern, *_), image_id = metadata.spec.splits[metadata.split].images, "119/000-5_x"
    path = tmp_path / "deep" / pattern.replace("{id}", image_id)
    expected = submission_name(str(path), metadata.spec, image_id)
    for folder in (tmp_path, *path.relative_to(tmp_path).parents):
        assert image_id_of(str(path), metadata.spec, str(tmp_path / folder)) == image_id
    assert submission_name(str(path), metadata.spec) == expected


def test_pictures_that_lie_elsewhere_are_named_by_their_path_below_the_folder():
    spec = MetadataCatalog.get("idd_test").spec
    assert image_id_of("mine/119/9_leftImg8bit.jpg", spec, "mine") == "119/9"
    assert submission_name("mine/9_leftImg8bit.png", spec) == "9_gtFine_labellevel3Ids.png"


def test_evaluators_find_the_files(tmp_path, monkeypatch):
    """Cityscapes' script by its own search, IDD's by its rule: the prediction has the ground truth's path."""
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as script

    spec = MetadataCatalog.get("cityscapes_val").spec
    image = "cityscapes/leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png"
    truth = "gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png"
    (tmp_path / submission_name(image, spec)).touch()
    monkeypatch.setattr(script.args, "predictionPath", str(tmp_path))
    monkeypatch.setattr(script.args, "predictionWalk", None)
    assert script.getPrediction(script.args, truth) == str(tmp_path / submission_name(image, spec))
    spec = MetadataCatalog.get("idd_val").spec
    (images, *_), (labels, *_) = spec.splits["val"].images, spec.splits["val"].labels
    sent = submission_name("/data/" + images.replace("{id}", "119/903127"), spec)
    assert sent == "119/903127_gtFine_labellevel3Ids.png"
    assert labels.replace("{id}", "119/903127").endswith(sent.replace("labellevel3Ids", "labelids"))  # beside it


@pytest.mark.parametrize("name, void, last", [("idd", 27, 26), ("mapillary_vistas", 0, 65)])
def test_the_numbering_of_the_pages_beside_that_of_the_scripts(name, void, last):
    spec = MetadataCatalog.get(f"{name}_test").spec
    labels = np.array([[0, 1, len(spec.classes) - 1, 255]], np.uint8)
    assert submission_ids(labels, spec, first_id=1, void_id=void)[0].tolist() == [1, 2, last, void]
    assert submission_ids(labels, spec, void_id=200)[0].tolist() == [0, 1, last - 1, 200]
    with pytest.raises(SubmissionError, match=f"void {last} is the id of a class"):
        submission_ids(labels, spec, first_id=1, void_id=last)


def test_a_list_of_ids_cannot_begin_elsewhere():
    spec = MetadataCatalog.get("kitti_test").spec
    with pytest.raises(SubmissionError, match="kitti: the ids of its server are a list of their own"):
        submission_ids(np.zeros((1, 1), np.uint8), spec, first_id=1)
