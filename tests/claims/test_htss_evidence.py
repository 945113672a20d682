"""The claim behind weak labels, on the toy datasets through the claims harness (long: half an hour of a core)."""

from __future__ import annotations

import pytest

PIXELS, FEWER, BOXES = "Hierarchy, pixels", "Hierarchy, pixels, 6 images", "Hierarchy, pixels + boxes"
SEEN, KNOWN = "seen mIoU", "known concepts"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_boxes_of_unlabelled_classes_raise_knowledgeability_and_cost_nothing(measure_on_toys):
    """Mean of 3 seeds, the same number of steps.

    With boxes a model knows more of the drawn concepts, beyond the spread of the seeds, than with as many images that
    all have pixel labels. On the sets with pixel labels it loses no more than that spread against a model that sees
    only their images, as many of them in a step. (Against the model that has more pixel labels it does lose there.)
    """
    table = measure_on_toys("htss_toy", (PIXELS, FEWER, BOXES))
    cells = {(row, column): table.cells[row, column] for row in (PIXELS, FEWER, BOXES) for column in (SEEN, KNOWN)}
    assert all(len(cell.values) == 3 for cell in cells.values())
    said = {place: cell.text() for place, cell in cells.items()}
    for row in (PIXELS, FEWER):
        spread = max(cells[row, KNOWN].std, cells[BOXES, KNOWN].std)
        assert cells[BOXES, KNOWN].mean > cells[row, KNOWN].mean + spread, said
    spread = max(cells[FEWER, SEEN].std, cells[BOXES, SEEN].std)
    assert cells[BOXES, SEEN].mean > cells[FEWER, SEEN].mean - spread, said
