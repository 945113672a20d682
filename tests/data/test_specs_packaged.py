"""The packaged specs against facts from elsewhere.

Sources: the official tables of cityscapesscripts, Detectron2's own metadata, the real samples, and machine-readable
facts about the datasets that lie beside the samples (folder ``datasets`` next to the one that MULTISEG_SAMPLES names).
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from cityscapesscripts.helpers import labels as cityscapes_labels
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES, _get_builtin_metadata
from PIL import Image

from multiseg_d2.data.files import list_pairs
from multiseg_d2.data.spec import load_spec, packaged_specs
from multiseg_d2.label_space import IGNORE, ILLEGAL
from multiseg_d2.taxonomy import Taxonomy

PACKAGE = Path(__file__).parents[2] / "multiseg_d2" / "data"
SAMPLE_SPECS = sorted((Path(__file__).parents[2] / "datasets" / "samples").glob("*.yaml"))
#: Layouts and label spaces of real datasets; what a spec in UniSeg's spelling means is in tests/test_unified.py.
REAL = [name for name in packaged_specs() if not name.startswith(("toy_", "uniseg_"))]
#: Specs that read the main layout of the facts of the same name; of CamVid that is the 32-colour release.
MAIN = {
    **{
        n: n
        for n in ("cityscapes", "bdd100k", "idd", "coco_stuff", "sun_rgbd", "kitti", "wilddash2", "mapillary_vistas")
    },
    **{n: n for n in ("ade20k", "acdc", "dark_zurich", "gta5", "synthia", "mapillary_vistas_v20")},
    "camvid_full": "camvid",
}
#: Their label files hold train ids, whatever other ids the facts list.
TRAIN_IDS = ("bdd100k", "bdd100k_seg", "cityscapes_trainids", "acdc", "dark_zurich")
#: Splits without labels, where that is not the test split alone.
UNLABELLED = {
    "acdc": {"test", "fog_test", "night_test", "rain_test", "snow_test"},
    "dark_zurich": {"test", "train", "day_train", "twilight_train", "night_train"},
}


@pytest.fixture(scope="module")
def facts(samples):
    """Name of a dataset -> facts."""
    folder = samples.parent / "datasets"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: packaged specs are not compared with the facts about the datasets")

    def read(name):
        file = {"mapillary_vistas_v20": "mapillary_vistas", "cityscapes16": "cityscapes"}.get(name, name)
        return in_one_form(name, json.loads((folder / f"{file}.json").read_text()))

    return read


def in_one_form(name: str, facts: dict) -> dict:
    """Facts that were written down later, in the form of the others."""
    if name == "mapillary_vistas_v20":
        splits = json.loads(json.dumps(facts["splits"]).replace("v1.2", "v2.0"))
        return {**facts, **facts["v2_0"], "splits": splits}
    if name == "synthia":
        facts["eval_classes"] = facts["eval_classes_16"]
        by_raw = {i: c["index"] for c in facts["eval_classes"] for i in (c["label_id"], *c.get("also", ()))}
        facts["raw_classes"] = [{"id": c["id"], "train_id": by_raw.get(c["id"], 255)} for c in facts["raw_classes"]]
        assert facts["ignore_ids"]["raw_16"] == [c["id"] for c in facts["raw_classes"] if c["train_id"] == 255]
    if name == "gta5":
        facts["raw_classes"] = [{"id": i, "train_id": 255} for i in facts["ignore_ids"]["raw"]]
        facts["raw_classes"] += [{"id": c["label_id"], "train_id": c["index"]} for c in facts["eval_classes"]]
    return facts


def decoded(spec) -> dict[tuple[int, int, int], int]:
    """RGB in the label files -> local id, for encoding color."""
    packed, raw_ids = spec.color_table()
    return {
        (p >> 16, p >> 8 & 255, p & 255): int(spec.raw_to_local[r]) for p, r in zip(packed.tolist(), raw_ids.tolist())
    }


# ---- every spec ----


@pytest.mark.parametrize("name", packaged_specs())
def test_every_spec(name):
    spec = load_spec(name)
    assert spec.name == name == Path(spec.path).stem
    assert spec.title


@pytest.mark.parametrize("name", REAL)
def test_every_real_dataset(name):
    spec = load_spec(name)
    assert spec.homepage and spec.licence
    text = Path(spec.path).read_text()
    assert text.startswith("# "), "a spec begins with what a reader must know"
    assert not re.search(r"\t| $", text, re.MULTILINE) and max(map(len, text.splitlines())) <= 120
    for split in spec.splits.values():
        written = {("wilddash2", "train"), ("wilddash2", "val"), ("gta5", "paired")}  # by scripts in datasets/
        assert split.count or (spec.dataset, split.name) in written
        folders = {p.split("/")[0] for p in (*split.images, *split.labels)}
        assert len(folders) == 1 and not folders.pop().startswith("/")  # one folder of its own below the data root
    unlabelled = {"test", "benchmark"} if name.split("_")[0] not in ("camvid", "sun") else set()
    unlabelled = UNLABELLED.get(name, unlabelled)
    assert {s.name for s in spec.splits.values() if s.annotation == "none"} == unlabelled & set(spec.splits)


@pytest.mark.parametrize("name", REAL)
def test_taxonomy_lists_exactly_the_classes(name):
    spec, taxonomy = load_spec(name), Taxonomy.load(PACKAGE / "taxonomy.yaml")
    listed = {c for concept in taxonomy.concepts.values() for c in concept.classes.get(spec.dataset, ())}
    assert listed == set(spec.class_names)
    assert not any(c.covers for c in spec.classes)  # said in one place only


def test_all_that_is_promised():
    datasets = {load_spec(name).dataset: len(load_spec(name).classes) for name in REAL}
    assert datasets == {
        "cityscapes": 19,
        "bdd100k": 19,
        "camvid": 11,
        "camvid_strict": 11,
        "idd": 26,
        "idd_level1": 7,
        "idd_level2": 16,
        "idd_level4": 30,
        "coco_stuff": 171,
        "sun_rgbd": 37,
        "kitti": 19,
        "wilddash2": 26,
        "mapillary_vistas": 65,
        "mapillary_vistas_v20": 116,
        "ade20k": 150,
        "acdc": 19,
        "dark_zurich": 19,
        "gta5": 19,
        "synthia": 16,
        "cityscapes16": 16,
    }


# ---- facts about the datasets ----


@pytest.mark.parametrize(("name", "source"), MAIN.items())
def test_classes_as_the_facts_say(facts, name, source):
    spec, expected = load_spec(name), facts(source)["eval_classes"]
    assert [c["index"] for c in expected] == list(range(len(spec.classes)))
    assert list(spec.class_names) == [c["name"] for c in expected]
    assert spec.colors.tolist() == [c["color"] for c in expected]


@pytest.mark.parametrize(("name", "source"), [(n, s) for n, s in MAIN.items() if n not in (*TRAIN_IDS, "camvid_full")])
def test_raw_ids_as_the_facts_say(facts, name, source):
    table = load_spec(name).raw_to_local
    raw_classes = {c["id"]: c for c in facts(source)["raw_classes"] if c["id"] >= 0}
    never = {i - 1 for i in facts(source)["ignore_ids"].get("never_annotated_coco_ids", ())}
    assert len(never) == (11 if name == "coco_stuff" else 0) and len(raw_classes) >= 23
    for raw_id, local_id in enumerate(table.tolist()):
        if raw_id in raw_classes and raw_id not in never:
            assert local_id == raw_classes[raw_id]["train_id"]
        else:
            assert local_id == (IGNORE if name == "coco_stuff" and raw_id == 255 else ILLEGAL)


def test_masks_of_train_ids():
    for name in TRAIN_IDS:
        table = load_spec(name).raw_to_local
        assert table[:19].tolist() == list(range(19)) and table[255] == IGNORE
        assert (np.delete(table, [*range(19), 255]) == ILLEGAL).all()


def test_camvid_as_the_facts_say(facts):
    camvid = facts("camvid")
    full, strict = load_spec("camvid_full"), load_spec("camvid_strict")
    assert decoded(full) == {tuple(c["color"]): c["train_id"] for c in camvid["raw_classes"]}
    order = camvid["eval_variants"]["strict_11"]["order"]
    assert list(strict.class_names) == order
    expected = {
        tuple(c["color"]): order.index(c["name"]) if c["name"] in order else IGNORE for c in camvid["raw_classes"]
    }
    assert decoded(strict) == expected
    for spec in (full, strict):  # "any colour not in the table" is ignored: the official rule
        assert spec.raw_to_local[32:].tolist() == [IGNORE] * (65536 - 32)
    segnet = load_spec("camvid")
    assert segnet.raw_to_local[:12].tolist() == [*range(11), IGNORE] and (segnet.raw_to_local[12:] == ILLEGAL).all()
    assert segnet.class_names == full.class_names and segnet.colors.tolist() == full.colors.tolist()
    for name, ids in camvid["split_ids"].items():
        for spec in (full, strict):
            assert Path(spec.splits[name].ids).read_text().split() == ids.split()


@pytest.mark.parametrize("name", REAL)
def test_counts_as_the_facts_say(facts, name):
    """Official numbers; a main layout has every split, another layout may have fewer."""
    spec = load_spec(name)
    source = re.sub("_(strict|level.)$", "", spec.dataset)  # variants of a label space have the splits of the dataset
    part = "I (IDD_Segmentation)" if name == "idd_part1" else None
    expected = {k: s for k, s in facts(source)["splits"].items() if k in spec.splits or name in MAIN}
    counts = {split: n["parts"][part] if part else n["images"] for split, n in expected.items()}
    parts = {"acdc", "dark_zurich"} & {name}  # their conditions have a test of their own
    assert {s.name: s.count for s in spec.splits.values() if s.count and (not parts or s.name in counts)} == counts
    labelled = {split: n["annotation_available"] for split, n in expected.items()}
    assert {split: bool(spec.splits[split].labels) for split in expected} == labelled


def test_conditions_are_splits_of_their_own_and_together(facts):
    acdc, per_condition = load_spec("acdc"), facts("acdc")["images_per_condition"]
    for split in ("train", "val", "test"):
        parts = [acdc.splits[f"{condition}_{split}"] for condition in facts("acdc")["conditions"]]
        assert {p.name.split("_")[0]: p.count for p in parts} == per_condition[split]
        whole = acdc.splits[split]
        assert whole.images == tuple(i for p in parts for i in p.images)
        assert whole.labels == tuple(i for p in parts for i in p.labels) and whole.count == sum(p.count for p in parts)
    zurich = load_spec("dark_zurich")
    parts = [zurich.splits[f"{time}_train"] for time in ("day", "twilight", "night")]
    assert zurich.splits["train"].images == tuple(i for p in parts for i in p.images)
    text = ", ".join(f"{p.count} {p.name.split('_')[0]}" for p in parts)
    assert text == facts("dark_zurich")["splits"]["train"]["note"] and sum(p.count for p in parts) == 8377


def test_adaptation_from_synthia(facts):
    """16 classes with Cityscapes' meanings on both sides, 13 of them in the score beside the mean of all."""
    synthia, target, whole = load_spec("synthia"), load_spec("cityscapes16"), load_spec("cityscapes")
    assert synthia.class_names == target.class_names and synthia.colors.tolist() == target.colors.tolist()
    for name, raw_ids in ((c.name, c.raw_ids) for c in target.classes):
        assert raw_ids == whole.classes[whole.class_names.index(name)].raw_ids
    left_out = set(whole.class_names) - set(target.class_names)
    assert left_out == {"terrain", "truck", "train"}
    assert set(target.ignore_ids) == set(whole.ignore_ids) | {22, 27, 31}
    groups = target.evaluation.groupings["thirteen"]
    assert list(groups) == facts("synthia")["thirteen"] and all(list(names) == [n] for n, names in groups.items())
    assert set(target.class_names) - set(groups) == {"wall", "fence", "pole"}


