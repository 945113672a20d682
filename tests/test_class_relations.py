"""Relations against the matrices of UniSeg's released run, and against set logic written out."""

from __future__ import annotations

import numpy as np
import pytest

from multiseg_d2.class_relations import (
    NEGATIVE,
    NULL,
    POSITIVE,
    THRESHOLD,
    ClassResponses,
    measured_relations,
    no_relations,
    relation_pairs,
    relations_text,
    taxonomy_relations,
)
from multiseg_d2.label_space import ILLEGAL, LabelSpace
from multiseg_d2.unified import UnifiedClasses


def test_the_rule_gives_the_released_relations(samples):
    path = samples.parent / "reference" / "class_relations.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: relations are not compared with the released ones")
    released = np.load(path, allow_pickle=False)
    assert released["threshold"] == pytest.approx(THRESHOLD)
    datasets = [key.removeprefix("relations_") for key in released.files if key.startswith("relations_")]
    found = {}
    for d in datasets:
        pixels, present = released[f"pixels_{d}"], released[f"present_{d}"]
        ours = measured_relations(released[f"mean_cosine_{d}"], pixels, present)
        populated = pixels > 0
        assert populated.sum() > 15
        np.testing.assert_array_equal(ours[populated], released[f"relations_{d}"][populated])
        found[d] = len(relation_pairs(ours))
    assert len(datasets) == 3 and sorted(found.values()) == [0, 0, 23]


def test_measured_by_hand():
    present, pixels = np.array([True, True, False]), np.array([9, 9, 0])
    responses = np.array([[0.2, 0.1, 0.3], [0.5, -0.5, -0.2], [1.0, 1.0, 1.0]])
    expected = [[1, 0, 1], [1, 1, -1], [0, 0, 0]]  # -0.2 responds more than the own class, but below the threshold
    assert measured_relations(responses, pixels, present).tolist() == expected
    assert measured_relations(responses, pixels, present, threshold=0.6).tolist() == [[1, 0, -1], [0, 1, -1], [0, 0, 0]]
    unseen = measured_relations(responses, np.array([9, 0, 0]), present)  # a class that no crop showed: its null row
    assert unseen[1].tolist() == no_relations(present)[1].tolist() == [0, 1, -1]


def union_of(**datasets: dict[str, list[int]]) -> UnifiedClasses:
    spaces = {}
    for name, classes in datasets.items():
        membership = np.zeros((len(classes), 12), bool)
        for row, ids in zip(membership, classes.values()):
            row[ids] = True
        table, colors = np.full(65536, ILLEGAL, np.uint8), np.zeros((len(classes), 3), np.uint8)
        spaces[name] = LabelSpace(name, tuple(classes), colors, table, membership)
    return UnifiedClasses.of(spaces)


def meanings_of(union: UnifiedClasses) -> dict[str, np.ndarray]:
    return {d: s.membership for d, s in union.spaces.items()}


def test_relations_by_meaning_are_those_of_sets():
    union = union_of(
        a={"rider": [0, 1], "car": [2, 3], "tree": [4, 5]},
        b={"bicyclist": [0], "motorcyclist": [1], "vehicle": [2, 3, 6], "plants": [5, 7], "car": [2, 3]},
    )
    relations = taxonomy_relations(union, meanings_of(union))
    sets = [set(np.flatnonzero(row)) for row in union.membership]
    for k, dataset in enumerate(union.datasets):
        for i in range(union.size):
            for j in range(union.size):
                if not union.present[k, i]:
                    expected = 0
                elif sets[i] <= sets[j]:
                    expected = POSITIVE
                elif union.present[k, j] or not sets[i] & sets[j]:
                    expected = NEGATIVE
                else:
                    expected = NULL
                assert relations[dataset][i, j] == expected, (dataset, union.names[i], union.names[j])
    name = union.names.index
    assert relations["b"][name("bicyclist"), name("rider")] == POSITIVE
    assert relations["a"][name("rider"), name("bicyclist")] == NULL  # the wider label does not say which
    assert relations["a"][name("tree"), name("plants")] == NULL  # overlap
    assert relations["b"][name("car"), name("vehicle")] == POSITIVE  # within one dataset


