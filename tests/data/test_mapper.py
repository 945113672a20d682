"""Samples against slicing, loops over pixels and Detectron2's own mapper."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from multiseg_d2.config import add_multiseg_config
from multiseg_d2.data.decode import BadFileError, SizeMismatchError
from multiseg_d2.data.labels import LabelReader, LabelTarget, label_targets
from multiseg_d2.data.mapper import EvaluationMapper, TrainMapper
from multiseg_d2.label_space import IGNORE, IllegalLabelError, LabelSpace, raw_to_local_table, remap

CLASSES = 8
TARGETS = {
    "x_train": LabelTarget("x", LabelReader("index", raw_to_local_table([[i + 20] for i in range(CLASSES)], [0])))
}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def blocks(height: int, width: int, size: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A picture of flat blocks whose colour tells their class: (H, W, 3) RGB, (H, W) raw ids 20..27."""
    grid = rng(seed).integers(0, CLASSES, (-(-height // size), -(-width // size)))
    local = np.kron(grid, np.ones((size, size), int))[:height, :width]
    color = np.stack([local * 30 + 10, 250 - local * 30, (local % 2) * 200], axis=2)
    return color.astype(np.uint8), (local + 20).astype(np.uint8)


def entry(folder, image: np.ndarray, label: np.ndarray | None = None, name: str = "a", **more) -> dict:
    Image.fromarray(image).save(folder / f"{name}.png")
    found = {"file_name": str(folder / f"{name}.png"), "image_id": name, "dataset": "x", "entry": "x_train", **more}
    if label is not None:
        Image.fromarray(label).save(folder / f"{name}_label.png")
        found["sem_seg_file_name"] = str(folder / f"{name}_label.png")
    return found


def test_without_augmentation_a_sample_is_the_file(tmp_path):
    image, label = (
        rng().integers(0, 256, (20, 30, 3)).astype(np.uint8),
        rng().integers(20, 28, (20, 30)).astype(np.uint8),
    )
    label[4, 5] = 0
    dataset_dict = entry(tmp_path, image, label)
    before = copy.deepcopy(dataset_dict)
    for order, channels in (("RGB", image), ("BGR", image[..., ::-1])):
        sample = TrainMapper(TARGETS, image_format=order)(dataset_dict, rng())
        assert sample["image"].dtype == sample["sem_seg"].dtype == torch.uint8
        assert sample["image"].numpy().tolist() == channels.transpose(2, 0, 1).tolist()
        assert sample["sem_seg"].numpy().tolist() == np.where(label == 0, IGNORE, label - 20).tolist()
    assert dataset_dict == before
    assert {k: sample[k] for k in ("dataset", "entry", "image_id", "file_name", "height", "width")} == {
        "dataset": "x",
        "entry": "x_train",
        "image_id": "a",
        "file_name": dataset_dict["file_name"],
        "height": 20,
        "width": 30,
    }


@pytest.mark.parametrize("seed", range(12))
def test_image_and_label_stay_aligned(tmp_path, seed):
    image, label = blocks(96, 128, seed=seed)
    mapper = TrainMapper(
        TARGETS,
        image_format="RGB",
        crop_size=(64, 80),
        scale_range=(0.5, 2.0),
        flip_probability=0.5,
        pad_value=(1, 2, 3),
    )
    sample = mapper(entry(tmp_path, image, label), rng(seed))
    planes, local = sample["image"].numpy().astype(int), sample["sem_seg"].numpy()
    assert planes.shape == (3, 64, 80) and local.shape == (64, 80)
    padded = local == IGNORE
    expected = np.stack([local * 30 + 10, 250 - local * 30, (local % 2) * 200.0])
    expected[:, padded] = np.array([[1], [2], [3]])
    agree = (np.abs(planes - expected) <= 2).all(0)
    # Only pixels within about one original pixel of an edge between blocks are mixtures.
    assert agree[padded].all() and agree.mean() > 0.8
    edge = np.zeros_like(padded)
    edge[1:] |= local[1:] != local[:-1]
    edge[:, 1:] |= local[:, 1:] != local[:, :-1]
    near = np.stack([np.roll(edge, (dy, dx), (0, 1)) for dy in range(-3, 3) for dx in range(-3, 3)]).any(0)
    assert agree[~near].all()


def test_crops_agree_with_detectron2s_mapper(tmp_path):
    image, label = blocks(80, 120, size=20)
    dataset_dict = entry(tmp_path, image, label)
    mapper = TrainMapper(TARGETS, crop_size=(40, 60), scale_range=(2.0, 2.0), flip_probability=1.0)
    ours = mapper(dataset_dict, rng(5))
    draw = rng(5)
    draw.random(2)  # scale, flip
    y0, x0 = int(draw.random() * 61), int(draw.random() * 91)
    transforms = [T.Resize((160, 240)), T.CropTransform(2 * x0, 2 * y0, 60, 40), T.HFlipTransform(60)]
    theirs = DatasetMapper(is_train=True, augmentations=transforms, image_format="BGR")(dataset_dict)
    np.testing.assert_array_equal(ours["sem_seg"].numpy() + 20, theirs["sem_seg"].numpy())
    difference = np.abs(ours["image"].numpy().astype(int) - theirs["image"].numpy())
    assert difference[:, 2:-2, 2:-2].max() <= 1


def test_samples_depend_on_the_generator_alone(tmp_path):
    image, label = blocks(60, 80)
    dataset_dict = entry(tmp_path, image, label)
    mapper = TrainMapper(TARGETS, crop_size=(32, 32), scale_range=(0.5, 2.0), flip_probability=0.5, color_jitter=0.4)
    samples = []
    for seed in (1, 1, 2):
        np.random.seed(len(samples))  # noqa: NPY002
        torch.manual_seed(len(samples))
        samples.append(mapper(dataset_dict, rng(seed)))
    assert torch.equal(samples[0]["image"], samples[1]["image"])
    assert torch.equal(samples[0]["sem_seg"], samples[1]["sem_seg"])
    assert not torch.equal(samples[0]["image"], samples[2]["image"])


def test_jitter_changes_the_image_and_nothing_else(tmp_path):
    image, label = blocks(40, 50)
    dataset_dict = entry(tmp_path, image, label)
    plain = TrainMapper(TARGETS)(dataset_dict, rng(3))
    jittered = TrainMapper(TARGETS, color_jitter=0.5)(dataset_dict, rng(3))
    assert torch.equal(plain["sem_seg"], jittered["sem_seg"])
    assert (plain["image"].float() - jittered["image"].float()).abs().mean() > 3


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 200)])
def test_images_smaller_than_the_crop_are_padded_and_stack(tmp_path, size):
    label = np.full(size, 21, np.uint8)
    mapper = TrainMapper(TARGETS, crop_size=(32, 48), scale_range=(0.4, 1.0), pad_value=(103.53, 116.28, 123.675))
    samples = [mapper(entry(tmp_path, np.zeros((*size, 3), np.uint8), label), rng(s)) for s in range(4)]
    images = torch.stack([s["image"] for s in samples])
    labels = torch.stack([s["sem_seg"] for s in samples])
    assert images.shape == (4, 3, 32, 48) and labels.shape == (4, 32, 48)
    for image, local in zip(images, labels):
        inside = local == 1
        height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
        assert height >= 1 and width >= 1 and inside[:height, :width].all()
        assert (local[~inside] == IGNORE).all() and (image[:, inside] == 0).all()
        assert image[:, ~inside].unique(dim=1).flatten().tolist() in ([104, 116, 124], [])


