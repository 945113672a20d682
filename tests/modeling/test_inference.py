"""Labels in pieces against labels of full-size scores, and lazily computed maps against the maps themselves."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from multiseg_d2.modeling import inference, score_maps
from multiseg_d2.modeling.inference import Prediction, confident_labels, label_map
from multiseg_d2.modeling.score_maps import MeanOverViews, MeanOverWindows, Mirrored, Resized

SIZES = [  # (C, h, w), resized to, used part
    ((19, 16, 32), (128, 256), (128, 256)),
    ((7, 12, 39), (96, 312), (94, 311)),  # padded to a multiple of 8
    ((5, 9, 13), (50, 77), (50, 77)),
    ((171, 6, 8), (43, 51), (43, 51)),
    ((4, 20, 21), (13, 10), (13, 10)),
    ((3, 8, 9), (8, 9), (8, 9)),
    ((4, 1, 1), (7, 9), (7, 9)),
    ((6, 90, 45), (713, 97), (700, 97)),
    ((1, 4, 4), (32, 32), (32, 32)),
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(score_maps, "_CPU_SCORES", 1 << 12)
    monkeypatch.setattr(inference, "_BATCH_SCORES", 1 << 10)
    monkeypatch.setattr(inference, "_CORNER_SCORES", 1 << 11)
    monkeypatch.setattr(inference, "_MOST_SCORES", 1.0)


def resized(values, size):
    return F.interpolate(values[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def regions(shape, seed=0, noise=1.0):
    """Scores as networks have them: areas in which one class leads, and noise."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(shape[0], max(shape[1] // 4, 1), max(shape[2] // 4, 1), generator=rng)
    return 6 * resized(coarse, shape[1:]) + noise * torch.randn(shape, generator=rng)


def assert_equal_but_for_ties(labels, scores):
    """The label's score is the largest, within rounding."""
    best = scores.amax(0)
    at_label = scores.gather(0, labels[None].long())[0]
    assert (best - at_label <= 1e-5 * best.abs().clamp(min=1)).all()
    assert (labels.long() != scores.argmax(0)).float().mean() <= 1e-3  # and nearly always it is the same class


@pytest.mark.parametrize(("shape", "size", "crop"), SIZES)
@pytest.mark.parametrize("noise", [0.0, 1.0, 20.0])
def test_labels_are_those_of_full_size_scores(shape, size, crop, noise):
    scores = regions(shape, noise=noise)
    whole = resized(scores, size)[:, : crop[0], : crop[1]]
    lazy = Resized(scores, size, crop)
    torch.testing.assert_close(lazy.full(), whole)
    labels = label_map(lazy)
    assert labels.dtype == torch.uint8 and labels.shape == torch.Size(crop)
    assert_equal_but_for_ties(labels, whole)


def test_both_ways_are_taken_and_agree(monkeypatch):
    lazy = Resized(regions((19, 20, 30)), (160, 240))
    assert inference._between_corners_pays(lazy)
    between = label_map(lazy)
    monkeypatch.setattr(inference, "_labels_between_corners", lambda _: pytest.fail("this way should not be taken"))
    monkeypatch.setattr(inference, "_between_corners_pays", lambda _: False)
    assert (label_map(lazy) != between).sum() <= 1
    monkeypatch.undo()
    for other in (Resized(regions((3, 9, 9)), (9, 9)), Mirrored(lazy), Resized(lazy, (50, 60))):
        assert not inference._between_corners_pays(other)


@pytest.mark.parametrize(("noise", "many"), [(0.0, False), (20.0, True)])
def test_where_too_many_classes_could_win_cells_are_not_looked_at_one_by_one(monkeypatch, noise, many):
    lazy = Resized(regions((19, 20, 30), noise=noise), (160, 240))
    between = label_map(lazy)
    monkeypatch.setattr(inference, "_MOST_SCORES", 0.2)
    assert (inference._labels_between_corners(lazy) is None) == many
    assert (label_map(lazy) != between).sum() <= 1


