"""Drawn street scenes: picture and label agree, looks differ, label spaces conflict as planned, files are as said."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from multiseg_d2.data.decode import read_image
from multiseg_d2.data.labels import read_label, read_local_label
from multiseg_d2.data.spec import packaged_specs
from multiseg_d2.label_space import DISJOINT, EQUAL, OVERLAP, SUBSET, SUPERSET, relation, remap
from multiseg_d2.toy import CONCEPTS, LOOKS, SPLITS, ToyFilesError, draw_scene, draw_split_scene, write_toy
from multiseg_d2.toy import write as write_module
from multiseg_d2.toy.encode import MIN_PIXELS, concept_classes, encode_label, raw_label, toy_spec

HEIGHT, WIDTH = 64, 128
BY_NAME = {f"{s.folder}/{s.name}": s for s in SPLITS}
TOY_SPECS = [name for name in packaged_specs() if name.startswith("toy_")]
PIXEL_SPECS = ("toy_day", "toy_dusk", "toy_rain", "toy_night", "toy_concepts")


def scene(look="day", index=0, **changed):
    return draw_scene(replace(LOOKS[look], **changed), HEIGHT, WIDTH, (7, index), index)


def space(spec_name):
    spec = toy_spec(spec_name)
    return MetadataCatalog.get(next(iter(spec.splits.values())).entry).label_space


@pytest.fixture(scope="module")
def full_counts():
    """Concept counts per picture of the sets as drawn by default: name -> (images, concepts)."""
    counts = {}
    for name, split in BY_NAME.items():
        if split.labels or split.concepts:
            images = round(48 * split.share)
            drawn = (draw_split_scene(split, i, 96, 192).concept for i in range(images))
            counts[name] = np.stack([np.bincount(c.ravel(), minlength=len(CONCEPTS)) for c in drawn])
    return counts


# ---- drawings ----


def test_a_drawing_depends_on_its_own_number_only():
    split = BY_NAME["rain/train"]
    alone = draw_split_scene(split, 5, HEIGHT, WIDTH)
    for index in (0, 9, 3):
        draw_split_scene(BY_NAME["night/test"], index, HEIGHT, WIDTH)
    again = draw_split_scene(split, 5, HEIGHT, WIDTH)
    for a, b in zip((alone.image, alone.concept, alone.thing), (again.image, again.concept, again.thing)):
        np.testing.assert_array_equal(a, b)


def test_drawings_of_other_numbers_splits_and_seeds_differ():
    pictures = [
        draw_split_scene(BY_NAME[name], index, HEIGHT, WIDTH, seed).image.tobytes()
        for name, index, seed in [
            ("dusk/train", 0, 0), ("dusk/train", 1, 0), ("dusk/val", 0, 0), ("dusk/train", 0, 1), ("box/train", 0, 0)
        ]
    ]  # fmt: skip
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("size", [(32, 32), (96, 192), (60, 201), (300, 100)])
def test_any_size_is_drawn_whole(size):
    drawing = draw_scene(LOOKS["night"], *size, (1,))
    assert drawing.image.shape == (*size, 3) and drawing.image.dtype == np.uint8
    assert drawing.concept.shape == drawing.thing.shape == size
    assert drawing.concept.min() > 0  # the unlabelled own bonnet is in the rain look only


@pytest.mark.parametrize("look", LOOKS)
def test_labels_lie_where_the_edges_of_the_picture_are(look):
    """Grey-level steps between neighbouring pixels are largest across label borders, unless the label is shifted."""

    def contrast(image, label):
        steps = np.abs(np.diff(image.astype(float).mean(2), axis=1))
        border = label[:, 1:] != label[:, :-1]
        return steps[border].mean() / steps[~border].mean()

    ratios = np.zeros(7)
    for index in range(6):
        drawing = draw_scene(LOOKS[look], 96, 192, (3, index), index)
        for i, shift in enumerate(range(-3, 4)):
            rolled = np.roll(drawing.concept, shift, axis=1)[:, 4:-4]
            ratios[i] += contrast(drawing.image[:, 4:-4], rolled) / 6
    assert ratios.argmax() == 3, ratios
    assert ratios[3] > 1.5 * max(ratios[0], ratios[6]), ratios


def test_concepts_have_the_colours_that_they_are_painted_with():
    totals = {name: [] for name in CONCEPTS}
    for index in range(16):
        drawing = draw_scene(replace(LOOKS["day"], noise=0.0, slope=0.0), 96, 192, (11, index), index)
        for concept in np.unique(drawing.concept):
            totals[CONCEPTS[concept]].append(drawing.image[drawing.concept == concept])
    red, green, blue = range(3)
    mean = {name: np.concatenate(values).mean(0) for name, values in totals.items() if values}
    assert mean["sky"].argmax() == blue
    for plant in ("grass", "tree", "bush"):
        assert mean[plant].argmax() == green, plant
    assert mean["traffic_cone"].argmax() == red and mean["traffic_cone"][red] > 1.5 * mean["traffic_cone"][blue]
    assert mean["road_marking"].min() > 1.5 * mean["road_surface"].max()
    assert np.ptp(mean["road_surface"]) < 15  # grey
    assert mean["sidewalk_core"].mean() > 1.3 * mean["road_surface"].mean()


def test_light_colours_and_sensor_change_no_label():
    for index in range(3):
        day = scene("day", index)
        dark = {name: tuple(tuple(0.3 * c for c in rgb) for rgb in rgbs) for name, rgbs in LOOKS["day"].palette.items()}
        other = scene("day", index, palette=dark, light=(0.5, 0.4, 0.9), noise=0.1, blur=1.5, haze=0.05, contrast=0.5)
        np.testing.assert_array_equal(day.concept, other.concept)
        np.testing.assert_array_equal(day.thing, other.thing)
        assert np.abs(day.image.astype(int) - other.image).mean() > 20


def test_an_object_is_of_one_concept():
    for look, index in itertools.product(LOOKS, range(4)):
        drawing = scene(look, index)
        for thing in np.unique(drawing.thing)[1:]:
            assert len(np.unique(drawing.concept[drawing.thing == thing])) == 1


# ---- looks ----


def test_every_class_is_in_every_split(full_counts):
    for name, counts in full_counts.items():
        split = BY_NAME[name]
        for spec_name in {split.labels, "toy_concepts" if split.concepts else ""} - {""}:
            owners = concept_classes(spec_name)
            for local_id, class_name in enumerate(toy_spec(spec_name).class_names):
                pictures = (counts[:, owners == local_id].sum(1) > 0).sum()
                assert pictures >= 2, f"{name}: {class_name} is in {pictures} pictures"


def test_rare_classes_are_rare_and_looks_differ_in_what_is_about(full_counts):
    share = {n: dict(zip(CONCEPTS, c.sum(0) / c.sum())) for n, c in full_counts.items()}
    day, dusk = share["day/train"], share["dusk/train"]
    assert day["bicycle"] > 2 * dusk["bicycle"] and day["bicyclist"] > 1.5 * dusk["bicyclist"]
    assert dusk["motorcycle"] > 1.5 * day["motorcycle"]
    for name in ("day/train", "dusk/train"):
        assert share[name]["road_surface"] > 100 * share[name]["motorcyclist"]
        assert 0 < share[name]["bus"] < 0.02


def test_batch_norm_statistics_differ_more_between_looks_than_within():
    """Means and deviations after one random convolution: what a batch norm sees in the first layer."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 16, 5, bias=False)
    statistics = {}
    for look in LOOKS:
        pictures = [draw_scene(LOOKS[look], HEIGHT, WIDTH, (5, i), i).image for i in range(12)]
        with torch.no_grad():
            x = convolution(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255)
        groups = x.split(4)  # three batches of four images
        statistics[look] = torch.stack([torch.cat([g.mean((0, 2, 3)), g.std((0, 2, 3))]) for g in groups])
    for a, b in itertools.combinations(LOOKS, 2):
        between = (statistics[a].mean(0) - statistics[b].mean(0)).norm()
        within = max((s - s.mean(0)).norm(dim=1).mean() for s in (statistics[a], statistics[b]))
        factor = 1.5 if "evening" in (a, b) else 3  # evening is made to be near
        assert between > factor * within, f"{a} and {b}: {between:.3f} against {within:.3f}"


