"""N steps, resumed for N more, equal 2N steps: bit for bit, whatever the number of workers."""

from __future__ import annotations

import logging

import pytest
import torch
from detectron2.engine import HookBase
from run_state import assert_same, drawn, final_state

from multiseg_d2.checkpoint import ResumeError
from multiseg_d2.checkpoint.file import read_checkpoint
from multiseg_d2.engine import Trainer

FPN = ["MODEL.SEM_SEG_HEAD.DECODER", "FPNDecoder", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res4', 'res5']"]
MODES = {
    "alternation": [],
    "workers": ["DATALOADER.NUM_WORKERS", "2"],
    "mixture": [*FPN, "DATALOADER.SCHEDULE", "weights", "DATALOADER.WEIGHTS", "(0.7, 0.3)"]
    + ["SOLVER.IMS_PER_BATCH", "4"],
    "interval": ["DATALOADER.INTERVAL", "2"],
    "shared norm, sequential": ["MODEL.DATASET_NORM.ENABLED", "False", "SOLVER.STEP_MODE", "sequential"],
    "one scale and shift, one norm in the head": ["MODEL.RESNETS.NORM", "BN/shared_affine"]
    + ["MODEL.SEM_SEG_HEAD.NORM", "BN/shared"],
    "AdamW, cosine": ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.001"]
    + ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.WARMUP_ITERS", "3"],
    "bfloat16, clipped": ["SOLVER.AMP.ENABLED", "True"]
    + ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"],
    "float16": ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "float16"],
}


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_equals_an_unbroken_one(mode, tiny_train):
    keys = ["SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "3", *MODES[mode]]
    whole = tiny_train(*keys, out="whole")
    halves = tiny_train(*keys, out="halves")
    (halves / "model_final.pth").unlink()
    (halves / "last_checkpoint").write_text("model_0000002.pth")  # as it was after three steps
    tiny_train("--resume", *keys, out="halves")
    assert_same(final_state(whole), final_state(halves))
    assert drawn(halves)[6:] == drawn(whole)[3:] and drawn(halves)[:6] == drawn(whole)
    assert read_checkpoint(halves / "model_final.pth")["trainer"]["iteration"] == 5


def test_every_parameter_and_statistic_moved(tiny_train):
    out = tiny_train("SOLVER.CHECKPOINT_PERIOD", "4")
    first, last = (read_checkpoint(out / name) for name in ("model_0000003.pth", "model_final.pth"))
    trained = [name for group in first["trainer"]["optimizer"]["param_groups"] for name in group["names"]]
    statistics = [key for key in first["model"] if ".branches.tiny" in key and "running" in key]
    assert len(trained) > 20 and len(statistics) > 20
    assert not [key for key in trained + statistics if torch.equal(first["model"][key], last["model"][key])]


def test_a_drawn_seed_is_taken_over_from_the_checkpoint(tiny_train):
    out = tiny_train("SEED", "-1", "SOLVER.CHECKPOINT_PERIOD", "3")
    whole = final_state(out)
    assert whole["run"]["seed"] >= 0
    (out / "model_final.pth").unlink()
    (out / "last_checkpoint").write_text("model_0000002.pth")
    tiny_train("--resume", "SEED", "-1", "SOLVER.CHECKPOINT_PERIOD", "3")
    assert_same(whole, final_state(out))


def test_two_runs_with_one_seed_are_equal_and_with_two_seeds_are_not(tiny_train):
    runs = [final_state(tiny_train("SEED", seed, out=out)) for seed, out in (("3", "a"), ("3", "b"), ("4", "c"))]
    assert_same(runs[0], runs[1])
    with pytest.raises(AssertionError):
        assert_same(runs[0]["model"], runs[2]["model"])


def test_resuming_a_finished_run_trains_no_more(tiny_train):
    out = tiny_train()
    before = final_state(out)
    tiny_train("--resume")
    assert_same(before, final_state(out))
    assert len(drawn(out)) == 6


def test_resume_without_a_checkpoint_starts_at_step_0(tiny_train):
    assert [step for step, *_ in drawn(tiny_train("--resume", out="empty"))] == list(range(6))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["DATASETS.TRAIN", "('tiny_a_train',)"], "DATASETS.TRAIN: the checkpoint has 'tiny_b_train' in addition"),
        (["DATASETS.TRAIN", "('tiny_b_train', 'tiny_a_train')"], "DATASETS.TRAIN: other order"),
        (["SOLVER.IMS_PER_BATCH", "4"], "IMS_PER_BATCH: 2 in the checkpoint, 4 in this run"),
        (["SEED", "8"], "seed: 7 in the checkpoint, 8 in this run"),
        (["MODEL.SEM_SEG_HEAD.CONVS_DIM", "12"], "sem_seg_head.trunk.decoder"),
        (["SOLVER.HEAD_LR_FACTOR", "10.0"], "parameters are grouped differently"),
    ],
)
def test_a_changed_run_is_not_resumed(tiny_train, keys, message):
    tiny_train("SOLVER.MAX_ITER", "1")
    with pytest.raises(ResumeError, match=message):
        tiny_train("--resume", *keys)


