"""Weak-to-strong consistency: the strong view, the weights of the two means, and whole runs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from run_state import assert_same, final_state

from multiseg_d2.data.schedule import Draw
from multiseg_d2.engine import Trainer
from multiseg_d2.engine.self_training.collapse import CollapseWatch
from multiseg_d2.engine.self_training.consistency import SURE, ConsistencyHook, strong_view, weighted
from multiseg_d2.engine.self_training.teacher import teach
from multiseg_d2.engine.step import _by_entry
from multiseg_d2.modeling.losses import cross_entropy

TARGETS = ("tiny_a_train/unlabelled", "tiny_b_train/unlabelled")
KEYS = [
    *("DATASETS.TRAIN", str(("tiny_a_train[:2]", "tiny_b_train[:2]", *TARGETS)), "MODEL.DATASET_NORM.ENABLED", "False"),
    *("SELF_TRAINING.ROUNDS", "1", "SELF_TRAINING.POLICY", "consistency", "MODEL.EMA_DECAY", "0.5"),
    *("SOLVER.STEP_MODE", "per_entry", "SOLVER.MAX_ITER", "4"),
]


def test_the_strong_view_changes_colours_and_cuts_one_hole_in_place():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 40, 60), np.uint8))
    seen = [strong_view(image, np.random.default_rng(seed), "RGB") for seed in range(20)]
    assert all(view.dtype == torch.uint8 and view.shape == image.shape for view in seen)
    assert torch.equal(seen[3], strong_view(image, np.random.default_rng(3), "RGB"))
    assert not torch.equal(seen[3], seen[4])
    for view in seen:
        flat = view.flatten(1).T
        colours, counts = torch.unique(flat, dim=0, return_counts=True)
        hole = (view == colours[counts.argmax()].view(3, 1, 1)).all(0)
        rows, columns = hole.any(1).nonzero()[:, 0], hole.any(0).nonzero()[:, 0]
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float().mean() > 0.99
        assert 0.2 * 0.2 * 0.8 < hole.float().mean() < 0.5 * 0.5 * 1.1


def test_weights_turn_one_mean_into_two():
    """CE of the pooled count with the weights = mean over drawn labels + sum over taught ones / their real pixels."""
    rng = torch.Generator().manual_seed(0)
    content = torch.ones(6, 8, dtype=torch.bool)
    content[:, 6:] = False

    def sample(pseudo, ignored, **more):
        labels = torch.randint(0, 3, (6, 8), generator=rng, dtype=torch.uint8)
        labels[:ignored] = 255
        image = torch.zeros(3, 6, 8)
        return {"dataset": "x", "image": image, "sem_seg": labels, **({"pseudo": True} if pseudo else {}), **more}

    samples = [sample(False, 2), sample(False, 0), sample(True, 3, content=content), sample(True, 6)]
    samples.append({**sample(True, 1), "dataset": "y"})
    found = weighted(samples)
    logits = torch.randn(4, 3, 6, 8, generator=rng)
    target = torch.stack([s["sem_seg"] for s in samples[:4]])
    pooled = cross_entropy(logits, target, weights=torch.stack([s["confidence"] for s in found[:4]]))
    plain = torch.nn.functional.cross_entropy(logits, target.long(), ignore_index=255, reduction="none")
    real = 6 * 6 + 6 * 8
    expected = plain[:2].sum() / (target[:2] != 255).sum() + plain[2:].sum() / real
    assert pooled.item() == pytest.approx(expected.item(), rel=1e-5)
    only_drawn = weighted(samples[:2])
    assert all("confidence" not in s for s in only_drawn)


def test_only_what_the_teacher_is_sure_of_is_labelled(monkeypatch):
    hook = ConsistencyHook.__new__(ConsistencyHook)
    hook.cfg, hook.target = SimpleNamespace(INPUT=SimpleNamespace(FORMAT="RGB")), ("t",)
    hook.watch, hook.weighs_pixels = CollapseWatch(), True
    labels, confidence = torch.arange(6, dtype=torch.uint8).view(2, 3), torch.tensor([[0.96, 0.9, 1.0], [SURE, 0.2, 1]])
    hook.trainer = None
    monkeypatch.setattr("multiseg_d2.engine.self_training.consistency.teach", lambda _t, s: [(labels, confidence)])
    content = torch.tensor([[True, True, False], [True, True, True]])
    bare = {"entry": "t", "dataset": "x", "image": torch.zeros(3, 2, 3, dtype=torch.uint8), "content": content}
    labelled = {**bare, "entry": "s", "sem_seg": labels}
    first, second = hook.disturb([labelled, bare])
    assert second["sem_seg"].tolist() == [[0, 255, 255], [3, 255, 5]]
    assert torch.equal(first["image"], labelled["image"]) and second["pseudo"] and "pseudo" not in first
    assert "confidence" in first and "confidence" in second
    hook.weighs_pixels = False  # nothing that the head would have to ignore
    assert not any("confidence" in sample for sample in hook.disturb([labelled, bare]))


@pytest.mark.parametrize(
    ("head", "loss", "mode"),
    [
        ("UnifiedHead", "null_bce", "per_entry"),
        ("UnifiedHead", "cross_entropy", "per_entry"),
        ("HierarchicalHead", "", "fused"),
    ],
)
def test_any_head_learns_from_what_the_teacher_is_sure_of(tiny_cfg, monkeypatch, head, loss, mode):
    """Softmax with weights; binary losses and a hierarchy without."""
    keys = ["MODEL.SEM_SEG_HEAD.NAME", head, "MODEL.SEM_SEG_HEAD.LOSS_TYPE", loss, "SOLVER.STEP_MODE", mode]
    monkeypatch.setattr("multiseg_d2.engine.self_training.consistency.SURE", 0.0)
    trainer = Trainer(tiny_cfg(*KEYS, *keys, "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", "0"))
    trainer.resume_or_load(resume=False)
    trainer.before_train()
    with EventStorage(0) as trainer.storage:
        trainer.iter = 0
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.run_step()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if "sem_seg_head" in name} <= changed
    losses = {name: float(value.latest()) for name, value in trainer.storage.histories().items() if "loss" in name}
    assert losses["total_loss"] > 0 and all(np.isfinite(value) for value in losses.values()), losses


def test_a_stopped_run_resumes_to_the_same(start, tiny_train):
    whole = tiny_train(*KEYS, out="whole")
    assert start(*KEYS, out="broken", fault="term@2").wait() == [75]
    broken = tiny_train("--resume", *KEYS, out="broken")
    assert_same(final_state(broken)["model"], final_state(whole)["model"])
    last = json.loads((whole / "metrics.json").read_text().splitlines()[-1])
    assert {"loss_tiny_a", "loss_tiny_b"} <= set(last)


def test_without_a_teacher_it_is_refused(tiny_cfg):
    with pytest.raises(ValueError, match="'consistency' needs a teacher"):
        tiny_cfg(*KEYS, "MODEL.EMA_DECAY", "0.0")


def test_the_teacher_has_the_averaged_weights(tiny_cfg, tiny_root):
    cfg = tiny_cfg(*KEYS)
    trainer = Trainer(cfg)
    sample = {"image": torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8), "dataset": "tiny_a", "entry": TARGETS[0]}
    ((labels, before),) = teach(trainer, [sample])
    assert labels.shape == before.shape == (32, 40) and labels.max() < 3 and before.min() >= 1 / 3
    trainer.ema.mean = {name: tensor.clone() for name, tensor in trainer.ema._weights().items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    ((_, after),) = teach(trainer, [sample])
    torch.testing.assert_close(after, before)
    assert trainer.model.training and not any(p.any() for p in trainer.model.parameters())


def test_taught_images_go_through_in_chunks_that_add_up():
    """Their losses are sums over a count of the whole step, so no chunk is weighted by its share."""
    label = torch.zeros(2, 2, dtype=torch.uint8)
    samples = [
        {"dataset": "x", "draw": Draw(entry, i, i), "sem_seg": label, "annotation": "pixel", "pseudo": entry == 1}
        for entry, number in ((0, 3), (1, 5))
        for i in range(number)
    ]
    assert [(len(p.samples), p.share) for p in _by_entry(samples, 2)] == [(3, 1.0), (2, 1.0), (2, 1.0), (1, 1.0)]
