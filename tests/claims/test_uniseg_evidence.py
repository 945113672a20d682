"""What UniSeg's losses claim, measured on the toy datasets through the claims harness (long: an hour of one core)."""

from __future__ import annotations

import pytest

CE, NULL, NIGHT = "CE over the union", "Null BCE", "night (unseen)"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_null_bce_beats_cross_entropy_on_the_unseen_look(measure_on_toys):
    """Mean of 3 seeds, the same number of steps, shared norms, mixed batches."""
    table = measure_on_toys("uniseg_toy", (CE, NULL))
    softmax, null = table.cells[CE, NIGHT], table.cells[NULL, NIGHT]
    assert len(softmax.values) == len(null.values) == 3
    assert null.mean > softmax.mean, (null.text(), softmax.text())
