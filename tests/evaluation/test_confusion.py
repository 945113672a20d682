"""Counting and scores against double loops, torchmetrics and Detectron2's silent mistake."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multiseg_d2.evaluation import confusion


def maps(num_classes: int, shape=(37, 53), seed: int = 0, void: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A random prediction and ground truth that agree on about half of the pixels."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes, shape).astype(np.uint8)
    prediction = np.where(rng.random(shape) < 0.5, truth, rng.integers(0, num_classes, shape)).astype(np.uint8)
    truth[rng.random(shape) < 0.2] = 255
    if void:
        prediction[rng.random(shape) < 0.1] = 255
    return prediction, truth


def count_by_loops(prediction, truth, num_classes):
    matrix = [[0] * (num_classes + 1) for _ in range(num_classes)]
    for row_p, row_t in zip(prediction.tolist(), truth.tolist()):
        for p, t in zip(row_p, row_t):
            if t != 255:
                matrix[t][num_classes if p == 255 else p] += 1
    return matrix


def scores_by_loops(matrix):
    """IoU and recall per class in plain double-precision Python; None where a class has no ground truth."""
    classes = range(len(matrix))
    iou, recall = [], []
    for c in classes:
        labelled = sum(matrix[c])
        predicted = sum(matrix[g][c] for g in classes)
        hit = matrix[c][c]
        iou.append(hit / (labelled + predicted - hit) if labelled else None)
        recall.append(hit / labelled if labelled else None)
    return iou, recall


def assert_same(array, listing):
    assert len(array) == len(listing)
    for a, b in zip(array.tolist(), listing):
        assert math.isnan(a) if b is None else a == pytest.approx(b, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 254), st.integers(1, 9), st.integers(1, 40), st.integers(0, 10**6))
def test_count_equals_double_loops(num_classes, height, width, seed):
    prediction, truth = maps(num_classes, (height, width), seed)
    expected = count_by_loops(prediction, truth, num_classes)
    assert confusion.count(prediction, truth, num_classes).tolist() == expected


def test_count_over_several_chunks(monkeypatch):
    prediction, truth = maps(7)
    whole = confusion.count(prediction, truth, 7)
    monkeypatch.setattr(confusion, "_PIXELS", 100)
    assert (confusion.count(prediction, truth, 7) == whole).all()
    assert whole.sum() == (truth != 255).sum() and whole.dtype == np.int64


def test_count_equals_torchmetrics(classification):
    prediction, truth = maps(19, void=False)
    matrix = confusion.count(prediction, truth, 19)
    p, t = torch.from_numpy(prediction).long(), torch.from_numpy(truth).long()
    assert (matrix[:, :19] == classification.multiclass_confusion_matrix(p, t, 19, ignore_index=255).numpy()).all()
    assert not matrix[:, 19].any()


@pytest.mark.parametrize("num_classes", [1, 2, 19, 171, 254])
def test_iou_equals_torchmetrics(classification, num_classes):
    prediction, truth = maps(num_classes, (200, 300), void=False)
    p, t = torch.from_numpy(prediction).long(), torch.from_numpy(truth).long()
    # One class is no multiclass problem to torchmetrics: a second one that never occurs takes its place.
    oracle = classification.multiclass_jaccard_index(p, t, max(2, num_classes), average="none", ignore_index=255)
    ours = confusion.class_iou(confusion.count(prediction, truth, num_classes))
    np.testing.assert_allclose(ours, oracle[:num_classes].double().numpy(), rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6))
def test_scores_equal_double_loops(num_classes, seed):
    prediction, truth = maps(num_classes, (6, 9), seed)
    matrix = confusion.count(prediction, truth, num_classes)
    listed = matrix.tolist()
    iou, recall = scores_by_loops(listed)
    assert_same(confusion.class_iou(matrix), iou)
    assert_same(confusion.class_accuracy(matrix), recall)
    total = sum(map(sum, listed))
    hits = sum(listed[c][c] for c in range(num_classes))
    weighted = sum(i * sum(listed[c]) / total for c, i in enumerate(iou) if i is not None) if total else float("nan")
    assert confusion.frequency_weighted_iou(matrix) == pytest.approx(weighted, abs=1e-12, nan_ok=True)
    assert confusion.pixel_accuracy(matrix) == pytest.approx(hits / total if total else float("nan"), nan_ok=True)
    present = [i for i in iou if i is not None]
    average = sum(present) / len(present) if present else float("nan")
    assert confusion.mean(confusion.class_iou(matrix)) == pytest.approx(average, abs=1e-12, nan_ok=True)


def test_a_class_without_ground_truth_is_not_a_number_but_its_false_positives_count():
    truth = np.array([[0, 0, 1, 255]], np.uint8)
    prediction = np.array([[0, 2, 1, 2]], np.uint8)  # class 2 is predicted, but has no ground truth
    iou = confusion.class_iou(confusion.count(prediction, truth, 4))
    assert iou[:2].tolist() == [0.5, 1.0] and np.isnan(iou[2:]).all()
    assert confusion.mean(iou) == 0.75


def test_nothing_labelled_gives_nan_and_no_warning(recwarn):
    matrix = confusion.empty(3)
    for score in (confusion.frequency_weighted_iou, confusion.pixel_accuracy):
        assert math.isnan(score(matrix))
    assert math.isnan(confusion.mean(confusion.class_iou(matrix)))
    assert math.isnan(confusion.mean(confusion.class_accuracy(matrix)))
    assert not recwarn.list


def test_void_prediction_is_a_miss():
    truth = np.zeros((1, 4), np.uint8)
    prediction = np.array([[0, 0, 255, 255]], np.uint8)
    matrix = confusion.count(prediction, truth, 2)
    assert matrix.tolist() == [[2, 0, 2], [0, 0, 0]]
    assert confusion.class_iou(matrix)[0] == 0.5 and confusion.pixel_accuracy(matrix) == 0.5


@pytest.mark.parametrize("side", ["ground truth", "prediction"])
def test_illegal_id_is_an_error_where_detectron2_scores_a_true_positive(side):
    truth, prediction = np.array([[5, 1]], np.uint8), np.array([[0, 1]], np.uint8)
    # Detectron2's rule: label 5 predicted as 0 among 3 classes lands in cell (1, 1), a hit of class 1.
    cells = np.bincount(4 * prediction.ravel().astype(int) + truth.ravel(), minlength=16).reshape(4, 4)
    assert cells.size == 16 and cells[1, 1] == 2
    if side == "prediction":
        truth, prediction = prediction, truth
    with pytest.raises(confusion.IllegalIdError, match=rf"{side} ids .*\(0 to 2\).*5 \(1 pixels\)") as caught:
        confusion.count(prediction, truth, 3)
    assert caught.value.counts == {5: 1} and caught.value.side == side
    assert str(caught.value.at("a.png")).startswith("a.png: ")


@pytest.mark.parametrize("value", [-1, 256, 300, 2**40])
def test_wide_integers_are_checked_before_they_are_narrowed(value):
    truth = np.array([[0, value]], np.int64)
    with pytest.raises(confusion.IllegalIdError, match=rf"{value} \(1 pixels\)"):
        confusion.count(np.zeros((1, 2), np.int64), truth, 3)


def test_bad_arguments():
    zeros = np.zeros((2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        confusion.count(zeros, zeros.T, 3)
    with pytest.raises(ValueError, match="integers"):
        confusion.count(zeros.astype(float), zeros, 3)
    with pytest.raises(ValueError, match="num_classes"):
        confusion.count(zeros, zeros, 256)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 256), st.integers(1, 6), st.integers(1, 11), st.integers(0, 10**6))
def test_argmax_equals_numpy_with_ties(num_classes, height, width, seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, (num_classes, height, width)).astype(np.float32)  # few values: many ties
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    assert (confusion.argmax(logits) == logits.argmax(0)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_argmax_in_strips(monkeypatch, dtype):
    logits = np.random.default_rng(0).standard_normal((5, 31, 7)).astype(dtype)
    monkeypatch.setattr(confusion, "_VALUES", 20)  # two rows at a time
    got = confusion.argmax(logits[:, :, ::-1])  # not contiguous
    assert got.dtype == np.uint8 and (got == logits[:, :, ::-1].argmax(0)).all()


@pytest.mark.parametrize("channel", [0, 1, 4])
def test_argmax_refuses_nan(channel):
    logits = np.zeros((5, 3, 3), np.float32)
    logits[channel, 2, 1] = np.nan
    with pytest.raises(ValueError, match="1 pixels .* not a number"):
        confusion.argmax(logits)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_merge_equals_counting_coarser_maps(seed):
    prediction, truth = maps(6, (8, 8), seed)
    groups = [[0, 3], [1], [2, 5]]  # 4 is in no group
    coarse = np.full(256, 255, np.uint8)
    for g, ids in enumerate(groups):
        coarse[ids] = g
    expected = confusion.count(coarse[prediction], coarse[truth], 3)
    assert (confusion.merge(confusion.count(prediction, truth, 6), groups) == expected).all()


def test_merge_refuses_a_class_in_two_groups():
    with pytest.raises(ValueError, match="another group"):
        confusion.merge(confusion.empty(3), [[0, 1], [1, 2]])