def test_a_changed_key_that_does_no_harm_is_told(tiny_train, caplog, monkeypatch):
    logger = logging.getLogger("multiseg_d2.checkpoint.resume")  # a run's set-up cuts its parent off from the root
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    tiny_train("SOLVER.MAX_ITER", "1")
    tiny_train("--resume", "SOLVER.MAX_ITER", "2", "DATALOADER.NUM_WORKERS", "0", "SOLVER.BASE_LR", "0.01")
    told = [r.getMessage() for r in caplog.records if "the config has changed" in r.getMessage()]
    assert len(told) == 1 and "SOLVER.BASE_LR: 0.05 in the checkpoint, 0.01 in this run" in told[0]
    assert "SOLVER.MAX_ITER: 1 in the checkpoint, 2 in this run" in told[0] and "OUTPUT_DIR" not in told[0]


class Rates(HookBase):
    """Learning rate of each step, as the optimizer has it when the step is done."""

    def __init__(self):
        self.rates = {}

    def before_step(self):
        groups = self.trainer.optimizer.param_groups
        self.rates[self.trainer.iter] = [group["lr"] for group in groups]


def rates(cfg, resume: bool) -> dict:
    trainer = Trainer(cfg)
    trainer.register_hooks([recorder := Rates()])
    trainer.resume_or_load(resume)
    trainer.train()
    return recorder.rates


@pytest.mark.parametrize(
    "schedule",
    [
        ["WarmupPolyLR", "SOLVER.WARMUP_ITERS", "4"],
        ["WarmupCosineLR", "SOLVER.WARMUP_ITERS", "0"],
        ["WarmupMultiStepLR", "SOLVER.STEPS", "(2, 7)", "SOLVER.WARMUP_ITERS", "0"],
    ],
    ids=lambda schedule: schedule[0],
)
def test_the_rate_of_a_step_follows_from_its_number_and_the_config(tiny_cfg, schedule):
    """Also where the checkpoint is of a finished shorter run with another rate, whose stored rate may be zero."""
    keys = ["SOLVER.LR_SCHEDULER_NAME", *schedule, "SOLVER.HEAD_LR_FACTOR", "5.0"]
    longer = [*keys, "SOLVER.MAX_ITER", "10", "SOLVER.BASE_LR", "0.02"]
    whole = rates(tiny_cfg(*longer, out="whole"), resume=False)
    rates(tiny_cfg(*keys, "SOLVER.BASE_LR", "0.05", "SOLVER.STEPS", "(2, 5)"), resume=False)  # 6 steps
    resumed = rates(tiny_cfg(*longer), resume=True)
    assert list(resumed) == [6, 7, 8, 9] and all(rate > 0 for rate in resumed[6])
    assert resumed == {step: whole[step] for step in resumed}


def test_a_changed_size_is_told_as_a_change_of_value(tiny_train, caplog):
    tiny_train("SOLVER.MAX_ITER", "1", "DATALOADER.NUM_WORKERS", "0")
    with caplog.at_level(logging.WARNING):
        tiny_train("--resume", "SOLVER.MAX_ITER", "2", "INPUT.CROP.SIZE", "[32, 32]")
    (told,) = [r.getMessage() for r in caplog.records if "the config has changed" in r.getMessage()]
    assert "INPUT.CROP.SIZE: [32, 40] in the checkpoint, [32, 32] in this run" in told and "in addition" not in told
    assert "From here on the new values hold" in told and "learning rate of a step follows from its number" in told
