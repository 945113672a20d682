"""Rounds of self-training: what they train on, and that a run killed anywhere resumes to the same result."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from run_state import assert_same, drawn, final_state

from multiseg_d2.data.soft_labels import read_soft_label
from multiseg_d2.engine import ConfigError
from multiseg_d2.engine.self_training.collapse import CollapseError
from multiseg_d2.engine.self_training.folder import PseudoLabelError, PseudoLabels

TARGET = "tiny_a_val/unlabelled"
KEYS = [
    *("DATASETS.TRAIN", f"('tiny_a_train', '{TARGET}')"),
    *("MODEL.DATASET_NORM.ENABLED", "False", "SOLVER.CHECKPOINT_PERIOD", "100", "SOLVER.MAX_ITER", "6"),
    *("SELF_TRAINING.ROUNDS", "2", "SELF_TRAINING.PORTION", "(0.5, 0.2, 1.0)", "SOLVER.BASE_LR", "0.0005"),
    *("SELF_TRAINING.SOURCE_PORTION", "(0.4, 0.4, 1.0)"),
]

SIGMOID = ["MODEL.SEM_SEG_HEAD.NAME", "UnifiedHead", "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "null_bce"]
TREE = ["MODEL.SEM_SEG_HEAD.NAME", "HierarchicalHead"]
UNION = ["MODEL.SEM_SEG_HEAD.NAME", "UnifiedHead", "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "cross_entropy"]


def labels_of(out, number: int) -> PseudoLabels:
    return PseudoLabels(out / "self_training", number, TARGET)


def label_bytes(out) -> dict[str, bytes]:
    """Every file of the rounds but the pictures."""
    root = out / "self_training"
    files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.parent != root]
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Where the run that nothing happened to is kept for the tests of this file."""
    return tmp_path_factory.mktemp("unbroken") / "out"


@pytest.fixture
def whole(unbroken, tiny_train):
    if not unbroken.exists():
        shutil.copytree(tiny_train(*KEYS, out="whole"), unbroken)
    return unbroken


def test_rounds_train_on_shares_of_source_and_labelled_target(whole):
    files = [[Path(file).relative_to(Path(file).parents[2]) for file, _ in samples] for _, samples in drawn(whole)]
    rounds = [set().union(*files[:3]), set().union(*files[3:])]
    source = [{f for f in seen if f.parts[0] == "train"} for seen in rounds]
    assert [len(seen) for seen in source] == [2, 4]  # 0.4 and 0.8 of five images
    assert source[0] < source[1]
    assert all(len([f for f in seen if f.parts[0] == "val"]) == 5 for seen in rounds)


def test_the_manifest_says_what_is_in_the_files(whole):
    for number, portion in ((0, 0.5), (1, 0.7)):
        labels = labels_of(whole, number)
        manifest = labels.manifest()
        assert manifest["round"] == number and manifest["settings"]["portion"] == pytest.approx(portion)
        maps = [cv2.imread(str(labels.folder / name), cv2.IMREAD_UNCHANGED) for name in manifest["files"]]
        assert len(maps) == 5
        counts = np.bincount(np.stack(maps).ravel(), minlength=256)
        assert list(manifest["kept_pixels"].values()) == counts[:3].tolist()
        assert counts[3:255].sum() == 0 and counts.sum() == manifest["pixels"] == 5 * 40 * 48
        predicted = np.array(list(manifest["predicted_pixels"].values()))
        assert predicted.sum() == manifest["pixels"]
        assert all(0 < t <= 1 for t in manifest["thresholds"].values())
        labels.check_files()
    assert (whole / "self_training" / f"{labels.slug}.png").stat().st_size > 1000


def test_one_line_of_the_log_has_portion_thresholds_and_kept_shares(whole):
    log = (whole / "log.txt").read_text()
    for number, portion in ((0, "0.500"), (1, "0.700")):
        manifest = labels_of(whole, number).manifest()
        (line,) = [line for line in log.splitlines() if f"round {number}, {TARGET}: " in line]
        kept = {name: 100 * pixels / manifest["pixels"] for name, pixels in manifest["kept_pixels"].items()}
        assert f"portion {portion}, {sum(kept.values()):.2f}% of all pixels kept; " in line
        for name, share in kept.items():
            assert f"{name} {manifest['thresholds'][name]:.3f}/{share:.2f}%" in line


def test_the_labels_are_a_dataset_like_any_other(whole):
    records = DatasetCatalog.get(labels_of(whole, 1).register())
    assert [r["dataset"] for r in records] == ["tiny_a"] * 5
    assert all("/labels/" in r["sem_seg_file_name"] and "self_training" in r["sem_seg_file_name"] for r in records)


