"""The taxonomy against the public facts it was made from, UniSeg's published unions, and small graphs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from multiseg_d2 import taxonomy as taxonomy_module
from multiseg_d2.taxonomy import BY_NAME, Concept, Taxonomy, TaxonomyError

PACKAGED = Path(taxonomy_module.__file__).parent / "data" / "taxonomy.yaml"


@pytest.fixture(scope="module")
def packaged() -> Taxonomy:
    return Taxonomy.load(PACKAGED)


def write(folder: Path, text: str) -> Path:
    path = folder / "taxonomy.yaml"
    path.write_text("concepts:\n" + text)
    return path


GRAPH = """
  vehicle: {classes: {coarse: vehicle}}
  car: {parents: [vehicle], classes: {fine: car, coarse2: [car, auto]}}
  truck: {parents: [vehicle], classes: {fine: truck}}
  person: {classes: {fine: person, mixed: thing}}
  bird: {classes: {mixed: thing}}
"""


def test_leaves_are_the_universal_classes_and_classes_cover_them(tmp_path):
    taxonomy = Taxonomy.load(write(tmp_path, GRAPH))
    assert taxonomy.universal == ("car", "truck", "person", "bird")
    assert taxonomy.membership("coarse", ["vehicle"]).tolist() == [[True, True, False, False]]
    assert taxonomy.membership("fine", ["person", "car"]).tolist() == [
        [False, False, True, False],
        [True, False, False, False],
    ]
    assert taxonomy.membership("mixed", ["thing"]).tolist() == [[False, False, True, True]]
    assert taxonomy.membership("coarse2", ["auto"]).tolist() == taxonomy.membership("coarse2", ["car"]).tolist()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  a: {parents: [b]}\n  b: {parents: [a]}\n", "contain themselves: a > b > a"),
        ("  car: {}\n  bus: {parents: [caar]}\n", r"'caar' of 'bus' does not exist \(did you mean 'car'"),
        ("  a: {}\n  a: {}\n", r"names twice: \['a'\]"),
        ("  a: {parent: [b]}\n", "a: unknown key 'parent' .did you mean 'parents'"),
        (
            "  a: {main: b}\n  b: {parents: [a]}\n  c: {parents: [b]}\n  d: {parents: [a]}\n  e: {parents: [b]}\n",
            "no `main` of its",
        ),
        ("  a: {}\nmain_of_classes: [a]\n", "main_of_classes: must be a mapping"),
        ("  a: {classes: {x: y}}\nmain_of_classes: {x: {yy: a}}\n", "does not list class 'yy' of 'x'.*'y'"),
        ("  a: {classes: {x: y}}\n  b: {parents: [a]}\n  c: {parents: [a]}\nmain_of_classes: {x: {y: bb}}\n", "'b'"),
        (
            "  a: {main: c}\n  b: {parents: [a], main: d}\n  c: {parents: [b]}\n  d: {parents: [b]}\n",
            "'a' and 'b' share 'c' and 'd', but each calls another",
        ),
        ("  a: {main: c}\n  b: {parents: [a]}\n  c: {}\n", "main 'c' of concept 'a' is not one of its parts"),
    ],
)
def test_contradictions_are_named(tmp_path, text, message):
    with pytest.raises(TaxonomyError, match=message):
        Taxonomy.load(write(tmp_path, text))


def test_main_holds_for_narrower_classes_and_follows_parts(tmp_path):
    """Against loops over all leaf sets: the leaf that a wider concept calls its main content, where it is inside."""
    path = write(
        tmp_path,
        """
  all: {classes: {wide: all}, main: car}
  vehicle: {parents: [all], classes: {coarse: vehicle}}
  car: {parents: [vehicle], classes: {fine: car}, main: sedan}
  sedan: {parents: [car]}
  van: {parents: [car]}
  truck: {parents: [vehicle], classes: {fine: truck, union: big}}
  bus: {parents: [vehicle], classes: {union: big}}
  animal: {parents: [all], classes: {fine: animal}}
  cat: {parents: [animal]}
  dog: {parents: [animal]}
main_of_classes:
  union: {big: bus}
