"""Pictures: right colours in the right places, legible for any size and number of classes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from multiseg_d2.evaluation import pictures
from multiseg_d2.evaluation.confusion_plot import confusion_plot, top_confusions

COLORS = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)
CLASSES = ["red", "green", "blue"]


@given(st.integers(0, 5000), st.integers(0, 40))
def test_spread_is_even_distinct_and_inside(length, number):
    chosen = pictures.spread(length, number)
    assert len(chosen) == min(length, number) == len(set(chosen)) and chosen == sorted(chosen)
    if chosen:
        ends = [chosen[0], *np.diff(chosen), length - 1 - chosen[-1]]
        assert min(ends) >= 0 and max(np.diff(chosen), default=0) <= -(-length // len(chosen))
        assert abs(ends[0] - ends[-1]) <= 1


@given(st.lists(st.tuples(*[st.sampled_from([0, 0, 64, 255])] * 3), min_size=1, max_size=254))
@settings(max_examples=40, deadline=None)
def test_distinct_colors(colors):
    result = pictures.distinct_colors(np.array(colors, np.uint8))
    assert len({tuple(c) for c in result.tolist()} | {(0, 0, 0)}) == len(colors) + 1
    first = {}
    for i, color in enumerate(colors):
        first.setdefault(color, i)
    for color, i in first.items():
        if color != (0, 0, 0):
            assert tuple(result[i].tolist()) == color or tuple(result[i]) not in colors
    assert (result == pictures.distinct_colors(np.array(colors, np.uint8))).all()


def test_color_map_and_overlay():
    ids = np.array([[0, 1, 2, 255]], np.uint8)
    assert pictures.color_map(ids, COLORS)[0].tolist() == [*COLORS.tolist(), [0, 0, 0]]
    image = np.full((1, 4, 3), 100, np.uint8)
    mixed = pictures.overlay(image, ids, COLORS, alpha=0.5)
    assert mixed[0].tolist() == [[150, 50, 50], [50, 150, 50], [50, 50, 150], [100, 100, 100]]


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 7), (375, 1242), (1080, 1920)])
def test_comparison_of_any_size(size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    truth, prediction = rng.choice(np.array([0, 1, 2, 255], np.uint8), (2, *size))
    page = pictures.comparison(image, {"ground truth": truth, "prediction": prediction}, CLASSES, COLORS, "title")
    assert page.ndim == 3 and page.dtype == np.uint8 and max(page.shape) < 4000


def test_comparison_shows_classes_and_errors_where_they_are():
    image = np.full((100, 200, 3), 128, np.uint8)
    truth = np.zeros((100, 200), np.uint8)
    truth[:, 100:] = 1
    truth[:20] = 255
    prediction = np.zeros((100, 200), np.uint8)  # the right half is wrong
    page = pictures.comparison(image, {"ground truth": truth, "prediction": prediction}, CLASSES, COLORS)
    height, width = 240, 480  # of a panel: enlarged to a readable size
    margin, heading = pictures._MARGIN, pictures._HEADING

    def panel(row, column):
        y = margin + row * (height + heading + margin) + heading
        x = margin + column * (width + margin)
        return page[y : y + height, x : x + width].astype(int)

    def is_mostly(pixel, channel):
        others = np.delete(pixel, channel)
        return pixel[channel] > 150 > 60 > others.max()

    photo, shown_truth, shown_prediction, errors = (panel(r, c) for r in (0, 1) for c in (0, 1))
    assert (photo == 128).all()
    assert is_mostly(shown_truth[200, 40], 0) and is_mostly(shown_truth[200, 440], 1)
    assert shown_truth[10, 40].max() < 60  # ignored
    assert is_mostly(shown_prediction[200, 440], 0)
    assert np.ptp(errors[200, 40]) == 0 and errors[200, 440, 0] > 2 * errors[200, 440, 1]  # grey, red
    assert errors[10, 440].max() < 60  # nothing is scored there


@pytest.mark.parametrize("size", [(90, 170), (900, 1700)])
def test_ids_are_never_mixed(size):
    """Between red (0) and blue (2) there is no green (1), whether a map is enlarged or reduced."""
    image = np.full((*size, 3), 128, np.uint8)
    ids = np.zeros(size, np.uint8)
    ids[size[0] // 3 :, size[1] // 3 :] = 2
    ids[2 * size[0] // 3 :] = 255
    page = pictures.comparison(image, {"label": ids}, [""] * 3, COLORS).astype(int)
    top = page[: page.shape[0] - 40]  # without the legend
    assert not (top[..., 1] > top[..., [0, 2]].max(-1) + 10).any()
    assert (top[..., 0] > top[..., 1] + 80).any() and (top[..., 2] > top[..., 1] + 80).any()


def test_legend_lists_what_occurs_only():
    ids = np.array([[0, 2]], np.uint8)
    entries = pictures._legend_entries([ids], CLASSES, COLORS)
    assert entries == [((200, 0, 0), "red"), ((0, 0, 200), "blue")]
    ids[0, 0] = 255
    assert [name for _, name in pictures._legend_entries([ids], CLASSES, COLORS)] == ["blue", "ignored"]


def test_legend_of_254_classes_stays_on_the_page():
    ids = np.arange(254, dtype=np.uint8).repeat(40).reshape(254, 40)
    names = [f"a class with a long name {i}" for i in range(254)]
    colors = np.random.default_rng(0).integers(0, 256, (254, 3)).astype(np.uint8)
    page = pictures.comparison(np.zeros((254, 40, 3), np.uint8), {"label": ids}, names, colors)
    places, height = pictures._legend_places(names, page.shape[1])
    assert len(set(places)) == 254 and max(x for x, _ in places) < page.shape[1] and height < page.shape[0]


def test_save(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    pictures.save(picture, tmp_path / "new/folder/a.png")
    assert (np.asarray(Image.open(tmp_path / "new/folder/a.png")) == picture).all()


@pytest.mark.parametrize("num_classes", [1, 2, 19, 171])
def test_confusion_plot_of_any_number_of_classes(num_classes):
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 50, (num_classes, num_classes + 1))
    matrix[num_classes // 2] = 0  # no ground truth
    picture = confusion_plot(matrix, [f"class {i}" for i in range(num_classes)], "a dataset")
    assert picture.shape[2] == 3 and min(picture.shape[:2]) > 300 and max(picture.shape[:2]) < 4500


def test_confusion_plot_of_nothing():
    assert confusion_plot(np.zeros((40, 41), int), [str(i) for i in range(40)]).any()


def test_top_confusions():
    matrix = np.array([[90, 10, 0, 0], [0, 0, 0, 0], [30, 0, 50, 20]])
    assert top_confusions(matrix, CLASSES) == [("blue", "red", 0.3), ("blue", "void", 0.2), ("red", "green", 0.1)]
    assert top_confusions(np.zeros((3, 4), int), CLASSES) == []