def ids_of(pattern: str, path: str) -> str:
    """Id of a path that ends in ``path``, whatever the folder of the dataset is called."""
    before, after = pattern.split("{id}")
    heads = [before.split("/", n)[-1] for n in range(before.count("/") + 1)]
    matches = [re.fullmatch(f"{re.escape(h)}(.+){re.escape(after)}", path) for h in heads]
    return next(m[1] for m in matches if m)


def one_of_several(path: str | None, split) -> str | None:
    """``a/{x,y}/*.png`` -> ``a/x/*.png``, after checking that the split has a pattern for each of x and y."""
    if path is None or "{" not in path:
        return path
    before, inner, after = re.fullmatch(r"([^{]*)\{([^}]*)\}(.*)", path).groups()
    if re.search(r"[A-Z]", inner):  # sequences of one folder, which is a part of the id
        return before + inner.split(",")[0] + after
    patterns = split.images if "rgb" in path else split.labels
    assert [p.split("/", 1)[1].split(before)[1].split("/")[0] for p in patterns] == inner.split(",")
    return before + inner.split(",")[0] + after


@pytest.mark.parametrize(("name", "source"), MAIN.items())
def test_layout_as_the_facts_say(facts, name, source):
    """The patterns give an image and its label, written as the facts write them, the same id."""
    spec = load_spec(name)
    for split, fact in facts(source)["splits"].items():
        image, label = fact["image_glob"].replace("img-*", "img-000001"), fact["label_glob"]
        image, label = (re.sub(r"ADE_[a-z]+_\*", "*", path) if path else path for path in (image, label))
        if "{" in image:  # one folder of several: the splits of that folder alone
            image, label = (one_of_several(path, spec.splits[split]) for path in (image, label))
        for pattern in spec.splits[split].images[:1]:
            path = image[:-1] + pattern.rsplit(".", 1)[1] if image.endswith(".*") else image
            image_id = ids_of(pattern, path.replace("*", "x"))
        if not spec.splits[split].labels:
            continue
        pattern = spec.splits[split].labels[0]
        label = {
            "idd": label.replace("_polygons.json", "_labelids.png"),
            "sun_rgbd": label.replace("*", "00000001"),
        }.get(name, label)
        assert ids_of(pattern, label.replace("*", "x")) == image_id


