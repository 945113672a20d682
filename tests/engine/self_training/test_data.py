"""Which images a round takes."""

from __future__ import annotations

import pytest

from multiseg_d2.engine.self_training.data import most_confident


@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.25, 1), (0.26, 2), (0.5, 2), (1.0, 4)])
def test_the_most_confident_images_by_sorting(share, number):
    confidence = {"d": 0.9, "a": 0.2, "c": 0.7, "b": 0.7}
    best = ("d", "b", "c", "a")  # of equal ones the first id
    assert most_confident(confidence, share) == tuple(sorted(best[:number]))
