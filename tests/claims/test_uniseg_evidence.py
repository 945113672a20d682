"""What UniSeg's losses and relations claim, measured on the toys through the claims harness (an hour of one core)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from multiseg_d2.class_relations import ClassResponses, taxonomy_relations
from multiseg_d2.data.register import register_from_config
from multiseg_d2.engine import load_config
from multiseg_d2.evaluation.relations_report import compare
from multiseg_d2.modeling.catalog import class_meanings, training_spaces
from multiseg_d2.unified import UnifiedClasses

ROOT = Path(__file__).resolve().parents[2]
CE, NULL, NIGHT = "CE over the union", "Null BCE", "night (unseen)"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_null_bce_beats_cross_entropy_on_the_unseen_look(measure_on_toys):
    """Mean of 3 seeds, the same number of steps, shared norms, mixed batches."""
    table = measure_on_toys("uniseg_toy", (CE, NULL))
    softmax, null = table.cells[CE, NIGHT], table.cells[NULL, NIGHT]
    assert len(softmax.values) == len(null.values) == 3
    assert null.mean > softmax.mean, (null.text(), softmax.text())


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_measured_relations_find_the_planted_super_classes_and_nothing_absurd(measure_on_toys, claim_runs):
    """After 600 steps, at a threshold of 0.06 (the released -0.08 is of another model), in each of three seeds.

    *vehicle* and *flat* of the rain are super-classes of what the other two sets have; what is not found is no error, a
    relation between classes that the taxonomy holds for disjoint is one.
    """
    measure_on_toys("uniseg_toy_long", ("Null BCE, then measured relations",))
    files = sorted(claim_runs.rglob("class_responses.npz"))
    assert len(files) == 3
    for file in files:
        sorted_out = compared_with_the_taxonomy(dataclasses.replace(ClassResponses.load(file), threshold=0.06))
        assert {("vehicle (toy_dusk)", "vehicle (toy_rain)"), ("curb", "flat")} <= sorted_out["confirmed"], sorted_out
        assert {("car", "vehicle (toy_rain)"), ("truck", "vehicle (toy_rain)")} & sorted_out["confirmed"], sorted_out
        assert not sorted_out["contradicted"], sorted_out


def compared_with_the_taxonomy(measured: ClassResponses) -> dict[str, set[tuple[str, str]]]:
    """Pairs of class names, over all datasets, by what the taxonomy says of them."""
    cfg = load_config(str(ROOT / "configs" / "uniseg" / "toy.yaml"), [])
    register_from_config(cfg)
    union = UnifiedClasses.of(training_spaces(cfg))
    stated = taxonomy_relations(union, class_meanings(cfg))
    pairs: dict[str, set[tuple[str, str]]] = {"confirmed": set(), "contradicted": set()}
    for dataset, matrix in measured.relations().items():
        result = compare(matrix, stated[dataset], measured.pixels[dataset])
        for kind, names in pairs.items():
            names |= {(union.names[i], union.names[j]) for i, j in getattr(result, kind)}
    return pairs