def test_road_and_sidewalk_swap_brightness_between_looks():
    """What a rule on colour learns in one look is wrong in another."""

    def mean(look, concept):
        drawings = [draw_scene(LOOKS[look], 96, 192, (2, i), i) for i in range(6)]
        return np.mean([d.image[d.concept == CONCEPTS.index(concept)].mean() for d in drawings])

    assert mean("day", "sidewalk_core") > 1.2 * mean("day", "road_surface")
    assert mean("dusk", "sidewalk_core") < 0.9 * mean("dusk", "road_surface")


# ---- label spaces ----

PLANNED = [
    ("toy_day", "rider", "toy_dusk", "bicyclist", SUPERSET),
    ("toy_day", "rider", "toy_dusk", "motorcyclist", SUPERSET),
    ("toy_day", "car", "toy_dusk", "vehicle", SUBSET),
    ("toy_day", "truck", "toy_dusk", "vehicle", SUBSET),
    ("toy_day", "person", "toy_dusk", "pedestrian", EQUAL),
    ("toy_day", "road", "toy_dusk", "road", SUPERSET),
    ("toy_day", "road", "toy_dusk", "lane marking", SUPERSET),
    ("toy_day", "sidewalk", "toy_dusk", "curb", SUPERSET),
    ("toy_day", "pole", "toy_dusk", "pole", SUBSET),
    ("toy_day", "traffic light", "toy_dusk", "pole", SUBSET),
    ("toy_day", "vegetation", "toy_dusk", "low vegetation", OVERLAP),
    ("toy_day", "person", "toy_rain", "person", SUBSET),
    ("toy_day", "rider", "toy_rain", "person", SUBSET),
    ("toy_dusk", "vehicle", "toy_rain", "vehicle", SUBSET),
    ("toy_dusk", "bicycle", "toy_rain", "vehicle", SUBSET),
    ("toy_box", "animal", "toy_rain", "person", SUBSET),
    ("toy_box", "traffic cone", "toy_rain", "object", SUBSET),
    ("toy_box", "van", "toy_day", "car", SUBSET),
]