def test_an_illegal_id_inside_the_crop_is_an_error_with_file_id_and_count(tmp_path):
    image, label = blocks(40, 60)
    label[5, 7:9] = 77
    dataset_dict = entry(tmp_path, image, label, name="street_7")
    with pytest.raises(IllegalLabelError, match=r"street_7_label\.png.*77 \(2 pixels\)"):
        TrainMapper(TARGETS)(dataset_dict, rng())
    mapper = TrainMapper(TARGETS, crop_size=(20, 20))
    for seed in range(30):  # a crop without that pixel is none the worse for it
        draw = rng(seed)
        draw.random(2)
        y0, x0 = int(draw.random() * 21), int(draw.random() * 41)
        if y0 <= 5 < y0 + 20 and (x0 <= 7 < x0 + 20 or x0 <= 8 < x0 + 20):
            with pytest.raises(IllegalLabelError, match="77"):
                mapper(dataset_dict, rng(seed))
        else:
            mapper(dataset_dict, rng(seed))


def test_sizes_that_differ_are_named(tmp_path):
    image, label = blocks(40, 60)
    with pytest.raises(SizeMismatchError, match=r"a\.png is 60x40.*a_label\.png is 60x39"):
        TrainMapper(TARGETS)(entry(tmp_path, image, label[:39]), rng())
    with pytest.raises(SizeMismatchError, match=r"a\.png is 60x40.*annotation file says 40x60"):
        TrainMapper(TARGETS)(entry(tmp_path, image, label, height=60, width=40), rng())
    tags = Image.Exif()
    tags[0x0112] = 6
    dataset_dict = entry(tmp_path, image, label)
    Image.fromarray(image).save(dataset_dict["file_name"], exif=tags)
    with pytest.raises(SizeMismatchError, match=r"a\.png is 40x60 \(after the turn.*orientation 6.*60x40"):
        TrainMapper(TARGETS)(dataset_dict, rng())