@pytest.mark.parametrize(
    ("name", "image", "label", "image_id"),
    [
        (
            "cityscapes",
            "leftImg8bit/val/{}_leftImg8bit.png",
            "gtFine/val/{}_gtFine_labelIds.png",
            "jena/jena_000000_000294",
        ),
        (
            "cityscapes_trainids",
            "leftImg8bit/val/{}_leftImg8bit.png",
            "gtFine/val/{}_gtFine_labelTrainIds.png",
            "a/a_0_1",
        ),
        ("bdd100k", "images/10k/val/{}.jpg", "labels/sem_seg/masks/val/{}.png", "7d06fefd-f7be05a6"),
        ("bdd100k_seg", "seg/images/val/{}.jpg", "seg/labels/val/{}_train_id.png", "7d06fefd-f7be05a6"),
        ("camvid", "val/{}.png", "valannot/{}.png", "0016E5_08370"),
        ("camvid_full", "701_StillsRaw_full/{}.png", "LabeledApproved_full/{}_L.png", "0016E5_08370"),
        ("idd", "leftImg8bit/val/{}_leftImg8bit.png", "gtFine/val/{}_gtFine_labelids.png", "0/005506"),
        ("idd", "leftImg8bit/val/{}_leftImg8bit.jpg", "gtFine/val/{}_gtFine_labelids.png", "9/frame0029"),
        ("idd_part1", "leftImg8bit/val/{}_leftImg8bit.png", "gtFine/val/{}_gtFine_labelids.png", "0/005506"),
        (
            "idd_level3ids",
            "leftImg8bit/val/{}_leftImg8bit.jpg",
            "gtFine/val/{}_gtFine_labellevel3Ids.png",
            "9/frame0029",
        ),
        ("coco_stuff", "val2017/{}.jpg", "annotations/val2017/{}.png", "000000000139"),
        ("coco_stuff_maps", "val2017/{}.jpg", "stuffthingmaps/val2017/{}.png", "000000000139"),
        ("wilddash2", "images/{}.jpg", "panoptic/{}.png", "ae0013_100000"),
        ("mapillary_vistas", "validation/images/{}.jpg", "validation/v1.2/labels/{}.png", "-a_B"),
        ("mapillary_vistas_v12", "validation/images/{}.jpg", "validation/labels/{}.png", "-a_B"),
        ("mapillary_vistas_v20", "validation/images/{}.jpg", "validation/v2.0/labels/{}.png", "-a_B"),
        (
            "ade20k",
            "ADEChallengeData2016/images/validation/{}.jpg",
            "ADEChallengeData2016/annotations/validation/{}.png",
            "ADE_val_00000001",
        ),
        ("acdc", "rgb_anon/night/val/{}_rgb_anon.png", "gt/night/val/{}_gt_labelTrainIds.png", "GP03/GP03_frame_1"),
        ("dark_zurich", "rgb_anon/val/night/{}_rgb_anon.png", "gt/val/night/{}_gt_labelTrainIds.png", "GP/GP_frame_1"),
        ("gta5", "images/{}.png", "labels/{}.png", "00001"),
        ("synthia", "RGB/{}.png", "GT/LABELS/{}.png", "0000000"),
    ],
)
def test_names_of_files(tmp_path, name, image, label, image_id):
    """One pair, laid out as the dataset is, is found."""
    splits = load_spec(name).splits
    split = splits.get("val", splits["train"])
    root = split.images[0].split("/")[0]
    for folder in {p.split("{id}")[0].rpartition("/")[0] for p in (*split.images, *split.labels)}:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for path in (image, label):
        (tmp_path / root / path.format(image_id)).parent.mkdir(exist_ok=True)
        (tmp_path / root / path.format(image_id)).touch()
    if name == "camvid_full":
        split = dataclasses.replace(split, ids=(image_id,))
    if name == "wilddash2":
        (tmp_path / root / "val.txt").write_text(image_id)
        entry = {"file_name": f"{image_id}.png", "segments_info": []}
        (tmp_path / root / "panoptic.json").write_text(json.dumps({"annotations": [entry]}))
    (record,) = list_pairs(split, str(tmp_path))
    assert record["image_id"] == image_id


