"""When labels have collapsed, and how long a teacher may go on giving such labels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from multiseg_d2.engine.self_training import collapse
from multiseg_d2.engine.self_training.collapse import PATIENCE, WINDOW, CollapseError, CollapseWatch, has_collapsed

CLASSES = ("road", "car", "sky")
ROAD = torch.zeros(4, 25, dtype=torch.uint8)
NOTHING = torch.full((4, 25), 255, dtype=torch.uint8)
MIXED = (torch.arange(100) % 3).view(4, 25).to(torch.uint8)


@pytest.mark.parametrize(
    ("kept", "collapsed"),
    [([0, 0, 0], True), ([99, 1, 0], False), ([991, 9, 0], True), ([0, 7, 0], True), ([5], False), ([0], True)],
)
def test_the_rule(kept, collapsed):
    assert has_collapsed(np.array(kept)) is collapsed


@pytest.fixture
def watch():
    made, head = CollapseWatch(), SimpleNamespace(own_space=lambda dataset: SimpleNamespace(classes=CLASSES))
    made.trainer = SimpleNamespace(model=SimpleNamespace(sem_seg_head=head), iter=-1)
    return made


def windows(watch: CollapseWatch, number: int, **labels: torch.Tensor) -> None:
    """The teacher labels an image of each dataset in each step."""
    for _ in range(number * WINDOW):
        watch.trainer.iter += 1
        for dataset, label in labels.items():
            watch.see(dataset, label)
        watch.after_step()


@pytest.mark.parametrize("labels", [ROAD, NOTHING])
def test_a_collapsed_teacher_is_warned_of_and_then_stopped(watch, labels, caplog):
    windows(watch, PATIENCE - 1, bad=labels, good=MIXED)
    assert len(caplog.messages) == PATIENCE - 1
    pixels = {"road": 100 * WINDOW if labels is ROAD else 0, "car": 0, "sky": 0}
    assert f"labels of bad have collapsed: in the last {WINDOW} of {WINDOW} steps" in caplog.messages[0]
    assert f"count: {pixels} (1 of {PATIENCE} times" in caplog.messages[0]
    with pytest.raises(CollapseError, match=f"labels of bad have .* so it was {PATIENCE} times in succession"):
        windows(watch, 1, bad=labels, good=MIXED)
    assert watch.trainer.iter + 1 == PATIENCE * WINDOW


def test_a_window_with_several_classes_begins_the_count_anew(watch, caplog):
    windows(watch, PATIENCE - 1, x=ROAD)
    windows(watch, 1, x=MIXED)
    windows(watch, 1)  # no image of it: nothing is known
    windows(watch, PATIENCE - 1, x=ROAD)
    assert len(caplog.messages) == 2 * (PATIENCE - 1)
    with pytest.raises(CollapseError):
        windows(watch, 1, x=ROAD)


def test_pixels_count_by_their_weight(watch, caplog):
    watch.trainer.iter = WINDOW - 1
    watch.see("x", MIXED, 0.0)
    watch.see("x", ROAD, 0.5)
    watch.after_step()
    assert "{'road': 50, 'car': 0, 'sky': 0}" in caplog.messages[0]


def test_a_resumed_run_goes_on_counting(watch):
    windows(watch, PATIENCE - 1, x=ROAD)
    resumed = CollapseWatch()
    resumed.load_state_dict(watch.state_dict())
    resumed.trainer = watch.trainer
    with pytest.raises(CollapseError):
        windows(resumed, 1, x=ROAD)


def test_processes_are_judged_as_one(watch, caplog, monkeypatch):
    """This one has seen one class, the other one another class or, of a second dataset, nothing."""
    other = {"x": np.bincount([1], minlength=256) * 1000.0}
    monkeypatch.setattr(collapse.comm, "all_gather", lambda own: [own, other])
    windows(watch, 1, x=ROAD, y=ROAD)
    assert ["of y have collapsed" in message for message in caplog.messages] == [True]
