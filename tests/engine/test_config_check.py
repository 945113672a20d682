"""Contradictions of a config, found at set-up."""

from __future__ import annotations

import sys

import pytest
import torch
from detectron2.data import MetadataCatalog

from multiseg_d2.engine.config_check import check_config
from multiseg_d2.engine.setup import argument_parser, setup
from multiseg_d2.user_error import ConfigError


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["DATASETS.TRAIN", "('tiny_a_tran',)"], "'tiny_a_tran' is not registered.*did you mean 'tiny_a_train'"),
        (["DATASETS.TEST", "('tiny_a_vall',)"], "DATASETS.TEST: 'tiny_a_vall' is not registered"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["DATASETS.TRAIN", "('tiny_a_train', 'tiny_a_train')"], "names a dataset twice"),
        (["DATALOADER.SCHEDULE", "fixed", "DATALOADER.WEIGHTS", "(1,)"], "DATALOADER.WEIGHTS has 1 numbers for 2"),
        (["DATALOADER.SCHEDULE", "fixed", "DATALOADER.WEIGHTS", "(1.5, 1)"], "whole numbers"),
        (["DATALOADER.SCHEDULE", "weights"], "DATALOADER.WEIGHTS has 0 numbers"),
        (["DATALOADER.WEIGHTS", "(1, 1)"], "uses none"),
        (["DATALOADER.SCHEDULE", "alternate"], "DATALOADER.SCHEDULE is 'alternate'"),
        (["DATALOADER.SCHEDULE", "size", "DATALOADER.TEMPERATURE", "0"], "TEMPERATURE"),
        (["DATALOADER.SCHEDULE", "size", "DATALOADER.INTERVAL", "2"], "INTERVAL 2 belongs to SCHEDULE 'alternation'"),
        (["DATALOADER.INTERVAL", "0"], "INTERVAL is 0"),
        (["SOLVER.OPTIMIZER", "adamw"], "SOLVER.OPTIMIZER is 'adamw': .*did you mean 'AdamW'"),
        (["SOLVER.LR_SCHEDULER_NAME", "PolyLR"], "did you mean 'WarmupPolyLR'"),
        (["SOLVER.STEP_MODE", "fuse"], "did you mean 'fused'"),
        (["SOLVER.AMP.DTYPE", "bf16"], "SOLVER.AMP.DTYPE is 'bf16'"),
        (["MODEL.EMA_DECAY", "1.0"], "EMA_DECAY must be in"),
        (["TEST.BEST_METRIC", "mIoU"], "BEST_METRIC is 'mIoU'.*mean/mIoU"),
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER must be 1 or more"),
        (["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"], "CLIP_TYPE is 'all'"),
        (["MODEL.SEM_SEG_HEAD.NAME", "PerDatasetHed"], "did you mean 'PerDatasetHead'"),
        (["MODEL.DATASET_NORM.UNSEEN", "nearst"], "did you mean 'nearest'"),
        (
            ["MODEL.RESNETS.NORM", "BN/share"],
            "MODEL.RESNETS.NORM: 'share' behind BN/ .*did you mean 'shared'",
        ),
        (["TEST.AUG.SCALES", "(1.0, 0.0)"], "TEST.AUG.SCALES must be positive"),
        (["TEST.SLIDING_WINDOW", "(3,)"], "TEST.SLIDING_WINDOW is .height, width."),
        (["TEST.PRECISE_BN.ENABLED", "True"], "TEST.PRECISE_BN is not supported"),
        (["SOLVER.IMS_PER_BATCH", "1"], "one image per batch norm and process"),
        (["DATASETS.SPECS", "('nowhere.yaml',)"], "nowhere.yaml"),
        (["DATASETS.REMAP_TO", "tiny_a", "DATASETS.TEST", "('tiny_b_val',)"], "tiny_b_val has the classes"),
    ],
)
def test_a_contradiction_is_told_with_its_key(tiny_cfg, keys, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        tiny_cfg(*keys)


def test_all_contradictions_are_told_at_once(tiny_cfg):
    with pytest.raises(ConfigError) as problem:
        tiny_cfg("SOLVER.OPTIMIZER", "Lion", "SOLVER.MAX_ITER", "0", "DATALOADER.INTERVAL", "0")
    assert str(problem.value).count("\n  - ") == 3


def test_shared_norms_may_see_one_image_of_each_dataset(tiny_cfg):
    tiny_cfg("SOLVER.IMS_PER_BATCH", "1", "MODEL.DATASET_NORM.ENABLED", "False")
    with pytest.raises(ConfigError, match="one image per batch norm"):
        keys = ["MODEL.DATASET_NORM.ENABLED", "False", "SOLVER.STEP_MODE", "sequential"]
        tiny_cfg("SOLVER.IMS_PER_BATCH", "1", *keys)


def test_norms_that_the_head_shares_see_the_images_of_all_datasets(tiny_cfg):
    tiny_cfg("SOLVER.IMS_PER_BATCH", "1", "MODEL.SEM_SEG_HEAD.NORM", "BN/shared")
    with pytest.raises(ConfigError, match="one image per batch norm"):
        tiny_cfg("SOLVER.IMS_PER_BATCH", "1", "MODEL.SEM_SEG_HEAD.NORM", "BN/shared_affine")
    cfg = tiny_cfg(
        "SOLVER.IMS_PER_BATCH", "4", "MODEL.RESNETS.NORM", "SyncBN/shared", "MODEL.SEM_SEG_HEAD.NORM", "SyncBN"
    )
    with pytest.raises(ConfigError, match="SyncBN of torch needs GPUs"):
        check_config(cfg, world_size=2)


def test_processes_must_share_a_step_evenly(tiny_cfg):
    cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", "4")
    check_config(cfg, world_size=2)
    with pytest.raises(ConfigError, match="12 images|8 images"):
        check_config(cfg, world_size=3)


def test_passes_per_entry_must_meet_on_all_processes(tiny_cfg):
    keys = ["SOLVER.STEP_MODE", "per_entry", "DATALOADER.SCHEDULE", "fixed", "DATALOADER.WEIGHTS"]
    check_config(tiny_cfg(*keys, "(2, 4)"), world_size=2)
    with pytest.raises(ConfigError, match="'per_entry' on 2 processes"):
        check_config(tiny_cfg(*keys, "(3, 5)"), world_size=2)
    mixture = [*keys[:2], "DATALOADER.SCHEDULE", "size", "SOLVER.IMS_PER_BATCH", "4"]
    with pytest.raises(ConfigError, match="'per_entry' on 2 processes"):
        check_config(tiny_cfg(*mixture), world_size=2)


def test_sync_batch_norm_of_torch_needs_gpus(tiny_cfg):
    keys = ["MODEL.RESNETS.NORM", "SyncBN", "MODEL.SEM_SEG_HEAD.NORM", "SyncBN", "SOLVER.IMS_PER_BATCH", "4"]
    check_config(tiny_cfg(*keys), world_size=2)
    cfg = tiny_cfg(*keys, "MODEL.DATASET_NORM.ENABLED", "False")
    with pytest.raises(ConfigError, match="SyncBN of torch needs GPUs"):
        check_config(cfg, world_size=2)


@pytest.mark.parametrize("annotation", ["none", "box"])
def test_a_set_that_the_head_cannot_learn_from_is_refused(tiny_cfg, annotation, monkeypatch):
    cfg = tiny_cfg()
    monkeypatch.setitem(MetadataCatalog.get("tiny_b_train").__dict__, "annotation", annotation)
    with pytest.raises(ConfigError, match=f"tiny_b_train has annotation type '{annotation}', and PerDatasetHead"):
        check_config(cfg)


def test_an_unlabelled_set_is_not_evaluated(tiny_cfg, monkeypatch):
    cfg = tiny_cfg("DATASETS.TEST", "('tiny_a_val',)")
    monkeypatch.setitem(MetadataCatalog.get("tiny_a_val").__dict__, "annotation", "none")
    with pytest.raises(ConfigError, match="tiny_a_val has no pixel labels"):
        check_config(cfg, eval_only=True)


def test_evaluation_needs_something_to_evaluate(tiny_cfg):
    with pytest.raises(ConfigError, match="DATASETS.TEST is empty"):
        tiny_cfg("--eval-only")


def test_without_a_gpu_the_cpu_is_used_and_that_is_told(tiny_argv, caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = setup(argument_parser().parse_args(tiny_argv("MODEL.DEVICE", "cuda")))
    assert cfg.MODEL.DEVICE == "cpu" and cfg.is_frozen()
    assert any("MODEL.DEVICE is cuda" in r.getMessage() for r in caplog.records)


def test_no_gpus_wanted_means_the_cpu(tiny_argv, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parse = argument_parser().parse_args
    monkeypatch.setattr(sys.modules[setup.__module__], "default_setup", lambda *_: None)
    assert setup(parse(tiny_argv("--num-gpus=0", "MODEL.DEVICE", "cuda"))).MODEL.DEVICE == "cpu"
    assert setup(parse(tiny_argv("MODEL.DEVICE", "cuda"))).MODEL.DEVICE == "cuda"
