"""The claim behind weak labels, on the toy datasets through the claims harness (long: half an hour of a core)."""

from __future__ import annotations

from pathlib import Path

import pytest

from multiseg_d2.claims import SubprocessRunner, load_claim, plan, run_claim
from multiseg_d2.toy import write_toy

ROOT = Path(__file__).resolve().parents[2]
PIXELS, BOXES = "Hierarchy, pixels", "Hierarchy, pixels + boxes"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_boxes_of_unlabelled_classes_raise_knowledgeability_and_cost_nothing(tmp_path, monkeypatch):
    """Mean of 3 seeds, the same number of steps and images.

    With boxes a model knows more of the drawn concepts than with pixel labels alone, beyond the spread of the seeds; on
    the sets with pixel labels it loses no more than that spread.
    """
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_toy(str(tmp_path))
    claim = load_claim(ROOT / "benchmarks" / "claims" / "htss_toy.yaml")
    jobs = plan(claim, tmp_path / "runs", seeds=[0, 1, 2], only=(PIXELS, BOXES))
    table = run_claim(claim, jobs, SubprocessRunner(ROOT / "train_net.py", []), lambda table: None)
    assert not table.failures
    strong, weak = (
        {column: table.cells[row, column] for column in ("seen mIoU", "known concepts")} for row in (PIXELS, BOXES)
    )
    assert all(len(cell.values) == 3 for side in (strong, weak) for cell in side.values())
    known = strong["known concepts"], weak["known concepts"]
    assert known[1].mean > known[0].mean + max(cell.std for cell in known), [cell.text() for cell in known]
    seen = strong["seen mIoU"], weak["seen mIoU"]
    assert seen[1].mean > seen[0].mean - max(cell.std for cell in seen), [cell.text() for cell in seen]
