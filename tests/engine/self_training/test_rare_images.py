"""Rare-class sampling: which images are drawn, how often, and that counts are those of the label maps."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import DatasetCatalog

from multiseg_d2.data.labels import label_targets, read_local_label
from multiseg_d2.data.loader import DrawDataset
from multiseg_d2.data.schedule import Draw
from multiseg_d2.engine.self_training.rare_images import RareImages, class_pixels

#: Pixels of three classes in six images: class 1 is in images 1 and 4, class 2 in image 5.
PIXELS = np.array([[9, 0, 0], [8, 1, 0], [9, 0, 0], [9, 0, 0], [5, 4, 0], [8, 0, 1]])


def draws(dataset: int, number: int) -> list[Draw]:
    return [Draw(dataset, i % 6, seed) for i, seed in enumerate(np.random.default_rng(0).integers(2**62, size=number))]


def test_rare_classes_are_drawn_evenly_and_then_their_images():
    choose = RareImages.of([PIXELS, None], (1, 2), 0.5)
    chosen = np.bincount([choose(draw) for draw in draws(0, 6000)], minlength=6) / 6000
    expected = 0.5 / 6 + 0.5 * np.array([0, 0.25, 0, 0, 0.25, 0.5])
    np.testing.assert_allclose(chosen, expected, atol=0.03)


def test_other_entries_and_classes_without_images_change_nothing():
    choose = RareImages.of([PIXELS, None], (2,), 1.0)
    assert all(choose(draw) == draw.index for draw in draws(1, 20))
    assert {choose(draw) for draw in draws(0, 20)} == {5}
    absent = RareImages.of([PIXELS[:, :1].repeat(2, 1) * [1, 0]], (1,), 1.0)
    assert all(absent(draw) == draw.index for draw in draws(0, 20))


def test_the_choice_depends_on_the_draw_alone():
    choose = RareImages.of([PIXELS], (1, 2), 0.7)
    assert [choose(d) for d in draws(0, 50)] == [choose(d) for d in reversed(draws(0, 50))][::-1]


def test_the_loader_reads_the_chosen_image_with_the_draws_own_randomness():
    images = [[{"file_name": str(i)} for i in range(6)]]

    def mapper(record, rng):
        return {"file": record["file_name"], "number": rng.random()}

    draw = Draw(0, 2, 77)
    plain, chosen = DrawDataset(images, mapper)[draw], DrawDataset(images, mapper, choose=lambda _draw: 5)[draw]
    assert (plain["file"], chosen["file"]) == ("2", "5") and plain["number"] == chosen["number"]


@pytest.mark.parametrize("remap", ["", "tiny_a"])
def test_counts_are_those_of_the_label_maps(remap, tiny_cfg, caplog):
    cfg = tiny_cfg("DATASETS.REMAP_TO", remap)
    for entry, target in label_targets(cfg.DATASETS.TRAIN, remap).items():
        caplog.clear()
        with caplog.at_level("INFO"):
            found = class_pixels(entry, target)
        title = f"{entry}: counting classes for SELF_TRAINING.MINING: "
        assert caplog.messages[0] == f"{title}5 label maps"
        assert caplog.messages[-1].startswith(f"{title}5 of 5 label maps, ") and "ETA" in caplog.messages[-1]
        for row, record in zip(found, DatasetCatalog.get(entry), strict=True):
            local, expected = read_local_label(record), np.zeros(target.num_classes, np.int64)
            for c in range(target.own_classes):
                into = c if target.translation is None else target.translation[c]
                if into < target.num_classes:
                    expected[into] += (local == c).sum()
            assert row.tolist() == expected.tolist()