def test_idd_levels_nest(facts):
    """Levels are the columns of the table; the groupings of level 3 are the levels 2 and 1, class by class."""
    idd, raw = load_spec("idd"), {c["id"]: c for c in facts("idd")["raw_classes"]}
    for level in (1, 2, 3, 4):
        table = load_spec("idd" if level == 3 else f"idd_level{level}").raw_to_local
        assert table[:40].tolist() == [raw[i][f"level{level}_id"] for i in range(40)]
        assert (table[40:] == ILLEGAL).all()
    for level in (1, 2):
        coarse = load_spec(f"idd_level{level}")
        groups = idd.evaluation.groupings[f"level{level}"]
        assert list(groups) == list(coarse.class_names)
        for raw_id in range(35):
            fine = idd.class_names[idd.raw_to_local[raw_id]]
            assert fine in groups[coarse.class_names[coarse.raw_to_local[raw_id]]]


def test_submission_ids_as_the_facts_say(facts):
    for name, void in (("cityscapes", 0), ("kitti", 0), ("wilddash2", 0), ("ade20k", 0), ("mapillary_vistas_v20", 123)):
        evaluation = load_spec(name).evaluation
        assert list(evaluation.submission_ids) == [c["label_id"] for c in facts(name)["eval_classes"]]
        assert evaluation.submission_void == void
    names = {c["id"]: c["name"].replace(" ", "").replace("-", "") for c in facts("wilddash2")["benchmark_labels"]}
    wilddash2 = load_spec("wilddash2")
    assert [names[i] for i in wilddash2.evaluation.submission_ids] == list(wilddash2.class_names)
    for name in ("bdd100k", "idd", "mapillary_vistas", "acdc", "dark_zurich"):  # servers that take local ids
        assert load_spec(name).evaluation.submission_ids is None


