"""Online self-training: what is pasted where, whose label it bears, and how much the teacher's pixels weigh."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from multiseg_d2.engine.self_training import online
from multiseg_d2.engine.self_training.collapse import CollapseWatch
from multiseg_d2.engine.self_training.online import SURE, OnlineSelfTrainingHook, class_mix, quality


@pytest.mark.parametrize(("classes", "pasted"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_half_of_the_classes_are_laid_over_the_other_image(classes, pasted):
    label = (torch.arange(48) % (classes + 1)).view(6, 8).to(torch.uint8)
    label[label == classes] = 255  # never cut
    image, under = torch.full((3, 6, 8), 200), torch.full((3, 6, 8), 10)
    under_label = torch.full((6, 8), 7, dtype=torch.uint8)
    chosen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, labels, where = class_mix(image, label, under, under_label)
        cut = set(label[where].tolist())
        assert len(cut) == pasted and 255 not in cut
        for y in range(6):
            for x in range(8):
                inside = int(label[y, x]) in cut
                assert bool(where[y, x]) == inside
                assert labels[y, x] == (label[y, x] if inside else 7)
                assert mixed[:, y, x].tolist() == [200 if inside else 10] * 3
        chosen |= cut
    assert chosen == set(range(classes))  # which ones is drawn


def test_images_of_two_sizes_are_refused():
    label = torch.zeros(4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(4, 5\) pixels .*INPUT.CROP"):
        class_mix(torch.zeros(3, 4, 4), label, torch.zeros(3, 4, 5), torch.zeros(4, 5, dtype=torch.uint8))


def test_the_teachers_pixels_weigh_as_much_as_it_is_sure_of_real_ones(monkeypatch):
    """A row of three target pixels of four is real, of which one is sure; the source has one class, which is pasted."""
    confidence = torch.tensor([[SURE + 0.01, SURE, 0.5, 1.0]])
    real = torch.tensor([[True, True, True, False]])
    assert float(quality(confidence, real)) == pytest.approx(1 / 3)
    hook = OnlineSelfTrainingHook.__new__(OnlineSelfTrainingHook)
    hook.source, hook.target, hook.trainer = ("s",), ("t",), SimpleNamespace()
    hook.watch = CollapseWatch()
    taught = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    monkeypatch.setattr(online, "teach", lambda _trainer, samples: [(taught, confidence)] * len(samples))
    image = torch.arange(12, dtype=torch.uint8).view(3, 1, 4)
    source = {"entry": "s", "image": image + 100, "sem_seg": torch.tensor([[9, 255, 255, 9]], dtype=torch.uint8)}
    target = {"entry": "t", "dataset": "target", "image": image, "content": real}
    first, mixed = hook.mix([source, target])
    assert first is source
    assert mixed["sem_seg"].tolist() == [[9, 2, 3, 9]]
    torch.testing.assert_close(mixed["confidence"], torch.tensor([[1.0, 1 / 3, 1 / 3, 1.0]]))
    assert mixed["content"].all() and mixed["pseudo"] and mixed["annotation"] == "pixel"
    assert mixed["image"][0].tolist() == [[100, 1, 2, 103]]
    assert hook.mix([source]) == [source] and hook.mix([target]) == [target]
