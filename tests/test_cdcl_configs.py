"""The configs of CDCL's tables: that they load, build, say what they are, and agree with the tables."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from multiseg_d2.claims import load_claim
from multiseg_d2.data.register import register_from_config
from multiseg_d2.engine import load_config
from multiseg_d2.engine.config_check import check_config
from multiseg_d2.modeling.norm.conversion import norm_report

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for folder in ("cdcl", "baselines") for p in (ROOT / "configs" / folder).rglob("*_r1*.yaml"))
ROWS = [path for path in FILES if not path.name.startswith("base_")]
CLAIMS = sorted((ROOT / "benchmarks" / "claims").glob("cdcl_*.yaml"))

#: Published mIoU, typed in anew from the slides: file -> numbers in the order of the table's columns.
PUBLISHED = {
    "cdcl/cs_bdd_r18": (72.63, 71.55, 60.47),
    "cdcl/cs_camvid_r18": (69.77, 68.56, 78.45, 77.34),
    "cdcl/cs_coco_r18": (72.63, 72.52, 32.87),
    "cdcl/cs_camvid_bdd_r18": (73.17, 70.98, 78.84, 75.52, 60.45),
    "cdcl/cs_bdd_r101": (75.83, 75.95, 63.84),
    "cdcl/cs_camvid_r101": (75.00, 74.77, 81.15, 79.33),
    "cdcl/cs_bdd_r101_769": (78.74, 77.60),
    "cdcl/cs_bdd_r18_ms": (72.52, 71.00),
    "cdcl/cs_bdd_r101_769_ms": (79.73, 78.40),
    "cdcl/ablation/cs_bdd_r18_dsbn_mixed": (68.55, 58.93),
    "cdcl/ablation/cs_bdd_r18_interval1": (72.63, 60.47),
    "cdcl/ablation/cs_bdd_r18_interval2": (68.88, 59.17),
    "cdcl/ablation/cs_bdd_r18_interval3": (65.11, 57.79),
    "cdcl/ablation/cs_bdd_r18_interval4": (62.86, 57.21),
    "cdcl/ablation/cs_bdd_r18_interval5": (61.12, 56.06),
    "baselines/single/cityscapes_r18": (67.52, 67.75),
    "baselines/single/bdd100k_r18": (53.88,),
    "baselines/single/camvid_r18": (73.05, 70.41),
    "baselines/single/coco_stuff_r18": (32.86,),
    "baselines/single/cityscapes_r101": (73.51, 74.45),
    "baselines/single/bdd100k_r101": (57.47,),
    "baselines/single/camvid_r101": (75.86, 74.72),
    "baselines/finetune/cityscapes_from_bdd100k_r18": (67.79, 66.52),
    "baselines/finetune/bdd100k_from_cityscapes_r18": (58.30,),
    "baselines/finetune/cityscapes_from_camvid_r18": (67.35, 67.87),
    "baselines/finetune/camvid_from_cityscapes_r18": (74.83, 71.16),
    "baselines/finetune/cityscapes_from_coco_stuff_r18": (70.44, 70.23),
    "baselines/finetune/coco_stuff_from_cityscapes_r18": (32.10,),
    "baselines/remap/cityscapes_from_bdd100k_r18": (66.23, 66.39),
    "baselines/remap/bdd100k_from_cityscapes_r18": (58.74,),
    "baselines/remap/cityscapes_from_camvid_r18": (67.13, 68.22),
    "baselines/remap/camvid_from_cityscapes_r18": (78.03, 76.86),
    "baselines/remap/cityscapes_from_coco_stuff_r18": (50.35, 52.39),
    "baselines/remap/coco_stuff_from_cityscapes_r18": (32.67,),
    "baselines/joint/cs_bdd_r18_mixed": (62.10, 53.34),
    "baselines/joint/cs_bdd_r18_dat": (64.69, 56.33),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs").with_suffix(""))


def head_of(path: Path) -> str:
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    return " ".join(line.lstrip("# ") for line in lines)


@lru_cache
def config(path: Path):
    cfg = load_config(str(path))
    register_from_config(cfg)
    return cfg


def build(cfg) -> nn.Module:
    """The model without memory for its weights."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def test_every_row_of_the_tables_has_a_config():
    assert {name_of(path) for path in ROWS} == set(PUBLISHED)


@pytest.mark.parametrize("path", ROWS, ids=name_of)
def test_head_and_content(path):
    head, name = head_of(path), name_of(path)
    assert f"--config-file configs/{name}.yaml" in head
    published = head[head.index("Published") :]
    published = published[: re.search(r"\.(?=\s|$)", published).end()]
    numbers = [float(text) for text in re.findall(r"\b\d\d\.\d\d\b", published)]
    assert numbers[: len(PUBLISHED[name])] == list(PUBLISHED[name])
    cfg = config(path)
    check_config(cfg, world_size=1)
    check_config(cfg, world_size=4)
    assert f"./output/{name}" == cfg.OUTPUT_DIR
    assert name.startswith("cdcl/") == cfg.MODEL.DATASET_NORM.ENABLED
    assert name.endswith("_ms") == cfg.TEST.AUG.ENABLED
    assert (101 if "_r101" in name else 18) == cfg.MODEL.RESNETS.DEPTH


