"""The packaged taxonomy as label remapping and unions use it: every pair of packaged label spaces.

Two lists of exceptions stand here, each line with its reason; a line that nothing needs any more is an error too.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from multiseg_d2.data.decode import open_file
from multiseg_d2.data.files import list_pairs
from multiseg_d2.data.labels import LabelReader, label_path
from multiseg_d2.data.register import current_taxonomy, register_packaged, use_taxonomy
from multiseg_d2.data.spec import load_spec
from multiseg_d2.label_space import DISJOINT, IGNORE, relation, remap

SAMPLES = Path(__file__).parents[2] / "datasets" / "samples"
STREET = "bdd100k|camvid|camvid_strict|cityscapes|idd.*|kitti|mapillary.*|wilddash2"

#: (datasets, classes, target datasets, reason), regular expressions: classes that remapping ignores although they have
#: something in common with classes of the target, and may hold more than 1 % of the pixels.
IGNORED_THOUGH_RELATED = [
    ("idd_level1", ".*", ".*", "seven classes that each merge many things: no table says which holds most pixels"),
    ("idd_level2", "curb-wall|fence-guard rail|info-structures|obs-fallback|large-vehicle", ".*", "as idd_level1"),
    ("idd.*", "obs-str-bar-fallback", ".*", "rest class of a dozen kinds of things, none of which is known to prevail"),
    ("idd.*", "vehicle fallback", STREET + "|coco_stuff", "mostly other vehicles, which these sets ignore"),
    (
        "idd|idd_level2",
        "drivable fallback",
        "mapillary.*",
        "unpaved ground by its name; only parking has a class there",
    ),
    ("idd_level4", "fallback background", ".*", "distant scenery; mountains are the one part with a class there"),
    ("idd_level4", "animal", ".*", "which animals prevail is in no table"),
    ("idd_level2", "2-wheeler", "camvid_strict", "mostly motorcycles, which the strict protocol ignores"),
    (".*", "rider", "camvid_strict|mapillary.*", "bicyclists, motorcyclists or others: it depends on the country"),
    (
        ".*",
        "[Tt]raffic ?[Ss]ign( .Front.)?|SignSymbol",
        "coco_stuff",
        "COCO-Stuff has stop signs only: few of all signs",
    ),
    ("camvid", "Building", "sun_rgbd", "mostly houses from outside; only its walls have a class there"),
    ("camvid.*", "Bicyclist", "sun_rgbd", "vehicle and rider in one class, the vehicle prevails"),
    ("mapillary_vistas", "Rail Track", STREET, "mostly railway, which these sets ignore; tram tracks are part of road"),
    ("mapillary_vistas", "Other Vehicle", ".*", "autorickshaws or others: it depends on the country"),
    ("mapillary_vistas", "Ground Animal", "coco_stuff", "which animals prevail is in no table"),
    ("mapillary_vistas", "Water", "coco_stuff", "rivers, sea or puddles: it depends on the place"),
    ("sun_rgbd", "floor mat", "coco_stuff", "rugs, mats and carpets are one class here and three there"),
    ("sun_rgbd", "bag", "coco_stuff", "handbags, backpacks and suitcases are one class here and three there"),
]
#: The same for classes that hold more than 1 % of the pixels and have nothing in common with any class of the target.
IGNORED_AS_UNRELATED = [
    (".*", "terrain", "camvid.*", "CamVid has no terrain: void there"),
    (".*", "pole|Pole", "coco_stuff", "COCO-Stuff has no poles"),
    (".*", "truck|bus", "camvid_strict", "ignored by the strict protocol"),
    (".*", "(?!wall|person|Building).*", "sun_rgbd", "an indoor set"),
]
#: Pairs of classes with one name that mean different things on purpose: (dataset, class, dataset, class, reason).
SAME_NAME_APART: list[tuple[str, str, str, str, str]] = []
#: Names that official tables use for one another (WildDash 2 policy, IDD's label table, MSeg, RVC), besides case,
#: spaces, punctuation and COCO's endings "-other", "-stuff".
ALIASES = [
    {"train", "onrails"},
    {"traffic sign", "traffic sign front", "signsymbol"},
    {"person", "pedestrian"},
    {"vegetation", "tree"},
    {"sidewalk", "pavement"},
    {"pole", "column pole"},
    {"guard rail", "guardrail"},
    {"street light", "streetlight"},
    {"road marking", "lane marking general"},
    {"couch", "sofa"},
    {"tv", "television"},
    {"refrigerator", "refridgerator"},
    {"cardboard", "box"},
    {"blinds", "window blind"},
    {"books", "book"},
    {"shelves", "shelf"},
]


@pytest.fixture(scope="module")
def spaces():
    """Dataset -> label space; the toy sets and UniSeg's spellings of the same classes are left out."""
    use_taxonomy("")
    entries = [MetadataCatalog.get(name) for name in register_packaged()]
    return {m.dataset: m.label_space for m in entries if not m.dataset.startswith(("toy", "uniseg"))}


