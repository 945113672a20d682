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
CITYSCAPES = "cityscapes|cityscapes16|bdd100k|kitti|acdc|dark_zurich|gta5|synthia"
STREET = CITYSCAPES + "|camvid|camvid_strict|idd.*|mapillary.*|wilddash2"

#: (datasets, classes, target datasets, reason), regular expressions: classes that remapping ignores although they have
#: something in common with classes of the target, and may hold more than 1 % of the pixels.
IGNORED_THOUGH_RELATED = [
    ("idd_level1", ".*", ".*", "seven classes that each merge many things: no table says which holds most pixels"),
    ("idd_level2", "curb-wall|fence-guard rail|info-structures|obs-fallback|large-vehicle", ".*", "as idd_level1"),
    ("idd.*", "obs-str-bar-fallback", ".*", "rest class of a dozen kinds of things, none of which is known to prevail"),
    ("idd.*", "vehicle fallback", STREET + "|coco_stuff|ade20k", "mostly other vehicles, which these sets ignore"),
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
    (
        "camvid",
        "SignSymbol",
        "ade20k",
        "mostly traffic signs, which ADE20K mixes with shop signs in a class left apart",
    ),
    ("camvid", "Building", "sun_rgbd", "mostly houses from outside; only its walls have a class there"),
    ("camvid.*", "Bicyclist", "sun_rgbd", "vehicle and rider in one class, the vehicle prevails"),
    (
        "mapillary.*",
        "Rail Track",
        STREET + "|ade20k",
        "mostly railway, which these sets ignore; tram tracks are part of road",
    ),
    ("mapillary.*", "Other Vehicle", ".*", "autorickshaws or others: it depends on the country"),
    ("mapillary.*", "Ground Animal", "coco_stuff", "which animals prevail is in no table"),
    ("mapillary.*", "Water", "coco_stuff|ade20k", "rivers, sea or puddles: it depends on the place"),
    ("sun_rgbd", "floor mat", "coco_stuff", "rugs, mats and carpets are one class here and three there"),
    ("sun_rgbd", "bag", "coco_stuff|ade20k", "handbags, backpacks and suitcases in one class; there, they are apart"),
    (
        "mapillary_vistas|wilddash2",
        "Lane Marking - General|roadmarking",
        ".*_v20",
        "two dozen kinds: no table has shares",
    ),
]
#: The same for classes that hold more than 1 % of the pixels and have nothing in common with any class of the target.
IGNORED_AS_UNRELATED = [
    (".*", "terrain", "camvid.*", "CamVid has no terrain: void there"),
    (".*", "pole|Pole", "coco_stuff", "COCO-Stuff has no poles"),
    (".*", "truck|bus|wall.*", "camvid_strict", "ignored by the strict protocol"),
    (".*", "terrain|grass|earth|playingfield|truck", "synthia|cityscapes16", "none of the 16 classes"),
    ("ade20k|coco_stuff", "grass|earth|playingfield", "camvid.*", "as terrain"),
    ("ade20k|coco_stuff", "mountain|sea|snow|cat|zebra|bridge", STREET, "ignored by most street sets"),
    ("ade20k", "windowpane|door", STREET, "part of a building there, but no public table says so"),
    ("coco_stuff", "door-stuff", STREET, "as ADE20K's door"),
    ("ade20k", "floor|ceiling|bed|cabinet|table|curtain|chair", STREET, "indoors"),
    ("ade20k", "plant", "camvid_strict", "its tree is trees only"),
    ("coco_stuff", "bed|laptop|oven|carpet|ceiling-other|desk-stuff|floor-other|rug", STREET, "indoors"),
    ("coco_stuff", "furniture-other|ground-other|metal", STREET + "|ade20k", "a rest class or a material"),
    ("coco_stuff", "snow|playingfield", "ade20k", "ADE20K has no such class"),
    (".*", ".*", "sun_rgbd", "an indoor set of 37 classes"),
]
#: Pairs of classes with one name that mean different things on purpose: (dataset, class, dataset, class, reason).
SAME_NAME_APART = [
    (
        "coco_stuff",
        "ground-other",
        "mapillary_vistas_v20",
        "Ground",
        "any other ground there, void beside a street here",
    ),
]
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


