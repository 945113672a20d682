"""Submission ids and names of the packaged datasets, against their servers' tables."""

from __future__ import annotations

import numpy as np
import pytest
from cityscapesscripts.helpers.labels import trainId2label
from detectron2.data import MetadataCatalog

from multiseg_d2.evaluation.submission import submission_ids, submission_name


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