def test_a_label_made_on_the_turned_image_fits_it(tmp_path):
    image, label = blocks(40, 60)
    tags = Image.Exif()
    tags[0x0112] = 6
    dataset_dict = entry(tmp_path, image, np.ascontiguousarray(np.rot90(label, -1)))
    Image.fromarray(image).save(dataset_dict["file_name"], exif=tags)
    sample = TrainMapper(TARGETS, image_format="RGB", crop_size=(30, 30))(dataset_dict, rng(2))
    local = sample["sem_seg"].numpy().astype(int)
    np.testing.assert_array_equal(sample["image"][0].numpy(), local * 30 + 10)
    assert (sample["height"], sample["width"]) == (60, 40)


def test_a_broken_label_names_the_label(tmp_path):
    image, label = blocks(40, 60)
    dataset_dict = entry(tmp_path, image, label)
    path = tmp_path / "a_label.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadFileError, match=r"a_label\.png"):
        TrainMapper(TARGETS)(dataset_dict, rng())


# ---- limit of one class's share ----


def test_crops_that_one_class_fills_are_drawn_again(tmp_path):
    label = np.full((64, 256), 20, np.uint8)
    label[:, 200:] = rng().integers(21, 28, (64, 56))  # four fifths of the width are one class
    dataset_dict = entry(tmp_path, np.zeros((64, 256, 3), np.uint8), label)

    def shares(limit):
        mapper = TrainMapper(TARGETS, crop_size=(64, 64), single_category_max_area=limit)
        crops = [mapper(dataset_dict, rng(seed))["sem_seg"].numpy() for seed in range(60)]
        return np.array([np.bincount(c.ravel(), minlength=256)[:IGNORE].max() / (c != IGNORE).sum() for c in crops])

    assert 0.6 < (shares(1.0) > 0.75).mean() < 0.95  # the crop starts at 0..192 and must start at 153 or later
    assert (shares(0.75) > 0.75).mean() < 0.3  # ten tries, one in five good: 0.8 ** 10 = 0.11
    assert (shares(0.1) > 0.1).all()  # impossible: a crop comes out all the same


def test_crops_without_any_label_are_drawn_again(tmp_path):
    label = np.zeros((64, 256), np.uint8)
    label[:, 128:] = rng().integers(20, 28, (64, 128))
    dataset_dict = entry(tmp_path, np.zeros((64, 256, 3), np.uint8), label)
    mapper = TrainMapper(TARGETS, crop_size=(64, 64), single_category_max_area=0.9)
    empty = [(mapper(dataset_dict, rng(s))["sem_seg"] == IGNORE).all().item() for s in range(30)]
    assert sum(empty) <= 1  # a third of all windows have no label


