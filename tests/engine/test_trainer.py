"""What the trainer does around the steps: evaluation, records, hooks with a state."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import tiny_run
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import EventStorage
from run_state import assert_same, drawn, final_state

from multiseg_d2.checkpoint.file import CheckpointError
from multiseg_d2.checkpoint.resume import ResumeError
from multiseg_d2.engine import Trainer
from multiseg_d2.engine.hooks import flat_numbers
from multiseg_d2.engine.signals import EXIT_STOPPED
from multiseg_d2.modeling.heads import PerDatasetHead

TEST = ["DATASETS.TEST", "('tiny_a_val', 'tiny_b_val')"]


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]


def test_evaluation_in_between_changes_nothing(tiny_train):
    plain = tiny_train(out="plain")
    often = tiny_train(*TEST, "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "1", out="often")
    a, b = final_state(plain), final_state(often)
    a.pop("kept"), b.pop("kept")
    assert_same(a, b)
    name = "tiny_b_val/sem_seg/mIoU"
    scores = {line["iteration"]: line[name] for line in metrics(often) if name in line}
    assert scores and all(0 <= score <= 100 for score in scores.values())
    assert (often / "inference" / "report.json").exists()


def test_eval_only_gives_the_scores_of_the_last_evaluation(tiny_train):
    out = tiny_train(*TEST)
    report = json.loads((out / "inference" / "report.json").read_text())
    again = tiny_train("--eval-only", *TEST, "MODEL.WEIGHTS", str(out / "model_final.pth"), out="again")
    assert json.loads((again / "inference" / "report.json").read_text()) == report
    assert not list(again.glob("*.pth"))


def test_two_processes_evaluate_as_one(tiny_train, start, tmp_path):
    weights = ["MODEL.WEIGHTS", str(tiny_train(*TEST, "SOLVER.MAX_ITER", "1") / "model_final.pth")]
    two = start("--eval-only", *TEST, *weights, "DATALOADER.NUM_WORKERS", "1", out="two", processes=2)
    assert two.wait() == [0, 0], two.text()
    reports = [json.loads((tmp_path / out / "inference" / "report.json").read_text()) for out in ("out", "two")]
    assert reports[0] == reports[1]


def test_eval_only_needs_the_weights_of_a_model(tiny_argv):
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS is empty"):
        tiny_run.run(tiny_argv("--eval-only", *TEST))


def test_records_have_losses_by_dataset(tiny_train):
    out = tiny_train("DATALOADER.INTERVAL", "2")
    names = {name for line in metrics(out) for name in line}
    assert {"total_loss", "lr", "data_time", "grad_norm", "loss_tiny_a", "loss_tiny_b", "loss_aux_tiny_b"} <= names
    assert list(out.glob("events.out.tfevents.*")) and (out / "log.txt").exists() and (out / "config.yaml").exists()


def test_pictures_of_the_batch_change_nothing(tiny_train, tiny_root, monkeypatch):
    drawings = {}

    def put_image(_storage, name, picture):
        drawings.setdefault(name, []).append(picture)

    monkeypatch.setattr(EventStorage, "put_image", put_image)
    plain, drawn_too = (tiny_train("VIS_PERIOD", period, out=f"drawn{period}") for period in "02")
    assert_same(final_state(plain), final_state(drawn_too))
    assert set(drawings) == {"training/tiny_a", "training/tiny_b"}
    for pictures in drawings.values():
        assert len(pictures) == 3 and all(p.dtype == np.uint8 and p.shape[0] == 3 and p.std() > 5 for p in pictures)


def test_a_remapped_dataset_is_shown_in_the_classes_it_is_trained_in(tiny_train):
    tiny_train("VIS_PERIOD", "1", "SOLVER.MAX_ITER", "1", "DATASETS.REMAP_TO", "tiny_a")


def test_without_tensorboard_it_trains_all_the_same(tiny_train, monkeypatch, caplog):
    class Missing:
        def __init__(self, _folder):
            raise ImportError("no module named tensorboard")

    monkeypatch.setattr("multiseg_d2.engine.trainer.TensorboardXWriter", Missing)
    assert metrics(tiny_train("SOLVER.MAX_ITER", "1"))
    assert any("tensorboard is not installed" in r.getMessage() for r in caplog.records)


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(start, tiny_train, tmp_path):
    run = start(*TEST, "TEST.EVAL_PERIOD", "4", fault="term_in_test")
    assert run.wait() == [EXIT_STOPPED], run.text()
    out = tmp_path / "out"
    assert [p.name for p in out.glob("*.pth")] == ["model_0000003.pth"]
    assert not (out / "inference" / "report.json").exists()
    tiny_train("--resume", *TEST)
    assert [step for step, _ in drawn(out)] == list(range(6)) and (out / "inference" / "report.json").exists()


def test_a_stop_after_the_last_step_leaves_the_evaluation_to_the_resumed_run(start, tiny_train, tmp_path):
    run = start(*TEST, fault="term@5")
    assert run.wait() == [EXIT_STOPPED], run.text()
    out = tmp_path / "out"
    assert (out / "model_final.pth").exists() and not (out / "inference" / "report.json").exists()
    tiny_train("--resume", *TEST)
    assert len(drawn(out)) == 6 and (out / "inference" / "report.json").exists()


def test_nothing_is_evaluated_after_a_failure(tiny_argv, tmp_path, monkeypatch):
    """Also not after one in the last step, where Detectron2's hook would."""
    monkeypatch.setenv("TINY_FAULT", "raise@5")
    with pytest.raises(ZeroDivisionError):
        tiny_run.run(tiny_argv(*TEST))
    assert not (tmp_path / "out" / "inference").exists()


