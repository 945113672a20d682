"""The best weights by a metric of the evaluations."""

from __future__ import annotations

import json

import pytest
from run_state import assert_same

from multiseg_d2.checkpoint.file import read_checkpoint
from multiseg_d2.engine import Trainer

KEYS = ["DATASETS.TEST", "('tiny_a_val',)", "TEST.EVAL_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "1"]
METRIC = "tiny_a_val/sem_seg/mIoU"


@pytest.fixture
def scored(monkeypatch):
    """Lets the evaluations give these scores, one after another."""

    def score(*values):
        left = list(values)
        monkeypatch.setattr(Trainer, "test", classmethod(lambda *_: {"tiny_a_val": {"sem_seg": {"mIoU": left.pop(0)}}}))

    return score


def best(out) -> dict:
    return json.loads((out / "weights" / "best.json").read_text())


def test_the_weights_of_the_highest_value_are_kept(tiny_train, scored):
    scored(1.0, 2.0, 7.0, 7.0, 3.0, 4.0)
    out = tiny_train(*KEYS, "TEST.BEST_METRIC", METRIC, "SOLVER.CHECKPOINT_PERIOD", "3")
    assert best(out) == {"metric": METRIC, "value": 7.0, "iteration": 2}
    kept = read_checkpoint(out / "weights" / "best.pth")
    assert_same(kept["model"], read_checkpoint(out / "model_0000002.pth")["model"])
    assert "trainer" not in kept and (out / "last_checkpoint").read_text() == "model_final.pth"


def test_the_last_evaluation_counts(tiny_train, scored):
    scored(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    out = tiny_train(*KEYS, "TEST.BEST_METRIC", METRIC)
    assert best(out)["value"] == 6.0
    assert_same(*(read_checkpoint(out / name)["model"] for name in ("weights/best.pth", "model_final.pth")))


def test_a_resumed_run_knows_what_was_best(tiny_train, scored):
    scored(1.0, 8.0, 2.0)
    tiny_train(*KEYS, "TEST.BEST_METRIC", METRIC, "SOLVER.MAX_ITER", "3")
    scored(5.0, 6.0, 7.0)
    out = tiny_train("--resume", *KEYS, "TEST.BEST_METRIC", METRIC)
    assert best(out)["value"] == 8.0


def test_a_metric_that_there_is_not_is_told_with_the_one_that_was_meant(tiny_train, scored, caplog):
    scored(*range(6))
    out = tiny_train(*KEYS, "TEST.BEST_METRIC", "tiny_a_val/sem_seg/miou")
    assert not (out / "weights").exists()
    assert any("TEST.BEST_METRIC: there is no" in r.getMessage() and METRIC in r.getMessage() for r in caplog.records)


def test_two_processes_keep_the_same(start, tmp_path):
    keys = [*KEYS, "TEST.BEST_METRIC", METRIC, "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "4"]
    run = start(*keys, processes=2)
    assert run.wait() == [0, 0], run.text()
    assert best(tmp_path / "out")["metric"] == METRIC
