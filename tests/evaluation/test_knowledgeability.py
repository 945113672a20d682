"""The number of known concepts against a count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from multiseg_d2.evaluation.knowledgeability import known_concepts


def test_by_hand():
    """Thresholds 1/4, 2/4, 3/4: 3, 2 and 1 classes reach them."""
    assert known_concepts(np.array([0.25, 0.6, 0.9, 0.0, np.nan]), thresholds=3) == 2.0


def test_ends():
    assert known_concepts(np.ones(7)) == 7
    assert known_concepts(np.zeros(7)) == 0
    assert known_concepts(np.array([])) == 0


def test_tends_to_the_sum_of_ious():
    iou = np.random.default_rng(0).random(50)
    assert known_concepts(iou, 5000) == pytest.approx(iou.sum(), abs=0.01)


def test_more_classes_at_equal_iou_are_more_knowledge():
    assert known_concepts(np.full(20, 0.5)) == 2 * known_concepts(np.full(10, 0.5))


def test_refuses_no_threshold():
    with pytest.raises(ValueError, match="threshold"):
        known_concepts(np.ones(2), 0)
