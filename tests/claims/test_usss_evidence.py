"""What USSS claims of unlabelled images, on the toy datasets through the claims harness (long: an hour of a core)."""

from __future__ import annotations

import pytest

BASIC, FULL, MILD = "Univ-basic, trained on", "Univ-full", "Univ-full, weights 0.1"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_mild_entropies_beat_labelled_images_alone_on_average(measure_on_toys):
    """Mean over both sets and 3 seeds, from the same first phase and with the same number of further steps.

    8 images of each set are labelled; Univ-full also sees the 48 of each without labels. With the released weights of 1
    it loses here, which contradicts the paper; with 0.1 it wins by little, at dusk.
    """
    table = measure_on_toys("usss_toy_long", (BASIC, FULL, MILD))
    cells = {row: [table.cells[row, column] for column in ("day", "dusk")] for row in (BASIC, FULL, MILD)}
    assert all(len(cell.values) == 3 for row in cells.values() for cell in row)
    means = {row: sum(cell.mean for cell in both) / 2 for row, both in cells.items()}
    assert means[MILD] > means[BASIC], means
    assert means[MILD] > means[FULL], means
