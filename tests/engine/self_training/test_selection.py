"""Selection of pseudo-labels: the authors' values, loops in double precision, and the limits of the soft labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from multiseg_d2.engine.self_training.selection import hard_labels, soft_labels


def probabilities_of(file) -> torch.Tensor:
    return torch.from_numpy(file["probabilities"]).permute(0, 3, 1, 2)  # (N, C, H, W)


def test_hard_labels_of_the_authors_code(reference):
    with np.load(reference / "cbst_selection.npz", allow_pickle=False) as file:
        labels = hard_labels(probabilities_of(file), torch.from_numpy(file["thresholds_hard"]))
        np.testing.assert_array_equal(labels.numpy(), file["labels_hard"])


def test_soft_labels_of_the_authors_code(reference):
    with np.load(reference / "cbst_selection.npz", allow_pickle=False) as file:
        thresholds = torch.from_numpy(file["thresholds_soft"])
        soft, labels = soft_labels(probabilities_of(file), thresholds, float(file["lrent_alpha"]))
        np.testing.assert_allclose(soft.permute(0, 2, 3, 1).numpy(), file["soft_labels"], atol=2e-6)
        np.testing.assert_array_equal(labels.numpy(), file["labels_soft"])


def test_hard_labels_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(2, 4, 3, 5, generator=generator, dtype=torch.float64).softmax(1)
    thresholds = torch.tensor([0.3, 0.2, 0.26, 1.0], dtype=torch.float64)
    labels = hard_labels(p, thresholds)
    for n, y, x in np.ndindex(2, 3, 5):
        ratios = [float(p[n, c, y, x]) / float(thresholds[c]) for c in range(4)]
        best = max(range(4), key=ratios.__getitem__)
        assert labels[n, y, x] == (best if ratios[best] >= 1 else 255)
    assert set(labels.unique().tolist()) > {255}


def test_a_ratio_of_exactly_one_is_kept():
    p = torch.tensor([0.75, 0.25]).view(1, 2, 1, 1)
    assert hard_labels(p, torch.tensor([0.75, 1.0])).item() == 0
    assert hard_labels(p, torch.tensor([0.7500001, 1.0])).item() == 255


def test_the_label_may_differ_from_the_most_probable_class():
    p = torch.tensor([0.6, 0.4]).view(1, 2, 1, 1)
    assert hard_labels(p, torch.tensor([0.9, 0.3])).item() == 1


def test_soft_labels_minimise_the_regularised_cost():
    """No other distribution costs less, and a pixel is kept exactly where the minimum is below 0, the cost of none."""
    generator = torch.Generator().manual_seed(2)
    p = torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64).mul(3).softmax(1)
    thresholds, alpha = torch.tensor([0.7, 0.65, 0.6], dtype=torch.float64), 0.4
    soft, labels = soft_labels(p, thresholds, alpha)

    def cost(y):
        ratio = p / thresholds.view(1, -1, 1, 1)
        return (-y * ratio.log() + alpha * torch.xlogy(y, y)).sum(1)

    minimum = cost(soft)
    for _ in range(200):
        other = torch.rand(1, 3, 4, 4, generator=generator, dtype=torch.float64).mul(6).softmax(1)
        assert (cost(other) >= minimum - 1e-12).all()
    assert torch.equal(labels != 255, minimum < 0)
    assert 0 < (labels != 255).sum() < labels.numel()


def test_limits_of_alpha():
    p = torch.tensor([0.5, 0.3, 0.2]).view(1, 3, 1, 1)
    thresholds = torch.full((3,), 0.4)
    nearly_hard, _ = soft_labels(p, thresholds, 0.001)
    assert nearly_hard.flatten().tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    ratio, _ = soft_labels(p, thresholds, 1.0)
    assert ratio.flatten().tolist() == pytest.approx([0.5, 0.3, 0.2])
    with pytest.raises(ValueError, match="alpha"):
        soft_labels(p, thresholds, 0.0)


def test_a_certain_pixel_has_no_nan():
    soft, labels = soft_labels(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.9, 0.9]), 0.25)
    assert soft.flatten().tolist() == [1.0, 0.0]
    assert labels.item() == 0
