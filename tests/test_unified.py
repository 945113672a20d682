"""The union of classes against UniSeg's published unions, brute force over leaf sets, and its own promises."""

from __future__ import annotations

import json

import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from multiseg_d2.data.register import use_taxonomy
from multiseg_d2.data.spec import load_spec, packaged_specs
from multiseg_d2.label_space import ILLEGAL, LabelSpace, remap
from multiseg_d2.taxonomy import Taxonomy
from multiseg_d2.unified import NO_CLASS, UnifiedClasses

UNISEG = {
    "C": "cityscapes_train",
    "I": "uniseg_idd_train",
    "B": "bdd100k_train",
    "M": "uniseg_mapillary_vistas_train",
}
#: What a spec in UniSeg's spelling respells.
RESPELLED = {
    "uniseg_idd": "idd",
    "uniseg_mapillary_vistas": "mapillary_vistas",
    "uniseg_camvid": "camvid_strict",
    "uniseg_camvid_rider": "camvid_strict",
    "uniseg_wilddash2": "wilddash2",
}
NINE = ("cityscapes", "bdd100k", "camvid_full", "idd", "coco_stuff", "sun_rgbd", "kitti", "wilddash2")


def space(name: str, covers: dict[str, list[int]], leaves: int, main: dict[str, int] | None = None) -> LabelSpace:
    membership = np.zeros((len(covers), leaves), bool)
    for row, ids in zip(membership, covers.values()):
        row[ids] = True
    mains = np.array([(main or {}).get(c, -1) for c in covers], np.int64)
    table = np.full(65536, ILLEGAL, np.uint8)
    return LabelSpace(name, tuple(covers), np.zeros((len(covers), 3), np.uint8), table, membership, mains)


@pytest.fixture
def vocabularies(samples):
    path = samples.parent / "reference" / "uniseg_vocabularies.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there: unions are not compared with UniSeg's")
    return json.loads(path.read_text())


@pytest.fixture
def by_name():
    """Chooses the union by exact names for the test, and the packaged taxonomy afterwards."""
    yield lambda train, test=(): use_taxonomy("exact_names", train, test)
    use_taxonomy("")


def union_of(entries) -> UnifiedClasses:
    metadata = [MetadataCatalog.get(name) for name in entries]
    return UnifiedClasses.of({m.dataset: m.label_space for m in metadata})


# ---- UniSeg's unions ----


def test_vocabularies_are_spelled_as_unisegs(vocabularies):
    ours = {"idd": "uniseg_idd", "mapillary": "uniseg_mapillary_vistas", "camvid": "uniseg_camvid", "bdd": "bdd100k"}
    for name in ("cityscapes", "bdd", "idd", "mapillary", "camvid", "kitti"):
        assert list(load_spec(ours.get(name, name)).class_names) == vocabularies["vocabularies"][name]


@pytest.mark.parametrize(("sets", "size"), [("CIB", 28), ("IBM", 70), ("BMC", 67), ("CIM", 70), ("CIBM", 70)])
def test_unions_are_unisegs(vocabularies, by_name, sets, size):
    by_name([UNISEG[letter] for letter in sets])
    union = union_of([UNISEG[letter] for letter in sets])
    assert union.size == size and list(union.names) == vocabularies["unions"][sets]
    for letter, present in zip(sets, union.present):
        classes = MetadataCatalog.get(UNISEG[letter]).label_space.classes
        assert {union.names[u] for u in np.flatnonzero(present)} == set(classes)
    for dataset, table in union.tables.items():
        assert [union.names[u] for u in table] == list(union.spaces[dataset].classes)


def test_columns_by_name(by_name):
    train = [UNISEG[letter] for letter in "CIB"]
    by_name(train, ["kitti_train", "uniseg_camvid_test", "uniseg_camvid_rider_test", "uniseg_wilddash2_public"])
    union = union_of(train)
    spaces = {n: MetadataCatalog.get(n).label_space for n in ("kitti_train", "uniseg_camvid_test")}
    for own in spaces.values():
        columns, unnameable = union.columns_of(own)
        assert [[union.names[u] for u in ids] for ids in columns] == [
            [name] if name in union.names else [] for name in own.classes
        ]
        assert [own.classes[c] for c in unnameable] == [name for name in own.classes if name not in union.names]
    assert union.columns_of(MetadataCatalog.get("uniseg_camvid_rider_test").label_space)[1] == []