@pytest.mark.parametrize(("a", "class_a", "b", "class_b", "expected"), PLANNED)
def test_conflicts_are_the_planned_ones(a, class_a, b, class_b, expected):
    sa, sb = space(a), space(b)
    assert relation(sa, sb)[sa.classes.index(class_a), sb.classes.index(class_b)] == expected


def test_boxes_name_what_no_pixel_label_tells_apart():
    boxes = space("toy_box")
    for pixel in ("toy_day", "toy_dusk"):
        codes = relation(boxes, space(pixel))
        for name in ("animal", "traffic cone"):
            assert (codes[boxes.classes.index(name)] == DISJOINT).all()


def test_night_has_the_classes_of_day_and_is_never_trained_on():
    day, night = space("toy_day"), space("toy_night")
    assert day.classes == night.classes and day.name != night.name
    np.testing.assert_array_equal(relation(day, night).diagonal(), EQUAL)
    np.testing.assert_array_equal(remap(night, day), np.arange(17))
    assert list(toy_spec("toy_night").splits) == ["test"]


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(PIXEL_SPECS, 2)))
def test_the_same_scene_in_two_spaces(a, b, tmp_path):
    """Written and read back as the loader does, every pixel pair is allowed by the relation of the two classes."""
    codes = relation(space(a), space(b))
    for index, look in enumerate(LOOKS):
        drawing = scene(look, index)
        maps = []
        for name in (a, b):
            path = tmp_path / f"{name}_{look}.png"
            path.write_bytes(encode_label(drawing.concept, name))
            entry = next(iter(toy_spec(name).splits.values())).entry
            maps.append(read_local_label({"sem_seg_file_name": str(path), "entry": entry}))
        for local_a, local_b in {(int(i), int(j)) for i, j in zip(maps[0].ravel(), maps[1].ravel())}:
            if local_a != 255 and local_b != 255:
                assert codes[local_a, local_b] != DISJOINT
            if local_a != 255 and local_b == 255:  # not named by b: then nothing of b contains it
                assert not np.isin(codes[local_a], (EQUAL, SUBSET)).any()
        for local_a, local_b in np.argwhere((codes == SUBSET) | (codes == EQUAL)):
            assert (maps[1][maps[0] == local_a] == local_b).all()


def test_every_raw_id_of_a_spec_is_written():
    concepts = np.arange(len(CONCEPTS), dtype=np.uint8)[None]
    for name in PIXEL_SPECS:
        spec, raw = toy_spec(name), raw_label(concepts, name)
        if spec.encoding == "color":
            written, listed = set(map(tuple, raw[0].tolist())), {c for cls in spec.classes for c in cls.raw_colors}
            assert written == listed | set(spec.ignore_colors)
        else:
            assert {i for cls in spec.classes for i in cls.raw_ids} <= set(raw.ravel().tolist())


# ---- files ----


def size_of(root):
    return json.loads((root / "toy" / "manifest.json").read_text())["size"]


def test_all_splits_are_on_disk_and_readable(toy_root):
    names = [split.entry for spec in TOY_SPECS for split in toy_spec(spec).splits.values()]
    assert {"toy_day_train", "toy_dusk_unlabelled", "toy_night_test", "toy_evening_train", "toy_box_train"} <= set(
        names
    )
    for name in names:
        records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
        assert len(records) >= 2
        for record in records[:2]:
            image = read_image(record["file_name"])
            if "sem_seg_file_name" in record:
                local = read_local_label(record)
                assert local.shape == image.shape[:2]
                assert set(np.unique(local)) <= {*range(len(metadata.stuff_classes)), 255}
        assert ("sem_seg_file_name" in records[0]) == (metadata.annotation == "pixel")