""",
    )
    taxonomy = Taxonomy.load(path)

    def main(dataset, *classes):
        return [taxonomy.universal[u] if u >= 0 else None for u in taxonomy.main_universal(dataset, classes)]

    assert main("wide", "all") == main("coarse", "vehicle") == ["sedan"]
    assert main("fine", "car", "truck", "animal") == ["sedan", "truck", None]
    assert main("union", "big") == ["bus"]
    larger = taxonomy.extend("mine", {"auto": ["car"], "pets": ["animal"]})
    assert [larger.universal[u] for u in larger.main_universal("mine", ["auto"])] == ["sedan"]
    assert larger.main_universal("mine", ["pets"]).tolist() == [-1] and larger.main_universal(
        "union", ["big"]
    ) == taxonomy.main_universal("union", ["big"])


def test_unknown_class_is_an_error_with_near_names(tmp_path):
    taxonomy = Taxonomy.load(write(tmp_path, GRAPH))
    with pytest.raises(TaxonomyError, match=r"class 'trucks' of 'fine' \(did you mean 'truck'\?\)"):
        taxonomy.membership("fine", ["trucks"])


def test_extending_keeps_the_places_of_the_universal_classes(tmp_path):
    taxonomy = Taxonomy.load(write(tmp_path, GRAPH))
    larger = taxonomy.extend(
        "mine", {"lorry": ["truck"], "cow": None, "cone": ["toy/cone"], "any": ["vehicle", "person"]}
    )
    assert larger.universal == (*taxonomy.universal, "mine/cow", "toy/cone")
    rows = larger.membership("mine", ["lorry", "cow", "cone", "any"])
    assert [np.flatnonzero(row).tolist() for row in rows] == [[1], [4], [5], [0, 1, 2]]
    assert taxonomy.universal == ("car", "truck", "person", "bird")


def test_a_misspelt_universal_class_is_not_a_new_one(tmp_path):
    taxonomy = Taxonomy.load(write(tmp_path, GRAPH))
    with pytest.raises(TaxonomyError, match=r"covers 'trukc'.*did you mean 'truck'"):
        taxonomy.extend("mine", {"lorry": ["trukc"]})


def test_packaged_concepts_with_classes_are_distinct_sets(packaged):
    """Two concepts with the same leaves would make different classes equal."""
    named = [n for n, c in packaged.concepts.items() if c.classes]
    assert len({packaged.leaves(n) for n in named}) == len(named)


def test_classes_of_one_dataset_are_disjoint(packaged):
    """Every pixel has one class: no two classes of a dataset may claim the same universal class."""
    for dataset in packaged.datasets():
        classes = list(packaged._classes[dataset])
        membership = packaged.membership(dataset, classes)
        claimed = membership.sum(0)
        doubled = {
            packaged.universal[u]: [c for c, row in zip(classes, membership) if row[u]]
            for u in np.flatnonzero(claimed > 1)
        }
        assert not doubled, (dataset, doubled)


def published_facts(path: Path):
    """A file of public facts that lies beside the samples."""
    if not path.is_file():
        pytest.skip(f"{path} is not there: the taxonomy is not compared with it")
    return json.loads(path.read_text())


def test_exact_names_give_the_published_unions(samples):
    published = published_facts(samples.parent / "reference" / "uniseg_vocabularies.json")
    letters = {"C": "cityscapes", "I": "idd", "B": "bdd", "M": "mapillary"}
    known = published["vocabularies"]
    for union, names in published["unions"].items():
        spaces = {key: known[key] for letter in union for key in known if key.startswith(letters[letter])}
        assert len(spaces) == len(union)
        assert list(Taxonomy.exact_names(spaces).universal) == names


def test_packaged_relations_agree_with_the_concept_graph(samples, packaged):
    """Every class of the nine datasets: what it is to each Cityscapes class, against a table made by other means."""
    facts = published_facts(samples.parent / "datasets" / "relations.json")
    compared = 0
    for dataset, rows in facts["to_cityscapes19"].items():
        for row in rows:
            mine = packaged.membership(dataset, [row["class"]])[0]
            meets = {c for c in row["cityscapes"] if (packaged.membership("cityscapes", [c])[0] & mine).any()}
            if row["relation"] in ("equal", "subset", "superset"):
                assert meets == set(row["cityscapes"]), row
                compared += 1
            if row["relation"] == "equal":
                assert (packaged.membership("cityscapes", row["cityscapes"])[0] == mine).all(), row
    assert compared > 150


def test_meaning_makes_nothing_up():
    taxonomy = Taxonomy(
        {
            "rider": Concept(classes={"a": ("rider",)}),
            "bicyclist": Concept(parents=("rider",)),
            "motorcyclist": Concept(parents=("rider",)),
            "car": Concept(),
        }
    )
    covers = {"x": ["rider"], "y": ["bicyclist", "car"], "z": None, "w": ["car", "other/thing"]}
    assert taxonomy.universal == ("bicyclist", "motorcyclist", "car")
    assert taxonomy.meaning(covers).tolist() == [[True, True, False], [True, False, True], [False] * 3, [False] * 3]
    assert taxonomy.meaning({"rider": None}, "a").tolist() == [[True, True, False]]  # the file's word


# ---- MSeg's taxonomy ----

#: MSeg's seven training sets (COCO by way of COCO-Stuff): classes of ours, how many of MSeg's 194 they reach, and how
#: many of ours MSeg leaves unlabelled.
MSEG = {
    "ade20k": (150, 117, 9),
    "bdd100k": (19, 19, 0),
    "cityscapes": (19, 19, 0),
    "coco_stuff": (171, 122, 12),
    "idd": (26, 25, 3),
    "mapillary_vistas": (65, 44, 5),
    "sun_rgbd": (37, 37, 0),
}


@pytest.fixture(scope="module")
def mseg() -> Taxonomy:
    return Taxonomy.load(BY_NAME["mseg"])


def test_mseg_has_its_194_classes_and_maps_its_training_sets(mseg):
    classes = [name for name in mseg.universal if "/" not in name]
    assert len(classes) == 194 and not any(name.endswith("_group") for name in classes)
    assert mseg.universal[:194] == tuple(classes)  # what MSeg leaves unlabelled stands behind
    reached: set[int] = set()
    for dataset, (count, wanted, unlabelled) in MSEG.items():
        names = list(mseg._classes[dataset])
        rows = mseg.membership(dataset, names)
        assert len(names) == count
        assert (int(rows[:, :194].any(0).sum()), int(rows[:, 194:].any(1).sum())) == (wanted, unlabelled), dataset
        assert rows.any(1).all()
        reached |= set(np.flatnonzero(rows[:, :194].any(0)))
    assert reached == set(range(194))


def test_mseg_agrees_with_its_table(samples, mseg):
    """Rows of the master table that were written down by others."""
    facts = published_facts(samples.parent / "datasets" / "relations.json")["public_tables"]["mseg"]["rows"]
    for dataset in ("bdd100k", "camvid_strict", "cityscapes", "kitti", "mapillary_vistas", "sun_rgbd"):
        theirs = {(row["concept"], n) for row in facts for n in row.get(dataset, ()) if row["concept"] != "unlabeled"}
        ours = {(c, n) for n in mseg._classes[dataset] for c in mseg.concepts_of(dataset, n) if "/" not in c}
        assert ours == theirs, dataset
    panoptic = {row["concept"] for row in facts if "coco_panoptic" in row}
    names = list(mseg._classes["coco_stuff"])
    reached = np.flatnonzero(mseg.membership("coco_stuff", names)[:, :194].any(0))
    assert {mseg.universal[u] for u in reached} == panoptic and len(panoptic) == 122


def test_mseg_s_merges(mseg):
    """Several classes of a dataset may be one of MSeg's; nothing of one dataset is in two by accident."""
    road = [
        "Road",
        "Parking",
        "Bike Lane",
        "Service Lane",
        "Lane Marking - General",
        "Lane Marking - Crosswalk",
        "Pothole",
    ]
    assert {mseg.concepts_of("mapillary_vistas", name) for name in road} == {("road",)}
    assert mseg.concepts_of("idd", "curb") == mseg.concepts_of("cityscapes", "sidewalk") == ("sidewalk_pavement",)
    assert mseg.concepts_of("coco_stuff", "wall-brick") == mseg.concepts_of("ade20k", "wall") == ("wall",)
    assert set(mseg.concepts_of("kitti", "rider")) == {"rider_other", "bicyclist", "motorcyclist"}
    for dataset in ("acdc", "dark_zurich", "gta5"):
        for name in mseg._classes["cityscapes"]:
            assert mseg.concepts_of(dataset, name) == mseg.concepts_of("cityscapes", name)