@pytest.mark.parametrize(("name", "original"), RESPELLED.items())
def test_respelled_classes_mean_what_they_did(name, original):
    """Same label files, same meaning; only names and order differ."""
    ours, theirs = load_spec(name), load_spec(original)
    spaces = [MetadataCatalog.get(next(iter(s.splits.values())).entry).label_space for s in (ours, theirs)]
    assert name in packaged_specs() and ours.dataset != theirs.dataset
    assert sorted(ours.colors.tolist()) == sorted(theirs.colors.tolist())
    table = remap(*spaces)  # equal or contained
    assert sorted(table.tolist()) == list(range(len(theirs.classes)))
    width = max(s.membership.shape[1] for s in spaces)
    rows = [np.pad(s.membership, ((0, 0), (0, width - s.membership.shape[1]))) for s in spaces]
    np.testing.assert_array_equal(rows[0], rows[1][table])
    if ours.encoding != "color":
        known = ours.raw_to_local < len(table)
        np.testing.assert_array_equal(table[ours.raw_to_local[known]], theirs.raw_to_local[known])
        np.testing.assert_array_equal(ours.raw_to_local[~known], theirs.raw_to_local[~known])
    else:
        assert [c.raw_colors for c in ours.classes] == [theirs.classes[i].raw_colors for i in table]


# ---- by meaning ----


def test_one_class_per_leaf_set_of_the_nine_datasets():
    """More classes than a label space may have, and exactly as many as there are distinct leaf sets."""
    union = union_of([f"{name}_{'train' if name != 'wilddash2' else 'public'}" for name in (*NINE, "mapillary_vistas")])
    sets = {tuple(np.flatnonzero(row)) for s in union.spaces.values() for row in s.membership}
    assert union.size == len(sets) > 255
    assert len(set(union.names)) == union.size
    for k, (dataset, own) in enumerate(union.spaces.items()):
        table = union.tables[dataset]
        assert table.dtype == np.int16
        for row, u in zip(own.membership, table):
            assert set(np.flatnonzero(union.membership[u])) == set(np.flatnonzero(row))
        assert sorted(set(table.tolist())) == np.flatnonzero(union.present[k]).tolist()


def test_equal_meanings_are_one_class_and_equal_names_may_be_two():
    a = space("a", {"road": [0, 1], "person": [2], "void": []}, 4)
    b = space("b", {"street": [0, 1], "person": [2, 3]}, 6)
    union = UnifiedClasses.of({"a": a, "b": b})
    assert union.names == ("road", "person (a)", "person (b)")
    assert union.tables["a"].tolist() == [0, 1, NO_CLASS] and union.tables["b"].tolist() == [0, 2]
    assert union.present.tolist() == [[True, True, False], [True, False, True]]
    assert union.columns_of(a) == ([[0], [1], []], [2])


def test_the_order_of_datasets_changes_no_class():
    a, b = space("a", {"x": [3], "y": [0, 1]}, 4), space("b", {"z": [0], "w": [3]}, 4)
    one, other = UnifiedClasses.of({"a": a, "b": b}), UnifiedClasses.of({"b": b, "a": a})
    np.testing.assert_array_equal(one.membership, other.membership)
    np.testing.assert_array_equal(one.present, other.present[::-1])


def test_columns_of_an_unseen_space():
    union = UnifiedClasses.of(
        {
            "fine": space("fine", {"bicyclist": [0], "motorcyclist": [1], "car": [2, 3]}, 8, {"car": 2}),
            "coarse": space("coarse", {"rider": [0, 1], "ground": [4, 5]}, 8),
        }
    )
    assert union.names == ("bicyclist", "rider", "motorcyclist", "car", "ground")
    wanted = space("wanted", {"rider": [0, 1], "car": [2], "van": [3], "road": [4], "sky": [6]}, 8)
    # Riders by three columns; cars because most of the wider class is; vans, road and sky by none.
    assert union.columns_of(wanted) == ([[0, 1, 2], [3], [], [], []], [2, 3, 4])
    nested = space("nested", {"human": [0, 1, 7], "bicyclist": [0]}, 8)
    assert union.columns_of(nested)[0] == [[1, 2], [0]]  # the narrowest class that contains it


def test_of_two_classes_with_one_meaning_the_first_is_scored():
    twice = space("twice", {"a": [0], "b": [0], "c": [1]}, 2)
    assert UnifiedClasses.of({"twice": twice}).columns_of(twice) == ([[0], [], [1]], [1])


def test_an_empty_union_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        UnifiedClasses.of({})
    with pytest.raises(ValueError, match="would be empty"):
        UnifiedClasses.of({"a": space("a", {"void": []}, 3)})


def test_names_must_match_exactly():
    taxonomy = Taxonomy.exact_names({"a": ["Road", "sky"], "b": ["road", "sky "]})
    spaces = {
        d: LabelSpace(d, c, np.zeros((2, 3), np.uint8), np.full(65536, ILLEGAL, np.uint8), taxonomy.membership(d, c))
        for d, c in {"a": ("Road", "sky"), "b": ("road", "sky ")}.items()
    }
    assert UnifiedClasses.of(spaces).names == ("Road", "road", "sky", "sky ")
