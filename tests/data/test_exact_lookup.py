"""The 24-bit look-up against a dict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multiseg_d2.data.exact_lookup import ExactLookup

KEYS = st.integers(0, (1 << 24) - 1)


@settings(max_examples=60, deadline=None)
@given(known=st.dictionaries(KEYS, st.integers(0, 65535), max_size=300), others=st.lists(KEYS, max_size=50))
def test_lookup_equals_a_dict(known, others):
    lookup = ExactLookup(np.array(list(known), np.uint32), np.array(list(known.values()), np.int64))
    asked = np.array([*known, *others], np.uint32)
    values, found = lookup(asked)
    for key, value, hit in zip(asked.tolist(), values.tolist(), found.tolist()):
        assert hit == (key in known)
        if hit:
            assert value == known[key]


@pytest.mark.parametrize("step", [1, 256, 65536, 4095])
def test_regular_keys_find_slots_of_their_own(step):
    keys = np.arange(0, min(1 << 24, 400 * step), step, dtype=np.uint32)
    values, found = ExactLookup(keys, np.arange(len(keys)))(keys.reshape(1, -1))
    assert found.all() and (values[0] == np.arange(len(keys))).all()


def test_what_does_not_fit_is_refused():
    for keys, values in (([1, 1], [0, 0]), ([1 << 24], [0]), ([-1], [0]), ([1], [65536]), ([1], [-1])):
        with pytest.raises(ValueError, match="distinct|must lie in"):
            ExactLookup(np.array(keys, np.int64), np.array(values))
