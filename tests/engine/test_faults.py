"""Killed, interrupted, poisoned: what a run leaves behind, and that it goes on as if nothing had been."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from process_probe import left_in
from run_state import assert_same, drawn, final_state

from multiseg_d2.checkpoint.file import CheckpointError, read_checkpoint
from multiseg_d2.engine import Trainer
from multiseg_d2.engine.signals import EXIT_STOPPED

KEYS = ["SOLVER.CHECKPOINT_PERIOD", "2"]


def test_killed_while_it_wrote_a_checkpoint(start, tiny_train, tmp_path):
    """The half-written file never gets the name of a checkpoint; the one before it is resumed."""
    killed = start(*KEYS, fault="half_save@3")
    assert killed.wait() == [-signal.SIGKILL]
    out = tmp_path / "out"
    assert [p.name for p in out.glob("*.pth")] == ["model_0000001.pth"] and list(out.glob(".*.tmp"))
    tiny_train("--resume", *KEYS)
    assert not list(out.glob(".*.tmp"))
    assert_same(final_state(tiny_train(*KEYS, out="whole")), final_state(out))


def test_killed_before_the_first_checkpoint_in_a_used_folder(start, tiny_train, tmp_path):
    """The earlier run's last checkpoint is not this run's."""
    tiny_train("SOLVER.BASE_LR", "0.02")
    killed = start(*KEYS, fault="kill@1")
    assert killed.wait() == [-signal.SIGKILL] and (tmp_path / "out" / "model_final.pth").exists()
    tiny_train("--resume", *KEYS)
    assert [step for step, _ in drawn(tmp_path / "out")] == [*range(6), 0, *range(6)]
    assert_same(final_state(tiny_train(*KEYS, out="whole")), final_state(tmp_path / "out"))


class At(HookBase):
    """Does something after a step."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def after_step(self):
        if self.trainer.iter == self.step:
            self.act()


def test_an_output_folder_removed_under_the_run_is_made_again(tiny_cfg, monkeypatch):
    """But for TensorBoard, which opens its file by name whenever it writes: it may end the run, naming the file."""
    monkeypatch.setattr(Trainer, "build_writers", lambda self: [])
    cfg = tiny_cfg()
    trainer = Trainer(cfg)
    trainer.register_hooks([At(2, lambda: os.rename(cfg.OUTPUT_DIR, f"{cfg.OUTPUT_DIR}.gone"))])
    trainer.resume_or_load(False)
    trainer.train()
    assert read_checkpoint(Path(cfg.OUTPUT_DIR, "model_final.pth"))["iteration"] == 5


