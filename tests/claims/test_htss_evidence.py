"""The claim behind weak labels, on the toy datasets through the claims harness (long: half an hour of a core)."""

from __future__ import annotations

import pytest

PIXELS, BOXES = "Hierarchy, pixels", "Hierarchy, pixels + boxes"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_boxes_of_unlabelled_classes_raise_knowledgeability_and_cost_nothing(measure_on_toys):
    """Mean of 3 seeds, the same number of steps and images.

    With boxes a model knows more of the drawn concepts than with pixel labels alone, beyond the spread of the seeds; on
    the sets with pixel labels it loses no more than that spread.
    """
    table = measure_on_toys("htss_toy", (PIXELS, BOXES))
    strong, weak = (
        {column: table.cells[row, column] for column in ("seen mIoU", "known concepts")} for row in (PIXELS, BOXES)
    )
    assert all(len(cell.values) == 3 for side in (strong, weak) for cell in side.values())
    known = strong["known concepts"], weak["known concepts"]
    assert known[1].mean > known[0].mean + max(cell.std for cell in known), [cell.text() for cell in known]
    seen = strong["seen mIoU"], weak["seen mIoU"]
    assert seen[1].mean > seen[0].mean - max(cell.std for cell in seen), [cell.text() for cell in seen]
