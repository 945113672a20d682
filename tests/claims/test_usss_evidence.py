"""What USSS claims of unlabelled images, on the toy datasets through the claims harness (long: an hour of a core)."""

from __future__ import annotations

import pytest

BASIC, FULL = "Univ-basic, trained on", "Univ-full"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_both_entropies_beat_labelled_images_alone(measure_on_toys):
    """Mean over both sets and 3 seeds, from the same first phase and with the same number of further steps.

    8 images of each set are labelled; Univ-full also sees the 48 of each without labels.
    """
    table = measure_on_toys("usss_toy", (BASIC, FULL))
    basic, full = ([table.cells[row, column] for column in ("day", "dusk")] for row in (BASIC, FULL))
    assert all(len(cell.values) == 3 for cell in (*basic, *full))
    mean_basic, mean_full = (sum(cell.mean for cell in cells) / 2 for cells in (basic, full))
    assert mean_full > mean_basic, {row: [c.text() for c in cells] for row, cells in ((BASIC, basic), (FULL, full))}