@pytest.mark.parametrize(
    "images", [pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow), 7]
)
def test_killed_while_labelling(images, whole, start, tiny_train):
    """In the first round, between the rounds (5 = nothing of the second is written yet), in the second."""
    broken = start(*KEYS, out="broken", fault=f"kill_in_labels@{images}")
    assert broken.wait() == [-9]
    out = tiny_train("--resume", *KEYS, out="broken")
    assert label_bytes(out) == label_bytes(whole)
    assert_same(final_state(out), final_state(whole))


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_while_training(step, whole, start, tiny_train):
    """Inside the first round, in the first step of the second (its labels are there), inside the second."""
    assert start(*KEYS, out="broken", fault=f"kill@{step}").wait() == [-9]
    out = tiny_train("--resume", *KEYS, out="broken")
    assert label_bytes(out) == label_bytes(whole)
    assert_same(final_state(out), final_state(whole))


def test_stopped_inside_a_round(whole, start, tiny_train):
    assert start(*KEYS, out="broken", fault="term@4").wait() == [75]
    out = tiny_train("--resume", *KEYS, out="broken")
    assert label_bytes(out) == label_bytes(whole)
    resumed, unbroken = final_state(out), final_state(whole)
    assert len(resumed.pop("kept")) == len(unbroken.pop("kept")) + 1  # the checkpoint of the stop
    assert_same(resumed, unbroken)


def test_changed_labels_are_not_trained_on(start, tiny_train, tmp_path):
    assert start(*KEYS, out="broken", fault="term@4").wait() == [75]
    (name, *_) = labels_of(tmp_path / "broken", 1).manifest()["files"]
    with open(labels_of(tmp_path / "broken", 1).folder / name, "ab") as file:
        file.write(b"x")
    with pytest.raises(PseudoLabelError, match="1 of 5 files are missing or have changed"):
        tiny_train("--resume", *KEYS, out="broken")


def test_two_processes_write_the_labels_of_one(whole, start, tmp_path):
    assert start(*KEYS, "SOLVER.MAX_ITER", "2", out="two", processes=2).wait() == [0, 0]
    one, two = labels_of(whole, 0).manifest(), labels_of(tmp_path / "two", 0).manifest()
    assert {k: v for k, v in one.items() if k != "confidence_of_images"} == {
        k: v for k, v in two.items() if k != "confidence_of_images"
    }


def test_labels_of_the_target_are_never_read(tiny_root, tiny_train, whole, tmp_path, monkeypatch):
    bare = tmp_path / "data"
    shutil.copytree(tiny_root, bare)
    shutil.rmtree(bare / "tiny_a" / "val" / "labels")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(bare))
    out = tiny_train(*KEYS, out="bare")
    assert_same(final_state(out)["model"], final_state(whole)["model"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["DATASETS.TRAIN", "('tiny_a_train',)"], "needs a labelled source and an unlabelled target"),
        (["SELF_TRAINING.POLICY", "spatial_prior"], "tools/spatial_prior.py"),
        (["SELF_TRAINING.ROUNDS", "7"], "7 rounds do not fit into 6 steps"),
        (["SELF_TRAINING.POLICY", "online"], "needs a teacher"),
        (["SELF_TRAINING.POLICY", "cbst"], "'cbst'"),
        (["SELF_TRAINING.PORTION", "(0.5,)"], "SELF_TRAINING.PORTION"),
        (["SELF_TRAINING.REGULARIZER", "('mrk', 0.1)"], "mrkld"),
        ([*SIGMOID, "SELF_TRAINING.REGULARIZER", "('lrent', 0.25)"], "UnifiedHead with LOSS_TYPE 'null_bce' does not"),
        ([*SIGMOID, "SELF_TRAINING.REGULARIZER", "('mrkld', 0.1)"], "asks for soft labels or a term of a softmax"),
        ([*TREE, "SELF_TRAINING.REGULARIZER", "('mrent', 0.1)"], "HierarchicalHead"),
        ([*SIGMOID, "SELF_TRAINING.POLICY", "online", "MODEL.EMA_DECAY", "0.9"], "'online' weighs pixels"),
        ([*TREE, "SELF_TRAINING.POLICY", "online", "MODEL.EMA_DECAY", "0.9"], "'online' weighs pixels"),
    ],
)
def test_configs_that_cannot_be_meant(keys, message, tiny_cfg):
    with pytest.raises(ConfigError, match=message):
        tiny_cfg(*KEYS, *keys)


