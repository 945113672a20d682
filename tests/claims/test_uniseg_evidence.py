"""What UniSeg's losses claim, measured on the toy datasets through the claims harness (long: an hour of one core)."""

from __future__ import annotations

from pathlib import Path

import pytest

from multiseg_d2.claims import SubprocessRunner, load_claim, plan, run_claim
from multiseg_d2.toy import write_toy

ROOT = Path(__file__).resolve().parents[2]
CE, NULL, NIGHT = "CE over the union", "Null BCE", "night (unseen)"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_null_bce_beats_cross_entropy_on_the_unseen_look(tmp_path, monkeypatch):
    """Mean of 3 seeds, the same number of steps, shared norms, mixed batches."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_toy(str(tmp_path))
    claim = load_claim(ROOT / "benchmarks" / "claims" / "uniseg_toy.yaml")
    jobs = plan(claim, tmp_path / "runs", seeds=[0, 1, 2], only=(CE, NULL))
    table = run_claim(claim, jobs, SubprocessRunner(ROOT / "train_net.py", []), lambda table: None)
    assert not table.failures
    softmax, null = table.cells[CE, NIGHT], table.cells[NULL, NIGHT]
    assert len(softmax.values) == len(null.values) == 3
    assert null.mean > softmax.mean, (null.text(), softmax.text())