# ---- official tables ----


def test_cityscapes_and_kitti_as_cityscapesscripts_say():
    table = cityscapes_labels.labels
    for name in ("cityscapes", "kitti"):
        spec = load_spec(name)
        for label in table:
            if label.id >= 0:
                assert spec.raw_to_local[label.id] == label.trainId % 256
        assert (spec.raw_to_local[34:] == ILLEGAL).all()
        for local_id, cls in enumerate(spec.classes):
            official = cityscapes_labels.trainId2label[local_id]
            assert (cls.name, cls.color) == (official.name, official.color)
            assert spec.evaluation.submission_ids[local_id] == official.id
        categories = {
            c: [x.name for x in table if x.category == c and not x.ignoreInEval]
            for c in cityscapes_labels.category2labels
        }
        groups = {k: list(v) for k, v in spec.evaluation.groupings["category"].items()}
        assert groups == {k: v for k, v in categories.items() if v}
    assert load_spec("cityscapes").class_names == load_spec("bdd100k").class_names
    assert load_spec("cityscapes").colors.tolist() == load_spec("bdd100k").colors.tolist()
    assert list(load_spec("cityscapes").class_names) == _get_builtin_metadata("cityscapes")["stuff_classes"]


def test_coco_stuff_as_detectron2_says():
    """Things have COCO's ids; stuff classes that the panoptic set did not merge keep id and name."""
    spec = load_spec("coco_stuff")
    by_id = {c.raw_ids[0] + 1: c.name for c in spec.classes}
    things = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}
    assert len(things) == 80 and {i: n for i, n in by_id.items() if i <= 91} == things
    kept = {c["id"]: c["name"] for c in COCO_CATEGORIES if not c["isthing"] and not c["name"].endswith("-merged")}
    assert len(kept) == 36 and {i: by_id[i] for i in kept} == kept
    assert sorted(by_id) == sorted([*things, *range(92, 183)])


