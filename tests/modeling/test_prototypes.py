"""Prototypes: means, axes and clusters against scikit-learn and plain loops; files; several processes' parts."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch.nn import functional as F

from multiseg_d2.modeling.prototypes import (
    PixelFeatures,
    PixelStatistics,
    Prototypes,
    PrototypeSource,
    cell_labels,
    principal_axes,
)

CHANNELS, SIZE = 6, (8, 12)


class FakeHead:
    """What PrototypeSource asks of a head."""

    datasets = ("alpha", "beta")

    def __init__(self, spaces):
        self.spaces, self.trunk = spaces, type("Trunk", (), {"out_channels": CHANNELS})

    def own_space(self, dataset):
        return self.spaces[dataset]


def pixels_of(seed: int, classes: int, images: int = 3):
    """Samples and embeddings (labels of twice their resolution) whose channels have very different variances."""
    rng = torch.Generator().manual_seed(seed)
    scales = torch.tensor([9.0, 5.0, 3.0, 1.0, 0.3, 0.1]).view(-1, 1, 1)
    samples, outputs = [], []
    for _ in range(images):
        labels = torch.randint(0, classes, SIZE, generator=rng, dtype=torch.uint8)
        labels[0] = 255
        shift = torch.rand(CHANNELS, 1, 1, generator=rng)
        embedding = scales * (torch.randn(CHANNELS, SIZE[0] // 2, SIZE[1] // 2, generator=rng) + shift)
        samples.append({"sem_seg": labels, "image": torch.zeros(3, *SIZE)})
        outputs.append({"embedding": embedding, "covers": SIZE})
    return samples, outputs


@pytest.fixture
def run_over(spaces):
    """A pass over made-up images of an entry; says what it was asked for."""
    asked = []

    def run(entry, evaluator, **options):
        asked.append((entry, options))
        dataset = entry.split("_")[1]
        evaluator.reset()
        evaluator.process(*pixels_of(*{"alpha": (0, 4), "beta": (1, 3)}[dataset]))  # alpha's fifth class: no pixel
        return evaluator.evaluate()

    run.asked = asked
    return run


def cells(seed: int, classes: int):
    """(P, D) features of labelled cells and (P,) their labels."""
    samples, outputs = pixels_of(seed, classes)
    labels = torch.stack([s["sem_seg"][1::2, 1::2] for s in samples]).flatten().numpy()
    features = torch.stack([o["embedding"] for o in outputs]).permute(0, 2, 3, 1).reshape(-1, CHANNELS).numpy()
    return features[labels != 255], labels[labels != 255]


def full_means(seed: int, classes: int) -> np.ndarray:
    """Class means of the features resized to the labels."""
    samples, outputs = pixels_of(seed, classes)
    full = F.interpolate(torch.stack([o["embedding"] for o in outputs]), size=SIZE, mode="bilinear").permute(0, 2, 3, 1)
    labels = torch.stack([s["sem_seg"] for s in samples])
    return np.stack([full[labels == c].mean(0).numpy() for c in range(classes)])


def test_means_are_projected_on_the_axes_of_all_pixels(spaces, run_over):
    source = PrototypeSource("some.pth", ("modeling_alpha_train", "modeling_beta_train"))
    found = source.find(FakeHead(spaces), run_over, dim=3)
    everything = np.concatenate([cells(0, 4)[0], cells(1, 3)[0]])
    pca = PCA(3).fit(everything.astype(np.float64))
    assert np.allclose(np.abs(np.sum(pca.components_ * found.projection, 1)), 1, atol=1e-5)
    for dataset, arguments in (("alpha", (0, 4)), ("beta", (1, 3))):
        reduced = (full_means(*arguments) - everything.mean(0)) @ found.projection.T
        expected = reduced / np.linalg.norm(reduced, axis=1, keepdims=True)
        own = found.vectors[dataset][: len(expected), 0]
        np.testing.assert_allclose(own, expected, atol=1e-5)
    assert not found.vectors["alpha"][4].any()
    assert run_over.asked[0] == (
        "modeling_alpha_train",
        {"labels": True, "embeddings": True, "weights": "some.pth"},
    )


def test_several_centroids_are_the_centres_of_a_classs_pixels(spaces, run_over):
    found = PrototypeSource("", ("modeling_alpha_train", "modeling_beta_train")).find(FakeHead(spaces), run_over, 3, 2)
    again = PrototypeSource("", ("modeling_alpha_train", "modeling_beta_train")).find(FakeHead(spaces), run_over, 3, 2)
    assert found.vectors["beta"].shape == (3, 2, 3)
    np.testing.assert_array_equal(found.vectors["beta"], again.vectors["beta"])
    features, labels = cells(1, 3)
    points = (features[labels == 1] - found.centre) @ found.projection.T
    centres = found.vectors["beta"][1].astype(np.float64)
    assert np.allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-6) and (centres[0] @ centres[1]) < 0.99
    # each centre, up to its length, is the mean of the points of one of two clusters
    from sklearn.cluster import KMeans

    expected = KMeans(2, n_init=10, random_state=1).fit(points).cluster_centers_
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(np.abs(centres @ expected.T).max(1) - 1).max() < 0.05


def test_two_parts_add_up_to_the_whole():
    samples, outputs = pixels_of(2, 4, images=4)

    def measured(chosen):
        evaluator = PixelFeatures(4, CHANNELS, sample=True)
        evaluator.process(samples[chosen], outputs[chosen])
        return evaluator.evaluate()["pixels"]

    whole, parts = measured(slice(None)), measured(slice(2)) + measured(slice(2, 4))
    for name in ("class_sums", "class_counts", "sum", "outer", "count"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name))
    assert [len(s) for s in parts.sample] == [len(s) for s in whole.sample] and whole.count > 0
    assert PixelStatistics.empty(4, CHANNELS).count == 0


def test_cells_in_the_padding_have_no_label():
    labels = torch.arange(24, dtype=torch.uint8).view(4, 6)
    found = cell_labels(labels, (3, 3), (6, 6))  # two rows of padding
    assert found.tolist() == [[7, 9, 11], [19, 21, 23], [255, 255, 255]]


def test_the_sign_and_order_of_axes_is_fixed():
    covariance = np.diag([1.0, 9.0, 4.0])
    np.testing.assert_allclose(principal_axes(covariance, 2), [[0, 1, 0], [0, 0, 1]])


def test_a_file_gives_the_same_and_other_classes_are_refused(spaces, run_over, tmp_path):
    entries = ("modeling_alpha_train", "modeling_beta_train")
    found = PrototypeSource("", entries, str(tmp_path)).find(FakeHead(spaces), run_over, 3)
    path = str(tmp_path / "prototypes.npz")
    loaded = PrototypeSource(path).find(FakeHead(spaces), None, 3)
    for dataset in found.vectors:
        np.testing.assert_array_equal(found.vectors[dataset], loaded.vectors[dataset])
    with pytest.raises(ValueError, match="the model wants"):
        PrototypeSource(path).find(FakeHead(spaces), None, 2)
    other = Prototypes(found.classes | {"beta": ("a", "b", "c")}, found.vectors, found.projection, found.centre)
    other.save(path)
    with pytest.raises(ValueError, match="the model has"):
        PrototypeSource(path).find(FakeHead(spaces), None, 3)


def test_random_prototypes_say_so(spaces, caplog):
    with caplog.at_level(logging.WARNING, "multiseg_d2"):
        found = PrototypeSource("random").find(FakeHead(spaces), None, 3)
    assert "RANDOM" in caplog.text and found.vectors["alpha"].any()


@pytest.mark.parametrize(("start", "warns"), [("", True), ("package://x", True), ("out/model_final.pth", False)])
def test_a_decoder_of_random_weights_is_said(start, warns, spaces, run_over, caplog):
    entries = ("modeling_alpha_train", "modeling_beta_train")
    with caplog.at_level(logging.WARNING, "multiseg_d2"):
        PrototypeSource("", entries, start=start).find(FakeHead(spaces), run_over, 3)
    assert ("RANDOM" in caplog.text) == warns


def test_no_labels_no_prototypes(spaces):
    def nothing(entry, evaluator, **options):
        evaluator.reset()
        return evaluator.evaluate()

    with pytest.raises(ValueError, match="need labelled pixels"):
        PrototypeSource("", ("modeling_alpha_train",)).find(FakeHead(spaces), nothing, 3)
