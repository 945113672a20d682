"""The claim behind CDCL, measured on the toy datasets through the claims harness (long: an hour of one core)."""

from __future__ import annotations

from pathlib import Path

import pytest

from multiseg_d2.claims import SubprocessRunner, load_claim, plan, run_claim
from multiseg_d2.toy import write_toy

ROOT = Path(__file__).resolve().parents[2]
ROWS = ("Shared BN + DAT", "CDCL (DSBN + DAT)")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_norms_per_dataset_beat_a_shared_norm_on_every_dataset(tmp_path, monkeypatch):
    """DSBN + DAT against shared BN + DAT, mean of 3 seeds, scored on each of the three sets in its own classes."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_toy(str(tmp_path))
    claim = load_claim(ROOT / "benchmarks" / "claims" / "toy_cdcl.yaml")
    jobs = plan(claim, tmp_path / "runs", seeds=[0, 1, 2], only=ROWS)
    table = run_claim(claim, jobs, SubprocessRunner(ROOT / "train_net.py", []), lambda table: None)
    assert not table.failures
    for column in (c.label for c in claim.columns):
        shared, cdcl = (table.cells[row, column] for row in ROWS)
        assert len(cdcl.values) == len(shared.values) == 3
        assert cdcl.mean > shared.mean, (column, cdcl.text(), shared.text())
