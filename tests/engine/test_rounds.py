"""Training data that change in a run: rounds whose order counts from their first step, resumed exactly."""

from __future__ import annotations

import logging
import re
import signal
from collections import Counter

import pytest
import tiny_run
from detectron2.engine import HookBase
from run_state import assert_same, drawn, final_state

from multiseg_d2.engine import Trainer

ROUNDS = "3:tiny_b_train;8:tiny_a_train,tiny_b_train"
KEYS = ["SOLVER.MAX_ITER", "10", "SOLVER.CHECKPOINT_PERIOD", "1"]


@pytest.fixture
def rounds(monkeypatch):
    monkeypatch.setenv("TINY_ROUNDS", ROUNDS)


def trained(out) -> dict:
    """The final state but for the list of periodic checkpoints, which tells where a run was resumed."""
    state = final_state(out)
    state.pop("kept")
    return state


def test_a_round_sees_every_image_once_in_each_of_its_epochs(rounds, tiny_train):
    steps = drawn(tiny_train(*KEYS))
    files = {step: [file for file, _ in batch] for step, batch in steps}
    assert [len(files[step]) for step in range(10)] == [4, 4, 4, 2, 2, 2, 2, 2, 4, 4]
    second = [file for step in range(3, 8) for file in files[step]]
    assert len(set(second)) == 5 and all("tiny_b" in file for file in second)
    assert Counter(second[:5]) == Counter(second[5:]) == Counter(set(second))  # two whole epochs of five images
    seeds = [seed for _, batch in steps for _, seed in batch]
    assert len(set(seeds)) == len(seeds)  # no round repeats the random crops of another


@pytest.mark.parametrize(
    ("last", "period"), [(2, 3), (5, 3), (7, 8), (8, 3)], ids=["at the boundary", "inside", "at the second", "after it"]
)
def test_a_run_resumed_in_rounds_equals_an_unbroken_one(rounds, tiny_train, caplog, last, period):
    keys = [*KEYS[:-1], str(period)]
    whole, halves = tiny_train(*keys, out="whole"), tiny_train(*keys, out="halves")
    (halves / "model_final.pth").unlink()
    (halves / "last_checkpoint").write_text(f"model_{last:07d}.pth")
    with caplog.at_level(logging.INFO):
        tiny_train("--resume", *keys, out="halves")
    assert any("resumed from" in r.getMessage() for r in caplog.records)
    assert not [r.getMessage() for r in caplog.records if "config has changed" in r.getMessage()]
    assert [step for step, _ in drawn(halves)[10:]] == list(range(last + 1, 10))
    assert_same(trained(whole), trained(halves))


@pytest.mark.parametrize("step", [3, 5], ids=["at the boundary", "inside"])
def test_killed_in_rounds(rounds, start, tiny_train, tmp_path, step):
    killed = start(*KEYS, fault=f"kill@{step}")
    assert killed.wait() == [-signal.SIGKILL], killed.text()
    tiny_train("--resume", *KEYS)
    assert_same(trained(tiny_train(*KEYS, out="whole")), trained(tmp_path / "out"))


def test_two_processes_change_their_data_together(rounds, start, tiny_train, tmp_path):
    keys = [*KEYS, "SOLVER.IMS_PER_BATCH", "4"]
    run = start(*keys, fault="term@4@1", processes=2)
    assert run.wait() == [75, 75], run.text()
    again = start("--resume", *keys, processes=2)
    assert again.wait() == [0, 0], again.text()
    whole = start(*keys, processes=2, out="whole")
    assert whole.wait() == [0, 0], whole.text()
    assert_same(trained(tmp_path / "whole")["model"], trained(tmp_path / "out")["model"])


def test_the_same_data_again_change_nothing(tiny_cfg):
    trainer = Trainer(tiny_cfg())
    loader = trainer._trainer._next_batch(0) and trainer._trainer.data_loader
    trainer.use_training_data(trainer.cfg.DATASETS.TRAIN, 0)
    assert trainer._trainer.data_loader is loader
    trainer.use_training_data(["tiny_b_train"], 1)
    assert trainer._trainer.data_loader is None


def test_the_hook_of_the_docs_changes_the_data(tiny_cfg):
    text = (tiny_run.ROOT / "docs" / "runs.md").read_text()
    code = re.search(r"```python\n(class SecondRound.*?)```", text, re.DOTALL)[1]
    for old, new in (("1000", "2"), ('"camvid_train", "my_pseudo_labels"', '"tiny_b_train"')):
        assert old in code
        code = code.replace(old, new)
    names = {"HookBase": HookBase}
    exec(code, names)
    trainer = Trainer(tiny_cfg("SOLVER.MAX_ITER", "4"))
    trainer.register_hooks([names["SecondRound"]()])
    seen = []
    trainer.transforms.append(lambda samples: seen.append({s["dataset"] for s in samples}) or samples)
    trainer.train()
    assert seen == [{"tiny_a", "tiny_b"}, {"tiny_a", "tiny_b"}, {"tiny_b"}, {"tiny_b"}]
