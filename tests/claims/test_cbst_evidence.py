"""What class-balanced self-training claims, measured on drawn scenes through the claims harness (half an hour)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SOURCE, LONGER, ST, CBST = "Source only", "Source only, trained on", "ST (one threshold)", "CBST"
SEEDS, TARGET = 3, "nightfall"


def kept_pixels(runs: Path, policy: str) -> list[dict[str, int]]:
    """Kept pixels per class of the last round of every run with a policy."""
    manifests = [json.loads(path.read_text()) for path in runs.rglob("round_02/*/manifest.json")]
    return [m["kept_pixels"] for m in manifests if m["settings"]["policy"] == policy]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_source_only_then_st_then_cbst_on_the_target(measure_on_toys):
    """Means of 3 seeds; the source trained on for as many steps and images is beaten as well."""
    table = measure_on_toys("toy_cbst")
    cells = {row: table.cells[row, TARGET] for row in (SOURCE, LONGER, ST, CBST)}
    assert all(len(cell.values) == SEEDS for cell in cells.values())
    said = {row: cell.text() for row, cell in cells.items()}
    assert cells[SOURCE].mean < cells[ST].mean < cells[CBST].mean, said
    assert cells[LONGER].mean < cells[CBST].mean, said


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_cbst_keeps_rare_classes(measure_on_toys, claim_runs):
    """In the last round fewer classes have no label at all than with one threshold for all, over the seeds."""
    measure_on_toys("toy_cbst", (ST, CBST))
    found = {policy: kept_pixels(claim_runs, policy) for policy in ("global", "class_balanced")}
    assert [len(manifests) for manifests in found.values()] == [SEEDS] * 2
    empty = {policy: sum(n == 0 for kept in lists for n in kept.values()) for policy, lists in found.items()}
    rarest = {
        policy: sum(sum(sorted(kept.values())[:6]) / sum(kept.values()) for kept in lists) / SEEDS
        for policy, lists in found.items()
    }
    assert empty["class_balanced"] <= empty["global"], empty
    assert rarest["class_balanced"] > rarest["global"], rarest