def fits(line, *names: str) -> bool:
    return all(re.fullmatch(pattern, name) for pattern, name in zip(line, names))


@pytest.fixture(scope="module")
def shares(samples):
    """Dataset -> (C,) share of the labelled pixels of each class, from real files (for ADE20K: published)."""
    found = {}
    for path in ("camvid_sample", "bdd100k_sample", "kitti_sample", "coco_stuff_sample"):
        spec = load_spec(SAMPLES / f"{path}.yaml")
        reader, counts = LabelReader.from_spec(spec), np.zeros(256, np.int64)
        records = [r for split in spec.splits.values() for r in list_pairs(split, str(samples)) if label_path(r)]
        for record in records[:: max(1, len(records) // 20)]:
            stored = reader.decode(open_file(label_path(record)))
            counts += np.bincount(reader.to_local(stored, record).ravel(), minlength=256)
        found[spec.dataset] = counts[: len(spec.classes)] / counts[: len(spec.classes)].sum()
    found["cityscapes"] = np.maximum(found["bdd100k"], found["kitti"])  # the same classes, seen by two other cameras
    return found


def test_no_class_is_ignored_where_a_wider_one_is_mapped(spaces):
    """A class inside a wider one whose main content it holds goes where the wider one goes."""
    rows = [(d, i, frozenset(np.flatnonzero(r))) for d, s in spaces.items() for i, r in enumerate(s.membership)]
    tables = {(a, b): remap(spaces[a], spaces[b]) for a, b in itertools.permutations(spaces, 2)}
    compared = 0
    for (narrow, i, inside), (wide, j, outside) in itertools.product(rows, rows):
        main = spaces[wide].main_universal[j]
        if not inside < outside or main not in inside or spaces[narrow].main_universal[i] not in (main, -1):
            continue
        for target in spaces.keys() - {narrow, wide}:
            if tables[wide, target][j] != IGNORE:
                compared += 1
                message = (narrow, spaces[narrow].classes[i], wide, spaces[wide].classes[j], target)
                assert tables[narrow, target][i] != IGNORE, message
    assert compared > 1000


def test_what_remapping_ignores_has_a_reason(spaces, shares):
    used = set()
    for a, b in itertools.permutations(spaces, 2):
        source, codes, table = spaces[a], relation(spaces[a], spaces[b]), remap(spaces[a], spaces[b])
        for i in np.flatnonzero(table == IGNORE):
            share = shares[a][i] if a in shares else None
            related = (codes[i] != DISJOINT).any()
            if (share is None and not related) or (share is not None and share <= 0.01):
                continue
            if a == "coco_stuff" and not related:
                continue  # indoor things, animals, food: no street or SUN RGB-D class is named like them (below)
            lines = IGNORED_THOUGH_RELATED if related else IGNORED_AS_UNRELATED
            reasons = [line for line in lines if fits(line, a, source.classes[i], b)]
            met = [spaces[b].classes[j] for j in np.flatnonzero(codes[i])]
            assert reasons, f"{a}: {source.classes[i]} ({share}) is ignored in {b}, where {met} have a part of it"
            used.update(reasons)
    unused = [line for line in IGNORED_THOUGH_RELATED + IGNORED_AS_UNRELATED if line not in used]
    assert not unused


def plain(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip().removesuffix(" other").removesuffix(" stuff")
    known = next((min(group) for group in ALIASES if words in group), words)
    return known.replace(" ", "")


def test_classes_of_one_name_have_something_in_common(spaces):
    used, compared = set(), 0
    for a, b in itertools.combinations(spaces, 2):
        codes = relation(spaces[a], spaces[b])
        for (i, x), (j, y) in itertools.product(enumerate(spaces[a].classes), enumerate(spaces[b].classes)):
            if plain(x) != plain(y):
                continue
            compared += 1
            lines = [line for line in SAME_NAME_APART if line[:4] in {(a, x, b, y), (b, y, a, x)}]
            assert (codes[i, j] != DISJOINT) != bool(lines), (a, x, b, y)
            used.update(lines)
    assert compared > 500 and used == set(SAME_NAME_APART)


def test_large_street_classes_go_where_their_names_say(spaces):
    def target(a, name, b):
        new = remap(spaces[a], spaces[b])[spaces[a].classes.index(name)]
        return None if new == IGNORE else spaces[b].classes[new]

    expected = {"sky": "sky-other", "building": "building-other", "wall": "wall-other", "vegetation": "tree"}
    assert {name: target("cityscapes", name, "coco_stuff") for name in expected} == expected
    assert target("cityscapes", "pole", "coco_stuff") is None  # there is none
    for a in ("cityscapes", "idd"):
        assert (target(a, "car", "wilddash2"), target(a, "truck", "wilddash2")) == ("car", "truck")
    assert target("cityscapes", "pole", "mapillary_vistas") == "Pole"
    for name in ("Pedestrian Area", "Traffic Sign Frame"):
        assert target("mapillary_vistas", name, "wilddash2") == {"P": "road", "T": "pole"}[name[0]]
        assert target("mapillary_vistas", name, "cityscapes") is None  # the tables disagree
    for name in ("Service Lane", "Pothole", "Crosswalk - Plain"):
        assert target("mapillary_vistas", name, "camvid_strict") == "Road"
    assert target("camvid_strict", "Car", "wilddash2") == "car"


def raw_facts(samples: Path, name: str):
    path = samples.parent / "datasets" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the taxonomy is not compared with the raw label tables")
    return json.loads(path.read_text())


def test_classes_cover_what_their_raw_classes_mean(samples, spaces):
    """Concepts of raw classes, placed by other means: each lies inside the class that its raw id is read as."""
    taxonomy, compared = current_taxonomy(), 0
    where = {}
    for concept in raw_facts(samples, "relations")["concepts"]:
        for dataset, names in concept["equal_raw"].items():
            for name in names:
                where[dataset, name] = concept["id"]
    for dataset in ("cityscapes", "idd", "wilddash2", "kitti"):
        for raw in raw_facts(samples, dataset)["raw_classes"]:
            concept = where.get((dataset, raw["name"]))
            if concept not in taxonomy.concepts or raw["id"] < 0:
                continue
            local = int(load_spec(dataset).raw_to_local[raw["id"]])
            inside = spaces[dataset].membership[:, sorted(taxonomy.leaves(concept))]
            expected = [] if local == IGNORE else [local]
            assert np.flatnonzero(inside.any(1)).tolist() == expected, (dataset, raw["name"], concept)
            assert inside[expected].all(), (dataset, raw["name"], concept)
            compared += 1
    assert compared > 100
