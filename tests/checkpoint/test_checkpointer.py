"""Which checkpoint is trusted, which are kept, and what must agree before a run goes on."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from multiseg_d2.checkpoint.checkpointer import AtomicCheckpointer
from multiseg_d2.checkpoint.file import CheckpointError, UnsafeCheckpointError, read_checkpoint
from multiseg_d2.checkpoint.resume import ResumeError, differences


class Counter:
    """A checkpointable."""

    def __init__(self, value=0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def checkpointer(folder, run=None, model=None, keep=3) -> AtomicCheckpointer:
    model = model or nn.Linear(3, 2)
    return AtomicCheckpointer(model, str(folder), run=run or {"seed": 1}, keep=keep, counter=Counter())


def save_steps(folder, *steps, **options) -> AtomicCheckpointer:
    saver = checkpointer(folder, **options)
    for step in steps:
        saver.checkpointables["counter"].value = step
        with torch.no_grad():
            saver.model.weight.fill_(step)
        saver.save(f"model_{step:07d}", iteration=step)
        os.utime(folder / f"model_{step:07d}.pth", ns=(step * 10**9, step * 10**9))
    return saver


def resumed_step(folder, **options) -> int:
    loader = checkpointer(folder, **options)
    extra = loader.resume_or_load("", resume=True)
    step = loader.checkpointables["counter"].value
    assert loader.model.weight.eq(step).all() and extra["iteration"] == step
    return step


def test_the_last_one_is_resumed(tmp_path):
    save_steps(tmp_path, 1, 2)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"  # where Detectron2 looks, too
    assert resumed_step(tmp_path) == 2


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def flip(path):
    content = bytearray(path.read_bytes())
    position = content.index(torch.full((2, 3), 3.0).numpy().tobytes())
    content[position] ^= 1
    path.write_bytes(content)


def flip_in_the_directory(path):
    """Where the archive says how large a part is: read all the same, with whatever lies behind it."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 24] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, flip, flip_in_the_directory, empty])
def test_a_broken_newest_one_is_named_and_the_one_before_it_used(tmp_path, harm, caplog):
    save_steps(tmp_path, 1, 2, 3)
    harm(tmp_path / "model_0000003.pth")
    assert resumed_step(tmp_path) == 2
    assert any("model_0000003.pth is broken" in r.getMessage() and r.levelname == "ERROR" for r in caplog.records)


def test_all_broken_is_an_error_that_names_them(tmp_path):
    save_steps(tmp_path, 1, 2)
    for path in tmp_path.glob("*.pth"):
        cut(path)
    with pytest.raises(CheckpointError, match=r"(?s)model_0000002\.pth is broken.*model_0000001\.pth is broken"):
        resumed_step(tmp_path)


@pytest.mark.parametrize(
    "tag", [None, b"", b"model_0000009.pth", b"\xff\xfe\x80", b"\0" * 40, "mödel".encode("latin1")]
)
def test_a_lost_or_wrong_tag_does_not_lose_the_run(tmp_path, tag):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resumed_step(tmp_path) == 2


def test_a_newest_one_with_code_is_refused_not_skipped(tmp_path):
    save_steps(tmp_path, 1)
    torch.save({"model": {}, "x": print}, tmp_path / "model_0000002.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    with pytest.raises(CheckpointError, match="model_0000002.pth is refused, loading it could run code"):
        resumed_step(tmp_path)
    with pytest.raises(UnsafeCheckpointError):
        read_checkpoint(tmp_path / "model_0000002.pth")


def test_only_the_last_few_are_kept_and_nothing_of_others(tmp_path):
    save_steps(tmp_path, 1, 2)  # an earlier run
    (tmp_path / ".model_0000003.pth.77.tmp").write_bytes(b"half")  # of a killed process
    (tmp_path / "mine.pth").write_bytes(b"x")
    save_steps(tmp_path, 5, 6, 7, keep=2)
    left = ["last_checkpoint", "mine.pth", *(f"model_000000{i}.pth" for i in (1, 2, 6, 7))]
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    again = checkpointer(tmp_path, keep=2)
    again.resume_or_load("", resume=True)
    again.save("model_0000008", iteration=8)
    again.save("model_final", iteration=9)
    left = [*(f"model_000000{i}.pth" for i in (1, 2, 7, 8)), "model_final.pth"]
    assert sorted(p.name for p in tmp_path.glob("model*")) == left


RUN = {
    "DATASETS.TRAIN": ["a_train", "b_train"],
    "classes": {"a": ["sky", "road"], "b": ["x", "y", "z"]},
    "schedule": {"DATALOADER.SCHEDULE": "alternation", "DATALOADER.WEIGHTS": []},
    "processes": 1,
    "seed": 5,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"DATASETS.TRAIN": ["a_train", "b_train", "c_train"]}, "DATASETS.TRAIN: this run has 'c_train' in addition"),
        ({"DATASETS.TRAIN": ["a_train"]}, "DATASETS.TRAIN: the checkpoint has 'b_train' in addition"),
        ({"DATASETS.TRAIN": ["b_train", "a_train"]}, r"DATASETS.TRAIN: other order: \['a_train', 'b_train'\] in"),
        ({"classes": {**RUN["classes"], "a": ["sky", "lane"]}}, "classes.a: the checkpoint has 'road' .* 'lane'"),
        ({"classes": {"a": ["sky", "road"]}}, r"classes.b: \['x', 'y', 'z'\] in the checkpoint, nothing in this run"),
        ({"schedule": {**RUN["schedule"], "DATALOADER.SCHEDULE": "size"}}, "'alternation' in .*, 'size' in"),
        ({"processes": 4}, "processes: 1 in the checkpoint, 4 in this run"),
        ({"seed": 6}, "seed: 5 in the checkpoint, 6 in this run"),
    ],
)
def test_another_run_is_refused_with_the_exact_difference(tmp_path, change, message):
    save_steps(tmp_path, 1, run=RUN)
    with pytest.raises(ResumeError, match=message):
        resumed_step(tmp_path, run={**RUN, **change})
    assert resumed_step(tmp_path, run=RUN) == 1


def test_a_fact_that_is_left_open_is_taken_over(tmp_path):
    save_steps(tmp_path, 1, run=RUN)
    loader = checkpointer(tmp_path, run={**RUN, "seed": None})
    loader.resume_or_load("", resume=True)
    assert loader.run["seed"] == 5


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 26), r"weight is \(2, 3\) in the checkpoint, \(26, 3\) in the model"),
        (nn.Linear(3, 2, bias=False), "the model has no bias"),
        (nn.Sequential(nn.Linear(3, 2)), "the checkpoint lacks 0.weight"),
    ],
)
def test_another_model_is_refused(tmp_path, model, message):
    save_steps(tmp_path, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ResumeError, match=message):
        checkpointer(tmp_path, model=model).resume_or_load("", resume=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_weights_alone_cannot_be_resumed(tmp_path):
    torch.save({"model": nn.Linear(3, 2).state_dict()}, tmp_path / "model_final.pth")
    with pytest.raises(ResumeError, match="holds weights only"):
        resumed_step(tmp_path)


def test_a_failed_save_stops_and_keeps_the_old_one(tmp_path, monkeypatch):
    saver = save_steps(tmp_path, 1)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.save("model_0000002", iteration=2)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert resumed_step(tmp_path) == 1


def test_differences_of_equal_values_are_none():
    assert differences(RUN, {**RUN, "classes": {"a": ("sky", "road"), "b": ["x", "y", "z"]}}) == []
    assert differences({"a": 1}, {"a": 1}) == []