def test_an_image_without_any_label_still_gives_a_sample(tmp_path):
    dataset_dict = entry(tmp_path, np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8))
    mapper = TrainMapper(TARGETS, crop_size=(20, 20), single_category_max_area=0.75)
    assert (mapper(dataset_dict, rng())["sem_seg"] == IGNORE).all()


# ---- unlabelled and weakly labelled ----


def test_unlabelled_images_give_samples_without_sem_seg(tmp_path):
    mapper = TrainMapper(TARGETS, crop_size=(30, 30), scale_range=(0.5, 2), single_category_max_area=0.75)
    sample = mapper(entry(tmp_path, blocks(40, 60)[0]), rng())
    assert "sem_seg" not in sample and "instances" not in sample and sample["image"].shape == (3, 30, 30)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_follow_the_image(tmp_path, seed):
    # Each box is painted into the label map as a class of its own, so the sample itself shows where it went.
    label = np.zeros((90, 120), np.uint8)
    annotations = []
    for k, (x0, y0, x1, y1) in enumerate([(5, 5, 40, 30), (50, 10, 110, 40), (20, 50, 60, 80), (70, 60, 100, 85)]):
        label[y0:y1, x0:x1] = 20 + k
        box, mode = ([x0, y0, x1, y1], BoxMode.XYXY_ABS) if k % 2 else ([x0, y0, x1 - x0, y1 - y0], BoxMode.XYWH_ABS)
        annotations.append({"bbox": box, "bbox_mode": mode, "category_id": k, "iscrowd": 0})
    annotations.append({"bbox": [0, 0, 120, 90], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 7, "iscrowd": 1})
    image = np.zeros((90, 120, 3), np.uint8)
    dataset_dict = entry(tmp_path, image, label, annotations=annotations, image_tags=[0, 1, 2, 3])
    before = copy.deepcopy(dataset_dict)
    mapper = TrainMapper(TARGETS, crop_size=(64, 64), scale_range=(0.5, 2.0), flip_probability=0.5)
    sample = mapper(dataset_dict, rng(seed))
    assert dataset_dict == before and sample["image_tags"] == [0, 1, 2, 3]
    boxes = {int(c): b.tolist() for c, b in zip(sample["instances"].gt_classes, sample["instances"].gt_boxes)}
    assert sample["instances"].image_size == (64, 64) and 7 not in boxes  # the crowd box is left out
    for k in range(4):
        ys, xs = np.nonzero(sample["sem_seg"].numpy() == k)
        if len(ys):
            seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert np.abs(np.subtract(seen, boxes[k])).max() <= 1, (k, seen, boxes[k])
        elif k in boxes:  # less than a pixel of it is inside
            assert min(boxes[k][2] - boxes[k][0], boxes[k][3] - boxes[k][1]) <= 1


