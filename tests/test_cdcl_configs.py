"""CDCL's tables: that every row builds, is what it says, and has the numbers that the paper prints."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from multiseg_d2.claims import collect, load_claim
from multiseg_d2.claims.claim import Phase
from multiseg_d2.claims.table import replace_block, to_markdown
from multiseg_d2.data.register import register_from_config
from multiseg_d2.engine import load_config
from multiseg_d2.engine.config_check import check_config
from multiseg_d2.modeling.norm.conversion import norm_report

ROOT = Path(__file__).resolve().parent.parent
CDCL = ROOT / "configs" / "cdcl"
CLAIMS = sorted((ROOT / "benchmarks" / "claims").glob("cdcl_*.yaml"))

#: Published mIoU, typed in anew from the slides: table -> row -> numbers in the order of the table's columns.
PUBLISHED = {
    "cdcl_cs_bdd_r18": {
        "Single": (67.52, 67.75, 53.88),
        "Fine-tuning": (67.79, 66.52, 58.30),
        "Label remap": (66.23, 66.39, 58.74),
        "CDCL": (72.63, 71.55, 60.47),
    },
    "cdcl_cs_camvid_r18": {
        "Single": (67.52, 67.75, 73.05, 70.41),
        "Fine-tuning": (67.35, 67.87, 74.83, 71.16),
        "Label remap": (67.13, 68.22, 78.03, 76.86),
        "CDCL": (69.77, 68.56, 78.45, 77.34),
    },
    "cdcl_cs_coco_r18": {
        "Single": (67.52, 67.75, 32.86),
        "Fine-tuning": (70.44, 70.23, 32.10),
        "Label remap": (50.35, 52.39, 32.67),
        "CDCL": (72.63, 72.52, 32.87),
    },
    "cdcl_three_datasets_r18": {
        "Single": (67.52, 67.75, 73.05, 70.41, 53.88),
        "CDCL": (73.17, 70.98, 78.84, 75.52, 60.45),
    },
    "cdcl_cs_bdd_r101": {"Single": (73.51, 74.45, 57.47), "CDCL": (75.83, 75.95, 63.84)},
    "cdcl_cs_camvid_r101": {"Single": (73.51, 74.45, 75.86, 74.72), "CDCL": (75.00, 74.77, 81.15, 79.33)},
    "cdcl_ablation_norm_dat": {
        "Single, BN": (67.75, 53.88),
        "Cross, BN, without DAT": (62.10, 53.34),
        "Cross, BN, with DAT": (64.69, 56.33),
        "Cross, DSBN, without DAT": (68.55, 58.93),
        "CDCL: DSBN, with DAT": (72.63, 60.47),
    },
    "cdcl_ablation_interval": {
        "t = 1": (72.63, 60.47),
        "t = 2": (68.88, 59.17),
        "t = 3": (65.11, 57.79),
        "t = 4": (62.86, 57.21),
        "t = 5": (61.12, 56.06),
    },
    "cdcl_cityscapes_test": {
        "SegNet": (56.10,),
        "ENet": (58.30,),
        "ESPNetv2": (65.10,),
        "ESPNet": (60.30,),
        "ERFNet": (68.00,),
        "FCN-8s": (65.30,),
        "RefineNet": (73.60,),
        "PSPNet-R18": (67.60,),
        "PSPNet-R18 + distillation": (71.40,),
        "CDCL R18": (71.00,),
        "CDCL R18, multi-scale": (72.52,),
        "PSPNet-R101": (77.60,),
        "CDCL R101 (769)": (78.74,),
        "PSPNet-R101 (769, multi-scale)": (78.40,),
        "CDCL R101 (769, multi-scale)": (79.73,),
    },
}


def phases() -> dict[str, tuple[str, Phase]]:
    """Every different phase of the tables: name -> (row, phase)."""
    found = {}
    for path in CLAIMS:
        claim = load_claim(path)
        for row in claim.rows:
            for r, run in enumerate(row.runs):
                for p, phase in enumerate(run.phases):
                    known = [phase == other for _, other in found.values()]
                    if not any(known):
                        found[f"{path.stem}: {row.label} {r}.{p}"] = (row.label, phase)
    return found


PHASES = phases()


@lru_cache
def config(path: str, *overrides: str):
    cfg = load_config(path, overrides)
    register_from_config(cfg)
    return cfg


def resolved(phase: Phase):
    return config(str(phase.config), *phase.overrides)


def build(cfg) -> nn.Module:
    """The model without memory for its weights."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("path", CLAIMS, ids=lambda p: p.stem)
def test_the_published_numbers_are_those_of_the_slides(path):
    claim = load_claim(path)
    assert {row.label: tuple(row.published.values()) for row in claim.rows} == PUBLISHED[path.stem]
    order = [column.label for column in claim.columns]
    assert all(sorted(row.published, key=order.index) == list(row.published) for row in claim.rows)
    page = CDCL / "README.md"  # where the table stands for readers; nothing was measured of it so far
    assert page.read_text(encoding="utf-8") == replace_block(page, claim.name, to_markdown(collect(claim, [])))


