"""Spatial priors against a loop and scipy's filter; files of priors."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import correlate1d

from multiseg_d2.engine.self_training.priors import load_prior, save_prior, spatial_prior
from multiseg_d2.label_space import LabelSpace, raw_to_local_table

SIZE = (6, 8)


def maps(seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    result = [generator.integers(0, 3, SIZE).astype(np.uint8) for _ in range(4)]
    for label in result:
        label[generator.random(SIZE) < 0.3] = 255
    return result


def counts(labels) -> np.ndarray:
    result = np.zeros((3, *SIZE))
    for label in labels:
        for y, x in np.ndindex(*SIZE):
            if label[y, x] != 255:
                result[label[y, x], y, x] += 1
    return result


def test_shares_without_smoothing():
    labels = maps()
    expected = counts(labels)
    expected = np.divide(expected, expected.sum(0), out=np.zeros_like(expected), where=expected.sum(0) > 0)
    prior = spatial_prior(range(4), 3, SIZE, kernel=1, read=labels.__getitem__)
    np.testing.assert_allclose(prior, expected, atol=1e-6)


def test_smoothing_is_a_reflected_gaussian():
    labels, taps = maps(1), 5
    weights = np.exp(-0.5 * ((np.arange(taps) - 2) / (taps / 6)) ** 2)
    smooth = correlate1d(correlate1d(counts(labels), weights / weights.sum(), 1), weights / weights.sum(), 2)
    prior = spatial_prior(range(4), 3, SIZE, kernel=taps, read=labels.__getitem__)
    np.testing.assert_allclose(prior, smooth / smooth.sum(0), atol=1e-5)
    np.testing.assert_allclose(prior.sum(0), 1, atol=1e-5)


def test_label_maps_of_other_sizes_are_brought_to_the_size():
    label = np.kron(maps(2)[0], np.ones((3, 3), np.uint8))
    small = spatial_prior([0], 3, SIZE, kernel=1, read=lambda _: label)
    np.testing.assert_array_equal(small, spatial_prior([0], 3, SIZE, kernel=1, read=lambda _: label[1::3, 1::3]))


def test_nothing_labelled():
    with pytest.raises(ValueError, match="no pixel"):
        spatial_prior([0], 3, SIZE, read=lambda _: np.full(SIZE, 255, np.uint8))


def space(*classes: str) -> LabelSpace:
    count = len(classes)
    colors = np.arange(3 * count, dtype=np.uint8).reshape(-1, 3)
    return LabelSpace("s", classes, colors, raw_to_local_table([[i] for i in range(count)]), np.eye(count, dtype=bool))


def test_files(tmp_path):
    prior = np.random.default_rng(0).random((2, 3, 4)).astype(np.float32)
    save_prior(tmp_path / "prior.npz", prior, ["a", "b"])
    np.testing.assert_array_equal(load_prior(tmp_path / "prior.npz", space("a", "b")).numpy(), prior)
    with pytest.raises(ValueError, match="for other classes"):
        load_prior(tmp_path / "prior.npz", space("b", "a"))
    with pytest.raises(ValueError, match=r"spatial_prior.py"):
        load_prior("", space("a", "b"))
    (tmp_path / "other.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"other.npz is no file of a spatial prior"):
        load_prior(tmp_path / "other.npz", space("a", "b"))
    with pytest.raises(ValueError, match=r"missing.npz is no file"):
        load_prior(tmp_path / "missing.npz", space("a", "b"))
