"""Label spaces against brute-force loops over pixels and over sets of universal classes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from multiseg_d2.label_space import (
    DISJOINT,
    EQUAL,
    IGNORE,
    ILLEGAL,
    MAX_CLASSES,
    OVERLAP,
    SUBSET,
    SUPERSET,
    IllegalLabelError,
    LabelSpace,
    raw_to_local_table,
    relation,
    remap,
    to_local,
)


def make_space(sets, width, name="a", main=None) -> LabelSpace:
    """A label space whose class c covers the universal ids sets[c]."""
    membership = np.zeros((len(sets), width), bool)
    for row, ids in zip(membership, sets):
        row[list(ids)] = True
    return LabelSpace(
        name,
        tuple(f"{name}{c}" for c in range(len(sets))),
        np.zeros((len(sets), 3), np.uint8),
        raw_to_local_table([[c] for c in range(len(sets))]),
        membership,
        None if main is None else np.array(main),
    )


tables = st.lists(st.sets(st.integers(0, 300), max_size=4), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(tables, st.sets(st.integers(0, 300), max_size=5), hnp.arrays(np.uint16, (5, 7), elements=st.integers(0, 320)))
def test_lookup_equals_a_loop_over_pixels(sets, ignore, label):
    sets = list(_disjoint(sets))
    ignore = ignore - set().union(*sets)
    table = raw_to_local_table([sorted(ids) for ids in sets], sorted(ignore))
    meaning = {i: c for c, ids in enumerate(sets) for i in ids} | dict.fromkeys(ignore, IGNORE)
    unknown = [int(v) for v in label.ravel() if int(v) not in meaning]
    if unknown:
        with pytest.raises(IllegalLabelError) as error:
            to_local(label, table)
        assert error.value.counts == {v: unknown.count(v) for v in set(unknown)}
    else:
        expected = [[meaning[int(v)] for v in row] for row in label]
        assert to_local(label, table).tolist() == expected


def _disjoint(sets):
    seen: set[int] = set()
    for ids in sets:
        yield ids - seen
        seen |= ids


def test_table_is_applied_once():
    """{6: 9, 9: 7} must not chain 6 -> 9 -> 7."""
    table = raw_to_local_table([[i] for i in range(6)] + [[100], [9], [101], [6]])
    assert to_local(np.array([6, 9], np.uint8), table).tolist() == [9, 7]


def test_unlisted_ids_are_illegal_unless_the_spec_says_otherwise():
    assert raw_to_local_table([[0]])[5] == ILLEGAL
    assert raw_to_local_table([[0]], unlisted=IGNORE)[5] == IGNORE


def test_error_names_file_id_and_count():
    label = np.array([[0, 77], [77, 1]], np.uint8)
    with pytest.raises(IllegalLabelError, match=r"labels/a.png: .*77 \(2 pixels\)"):
        try:
            to_local(label, raw_to_local_table([[0], [1]]))
        except IllegalLabelError as error:
            raise error.at("labels/a.png") from None


@pytest.mark.parametrize(
    ("classes", "ignore", "message"),
    [
        ([[1], [1]], [], "listed for class 0 and again for class 1"),
        ([[1]], [1], "again for ignore"),
        ([[70000]], [], "not in"),
    ],
)
def test_contradictory_tables_are_refused(classes, ignore, message):
    with pytest.raises(ValueError, match=message):
        raw_to_local_table(classes, ignore)


def test_label_types_are_not_guessed():
    with pytest.raises(TypeError, match="uint8 or uint16"):
        to_local(np.zeros((2, 2), np.int32), raw_to_local_table([[0]]))


def test_more_classes_than_eight_bits_hold_are_refused():
    with pytest.raises(ValueError, match=f"1 to {MAX_CLASSES}"):
        count = MAX_CLASSES + 1
        LabelSpace(
            "wide",
            tuple(map(str, range(count))),
            np.zeros((count, 3), np.uint8),
            np.zeros(65536, np.uint8),
            np.eye(count, dtype=bool),
        )


def test_doubled_class_names_are_refused():
    space = make_space([{0}, {1}], 2)
    with pytest.raises(ValueError, match="unique.*'a'"):
        LabelSpace("x", ("a", "a"), space.colors, space.raw_to_local, space.membership)


def test_arrays_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="read-only"):
        make_space([{0}], 1).raw_to_local[0] = 3


subsets = st.lists(st.sets(st.integers(0, 5), max_size=4), min_size=1, max_size=5)


def _expected(a: set, b: set) -> int:
    if not a & b:
        return DISJOINT
    if a == b:
        return EQUAL
    return SUBSET if a < b else SUPERSET if a > b else OVERLAP


@given(subsets, subsets)
def test_relation_equals_set_algebra(a, b):
    codes = relation(make_space(a, 6), make_space(b, 8, "b"))  # the later taxonomy has more universal classes
    assert codes.tolist() == [[_expected(x, y) for y in b] for x in a]


def test_remap_takes_the_containing_class_and_never_guesses():
    target = make_space([{0, 1}, {2}, {3}], 6, "t")
    source = make_space([{0}, {2}, {2, 3}, {1, 2, 3}, {5}], 6, "s", main=[-1, -1, -1, 3, -1])
    assert remap(source, target).tolist() == [0, 1, IGNORE, 2, IGNORE]


def test_remap_prefers_the_narrowest_of_nested_targets():
    target = make_space([{0, 1, 2}, {0, 1}], 3, "t")
    assert remap(make_space([{0}, {2}], 3, "s"), target).tolist() == [1, 0]


def test_remap_onto_itself_is_the_identity():
    space = make_space([{0, 3}, {1}, {2}], 4)
    assert remap(space, space).tolist() == [0, 1, 2]