@pytest.mark.parametrize("name", PHASES)
def test_every_run_of_the_tables_is_sound(name):
    label, phase = PHASES[name]
    cfg = resolved(phase)
    check_config(cfg, world_size=1)
    check_config(cfg, world_size=4)
    assert (101 if "r101" in phase.config.name else 18) == cfg.MODEL.RESNETS.DEPTH
    norms = ("CDCL", "DSBN", "t = ")
    assert any(word in label for word in norms) == cfg.MODEL.DATASET_NORM.ENABLED, label
    assert bool(cfg.DATASETS.REMAP_TO) == (label == "Label remap")
    assert phase.eval_only == cfg.TEST.AUG.ENABLED == ("multi-scale" in label and name.endswith(".1"))


@pytest.mark.parametrize(
    "path", sorted({str(phase.config) for _, phase in PHASES.values()}), ids=lambda p: Path(p).stem
)
def test_the_model_builds_with_the_norms_that_the_row_is_about(path):
    cfg = config(path)
    report = norm_report(build(cfg))
    assert not report["frozen"]
    assert bool(report["per dataset"]) == cfg.MODEL.DATASET_NORM.ENABLED == (not report["plain"])


def test_recipe_of_the_specification():
    cfg = config(str(CDCL / "cs_bdd_r18.yaml"))
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
    assert (backbone.OUTPUT_STRIDE, backbone.NORM) == (8, "SyncBN")
    assert cfg.MODEL.BACKBONE.NAME == "build_deep_stem_resnet_backbone"
    assert (head.DECODER, head.CONVS_DIM, head.DROPOUT, head.AUX_LOSS_WEIGHT) == ("PSPDecoder", 128, 0.1, 0.4)
    assert list(cfg.INPUT.CROP.SIZE) == [512, 512] and tuple(cfg.INPUT.SCALE_RANGE) == (0.7, 2.1, 0.1)
    assert config(str(CDCL / "cs_bdd_r101.yaml")).MODEL.SEM_SEG_HEAD.CONVS_DIM == 512


def test_the_rows_on_the_cityscapes_test_set():
    claim = load_claim(ROOT / "benchmarks" / "claims" / "cdcl_cityscapes_test.yaml")
    runs = {row.label: row.runs[0].phases for row in claim.rows if row.runs}
    for label in ("CDCL R18, multi-scale", "CDCL R101 (769, multi-scale)"):
        train, test = map(resolved, runs[label])
        assert sum(scale**2 for scale in test.TEST.AUG.SCALES) == 3.375 and not test.TEST.AUG.FLIP
        assert train.MODEL == test.MODEL and train.INPUT == test.INPUT
        assert runs[label][0] == runs[label.replace(", multi-scale", "")][0]  # one training for both rows
    assert list(resolved(runs["CDCL R101 (769)"][0]).INPUT.CROP.SIZE) == [769, 769]


def test_intervals_see_the_same_number_of_images():
    claim = load_claim(ROOT / "benchmarks" / "claims" / "cdcl_ablation_interval.yaml")
    for interval, row in enumerate(claim.rows, 1):
        cfg = resolved(row.runs[0].phases[0])
        per_update = cfg.SOLVER.IMS_PER_BATCH * (2 if interval == 1 else 1)
        assert interval == cfg.DATALOADER.INTERVAL and cfg.SOLVER.MAX_ITER * per_update == 640_000


def test_the_ablation_of_norms_and_alternation():
    claim = load_claim(ROOT / "benchmarks" / "claims" / "cdcl_ablation_norm_dat.yaml")
    facts = {}
    for row in claim.rows[1:]:
        cfg = resolved(row.runs[0].phases[0])
        per_update = cfg.SOLVER.IMS_PER_BATCH * (1 if cfg.DATALOADER.SCHEDULE == "size" else 2)
        facts[row.label] = (cfg.MODEL.DATASET_NORM.ENABLED, cfg.DATALOADER.SCHEDULE, cfg.SOLVER.STEP_MODE, per_update)
    assert facts == {
        "Cross, BN, without DAT": (False, "size", "fused", 16),
        "Cross, BN, with DAT": (False, "alternation", "sequential", 16),
        "Cross, DSBN, without DAT": (True, "size", "fused", 16),
        "CDCL: DSBN, with DAT": (True, "alternation", "fused", 16),
    }


@pytest.mark.parametrize("depth", [18, 101])
@pytest.mark.parametrize("dataset", ["bdd100k", "camvid_full", "coco_stuff", "mapillary_vistas"])
def test_a_dataset_adds_less_than_half_a_percent_of_parameters(depth, dataset):
    """Norms of the whole model and both classifiers, beside one dataset's model."""
    counts = {}
    for train in (("cityscapes_train",), ("cityscapes_train", f"{dataset}_train")):
        cfg = config(str(CDCL / f"base_r{depth}.yaml")).clone()
        cfg.DATASETS.TRAIN, cfg.MODEL.DATASET_NORM.ENABLED = train, True
        register_from_config(cfg)
        counts[len(train)] = sum(parameter.numel() for parameter in build(cfg).parameters())
    assert MetadataCatalog.get(f"{dataset}_train").label_space.num_classes >= 11
    assert 0 < (counts[2] - counts[1]) / counts[1] < 0.005