def test_files_hold_the_scenes_that_can_be_drawn_again(toy_root):
    record = DatasetCatalog.get("toy_dusk_val")[1]
    drawing = draw_split_scene(BY_NAME["dusk/val"], 1, *size_of(toy_root))
    np.testing.assert_array_equal(read_image(record["file_name"], "RGB"), drawing.image)
    np.testing.assert_array_equal(read_label(record), raw_label(drawing.concept, "toy_dusk"))
    jpeg = read_image(DatasetCatalog.get("toy_day_val")[1]["file_name"], "RGB")
    psnr = [cv2.PSNR(jpeg, draw_split_scene(BY_NAME["day/val"], i, *size_of(toy_root)).image) for i in range(3)]
    assert psnr[1] > 25 and max(psnr[0], psnr[2]) < 18  # decibels


def test_label_files_are_of_four_kinds(toy_root):
    def mode(name):
        return Image.open(DatasetCatalog.get(name)[0]["sem_seg_file_name"]).mode

    assert mode("toy_day_train") == "P" and mode("toy_evening_val") == "P"
    assert mode("toy_dusk_train").startswith("I")
    assert mode("toy_rain_train") == "RGB"
    assert mode("toy_night_test") == "L"


def test_boxes_enclose_what_is_seen_of_their_objects_exactly(toy_root):
    owners, count = concept_classes("toy_box"), 0
    for index, record in enumerate(DatasetCatalog.get("toy_box_train")):
        drawing = draw_split_scene(BY_NAME["box/train"], index, *size_of(toy_root))
        expected = {}  # by a plain loop over pixels
        for y, x in itertools.product(range(drawing.concept.shape[0]), range(drawing.concept.shape[1])):
            local_id, thing = int(owners[drawing.concept[y, x]]), int(drawing.thing[y, x])
            if local_id >= 0:
                box = expected.setdefault(thing, [local_id, 0, x, y, x + 1, y + 1])
                box[1:] = [box[1] + 1, min(box[2], x), min(box[3], y), max(box[4], x + 1), max(box[5], y + 1)]
        wanted = sorted((b[0], *b[2:]) for b in expected.values() if b[1] >= MIN_PIXELS)
        assert sorted((a["category_id"], *map(int, a["bbox"])) for a in record["annotations"]) == wanted
        count += len(wanted)
    assert count > 20


def test_tags_are_the_classes_that_are_seen(toy_root):
    owners = concept_classes("toy_tag")
    for index, record in enumerate(DatasetCatalog.get("toy_tag_train")):
        drawing = draw_split_scene(BY_NAME["tag/train"], index, *size_of(toy_root))
        expected = set()
        for thing in np.unique(drawing.thing):
            seen = drawing.concept[drawing.thing == thing]
            if owners[seen[0]] >= 0 and len(seen) >= MIN_PIXELS:
                expected.add(int(owners[seen[0]]))
        assert record["image_tags"] == sorted(expected)


# ---- writing ----

SMALL = dict(images=2, size=(32, 64))


def modified(folder):
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_same_parameters_reuse_the_folder_and_others_are_an_error(tmp_path):
    folder = write_toy(tmp_path, **SMALL)
    before = modified(folder)
    assert write_toy(tmp_path, **SMALL) == folder and modified(folder) == before
    with pytest.raises(ToyFilesError, match=r"'seed': 0.*asked.*'seed': 3"):
        write_toy(tmp_path, **SMALL, seed=3)
    assert modified(folder) == before
    write_toy(tmp_path, **SMALL, seed=3, redraw=True)
    assert json.loads((folder / "manifest.json").read_text())["seed"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


def test_a_folder_of_other_files_is_never_replaced(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "precious.txt").write_text("mine")
    for redraw in (False, True):
        with pytest.raises(ToyFilesError, match="no toy sets"):
            write_toy(tmp_path, **SMALL, redraw=redraw)
    assert (tmp_path / "toy" / "precious.txt").read_text() == "mine"


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(done, total):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_toy(tmp_path, **SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(write_module, "encode_image", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_toy(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_two_may_draw_at_once(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: write_toy(tmp_path, **SMALL), range(2)))
    assert folders == [tmp_path / "toy"] * 2 and [p.name for p in tmp_path.iterdir()] == ["toy"]
    assert len(list((tmp_path / "toy" / "day" / "images" / "train").iterdir())) == 2


@pytest.mark.parametrize("wrong", [dict(images=1), dict(size=(16, 64)), dict(size=(64, 4096)), dict(seed=-1)])
def test_parameters_that_cannot_be_drawn(tmp_path, wrong):
    with pytest.raises(ValueError, match="needs at least"):
        write_toy(tmp_path, **{**SMALL, **wrong})
    assert list(tmp_path.iterdir()) == []
