"""Rotation, padding, sizes and centres in whole samples: what is real, what is ignored, what stays aligned."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.structures import BoxMode
from PIL import Image

from multiseg_d2.config import add_multiseg_config
from multiseg_d2.data.labels import LabelReader, LabelTarget
from multiseg_d2.data.mapper import TrainMapper
from multiseg_d2.data.soft_labels import write_soft_label
from multiseg_d2.label_space import IGNORE, raw_to_local_table

#: Raw id 0 is the class "road", as in IDD and BDD100K.
TARGETS = {"x_train": LabelTarget("x", LabelReader("index", raw_to_local_table([[i] for i in range(8)])), None, 8, 8)}
PAD = (11.0, 22.0, 33.0)


def entry(folder, image, label=None, **more) -> dict:
    Image.fromarray(image).save(folder / "a.png")
    found = {"file_name": str(folder / "a.png"), "image_id": "a", "dataset": "x", "entry": "x_train", **more}
    if label is not None:
        Image.fromarray(label).save(folder / "a_label.png")
        found["sem_seg_file_name"] = str(folder / "a_label.png")
    return found


def blocks(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Flat blocks whose colour tells their class: (H, W, 3) RGB, (H, W) raw ids from 1."""
    grid = np.random.default_rng(seed).integers(1, 8, (-(-height // 16), -(-width // 16)))
    raw = np.kron(grid, np.ones((16, 16), int))[:height, :width]
    return np.stack((raw * 30 + 10, 250 - raw * 30, raw % 2 * 200), 2).astype(np.uint8), raw.astype(np.uint8)


def mapper(**arguments) -> TrainMapper:
    return TrainMapper(TARGETS, image_format="RGB", pad_value=PAD, **arguments)


@pytest.mark.parametrize("seed", range(8))
def test_turned_image_label_and_shares_stay_aligned(tmp_path, seed):
    image, raw = blocks(96, 128, seed)
    write_soft_label(tmp_path / "a.npz", (raw[None] == np.arange(8)[:, None, None]).astype(float), keep=1)
    record = entry(tmp_path, image, raw, soft_label_file_name=str(tmp_path / "a.npz"))
    make = mapper(crop_size=(64, 80), scale_range=(0.6, 1.6), rotation=25.0, flip_probability=0.5)
    sample = make(record, np.random.default_rng(seed))
    local, pixels = sample["sem_seg"].numpy(), sample["image"].numpy().transpose(1, 2, 0)
    flat = np.abs(pixels[..., 0].astype(int) - (local.astype(int) * 30 + 10)) <= 3  # nearest against bilinear at edges
    real = sample["content"].numpy() if "content" in sample else np.ones(local.shape, bool)
    assert flat[real].mean() > 0.75 and not (local[real] == IGNORE).any()
    shares = sample["soft_label"].numpy()
    sure = shares.max(0) > 0.99
    assert sure[real].mean() > 0.6 and (shares.argmax(0)[sure] == local[sure]).all()


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_no_image_is_ignored_and_never_raw_0(tmp_path, padded):
    image, raw = np.full((60, 60, 3), 200, np.uint8), np.full((60, 60), 5, np.uint8)
    make = mapper(crop_size=(80, 90) if padded else (60, 60), rotation=45.0)
    found = [make(entry(tmp_path, image, raw), np.random.default_rng(seed)) for seed in range(6)]
    for sample in found:
        label, real = sample["sem_seg"].numpy(), sample["content"].numpy()
        assert set(np.unique(label)) == {5, IGNORE}
        np.testing.assert_array_equal(real, label == 5)
        pixels = sample["image"].numpy()
        inside = cv2.erode(real.astype(np.uint8), np.ones((5, 5)), borderType=cv2.BORDER_CONSTANT, borderValue=0) == 1
        assert inside.sum() > 500 and (pixels[:, inside] == 200).all()
        assert (pixels[:, 60:] == np.array(PAD, np.uint8)[:, None, None]).all()


def test_content_is_there_only_where_something_is_missing(tmp_path):
    record = entry(tmp_path, *blocks(40, 50))
    assert "content" not in mapper(crop_size=(40, 50))(record, np.random.default_rng(0))
    assert "content" not in mapper()(record, np.random.default_rng(0))
    content = mapper(crop_size=(48, 50))(record, np.random.default_rng(0))["content"]
    assert content.dtype == torch.bool and content[:40].all() and not content[40:].any()
    unlabelled = entry(tmp_path, blocks(40, 50)[0])
    assert torch.equal(mapper(crop_size=(48, 50))(unlabelled, np.random.default_rng(0))["content"], content)


def test_boxes_turn_with_the_image(tmp_path):
    image = np.zeros((80, 100, 3), np.uint8)
    image[30:40, 60:75] = 255
    box = {"bbox": [60.0, 30.0, 75.0, 40.0], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2, "iscrowd": 0}
    record = entry(tmp_path, image, annotations=[box], annotation="box")
    sample = mapper(rotation=40.0)(record, np.random.default_rng(3))
    (x0, y0, x1, y1) = sample["instances"].gt_boxes.tensor[0].tolist()
    rows, columns = np.nonzero(sample["image"].numpy()[0] > 127)
    for edge, seen in ((x0, columns.min()), (x1, columns.max() + 1), (y0, rows.min()), (y1, rows.max() + 1)):
        assert abs(edge - seen) <= 1.5


# ---- sizes ----


def config(**keys):
    cfg = get_cfg()
    add_multiseg_config(cfg)
    cfg.DATASETS.TRAIN = ("camvid_train", "kitti_train")
    cfg.merge_from_list([x for pair in keys.items() for x in pair])
    return cfg


def sizes(cfg, folder, name: str = "camvid_train", count: int = 60) -> set[tuple[int, int]]:
    make = TrainMapper(cfg)
    record = {**entry(folder, blocks(40, 60)[0]), "entry": name}
    return {tuple(make(record, np.random.default_rng(i))["image"].shape[1:]) for i in range(count)}


KEEP = {"INPUT.SCALE_RANGE": (1.0, 1.0)}


def test_images_keep_their_size_unless_the_config_says_otherwise(tmp_path):
    assert sizes(config(**KEEP), tmp_path) == {(40, 60)}


def test_detectron2s_sizes_are_honoured(tmp_path):
    choice = config(**KEEP, **{"INPUT.MIN_SIZE_TRAIN": (20, 80), "INPUT.MAX_SIZE_TRAIN": 90})
    assert sizes(choice, tmp_path) == {(20, 30), (60, 90)}
    drawn = {"INPUT.MIN_SIZE_TRAIN": (20, 23), "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}
    assert {h for h, _ in sizes(config(**KEEP, **drawn), tmp_path)} == {20, 21, 22, 23}
    one = config(**{"INPUT.MIN_SIZE_TRAIN": (20,), "INPUT.SCALE_RANGE": (2.0, 2.0), "INPUT.MAX_SIZE_TRAIN": 0})
    assert sizes(one, tmp_path) == {(40, 60)}  # the random scale comes on top


def test_sizes_per_dataset(tmp_path):
    cfg = config(**KEEP, **{"INPUT.MIN_SIZE_TRAIN": (20, 0), "INPUT.MIN_SIZE_TRAIN_SAMPLING": "per_dataset"})
    assert sizes(cfg, tmp_path, count=3) == {(20, 30)} and sizes(cfg, tmp_path, "kitti_train", 3) == {(40, 60)}
    with pytest.raises(ValueError, match="MIN_SIZE_TRAIN has 2 lengths for 1 training sets.*one per entry"):
        TrainMapper(cfg, entries=["camvid_train"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"INPUT.MIN_SIZE_TRAIN": ()}, "INPUT.MIN_SIZE_TRAIN is"),
        ({"INPUT.MIN_SIZE_TRAIN": (-1,)}, "INPUT.MIN_SIZE_TRAIN is"),
        ({"INPUT.MIN_SIZE_TRAIN_SAMPLING": "per_set"}, "'per_set', not one of choice, range, per_dataset"),
        ({"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT.MIN_SIZE_TRAIN": (9, 5)}, r"needs \(low, high\)"),
        ({"INPUT.ROTATION": 181.0}, r"INPUT.ROTATION is 181.0; it is the largest angle"),
        ({"INPUT.BLUR": -1}, "INPUT.BLUR is -1; it is the largest radius"),
    ],
)
def test_contradictions_are_refused_by_key(keys, message):
    with pytest.raises(ValueError, match=message):
        TrainMapper(config(**keys))


def test_config_keys_reach_the_sample(tmp_path):
    cfg = config(**KEEP, **{"INPUT.ROTATION": 30.0, "INPUT.BLUR": 3, "INPUT.FORMAT": "RGB"})
    make = TrainMapper(cfg)
    assert (make.rotation, make.blur) == (30.0, 3)
    sharp = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    record = {**entry(tmp_path, sharp), "entry": "camvid_train"}
    make.rotation = 0
    spread = [make(record, np.random.default_rng(i))["image"].float().std().item() for i in range(20)]
    assert 4 <= sum(s < 60 for s in spread) <= 16  # every second image or so, with radius 1 to 3


# ---- mining ----


class FirstPixel:
    """Centres crops on the first pixel of a class; at module level, so that worker processes can be given it."""

    def __init__(self, local_id: int) -> None:
        self.local_id = local_id

    def __call__(self, local, dataset_dict, rng):
        found = np.argwhere(local == self.local_id)
        return tuple(found[0]) if len(found) else None


@pytest.mark.parametrize("rotation", [0.0, 20.0])
@pytest.mark.parametrize("pixel", [(50, 60), (2, 3), (99, 117)])
def test_crops_are_centred_where_the_caller_says(tmp_path, pixel, rotation):
    image, raw = np.zeros((100, 120, 3), np.uint8), np.zeros((100, 120), np.uint8)
    raw[pixel[0] - 2 : pixel[0] + 3, pixel[1] - 2 : pixel[1] + 3] = 3
    make = mapper(crop_size=(41, 41), scale_range=(0.9, 1.4), flip_probability=0.5, rotation=rotation)
    make.centre = FirstPixel(3)
    for seed in range(5):
        local = make(entry(tmp_path, image, raw), np.random.default_rng(seed))["sem_seg"].numpy()
        assert (local == 3).any() or (rotation and pixel != (50, 60))  # a turn may carry a corner out of the image
    make.centre = FirstPixel(7)  # not there: a random crop, drawn as without mining
    plain = mapper(crop_size=(41, 41), scale_range=(0.9, 1.4), flip_probability=0.5, rotation=rotation)
    record = entry(tmp_path, image, raw)
    assert torch.equal(
        make(record, np.random.default_rng(1))["sem_seg"], plain(record, np.random.default_rng(1))["sem_seg"]
    )
