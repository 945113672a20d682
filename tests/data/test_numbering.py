"""The suspicion of another numbering: told where files were swapped, silent on what is right."""

from __future__ import annotations

import numpy as np
import pytest

from multiseg_d2.data.numbering import suspicion
from multiseg_d2.data.spec import load_spec, packaged_specs

LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
#: Roughly the shares of a driving set over the 19 classes, in train-id order.
SHARES = [37, 6, 23, 1, 1, 1, 0.2, 0.6, 16, 1, 4, 1, 0.1, 7, 0.3, 0.2, 0.2, 0.1, 0.4]


def counts(ids, ignore, pixels=10_000_000):
    table = np.zeros(65536, np.int64)
    table[ids] = np.array(SHARES) / 100 * pixels
    table[ignore] = pixels // 50
    return table


TRAIN_IDS, OFFICIAL_IDS = counts(list(range(19)), 255), counts(LABEL_IDS, 1)


@pytest.mark.parametrize(
    ("spec", "raw_counts", "words"),
    [
        ("cityscapes", OFFICIAL_IDS, None),
        ("kitti", OFFICIAL_IDS, None),
        ("cityscapes_trainids", TRAIN_IDS, None),
        ("bdd100k", TRAIN_IDS, None),
        ("cityscapes", TRAIN_IDS, "look like train ids"),
        ("kitti", TRAIN_IDS, "look like train ids"),
        ("cityscapes_trainids", OFFICIAL_IDS, "look like Cityscapes label ids"),
        ("bdd100k", OFFICIAL_IDS, "look like Cityscapes label ids"),
    ],
)
def test_cityscapes_numberings(spec, raw_counts, words):
    found = suspicion(load_spec(spec), raw_counts)
    if words is None:
        assert found is None
    else:
        assert words in found and "road 36%" in found


def test_a_few_pixels_prove_nothing():
    assert suspicion(load_spec("cityscapes"), counts(list(range(19)), 255, 1000)) is None


def test_level_3_files_given_for_idd_ids():
    table = np.zeros(65536, np.int64)
    table[:26] = 100_000
    assert "look like train ids" in suspicion(load_spec("idd"), table)


@pytest.mark.parametrize("name", packaged_specs())
def test_files_in_the_right_numbering_raise_no_suspicion(name):
    """Every class and every ignored id occurs, in random amounts."""
    spec = load_spec(name)
    rng = np.random.default_rng(0)
    raw_ids = [i for c in spec.classes for i in c.raw_ids] + list(spec.ignore_ids)
    table = np.zeros(65536, np.int64)
    table[raw_ids] = rng.integers(1, 1_000_000, len(raw_ids))
    assert suspicion(spec, table) is None


@pytest.mark.parametrize("name", ["cityscapes", "kitti"])
def test_scenes_without_rare_classes_raise_no_suspicion(name):
    """Road, building, vegetation and sky alone are a plausible small set."""
    table = np.zeros(65536, np.int64)
    table[[7, 11, 21, 23]] = 100_000
    assert suspicion(load_spec(name), table) is None


def test_an_illegal_id_alone_is_not_another_numbering():
    table = counts(list(range(19)), 255)
    table[77] = 12
    assert suspicion(load_spec("bdd100k"), table) is None