def test_unknown_meanings_say_nothing():
    union = union_of(a={"rider": [0, 1], "thing": [8]}, b={"bicyclist": [0], "stuff": [9]})
    meanings = meanings_of(union)
    meanings["a"] = meanings["a"] & (np.arange(2) == 0)[:, None]  # nobody says what `thing` is
    relations = taxonomy_relations(union, meanings)
    thing, stuff, rider = (union.names.index(n) for n in ("thing", "stuff", "rider"))
    np.testing.assert_array_equal(relations["a"][thing], no_relations(union.present[0])[thing])
    assert relations["b"][stuff, thing] == NULL and relations["b"][stuff, rider] == NEGATIVE


def test_a_class_that_datasets_mean_differently():
    """Union by exact names: `sidewalk` of b has a part that that of a lacks."""
    union = union_of(a={"sidewalk": [0], "x": [1]}, b={"sidewalk": [0], "curb": [2]}, c={"edge": [3], "path": [4]})
    meanings = {
        "a": np.eye(12, dtype=bool)[[5, 4]],  # sidewalk = {5}, x = {4}
        "b": np.stack([np.arange(12) // 2 == 2, np.arange(12) == 7]),  # sidewalk = {4, 5}
        "c": np.eye(12, dtype=bool)[[4, 5]],  # edge = {4}, path = {5}
    }
    relations = taxonomy_relations(union, meanings)
    edge, path, sidewalk, x = (union.names.index(n) for n in ("edge", "path", "sidewalk", "x"))
    c = relations["c"]
    assert c[path, sidewalk] == POSITIVE  # inside both
    assert c[edge, sidewalk] == NULL  # inside one of them only
    assert relations["a"][x, sidewalk] == NULL  # a tells them apart, but what is b's sidewalk holds both


@pytest.mark.parametrize("seed", range(5))
def test_no_relations_are_the_null_loss(seed):
    present = np.random.default_rng(seed).random(9) < 0.6
    relations = no_relations(present)
    for i in np.flatnonzero(present):
        assert relations[i].tolist() == [1 if j == i else 0 if present[j] else -1 for j in range(9)]
    assert relation_pairs(relations) == []


def test_responses_are_read_as_written(tmp_path):
    rng = np.random.default_rng(0)
    present = {"a": np.array([True, False, True]), "b": np.array([True, True, False])}
    responses = {d: rng.uniform(-1, 1, (3, 3)) for d in present}
    written = ClassResponses(("x", "y", "ä z"), present, responses, {d: np.array([3, 0, 5]) for d in present}, 0.1)
    written.save(tmp_path / "a" / "responses.npz")
    read = ClassResponses.load(tmp_path / "a" / "responses.npz")
    assert read.classes == written.classes and read.threshold == 0.1
    for d in present:
        np.testing.assert_array_equal(read.responses[d], responses[d])
        np.testing.assert_array_equal(read.relations()[d], written.relations()[d])
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="does not hold class responses"):
        ClassResponses.load(tmp_path / "other.npz")


def test_the_listing_marks_the_threshold_in_the_distribution():
    present = {"a": np.array([True, True, False])}
    responses = {"a": np.array([[0.1, 0.0, 0.42], [-0.5, -0.4, -0.3], [0.0, 0.0, 0.0]])}
    measured = ClassResponses(("rider", "car", "person"), present, responses, {"a": np.array([7, 9, 0])}, -0.08)
    lines = relations_text(measured.classes, measured.relations(), measured).splitlines()
    assert lines[:2] == ["a: 1 relation", "  rider -> person  +0.420, own +0.100, 7 pixels"]
    marked = next(n for n, line in enumerate(lines) if "threshold -0.08" in line)
    below = [line for line in lines[:marked] if line.startswith("  -0.3")]
    above = [line for line in lines[marked:] if line.startswith(("  +0.4", "  +0.3"))]
    assert below and "1 #" in below[0] and any("1 #" in line for line in above)