def test_a_class_that_leads_at_no_corner_can_win_between_them():
    scores = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]], [[3.0, 3.0]], [[-1.0, -1.0]]])  # (4, 1, 2)
    labels = label_map(Resized(scores, (8, 16)))
    assert_equal_but_for_ties(labels, resized(scores, (8, 16)))
    assert {0, 1, 2} == set(labels.unique().tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_type(dtype):
    scores = regions((5, 9, 13)).to(dtype)
    assert torch.equal(label_map(Resized(scores, (72, 104))), label_map(Resized(scores.float(), (72, 104))))


@pytest.mark.parametrize(("shape", "size", "crop"), SIZES)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_winners_probability(shape, size, crop, activation):
    scores = regions(shape)
    whole = resized(scores, size)[:, : crop[0], : crop[1]]
    labels, confidence = confident_labels(Resized(scores, size, crop, activation))
    assert_equal_but_for_ties(labels, whole)
    expected = (whole.softmax(0) if activation == "softmax" else whole.sigmoid()).amax(0)
    torch.testing.assert_close(confidence, expected, rtol=1e-4, atol=1e-6)


def test_class_balanced_ratio():
    scores, thresholds = regions((5, 9, 13)), torch.tensor([0.9, 0.5, 0.99, 0.05, 0.7])
    labels, ratio = confident_labels(Resized(scores, (72, 104)), thresholds=thresholds)
    expected = resized(scores, (72, 104)).softmax(0) / thresholds[:, None, None]
    assert_equal_but_for_ties(labels, expected)
    torch.testing.assert_close(ratio, expected.amax(0), rtol=1e-4, atol=1e-6)
    for bad in (thresholds[:4], thresholds - 0.9):
        with pytest.raises(ValueError, match="one threshold > 0 for each of the 5"):
            confident_labels(Resized(scores, (72, 104)), thresholds=bad)


def test_where_void_wins_the_label_is_255():
    scores = regions((5, 9, 13))
    plain, void = (label_map(Resized(scores, (72, 104)), void=v) for v in (False, True))
    assert (plain == 4).any()
    assert torch.equal(void, plain.masked_fill(plain == 4, 255))
    assert torch.equal(confident_labels(Resized(scores, (72, 104)), void=True)[0], void)


def test_maps_of_maps():
    """Every composition against the same operations on whole tensors, in full and by an odd rectangle."""
    scores, other = regions((4, 9, 13)), regions((4, 12, 10), seed=1)
    whole, second = resized(scores, (50, 77)), resized(other, (50, 77))
    lazy, lazy_second = Resized(scores, (50, 77)), Resized(other, (50, 77))
    mean = (whole.softmax(0) + second.flip(-1).softmax(0)) / 2
    windows = torch.zeros(4, 60, 77)
    windows[:, :50] += whole
    windows[:, 10:] += second
    windows[:, 10:50] /= 2
    cases = [
        (Mirrored(lazy), whole.flip(-1)),
        (MeanOverViews([lazy, Mirrored(lazy_second)]), mean.log()),
        (MeanOverWindows([(0, 0, lazy), (10, 0, lazy_second)], (60, 77)), windows),
        (
            Resized(MeanOverWindows([(0, 0, lazy), (10, 0, lazy_second)], (60, 77)), (131, 50)),
            resized(windows, (131, 50)),
        ),
        (
            Resized(Resized(scores, (50, 80), (48, 77)), (131, 50)),
            resized(resized(scores, (50, 80))[:, :48, :77], (131, 50)),
        ),
    ]
    for lazy_map, expected in cases:
        torch.testing.assert_close(lazy_map.full(), expected, rtol=1e-4, atol=1e-5)
        rows, columns = slice(7, 40), slice(11, 12)
        torch.testing.assert_close(lazy_map.tile(rows, columns), expected[:, rows, columns], rtol=1e-4, atol=1e-5)
        assert_equal_but_for_ties(label_map(lazy_map), expected)


def test_sigmoid_views_are_averaged_as_probabilities():
    views = [Resized(regions((4, 9, 13), seed), (50, 77), activation="sigmoid") for seed in range(3)]
    mean = torch.stack([view.full().sigmoid() for view in views]).mean(0)
    torch.testing.assert_close(MeanOverViews(views).full().sigmoid(), mean)
    torch.testing.assert_close(confident_labels(MeanOverViews(views))[1], mean.amax(0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers_are_refused(bad):
    scores = regions((4, 9, 13))
    scores[2, 3, 4] = bad
    for lazy in (Resized(scores, (50, 77)), Mirrored(Resized(scores, (9, 13)))):
        with pytest.raises(ValueError, match="1 of 117 positions have a score that is not a finite number"):
            label_map(lazy)


def test_too_many_channels_are_refused():
    with pytest.raises(ValueError, match="1 to 255 channels, not 256"):
        label_map(Resized(torch.zeros(256, 2, 2), (8, 8)))


def test_autocast_changes_nothing():
    lazy = Resized(regions((5, 9, 13)), (72, 104))
    expected = lazy.full()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lazy.full(), expected)


def test_a_prediction_is_a_mapping():
    prediction = Prediction(Resized(regions((5, 9, 13)), (72, 104)), void=True)
    assert set(prediction) == {"sem_seg", "sem_seg_labels"} and len(prediction) == 2
    assert prediction["sem_seg"].shape == (5, 72, 104) and prediction["sem_seg_labels"].shape == (72, 104)
    assert prediction.num_classes == 4
    assert prediction.get("instances") is None


def test_memory_layout_and_input_are_left_alone():
    scores = regions((5, 9, 13)).mT.contiguous().mT
    before = scores.clone()
    for lazy in (Resized(scores, (72, 104)), Resized(scores, (9, 13)), MeanOverViews([Resized(scores, (9, 13))] * 2)):
        label_map(lazy), confident_labels(lazy), lazy.full()
    assert torch.equal(scores, before)
