"""Crops around rare classes: which classes, which pixels, how often."""

from __future__ import annotations

import numpy as np
import pytest

from multiseg_d2.engine.self_training.mining import MiningRule, RareCrops


def test_classes_below_the_share_are_rare():
    predicted = np.array([900, 98, 1, 1])
    assert MiningRule(0.8, 0.01, 3).crops(predicted) == RareCrops((2, 3), 0.8)


def test_the_least_predicted_ones_where_none_is_below():
    predicted = np.array([500, 100, 300, 100])
    assert MiningRule(0.8, 0.001, 3).crops(predicted) == RareCrops((1, 3, 2), 0.8)
    assert MiningRule(0.8, 0.001, 0).crops(predicted) is None
    assert MiningRule(0.0, 0.5, 3).crops(predicted) is None


def test_centres_are_pixels_of_rare_classes_uniform_over_classes():
    label = np.zeros((20, 30), np.uint8)
    label[3:5, 4:8], label[10, 20] = 2, 3
    rng, crops = np.random.default_rng(0), RareCrops((2, 3, 7), 0.75)
    found = [crops(label, {}, rng) for _ in range(2000)]
    centres = [(int(y), int(x)) for y, x in filter(None, found)]
    assert len(centres) == pytest.approx(1500, abs=80)
    assert {int(label[c]) for c in centres} == {2, 3}
    assert sum(c == (10, 20) for c in centres) == pytest.approx(len(centres) / 2, abs=80)
    assert len(set(centres)) == 9


def test_an_image_without_them_is_cropped_at_random():
    assert RareCrops((2,), 1.0)(np.full((4, 4), 255, np.uint8), {}, np.random.default_rng(0)) is None


@pytest.mark.parametrize("values", [(0.8, 0.1), (1.2, 0.1, 3), (0.5, -1, 3), (0.5, 0.1, 1.5), (0.5, 0.1, -1)])
def test_what_cannot_be_meant(values):
    with pytest.raises(ValueError, match=r"SELF_TRAINING.MINING"):
        MiningRule.of("SELF_TRAINING.MINING", values)