@pytest.mark.parametrize("head", [UNION, SIGMOID])
def test_heads_over_the_union_learn_from_pseudo_labels(head, tiny_train):
    """Cross-entropy with everything, sigmoids with hard labels."""
    regularizer = ["SELF_TRAINING.REGULARIZER", "('lrent', 0.25)"] if head == UNION else []
    out = tiny_train(*KEYS, *head, *regularizer, "SOLVER.MAX_ITER", "2", "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", "0.0")
    assert any(name.startswith("soft/") for name in labels_of(out, 1).manifest()["files"]) == (head == UNION)


def test_curves_of_the_rounds_are_among_the_metrics(whole):
    lines = [json.loads(line) for line in (whole / "metrics.json").read_text().splitlines()]
    known = {name: value for line in lines for name, value in line.items() if name.startswith("self_training/")}
    labels = labels_of(whole, 1)
    manifest, prefix = labels.manifest(), f"self_training/{labels.slug}"
    assert known[f"{prefix}/portion"] == pytest.approx(0.7)
    for name, threshold in manifest["thresholds"].items():
        assert known[f"{prefix}/threshold/{name}"] == pytest.approx(threshold)
        assert known[f"{prefix}/kept/{name}"] == pytest.approx(manifest["kept_pixels"][name] / manifest["pixels"])


def test_images_that_are_scored_are_not_labelled(refused):
    message = refused(*KEYS, "DATASETS.TEST", "('tiny_a_val',)")
    assert re.search(r"error: 5 images of the target .* are scored", message)


def test_labels_that_have_collapsed_stop_the_run(tiny_train):
    with pytest.raises(CollapseError, match="0 of 9600 pixels are kept"):
        tiny_train(*KEYS, "SELF_TRAINING.PORTION", "(0.0001, 0, 1.0)")


def test_scored_images_may_be_labelled_where_that_is_wanted(tiny_train):
    keys = ["DATASETS.TEST", "('tiny_a_val',)", "SELF_TRAINING.LABEL_SCORED", "True", "SOLVER.MAX_ITER", "2"]
    out = tiny_train(*KEYS, *keys)
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert any("tiny_a_val/sem_seg/mIoU" in line for line in lines)


def test_the_most_confident_images_only(tiny_train):
    out = tiny_train(*KEYS, "SELF_TRAINING.TARGET_PORTION", "(0.4, 0.0, 1.0)", "SOLVER.MAX_ITER", "2")
    manifest = labels_of(out, 0).manifest()
    confidence = manifest["confidence_of_images"]
    best = sorted(confidence, key=confidence.get, reverse=True)[:2]
    assert sorted(manifest["files"]) == sorted(f"labels/{image_id}.png" for image_id in best)


@pytest.mark.parametrize("mining", ["(0.0, 0.001, 3)", "(0.9, 0.4, 1)"])
def test_online_mixing_runs_and_resumes(mining, tiny_train):
    """Also with images of rare classes drawn more often."""
    keys = [*KEYS, "SELF_TRAINING.POLICY", "online", "MODEL.EMA_DECAY", "0.9", "SOLVER.CHECKPOINT_PERIOD", "3"]
    keys += ["SELF_TRAINING.MINING", mining]
    whole = tiny_train(*keys, out="online")
    halves = tiny_train(*keys, out="halves")
    (halves / "model_final.pth").unlink()
    (halves / "last_checkpoint").write_text("model_0000002.pth")
    tiny_train("--resume", *keys, out="halves")
    assert_same(final_state(whole), final_state(halves))


def test_soft_labels_and_mined_crops_resume(tiny_train):
    keys = [*KEYS, "SELF_TRAINING.REGULARIZER", "('lrent', 0.25)", "SELF_TRAINING.MINING", "(0.8, 0.4, 1)"]
    keys += ["SOLVER.CHECKPOINT_PERIOD", "2"]
    whole = tiny_train(*keys, out="lrent")
    halves = tiny_train(*keys, out="halves")
    (halves / "model_final.pth").unlink()
    (halves / "last_checkpoint").write_text("model_0000003.pth")
    tiny_train("--resume", *keys, out="halves")
    assert_same(final_state(whole), final_state(halves))
    labels = labels_of(whole, 0)
    names = list(labels.manifest()["files"])
    assert sum(name.startswith("soft/") for name in names) == 5
    assert_that_soft_and_hard_agree(labels.folder, names)


def assert_that_soft_and_hard_agree(folder, names):
    for name in names:
        if name.startswith("labels/"):
            hard = cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED)
            soft = read_soft_label(str(folder / name.replace("labels/", "soft/").replace(".png", ".npz")), *hard.shape)
            assert ((soft.shares.sum(0) > 0) == (hard != 255)).all()
            best = np.take_along_axis(soft.class_ids, soft.shares.argmax(0)[None], 0)[0]
            assert (best[hard != 255] == hard[hard != 255]).all()