@pytest.mark.parametrize("path", ROWS, ids=name_of)
def test_the_model_builds_with_the_norms_that_the_row_is_about(path):
    cfg = config(path)
    report = norm_report(build(cfg))
    assert not report["frozen"]
    assert bool(report["per dataset"]) == cfg.MODEL.DATASET_NORM.ENABLED == (not report["plain"])


def test_recipe_of_the_specification():
    cfg = config(ROOT / "configs/cdcl/cs_bdd_r18.yaml")
    head, solver, backbone = cfg.MODEL.SEM_SEG_HEAD, cfg.SOLVER, cfg.MODEL.RESNETS
    assert (solver.OPTIMIZER, solver.MOMENTUM, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM) == (
        "SGD",
        0.9,
        1e-4,
        1e-4,
    )
    assert (solver.BASE_LR, solver.LR_SCHEDULER_NAME, solver.POLY_LR_POWER) == (0.01, "WarmupPolyLR", 0.9)
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.WARMUP_ITERS) == (8, 40000, 0)
    assert (cfg.DATALOADER.SCHEDULE, cfg.DATALOADER.INTERVAL) == ("alternation", 1)
    assert (backbone.OUTPUT_STRIDE, backbone.DEEP_STEM, backbone.NORM) == (8, True, "SyncBN")
    assert (head.DECODER, head.CONVS_DIM, head.DROPOUT, head.AUX_LOSS_WEIGHT) == ("PSPDecoder", 128, 0.1, 0.4)
    assert list(cfg.INPUT.CROP.SIZE) == [512, 512] and tuple(cfg.INPUT.SCALE_RANGE) == (0.7, 2.1, 0.1)
    assert config(ROOT / "configs/cdcl/cs_bdd_r101.yaml").MODEL.SEM_SEG_HEAD.CONVS_DIM == 512
    assert list(config(ROOT / "configs/cdcl/cs_bdd_r101_769.yaml").INPUT.CROP.SIZE) == [769, 769]
    scales = config(ROOT / "configs/cdcl/cs_bdd_r18_ms.yaml").TEST.AUG.SCALES
    assert sum(scale**2 for scale in scales) == 3.375


@pytest.mark.parametrize("interval", range(1, 6))
def test_intervals_see_the_same_number_of_images(interval):
    cfg = config(ROOT / f"configs/cdcl/ablation/cs_bdd_r18_interval{interval}.yaml")
    per_update = cfg.SOLVER.IMS_PER_BATCH * (2 if interval == 1 else 1)
    assert interval == cfg.DATALOADER.INTERVAL and cfg.SOLVER.MAX_ITER * per_update == 640_000


@pytest.mark.parametrize("path", CLAIMS, ids=lambda p: p.stem)
def test_the_tables_agree_with_the_heads_of_their_configs(path):
    claim = load_claim(path)
    for row in claim.rows:
        for run in row.runs:
            head = head_of(run.phases[-1].config)
            published = head[head.index("Published") :]
            for label in run.columns:
                if label in row.published:
                    assert f"{row.published[label]:.2f}" in published, f"{row.label}, {label}: {head}"
    readme = (ROOT / "configs/cdcl/README.md").read_text()
    block = readme[readme.index(f"claims:{path.stem} begin") : readme.index(f"claims:{path.stem} end")]
    for row in claim.rows:
        (line,) = [text for text in block.splitlines() if text.startswith(f"| {row.label} |")]
        assert all(f"{number:.2f}" in line for number in row.published.values())


@pytest.mark.parametrize("depth", [18, 101])
@pytest.mark.parametrize("dataset", ["bdd100k", "camvid_full", "coco_stuff", "mapillary_vistas"])
def test_a_dataset_adds_less_than_half_a_percent_of_parameters(depth, dataset):
    """Norms of the whole model and both classifiers, beside one dataset's model."""
    counts = {}
    for train in (("cityscapes_train",), ("cityscapes_train", f"{dataset}_train")):
        cfg = config(ROOT / f"configs/cdcl/base_r{depth}.yaml").clone()
        cfg.DATASETS.TRAIN, cfg.MODEL.DATASET_NORM.ENABLED = train, True
        register_from_config(cfg)
        counts[len(train)] = sum(parameter.numel() for parameter in build(cfg).parameters())
    assert MetadataCatalog.get(f"{dataset}_train").label_space.num_classes >= 11
    assert 0 < (counts[2] - counts[1]) / counts[1] < 0.005
