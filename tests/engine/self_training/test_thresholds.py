"""Thresholds against sorted lists, and against values of the authors' code."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from multiseg_d2.engine.self_training.thresholds import ConfidenceSamples


def sorted_thresholds(images, classes: int, portion: float, stride: int, per_class: bool) -> np.ndarray:
    """The definition: sort everything."""
    lists: list[list[np.float32]] = [[] for _ in range(classes)]
    for confidence, labels in images:
        for c in range(classes):
            lists[c] += list(confidence[labels == c][::stride])
    if not per_class:
        lists = [[value for values in lists for value in values]] * classes
    result = np.ones(classes, np.float32)
    for c, values in enumerate(lists):
        rank = int(np.floor(len(values) * portion))
        if rank:
            result[c] = sorted(values, reverse=True)[rank - 1]
    return result


def images(seed: int, classes: int, count: int = 5, ties: bool = False):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        confidence = generator.random((13, 17), np.float32) ** np.float32(0.1)
        if ties:
            confidence = np.round(confidence, 1).astype(np.float32)
        labels = generator.integers(0, classes, (13, 17)).astype(np.uint8)
        labels[generator.random((13, 17)) < 0.1] = 255  # void
        labels[labels == 1] = 0  # class 1 is never predicted
        yield confidence, labels


@pytest.mark.parametrize("portion", [0.0, 0.003, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("per_class", [False, True])
def test_equal_the_sorted_definition(portion, ties, per_class, tmp_path):
    data = list(images(3, 7, ties=ties))
    samples = ConfidenceSamples(7, tmp_path, stride=3)
    for confidence, labels in data:
        samples.add(confidence, labels)
    expected = sorted_thresholds(data, 7, portion, 3, per_class)
    np.testing.assert_array_equal(samples.thresholds(portion, per_class), expected)
    np.testing.assert_array_equal(samples.thresholds(portion, per_class), expected)  # asking twice changes nothing
    assert samples.predicted[1] == 0
    assert samples.predicted.sum() == sum((labels < 7).sum() for _, labels in data)


def test_more_classes_than_one_reading_counts(tmp_path):
    data = list(images(4, 200))
    samples = ConfidenceSamples(200, tmp_path, stride=1)
    for confidence, labels in data:
        samples.add(confidence, labels)
    np.testing.assert_array_equal(samples.thresholds(0.4), sorted_thresholds(data, 200, 0.4, 1, True))


def test_the_ends_of_the_range(tmp_path):
    samples = ConfidenceSamples(2, tmp_path, stride=1)
    samples.add(np.array([[0.0, -0.0, 1.0, 1e-40]], np.float32), np.zeros((1, 4), np.uint8))
    ranks = [samples.thresholds(p)[0] for p in (0.25, 0.5, 0.75, 1.0)]
    np.testing.assert_array_equal(ranks, np.array([1.0, 1e-40, 0.0, 0.0], np.float32))


def test_processes_share_their_counts(tmp_path):
    """Two processes (here threads) with a part of the images each find the thresholds of all images."""
    data, barrier, sent = list(images(5, 6)), threading.Barrier(2), {}

    def all_sum_of(rank):
        def all_sum(counts):
            sent[rank] = counts
            barrier.wait(30)
            total = sent[0] + sent[1]
            barrier.wait(30)
            return total

        return all_sum

    def process(rank):
        samples = ConfidenceSamples(6, tmp_path, all_sum=all_sum_of(rank))
        for confidence, labels in data[rank::2]:
            samples.add(confidence, labels)
        return samples.thresholds(0.3)

    with ThreadPoolExecutor(2) as pool:
        for thresholds in pool.map(process, range(2)):
            np.testing.assert_array_equal(thresholds, sorted_thresholds(data, 6, 0.3, 4, True))


@pytest.mark.parametrize("bad", [np.nan, 1.5, -0.1])
def test_refuses_what_is_no_probability(bad, tmp_path):
    samples = ConfidenceSamples(2, tmp_path)
    with pytest.raises(ValueError, match="probabilities"):
        samples.add(np.array([[0.5, bad]], np.float32), np.zeros((1, 2), np.uint8))


def test_values_of_the_authors_code(reference):
    with np.load(reference / "cbst_selection.npz", allow_pickle=False) as file:
        probabilities, portion, stride = file["probabilities"], float(file["portion"]), int(file["sample_stride"])
        samples = ConfidenceSamples(probabilities.shape[-1], stride=stride)
        for image in probabilities:
            samples.add(image.max(axis=-1), image.argmax(axis=-1))
        np.testing.assert_array_equal(samples.thresholds(portion), file["thresholds_hard"])
        np.testing.assert_array_equal(samples.thresholds(portion), file["thresholds_soft"])
        np.testing.assert_array_equal(samples.predicted, file["predicted_pixels"])
