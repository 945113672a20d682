"""UniSeg's configs and claims: the recipe that is known, the unions that it prints, epochs counted from the specs."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

from multiseg_d2.claims import load_claim
from multiseg_d2.class_relations import taxonomy_relations
from multiseg_d2.data.register import register_from_config, use_taxonomy
from multiseg_d2.engine import load_config
from multiseg_d2.engine.config_check import check_config
from multiseg_d2.evaluation.relations_report import compare
from multiseg_d2.modeling.catalog import class_meanings, training_spaces
from multiseg_d2.unified import UnifiedClasses

ROOT = Path(__file__).resolve().parent.parent
UNISEG = ROOT / "configs" / "uniseg"
CLAIMS = ("uniseg_w18", "uniseg_w48")
UNIONS = {"CIB": 28, "IBM": 70, "BMC": 67, "CIM": 70, "CIBM": 70}
IMAGES = {"cityscapes": 2975, "uniseg_idd": 6993, "bdd100k": 7000, "uniseg_mapillary_vistas": 18000}


@pytest.fixture(autouse=True)
def packaged_taxonomy():
    yield
    use_taxonomy("")


@lru_cache
def claim(name):
    return load_claim(ROOT / "benchmarks" / "claims" / f"{name}.yaml")


def configs(name):
    """(row label, phase number, config) of every run of a claims file."""
    for row in claim(name).rows:
        for run in row.runs:
            for number, phase in enumerate(run.phases):
                yield row.label, number, load_config(str(phase.config), phase.overrides)


@pytest.mark.parametrize("name", CLAIMS)
def test_every_run_is_a_whole_number_of_epochs(name):
    """150 epochs of the concatenated sets in the first stage, 50 in the second, 16 images a step."""
    rows = 0
    for label, number, cfg in configs(name):
        datasets = [MetadataCatalog.get(entry).dataset for entry in cfg.DATASETS.TRAIN]
        assert {MetadataCatalog.get(e).spec.splits["train"].count for e in cfg.DATASETS.TRAIN} == {
            IMAGES[d] for d in datasets
        }
        letters = "".join({"cityscapes": "C", "uniseg_idd": "I", "bdd100k": "B"}.get(d, "M") for d in datasets)
        assert letters == label.split(",")[0]
        epochs = cfg.SOLVER.MAX_ITER * 16 / sum(IMAGES[d] for d in datasets)
        assert epochs == pytest.approx((150, 50)[number], abs=0.01) and cfg.SOLVER.IMS_PER_BATCH == 16
        assert ("SGD", "AdamW")[number] == cfg.SOLVER.OPTIMIZER and (0.01, 0.001)[number] == cfg.SOLVER.BASE_LR
        rows += 1
    assert rows == 5 * (3 + 3 * 2)


@pytest.mark.parametrize("name", CLAIMS)
def test_rows_are_the_network_and_loss_that_they_say(name):
    network = {"uniseg_w18": "hrnet_w18_small_v2", "uniseg_w48": "hrnet_w48"}[name]
    for label, number, cfg in configs(name):
        keys = cfg.MODEL.SEM_SEG_HEAD
        assert (network == cfg.MODEL.TIMM.NAME and network in cfg.MODEL.WEIGHTS) or number == 1
        what = label.split(", ")[1]
        losses = {"CE": "cross_entropy", "BCE": "bce", "null BCE": "null_bce"}
        assert losses.get(what, "relational_bce" if number else "null_bce") == keys.LOSS_TYPE
        assert (
            0 if what in losses else 20
        ) == keys.COSINE_SCALE  # a second stage needs a cosine classifier from the first
        source = {"second stage with the taxonomy's relations": "taxonomy", "second stage with no relations": "none"}
        assert (source.get(what, "") if number else "") == keys.CLASS_STATISTICS


def test_published_numbers_are_there_once():
    for name in CLAIMS:
        published = [(row.label, dict(row.published)) for row in claim(name).rows if row.published]
        assert published == [("published: UniSeg", {"WD2 benchmark": 39.4})]
        assert "more than 8 points" in claim(name).note


@pytest.mark.parametrize("sets", UNIONS)
def test_the_unions_of_the_rows(sets):
    """Each row's head has the published number of classes; the config is one that can be trained."""
    label = f"{sets}, null BCE"
    cfg = next(cfg for row, _, cfg in configs("uniseg_w18") if row == label)
    register_from_config(cfg)
    check_config(cfg, world_size=8)
    with torch.device("meta"):
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "meta", ""
        model = build_model(cfg)
    assert model.sem_seg_head.union.size == UNIONS[sets]
    assert model.sem_seg_head.trunk.out_channels == 270  # as HRNetV2-W18 has
    unnameable = {
        entry: model.sem_seg_head.unnameable(MetadataCatalog.get(entry).label_space) for entry in cfg.DATASETS.TEST
    }
    assert unnameable["kitti_train"] == () and len(unnameable["uniseg_wilddash2_public"]) == (6 if sets == "CIB" else 2)
    assert unnameable["uniseg_camvid_test"] == (("bicyclist",) if sets == "CIB" else ())
    assert unnameable["uniseg_camvid_rider_test"] == ()


def test_relations_by_the_taxonomy_beside_the_released_ones(samples):
    """Of the 23 relations that UniSeg's run on CIM found, the taxonomy states some; few does it exclude."""
    path = samples.parent / "reference" / "class_relations.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the taxonomy is not compared with the released relations")
    label = "CIM, second stage with the taxonomy's relations"
    cfg = next(cfg for row, number, cfg in configs("uniseg_w18") if row == label and number == 1)
    register_from_config(cfg)
    union, released = UnifiedClasses.of(training_spaces(cfg)), np.load(path, allow_pickle=False)
    mapillary = "uniseg_mapillary_vistas"
    stated = taxonomy_relations(union, class_meanings(cfg))[mapillary]
    found = compare(released["relations_mapillary"], stated, released["pixels_mapillary"])
    names = {kind: {(union.names[i], union.names[j]) for i, j in getattr(found, kind)} for kind in ("confirmed", "new")}
    assert {("bicyclist", "rider"), ("motorcyclist", "rider"), ("on rails", "train")} <= names["confirmed"]
    # By name, road is also Cityscapes', which holds what Mapillary tells apart: neither stated nor excluded.
    assert {("catch basin", "road"), ("pothole", "road"), ("ground animal", "person")} <= names["new"]
    assert len(found.confirmed) + len(found.new) + len(found.contradicted) == 23 and len(found.contradicted) <= 8