def test_boxes_agree_with_detectron2s_mapper(tmp_path):
    corners = rng().uniform(0, 60, (20, 2))
    corners = np.concatenate([corners, corners + rng(1).uniform(1, 60, (20, 2))], axis=1)
    annotations = [
        {"bbox": b.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": i, "iscrowd": 0}
        for i, b in enumerate(corners)
    ]
    dataset_dict = entry(tmp_path, np.zeros((120, 120, 3), np.uint8), annotations=annotations)
    ours = TrainMapper(TARGETS, crop_size=(50, 40), flip_probability=1.0)(dataset_dict, rng(5))["instances"]
    draw = rng(5)
    draw.random(2)  # scale, flip
    y0, x0 = int(draw.random() * 71), int(draw.random() * 81)
    transforms = [T.CropTransform(x0, y0, 40, 50), T.HFlipTransform(40)]
    theirs = DatasetMapper(is_train=True, augmentations=transforms, image_format="BGR")(dataset_dict)["instances"]
    assert ours.gt_classes.tolist() == theirs.gt_classes.tolist() and 0 < len(ours) < 20
    assert torch.allclose(ours.gt_boxes.tensor, theirs.gt_boxes.tensor, atol=1e-4)


def test_an_image_without_any_box_gives_empty_instances(tmp_path):
    sample = TrainMapper(TARGETS)(entry(tmp_path, blocks(20, 30)[0], annotations=[], image_tags=[]), rng())
    assert len(sample["instances"]) == 0 and sample["instances"].gt_boxes.tensor.shape == (0, 4)
    assert sample["image_tags"] == []


# ---- remapped label spaces ----


def space(name: str, classes: list[str], raw_ids: list[list[int]], membership) -> LabelSpace:
    colors = np.zeros((len(classes), 3), np.uint8)
    return LabelSpace(name, classes, colors, raw_to_local_table(raw_ids, [0]), np.array(membership, bool))


@pytest.fixture
def two_spaces():
    """A fine source (car, truck, tree, rider) and a coarse target (plant, vehicle)."""
    source = space("fine", ["car", "truck", "tree", "rider"], [[20, 21], [22], [23], [24]], np.eye(4))
    target = space("coarse", ["plant", "vehicle"], [[5], [6]], [[0, 0, 1, 0], [1, 1, 0, 0]])
    for label_space in (source, target):
        MetadataCatalog.get(f"{label_space.name}_mapper").set(
            label_space=label_space,
            dataset=label_space.name,
            spec=SimpleNamespace(encoding="index", raw_to_local=label_space.raw_to_local),
        )
    yield source, target
    for label_space in (source, target):
        MetadataCatalog.pop(f"{label_space.name}_mapper")


def test_labels_boxes_and_tags_are_remapped_once(tmp_path, two_spaces):
    expected = {0: IGNORE, 20: 1, 21: 1, 22: 1, 23: 0, 24: IGNORE}
    raw = rng().choice(list(expected), (30, 40)).astype(np.uint8)
    boxes = [{"bbox": [2, 2, 20, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": c} for c in (3, 2, 0, 1)]
    dataset_dict = entry(tmp_path, np.zeros((30, 40, 3), np.uint8), raw, annotations=boxes, image_tags=[0, 1, 3])
    dataset_dict.update(entry="fine_mapper", dataset="fine")
    targets = label_targets(["fine_mapper", "coarse_mapper"], "coarse")
    np.testing.assert_array_equal(targets["fine_mapper"].translation, remap(*two_spaces))
    sample = TrainMapper(targets)(dataset_dict, rng())
    assert sample["dataset"] == "coarse" and sample["entry"] == "fine_mapper"
    assert sample["sem_seg"].tolist() == [[expected[i] for i in row] for row in raw.tolist()]
    assert sample["instances"].gt_classes.tolist() == [0, 1, 1] and sample["image_tags"] == [1]
    assert targets["coarse_mapper"].translation is None
    raw[0, 0] = 99  # what the source does not know stays an error
    Image.fromarray(raw).save(dataset_dict["sem_seg_file_name"])
    with pytest.raises(IllegalLabelError, match="99"):
        TrainMapper(targets)(dataset_dict, rng())


def test_remapping_to_an_unknown_dataset_is_an_error(two_spaces):
    with pytest.raises(ValueError, match=r"DATASETS\.REMAP_TO.*'cityscape'.*did you mean 'cityscapes'"):
        label_targets(["fine_mapper"], "cityscape")


# ---- config ----


def config(**keys) -> object:
    cfg = get_cfg()
    add_multiseg_config(cfg)
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [24, 32]
    cfg.DATASETS.TRAIN = ("camvid_train", "bdd100k_train")
    cfg.merge_from_list([item for pair in keys.items() for item in pair])
    return cfg


def test_a_mapper_is_built_from_a_config():
    mapper = TrainMapper(config(**{"INPUT.COLOR_JITTER": 0.3, "INPUT.SCALE_RANGE": (0.7, 2.1, 0.1)}))
    assert set(mapper.targets) == {"camvid_train", "bdd100k_train"}
    assert [t.dataset for t in mapper.targets.values()] == ["camvid", "bdd100k"]
    assert (mapper.crop_size, mapper.flip_probability, mapper.color_jitter) == ((24, 32), 0.5, 0.3)
    assert mapper.scale_range == (0.7, 2.1, 0.1) and mapper.pad_value.tolist() == [104, 116, 124]
    plain = TrainMapper(config(**{"INPUT.CROP.ENABLED": False, "INPUT.RANDOM_FLIP": "none"}))
    assert plain.crop_size is None and plain.flip_probability == 0
    remapped = TrainMapper(config(**{"DATASETS.REMAP_TO": "camvid"}))
    assert [t.dataset for t in remapped.targets.values()] == ["camvid", "camvid"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.CROP.TYPE", "relative_range"),
        ("INPUT.CROP.SIZE", [0.5, 0.5]),
        ("INPUT.RANDOM_FLIP", "vertical"),
        ("INPUT.SCALE_RANGE", (2.0, 0.5)),
        ("INPUT.SCALE_RANGE", (0.0, 0.5)),
        ("INPUT.SCALE_RANGE", (1.0,)),
        ("INPUT.COLOR_JITTER", 1.5),
        ("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.0),
    ],
)
def test_config_values_that_mean_nothing_are_refused_by_key(key, value):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        TrainMapper(config(**{key: value}))


# ---- test time ----


def test_test_images_keep_their_size_and_their_dict(tmp_path):
    image, label = blocks(40, 60)
    dataset_dict = entry(tmp_path, image, label)
    sample = EvaluationMapper(image_format="RGB")(dataset_dict)
    assert sample["image"].numpy().tolist() == image.transpose(2, 0, 1).tolist()
    assert {k: sample[k] for k in dataset_dict} == dataset_dict and "sem_seg" not in sample
    assert (sample["height"], sample["width"]) == (40, 60)


@pytest.mark.parametrize(("min_size", "max_size"), [(80, 1000), (20, 1000), (80, 90), (20, 25), (33, 0)])
def test_test_images_are_resized_as_detectron2_does(tmp_path, min_size, max_size):
    image = np.asarray(Image.fromarray(blocks(40, 60)[0]).resize((60, 40)))
    dataset_dict = entry(tmp_path, image)
    cfg = config(**{"INPUT.MIN_SIZE_TEST": min_size, "INPUT.MAX_SIZE_TEST": max_size})
    sample = EvaluationMapper(cfg)(dataset_dict)
    resize = T.ResizeShortestEdge(min_size, max_size or 10**9)
    theirs = DatasetMapper(is_train=False, augmentations=[resize], image_format="BGR")(dataset_dict)
    assert sample["image"].shape == theirs["image"].shape
    assert (sample["height"], sample["width"]) == (40, 60)
    assert (sample["image"].float() - theirs["image"].float()).abs().mean() < 6


# ---- real files ----


def test_real_datasets_give_samples_that_stack(samples):
    places = {
        "camvid_train": ("camvid/images/train", "camvid/labels/train"),
        "bdd100k_train": ("bdd100k/images/train", "bdd100k/labels/train"),
        "coco_stuff_train": ("coco_stuff/images/train", "coco_stuff/labels/train"),
        "kitti_train": ("kitti_semantic/images/train", "kitti_semantic/labels/train"),
    }
    mapper = TrainMapper(
        label_targets(list(places)),
        crop_size=(256, 320),
        scale_range=(0.5, 2.0),
        flip_probability=0.5,
        color_jitter=0.2,
    )
    batch = []
    for name, (images, labels) in places.items():
        for seed, image in enumerate(sorted((samples / images).iterdir())[:4]):
            label = samples / labels / f"{image.stem}.png"
            dataset_dict = {"entry": name, "file_name": str(image), "sem_seg_file_name": str(label)}
            batch.append(mapper(dataset_dict, rng(seed)))
    assert torch.stack([s["image"] for s in batch]).shape == (16, 3, 256, 320)
    for sample in batch:
        local = sample["sem_seg"][sample["sem_seg"] != IGNORE]
        assert local.numel() > 1000
        assert local.max() < len(MetadataCatalog.get(sample["entry"]).stuff_classes)