def test_a_disk_that_fills_up_stops_the_run_and_keeps_the_last_checkpoint(tiny_cfg, monkeypatch):
    def full(*_names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cfg = tiny_cfg(*KEYS)
    trainer = Trainer(cfg)
    trainer.register_hooks([At(2, lambda: monkeypatch.setattr(os, "replace", full))])
    trainer.resume_or_load(False)
    with pytest.raises(CheckpointError, match=r"model_0000003\.pth could not be written: No space left on device"):
        trainer.train()
    monkeypatch.undo()
    assert sorted(p.name for p in Path(cfg.OUTPUT_DIR).glob("*.pth")) == ["model_0000001.pth"]
    assert not list(Path(cfg.OUTPUT_DIR).glob(".*.tmp"))
    again = Trainer(cfg)
    again.resume_or_load(True)
    assert again.start_iter == 2


@pytest.mark.parametrize("name", ["term", "term_all", "usr1", "int"])
def test_a_signal_ends_the_run_after_the_step_with_its_state_saved(start, tiny_train, tmp_path, name):
    workers = ["DATALOADER.NUM_WORKERS", "2" if name == "term_all" else "0"]
    stopped = start(*workers, fault=f"{name}@2")
    assert stopped.wait() == [EXIT_STOPPED], stopped.text()
    out = tmp_path / "out"
    assert [p.name for p in out.glob("*.pth")] == ["model_0000002.pth"] and len(drawn(out)) == 3
    assert ("Ctrl-C again" in stopped.text()) == (name == "int")
    tiny_train("--resume", *workers)
    assert [step for step, _ in drawn(out)] == [0, 1, 2, 3, 4, 5]
    resumed, whole = final_state(out), final_state(tiny_train(out="whole"))
    assert resumed.pop("kept") == ["model_0000002.pth"] and whole.pop("kept") == []
    assert_same(whole, resumed)


@pytest.mark.parametrize("fault", ["int_all@2", "int_at_start", "int_from_worker"])
def test_ctrl_c_reaches_all_processes_and_only_the_first_decides(start, tmp_path, fault):
    """At a step, while the workers start, and while the training process waits for one of them."""
    stopped = start("DATALOADER.NUM_WORKERS", "2", "SOLVER.MAX_ITER", "100000", fault=fault)
    group = stopped.processes[0].pid
    assert stopped.wait() == [EXIT_STOPPED], stopped.text()
    (saved,) = (tmp_path / "out").glob("*.pth")
    assert saved.name == f"model_{len(drawn(tmp_path / 'out')) - 1:07d}.pth"
    assert "Traceback" not in stopped.text() and not left_in(group)


def test_a_second_interrupt_aborts(start, tmp_path):
    aborted = start(fault="int@2,int@2")
    assert aborted.wait() == [-signal.SIGINT], aborted.text()
    assert not list((tmp_path / "out").glob("*.pth"))


def test_a_poisoned_image_stops_the_run_and_is_named(start, tmp_path):
    run = start(fault="nan@2")
    assert run.wait() == [1]
    _, batch = drawn(tmp_path / "out")[2]
    assert "step 2: a loss or gradient is not finite" in run.text()
    assert all(file in run.text() for file, _ in batch)
    assert not list((tmp_path / "out").glob("*.pth"))


# ---- two processes ---------------------------------------------------------------------------------------------------
SYNC = ["MODEL.RESNETS.NORM", "SyncBN", "MODEL.SEM_SEG_HEAD.NORM", "SyncBN", "MODEL.SEM_SEG_HEAD.DROPOUT", "0.0"]
FPN = ["MODEL.SEM_SEG_HEAD.DECODER", "FPNDecoder", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res4', 'res5']"]
TWO = {
    "fused": ["SOLVER.IMS_PER_BATCH", "4"],
    "sequential": ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.STEP_MODE", "sequential"],
    "interval": ["SOLVER.IMS_PER_BATCH", "4", "DATALOADER.INTERVAL", "2"],
    "one dataset each": [*FPN, "SOLVER.IMS_PER_BATCH", "1"],
    "never the second": ["DATALOADER.SCHEDULE", "fixed", "DATALOADER.WEIGHTS", "(4, 0)"],
    "different, sequential": [*FPN, "DATALOADER.SCHEDULE", "weights", "DATALOADER.WEIGHTS", "(1.0, 1.0)"]
    + ["SOLVER.STEP_MODE", "sequential"],
    "per entry": ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.STEP_MODE", "per_entry"],
    "fused, bfloat16": ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.AMP.ENABLED", "True"],
    "sequential, bfloat16": ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.AMP.ENABLED", "True"]
    + ["SOLVER.STEP_MODE", "sequential"],
}


def test_what_is_saved_is_what_every_process_goes_on_with(start, tmp_path):
    """Norms that are not synchronised count their own images: statistics drift apart until a checkpoint is written."""
    run = start(
        "SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "4", fault="show_buffers@0@0,show_buffers@0@1", processes=2
    )
    assert run.wait() == [0, 0], run.text()
    ours, other = (torch.load(tmp_path / "out" / f"buffers_{rank}.pth") for rank in range(2))
    saved = read_checkpoint(tmp_path / "out" / "model_final.pth")["model"]
    statistics = [key for key in ours if "running" in key]
    assert statistics and all(torch.equal(ours[key], other[key]) for key in ours)
    assert all(torch.equal(ours[key], saved[key]) for key in statistics)


@pytest.mark.parametrize("mode", TWO)
def test_two_processes_train_as_one_with_the_same_images(start, tiny_train, tmp_path, mode):
    keys = [*SYNC, *TWO[mode], "SOLVER.MAX_ITER", "4"]
    two = start(*keys, processes=2, out="two")
    assert two.wait() == [0, 0], two.text()
    one = tiny_train(*keys, out="one")
    drawn_by_two = [sorted(a + b) for (_, a), (_, b) in zip(drawn(tmp_path / "two", 0), drawn(tmp_path / "two", 1))]
    assert drawn_by_two == [sorted(batch) for _, batch in drawn(one)]
    a, b = (read_checkpoint(out / "model_final.pth") for out in (one, tmp_path / "two"))
    for key, value in a["model"].items():
        scale = value.float().abs().max().clamp(min=1e-2)
        apart = (value.float() - b["model"][key].float()).abs().max() / scale
        assert apart < (0.02 if "bfloat16" in mode else 1e-5), f"{key}: {apart:.2e}"


def test_a_poisoned_image_on_one_process_stops_both(start, tmp_path):
    run = start("SOLVER.IMS_PER_BATCH", "4", *SYNC, fault="nan@2@1", processes=2)
    assert run.wait() == [1, 1]
    _, batch = drawn(tmp_path / "out", rank=1)[2]
    for log in run.logs:  # both say whose files they were
        text = log.read_text()
        assert "step 2: a loss or gradient is not finite" in text and "rank 1:" in text
        assert all(file in text for file, _ in batch)


def test_a_signal_to_one_process_stops_both_at_the_same_step(start, tiny_train, tmp_path):
    keys = ["SOLVER.IMS_PER_BATCH", "4", "MODEL.SEM_SEG_HEAD.DROPOUT", "0.5"]
    run = start(*keys, fault="usr1@2@1", processes=2)
    assert run.wait() == [EXIT_STOPPED] * 2, run.text()
    out = tmp_path / "out"
    assert [p.name for p in out.glob("*.pth")] == ["model_0000002.pth"]
    assert len(drawn(out, 0)) == len(drawn(out, 1)) == 3
    again = start("--resume", *keys, processes=2)
    assert again.wait() == [0, 0], again.text()
    whole = start(*keys, out="whole", processes=2)
    assert whole.wait() == [0, 0], whole.text()
    assert_same(final_state(tmp_path / "whole")["model"], final_state(out)["model"])  # norms not synchronised, dropout


def test_parameters_without_a_gradient_are_named_at_the_first_step(start, tiny_train):
    keys = [*FPN[:2], "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res4']", "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", "0.0"]
    keys += ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "3"]
    run = start(*keys, processes=2)
    assert run.wait() == [1, 1], run.text()
    for log in run.logs:
        assert "no loss depends on" in log.read_text() and "backbone.res5.0.weight" in log.read_text()
    remedy = start(*keys, "SOLVER.STEP_MODE", "sequential", processes=2, out="sequential")
    assert remedy.wait() == [0, 0], remedy.text()
    tiny_train(*keys, out="one")  # a single process needs no remedy


def test_another_number_of_processes_is_refused(start, tiny_train):
    tiny_train("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "1")
    run = start("--resume", "SOLVER.IMS_PER_BATCH", "4", processes=2)
    assert run.wait() == [1, 1]
    assert "processes: 1 in the checkpoint, 2 in this run" in run.text()