#: (dataset, class, dataset, class, relation before, relation now, reason), regular expressions: what changed since the
#: first version of the taxonomy, which knew the 13 label spaces of nine datasets (tests/data/memberships_v1.json).
CHANGED = [
    ("wilddash2", "road", "map.*", "Pedestrian Area", "disjoint", "superset", "raw class 70 is read as road"),
    ("wilddash2", "road", ".*", "[Rr]oad|drivable", "subset", "overlap", "pedestrian areas are no road elsewhere"),
    ("wilddash2", "pole", "map.*", "Traffic Sign Frame", "disjoint", "superset", "raw class 45 is read as pole"),
    ("wilddash2", "pole", "idd|idd_level4", "pole", "equal", "superset", "sign frames are no pole there"),
    ("wilddash2", "pole", "idd_level[12]", "obs-fallback|road-side-objs", "subset", "overlap", "as above"),
    ("wilddash2", "pickup", ".*", "[Tt]ruck|large-vehicle|vehicles", "disjoint", "subset", "policy of WildDash 2"),
    ("camvid_strict", "Car", "wilddash2", "car", "disjoint", "subset", "both leave vans out"),
    ("camvid_strict", "Road", "map.*", "Road", "equal", "superset", "service lanes and more are road, too"),
    (
        "camvid_strict",
        "Road",
        "map.*",
        "Crosswalk - Plain|Service Lane|Pothole|Catch Basin",
        "disjoint",
        "superset",
        "CamVid draws them as road",
    ),
    ("camvid_strict", "Road", "map.*", "Manhole|Bike Lane|Rail Track", "disjoint", "overlap", "the part in the road"),
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
    ade = raw_facts(samples, "ade20k")["raw_classes"][1:]
    found["ade20k"] = np.array([c["pixel_ratio"] for c in ade])
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


def test_partners_in_official_tables_have_something_in_common(samples, spaces):
    """WildDash 2's policy (to Cityscapes, IDD, Mapillary) and IDD's own column of Cityscapes ids, class by class."""
    idd = raw_facts(samples, "idd")
    local_of = {c["name"]: c["train_id"] for c in idd["raw_classes"]}
    mapillary = {c["full_name"]: c["name"] for c in raw_facts(samples, "mapillary_vistas")["eval_classes"]}
    pairs = {("idd", c["train_id"], "cityscapes", c["cs_train_id"], c["name"]) for c in idd["raw_classes"]}
    for raw in raw_facts(samples, "wilddash2")["raw_classes"]:
        own, name = raw["train_id"], raw["name"]
        pairs.add(("wilddash2", own, "cityscapes", raw["cityscapes_train_id"], name))
        pairs.add(("wilddash2", own, "idd", local_of.get(raw["idd_name"], IGNORE), name))
        partner = mapillary.get(raw["mapillary_v1_2_name"])
        if partner:
            pairs.add(("wilddash2", own, "mapillary_vistas", spaces["mapillary_vistas"].classes.index(partner), name))
    codes = {(a, b): relation(spaces[a], spaces[b]) for a, _, b, _, _ in pairs}
    apart = {
        (a, spaces[a].classes[i], b, spaces[b].classes[j], name)
        for a, i, b, j, name in pairs
        if IGNORE not in (i, j) and codes[a, b][i, j] == DISJOINT
    }
    assert not apart
    assert len([p for p in pairs if IGNORE not in (p[1], p[3])]) > 100


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


def relation_of(a: frozenset, b: frozenset) -> str:
    if not a & b:
        return "disjoint"
    return "equal" if a == b else "subset" if a < b else "superset" if a > b else "overlap"


def test_what_changed_since_the_first_taxonomy_has_a_reason(spaces):
    """All pairs of classes of the first 13 label spaces, by set algebra: as they were, but for the listed ones."""
    stored = json.loads((Path(__file__).parent / "memberships_v1.json").read_text())
    before = {(d, c): frozenset(ids.split(",")) for d, classes in stored.items() for c, ids in classes.items()}
    now = {
        (d, c): frozenset(np.flatnonzero(row))
        for d in stored
        for c, row in zip(spaces[d].classes, spaces[d].membership)
    }
    assert before.keys() == now.keys()
    back, used, changes = {"subset": "superset", "superset": "subset"}, set(), 0
    for a, b in itertools.combinations(before, 2):
        was, is_now = relation_of(before[a], before[b]), relation_of(now[a], now[b])
        if a[0] == b[0] or was == is_now:
            continue
        reverse = (*b, *a, back.get(was, was), back.get(is_now, is_now))
        lines = [line for line in CHANGED if fits(line[:6], *a, *b, was, is_now) or fits(line[:6], *reverse)]
        assert lines, (a, b, was, is_now)
        used.update(lines)
        changes += 1
    assert used == set(CHANGED) and changes == 33


def test_later_versions_lie_inside_earlier_ones(spaces):
    """Each label of Mapillary Vistas 2.0 is part of one of 1.2, but for those of which no public table says so."""
    old, new = spaces["mapillary_vistas"], spaces["mapillary_vistas_v20"]
    inside = remap(new, old)
    codes = relation(new, old)
    apart = {c for c, code in zip(new.classes, codes) if (code == DISJOINT).all()}
    assert apart == {
        *("Driveway", "Parking Aisle", "Road Shoulder", "Traffic Island", "Garage", "Parking Meter", "Traffic Cone"),
        *("Signage - Back", "Signage - Information", "Signage - Other", "Signage - Store", "Water Valve"),
        *("Dynamic", "Ground", "Static"),
    }
    for i, name in enumerate(new.classes):
        if name not in apart:
            assert inside[i] != IGNORE and codes[i, inside[i]] in (1, 2), name  # equal or subset
        if name in old.classes:
            assert old.classes[inside[i]] == name
    assert {old.classes[t] for t in set(inside.tolist()) - {IGNORE}} == set(old.classes)  # nothing of 1.2 is lost