def test_coco_panoptic_sample_as_detectron2_says():
    spec = load_spec(SAMPLE_SPECS[0].parent / "coco_panoptic_sample.yaml")
    expected = [(c["name"], tuple(c["color"]), (c["id"],)) for c in COCO_CATEGORIES]
    assert [(c.name, c.color, c.raw_ids) for c in spec.classes] == expected
    assert all(c.covers for c in spec.classes)


# ---- real files ----


def raw_values(record, spec) -> set:
    """Values of a label file, read with Pillow alone: ids, or colours as (R, G, B)."""
    image = Image.open(record.get("sem_seg_file_name") or record["pan_seg_file_name"])
    if spec.encoding == "index":
        return set(np.unique(np.asarray(image)).tolist())
    return {color for _, color in image.convert("RGB").getcolors(2**20)}


@pytest.mark.parametrize("path", SAMPLE_SPECS, ids=lambda p: p.stem)
def test_every_value_in_the_real_labels_is_known(samples, path):
    spec, seen = load_spec(path), set()
    for split in (s for s in spec.splits.values() if s.annotation == "pixel"):
        for record in list_pairs(split, str(samples))[:: 10 if spec.dataset == "camvid" else 1]:
            for value in raw_values(record, spec):
                if spec.encoding == "index":
                    local_id = int(spec.raw_to_local[value])
                elif spec.encoding == "color":
                    local_id = decoded(spec)[value]
                else:
                    category = {s["id"]: s["category_id"] for s in record["segments_info"]} | {0: 0}
                    local_id = int(spec.raw_to_local[category[value[0] + 256 * value[1] + 65536 * value[2]]])
                assert local_id != ILLEGAL, (record["file_name"], value)
                seen.add(local_id)
    counted = {"camvid_sample": 11, "bdd100k_sample": 18, "coco_stuff_sample": 87, "comma10k_sample": 5}  # by others
    assert len(seen - {IGNORE}) == counted.get(spec.name, len(seen - {IGNORE}))
