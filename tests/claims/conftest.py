"""Measures rows of a claims file for the tests of a claim."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from multiseg_d2.claims import SubprocessRunner, Table, load_claim, plan, run_claim
from multiseg_d2.toy import write_toy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def claim_runs(tmp_path_factory) -> Path:
    """Folder of the runs behind the claims.

    MULTISEG_CLAIM_RUNS names one of runs that `tools/claims.py` has finished (`<output>/runs`): those with the same
    resolved config, seed, dataset specs and weights are taken, also if the package has changed since.
    """
    finished = os.environ.get("MULTISEG_CLAIM_RUNS", "")
    return Path(finished) if finished else tmp_path_factory.mktemp("claims") / "runs"


@pytest.fixture
def measure_on_toys(tmp_path, monkeypatch, claim_runs) -> Callable[..., Table]:
    """Function of a claims file's name and labels of its rows (none = all): their table, three seeds, on drawn toys."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def measure(name: str, rows: Collection[str] = ()) -> Table:
        write_toy(str(tmp_path))
        claim = load_claim(ROOT / "benchmarks" / "claims" / f"{name}.yaml")
        jobs = plan(claim, claim_runs, seeds=[0, 1, 2], only=rows, any_source="MULTISEG_CLAIM_RUNS" in os.environ)
        table = run_claim(claim, jobs, SubprocessRunner(ROOT / "train_net.py", []), lambda table: None)
        assert not table.failures
        return table

    return measure
