"""Configs and claims of universal semi-supervision: steps, unlabelled batches, sizes and published numbers."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog

from multiseg_d2.claims import load_claim
from multiseg_d2.data.register import register_from_config
from multiseg_d2.engine import load_config
from multiseg_d2.engine.config_check import check_config
from multiseg_d2.view_name import parse_view

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = ("usss_cs_idd", "usss_cs_camvid", "usss_cs_sun")
SIDES = {"cityscapes": 512, "idd": 512, "idd_level3ids": 512, "camvid": 360, "sun_rgbd": 480}
BATCH = 8


@lru_cache
def phases(name: str):
    """(row label, config) of every training of a claims file."""
    found = []
    for row in load_claim(ROOT / "benchmarks" / "claims" / f"{name}.yaml").rows:
        for run in row.runs:
            found += [(row.label, load_config(str(p.config), p.overrides)) for p in run.phases if not p.eval_only]
    return found


def batches(entry: str) -> int:
    """Batches of 8 in an entry, by the counts in the specs."""
    view = parse_view(entry)
    metadata = MetadataCatalog.get(view.entry if view else entry)
    count = metadata.spec.splits[metadata.split].count
    if view is not None and view.sliced:
        count = min(view.stop or count, count) - view.start
    return math.ceil(count / BATCH)


@pytest.mark.parametrize("name", CLAIMS)
def test_epochs_unlabelled_batches_and_sizes_are_those_of_the_recipe(name, monkeypatch):
    """200 epochs of the smaller labelled set; m = batches of an unlabelled set / steps of an epoch, at least 1."""
    monkeypatch.chdir(ROOT)
    seen = set()
    for label, cfg in phases(name):
        register_from_config(cfg)
        kinds = {e: MetadataCatalog.get(e).get("annotation", "pixel") for e in cfg.DATASETS.TRAIN}
        steps = min(batches(e) for e, kind in kinds.items() if kind == "pixel")
        factor = 2 if "twice as long" in label else 1
        alone = {47: 46}.get(steps, steps) if len(kinds) == 1 else steps  # a single set: as many steps as the pair
        assert factor * 200 * alone == cfg.SOLVER.MAX_ITER, label
        wanted = [BATCH * (1 if kind == "pixel" else max(batches(e) // steps, 1)) for e, kind in kinds.items()]
        assert list(cfg.DATALOADER.WEIGHTS) == wanted, label
        assert list(cfg.INPUT.MIN_SIZE_TRAIN) == [SIDES[MetadataCatalog.get(e).dataset] for e in kinds], label
        assert (cfg.MODEL.SEM_SEG_HEAD.NAME == "EntropyHead") == ("none" in kinds.values())
        if (key := str(cfg)) not in seen:
            seen.add(key)
            check_config(cfg, world_size=4)


def test_the_published_numbers_are_there_and_average_as_published():
    published = {
        (name, row.label): dict(row.published)
        for name in CLAIMS
        for row in load_claim(ROOT / "benchmarks" / "claims" / f"{name}.yaml").rows
        if row.published
    }
    averages = {  # of the paper's slides
        ("usss_cs_idd", "Train on CS"): 27.81,
        ("usss_cs_idd", "Train on IDD"): 25.79,
        ("usss_cs_idd", "Univ-basic"): 31.58,
        ("usss_cs_idd", "Univ-full"): 31.97,
        ("usss_cs_camvid", "N=375, train on CS"): 51.80,
        ("usss_cs_camvid", "N=375, train on CamVid"): 43.53,
        ("usss_cs_camvid", "N=375, Univ-basic"): 59.24,
        ("usss_cs_camvid", "N=375, Univ-cross"): 59.85,
        ("usss_cs_camvid", "N=375, Univ-full"): 60.32,
        ("usss_cs_sun", "Train on CS"): 39.85,
        ("usss_cs_sun", "Train on SUN"): 29.07,
        ("usss_cs_sun", "Univ-basic"): 44.78,
        ("usss_cs_sun", "Univ-full"): 50.52,
    }
    for key, average in averages.items():
        assert sum(published[key].values()) / 2 == pytest.approx(average, abs=0.0101), key
    assert set(published) - set(averages) == {
        ("usss_cs_camvid", "published: Hung et al."),
        ("usss_cs_camvid", "published: Souly et al."),
        ("usss_cs_sun", "published: SceneNet, 5,300 labelled"),
    }


def test_rows_that_start_without_pretraining_on_labels_take_only_prototypes_from_the_first_phase():
    """As in the paper: training starts from ImageNet, the first phase gives the prototypes."""
    for name in CLAIMS:
        for row in load_claim(ROOT / "benchmarks" / "claims" / f"{name}.yaml").rows:
            if re.search("Univ-(full|cross)", row.label) and not row.label.startswith("published"):
                for run in row.runs:
                    assert run.phases[1].weights_as == ("MODEL.SEM_SEG_HEAD.CLASS_STATISTICS",)


@pytest.mark.parametrize("name", ["usss_toy", "usss_camvid"])
def test_evidence_compares_at_the_same_number_of_steps(name):
    """Every second phase of a file has as many steps, whatever it trains on."""
    claim = load_claim(ROOT / "benchmarks" / "claims" / f"{name}.yaml")
    steps = {
        load_config(str(run.phases[1].config), run.phases[1].overrides).SOLVER.MAX_ITER
        for row in claim.rows
        for run in row.runs
        if len(run.phases) > 1
    }
    assert len(steps) == 1 and len(claim.rows) >= 6