class Teacher(HookBase):
    """A running mean of the weights, as self-training has."""

    def __init__(self):
        self.mean = None

    def after_step(self):
        weight = self.trainer.model.state_dict()["backbone.res4.0.weight"].clone()
        self.mean = weight if self.mean is None else 0.5 * self.mean + 0.5 * weight

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def test_a_hook_added_as_in_detectron2_has_its_state_saved(tiny_cfg):
    trainer = Trainer(tiny_cfg("SOLVER.CHECKPOINT_PERIOD", "3"))
    teacher = Teacher()
    trainer.register_hooks([teacher])
    trainer.resume_or_load(resume=False)
    trainer.train()
    again = Trainer(tiny_cfg())
    again.register_hooks([restored := Teacher()])
    again.resume_or_load(resume=True)
    assert again.start_iter == 6 and torch.equal(restored.mean, teacher.mean)  # the last step's is in it


def test_hooks_run_in_an_order_that_does_not_depend_on_when_they_were_added(tiny_cfg):
    class Late(HookBase):
        pass

    class Extended(Trainer):
        def build_hooks(self):
            return [*super().build_hooks(), Late()]

    trainer = Extended(tiny_cfg("TEST.BEST_METRIC", "mean/mIoU", "MODEL.EMA_DECAY", "0.9"))
    trainer.register_hooks([Teacher(), None])
    names = [type(hook).__name__ for hook in trainer._hooks]
    before = ["IterationTimer", "ProcessorTimeHook", "LearningRateHook", "EMAHook", "Late", "Teacher"]
    assert names == [
        *before,
        "CheckpointHook",
        "EvaluationHook",
        "BestWeightsHook",
        "PreviewHook",
        "PeriodicWriter",
        "StopHook",
    ]


def test_a_state_that_cannot_be_saved_is_refused_before_the_first_step(tiny_cfg):
    class Bad(Teacher):
        def state_dict(self):
            return {"mean": np.float64(3.0)}

    trainer = Trainer(tiny_cfg())
    trainer.register_hooks([Bad()])
    with pytest.raises(CheckpointError, match=r"hooks.*Bad.*mean.* is a numpy.float64"):
        trainer.train()
    assert trainer.iter == 0


def test_other_numbers_of_images_are_not_resumed(tiny_cfg, monkeypatch):
    trainer = Trainer(tiny_cfg("SOLVER.MAX_ITER", "1"))
    trainer.train()
    assert trainer.checkpointer.run["images"] == {"tiny_a_train": 5, "tiny_b_train": 5}
    pairs = DatasetCatalog.get("tiny_b_train")
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: pairs[:4] if name == "tiny_b_train" else pairs)
    again = Trainer(tiny_cfg("SOLVER.MAX_ITER", "2"))
    again.resume_or_load(resume=True)
    with pytest.raises(ResumeError, match="tiny_b_train: 5 in the checkpoint, 4 in this run"):
        again.train()


def test_it_is_detectron2s_trainer(tiny_cfg):
    trainer = Trainer(tiny_cfg())
    assert isinstance(trainer, DefaultTrainer) and trainer.data_loader is None  # built when training starts
    assert trainer.optimizer.param_groups and trainer.model.training
    assert trainer.max_iter == 6 and trainer.start_iter == 0


def test_the_first_weights_depend_on_the_seed_only(tiny_cfg):
    weights = []
    for seed in ("5", "5", "6"):
        torch.rand(int(seed))  # whatever was drawn before
        weights.append(Trainer(tiny_cfg("SEED", seed)).model.state_dict()["backbone.res4.0.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_flat_numbers():
    results = {"a_val": {"sem_seg": {"mIoU": 3, "IoU-x": math.nan, "name": "x", "on": True}}, "b_val": {}}
    assert dict(flat_numbers(results)) == {"a_val/sem_seg/mIoU": 3.0}


def test_a_head_may_look_at_data_once_before_the_first_step(tiny_cfg, monkeypatch):
    prepared = []

    def prepare(head, run_over):
        prepared.append((run_over("tiny_a_train", Counting()), head.training))

    monkeypatch.setattr(PerDatasetHead, "prepare", prepare)
    Trainer(tiny_cfg("SOLVER.MAX_ITER", "1")).train()
    assert prepared == [({"images": 5}, True)]
    again = Trainer(tiny_cfg("SOLVER.MAX_ITER", "2"))
    again.resume_or_load(resume=True)
    again.train()
    assert again.start_iter == 1 and len(prepared) == 1


class Counting(DatasetEvaluator):
    def reset(self):
        self.images = 0

    def process(self, inputs, outputs):
        self.images += len(inputs)

    def evaluate(self):
        return {"images": self.images}


def test_the_hook_of_the_documentation(tiny_cfg, capsys):
    """The example of docs/own_modules.md, as it stands there."""
    text = (tiny_run.ROOT / "docs" / "own_modules.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "HookBase" in block]
    names: dict = {}
    exec(code.replace("% 100 == 0", "% 3 == 0"), names)  # a tiny run has 6 steps
    names["train"](tiny_cfg())
    said = [line.split() for line in capsys.readouterr().out.splitlines() if re.fullmatch(r"\d+ 0\.\d+", line)]
    assert [int(step) for step, _ in said] == [3, 6] and float(said[0][1]) > float(said[1][1])
