"""HTSS's configs and claims: fixed numbers of images per step, rows at the same budget, the predecessors' recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_sem_seg_head

from multiseg_d2.claims import load_claim
from multiseg_d2.data.register import register_from_config, use_taxonomy
from multiseg_d2.engine import load_config
from multiseg_d2.modeling.heads.hierarchical import training_hierarchy
from multiseg_d2.modeling.inference import Prediction
from multiseg_d2.modeling.score_maps import Resized

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    yield
    use_taxonomy()


def runs(name: str):
    """(row, config of its last phase) of a claims file."""
    for row in load_claim(ROOT / "benchmarks" / "claims" / f"{name}.yaml").rows:
        for run in row.runs:
            yield row.label, load_config(str(run.phases[-1].config), run.phases[-1].overrides)


def pixel_images(cfg) -> int:
    """Images of a step that have pixel labels."""
    pairs = zip(cfg.DATASETS.TRAIN, cfg.DATALOADER.WEIGHTS, strict=True)
    return sum(number for name, number in pairs if "_box_" not in name and "_tag_" not in name)


@pytest.mark.parametrize("name", ["htss_toy", "htss_samples"])
def test_every_row_has_the_same_steps_and_images(name):
    """But for a row that has only the pixel labels of the rows with boxes: what their fewer pixel labels cost."""
    fewer = {label: cfg for label, cfg in runs(name) if label.endswith(" images")}
    others = {label: cfg for label, cfg in runs(name) if label not in fewer}
    assert len(others) > 3 and len(fewer) == 1
    assert len({cfg.SOLVER.MAX_ITER for _, cfg in runs(name)}) == 1
    assert len({sum(cfg.DATALOADER.WEIGHTS) for cfg in others.values()}) == 1
    beside_boxes = {pixel_images(cfg) for label, cfg in others.items() if "boxes" in label or "tags" in label}
    (control,) = fewer.values()
    assert beside_boxes == {pixel_images(control)} == {sum(control.DATALOADER.WEIGHTS)}


def test_what_self_training_adds_is_held_against_more_training():
    by_label = dict(runs("htss_toy_cbst"))
    tested, control = (by_label[label] for label in by_label if "," in label)
    assert tested.SELF_TRAINING.ROUNDS == 2 and control.SELF_TRAINING.ROUNDS == 0
    assert tested.SOLVER.MAX_ITER == control.SOLVER.MAX_ITER
    assert sum(tested.DATALOADER.WEIGHTS) == sum(control.DATALOADER.WEIGHTS)


@pytest.mark.parametrize(("name", "images", "hard"), [("iv2018", (1, 2, 1), True), ("iv2019", (4, 8, 4), False)])
def test_the_predecessors_recipe(name, images, hard):
    cfg = load_config(f"configs/htss/{name}.yaml")
    register_from_config(cfg)
    assert tuple(cfg.DATALOADER.WEIGHTS) == images and cfg.DATALOADER.SCHEDULE == "fixed"
    assert cfg.SOLVER.BASE_LR == 0.01 and cfg.SOLVER.GAMMA == 0.5 and cfg.MODEL.EMA_DECAY == 0.9
    largest = max(MetadataCatalog.get(e).spec.splits["train"].count for e in cfg.DATASETS.TRAIN)
    index = [MetadataCatalog.get(e).spec.splits["train"].count for e in cfg.DATASETS.TRAIN].index(largest)
    epoch = -(-largest // images[index])
    assert 17 * epoch == cfg.SOLVER.MAX_ITER and tuple(cfg.SOLVER.STEPS) == (8 * epoch, 15 * epoch)
    assert (cfg.MODEL.SEM_SEG_HEAD.LOSS_TYPE == "iv2018") == hard


def test_boxes_divide_classes_of_camvid():
    """In the sample, what boxes add is inside classes that pixels teach: the root does not learn from boxes."""
    cfg = load_config("configs/htss/samples.yaml")
    register_from_config(cfg)
    tree = training_hierarchy(cfg)
    assert tree.weak == {"coco128_box"}  # the tags have its label space
    inner = {tree.nodes[i].name for i in tree.classifiers}
    assert {"Car", "SignSymbol", "Pedestrian", "Bicyclist"} < inner
    untaught = {tree.nodes[child].name for classifier, child in tree.untrained if classifier == 0}
    assert {"airplane", "pizza"} < untaught and "Car" not in untaught


def test_void_as_it_is_or_replaced_by_the_next_best():
    """Two names of one head, whose weights are the same."""
    cfg = load_config("configs/htss/toy.yaml")
    register_from_config(cfg)
    shapes = {name: ShapeSpec(channels=8, stride=8) for name in cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES}
    plain, filled = (
        build_sem_seg_head(_named(cfg, name), shapes).eval()
        for name in ("HierarchicalHead", "HierarchicalHeadWithoutVoid")
    )
    with torch.no_grad():
        for _, end in plain.channels:
            plain.classifier.bias[end - 1] += 50
    filled.load_state_dict(plain.state_dict())
    space = plain.own_space(plain.datasets[0])
    features = {name: torch.randn(1, 8, 6, 5) for name in shapes}
    with torch.no_grad():
        scores = [Resized(head.logits(features, space)[0], (24, 20)) for head in (plain, filled)]
    labels = [
        Prediction(head.score_map(own, space), void=True)["sem_seg_labels"]
        for head, own in zip((plain, filled), scores)
    ]
    assert (labels[0] == 255).all() and not (labels[1] == 255).any()


def _named(cfg, name):
    cfg = cfg.clone()
    cfg.MODEL.SEM_SEG_HEAD.NAME = name
    return cfg
