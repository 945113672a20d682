"""Entropy of similarities to prototypes: the published module's numbers, masks, centroids, by plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from multiseg_d2.modeling.losses import prototype_entropy, prototype_scores


@pytest.mark.parametrize("dataset", ["a", "b"])
@pytest.mark.parametrize(("cross", "within"), [(1, 0), (0, 1), (1, 1)])
def test_the_published_module(reference, dataset, cross, within):
    """Loss and gradient with respect to the embedding, as the released code has them."""
    stored = np.load(reference / "entropy_module.npz", allow_pickle=False)
    embedding = torch.from_numpy(stored["embedding"]).requires_grad_()
    other = {"a": "b", "b": "a"}[dataset]
    loss = 0.0
    for name, weight in ((dataset, within), (other, cross)):
        prototypes = torch.from_numpy(stored[f"prototypes_{name}"][:-1])
        loss = loss + weight * prototype_entropy(prototype_scores(embedding, prototypes), (5, 4))
    loss.backward()
    name = f"{dataset}_cross{cross}_within{within}"
    assert loss.item() == pytest.approx(stored[f"loss_{name}"].item(), rel=1e-6)
    torch.testing.assert_close(embedding.grad, torch.from_numpy(stored[f"grad_{name}"]), rtol=1e-4, atol=1e-8)


def loop(scores, size, content, weights, confident) -> float:
    """Pixel by pixel."""
    full = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    factor = F.interpolate(weights[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    total = 0.0
    for n, y, x in np.ndindex(len(scores), *size):
        row = [math.exp(v) for v in full[n, :, y, x].tolist()]
        shares = [v / sum(row) for v in row]
        value = -sum(p * math.log(p) for p in shares)
        if content[n, y, x] and not (confident and value >= math.log(len(row)) / 2):
            total += value * factor[n, y, x].item()
    return total / content.sum().item()


@pytest.mark.parametrize("confident", [False, True])
def test_masks_by_loops(confident):
    rng = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, 4, 3, 5, generator=rng)
    content = torch.rand(2, 6, 9, generator=rng) > 0.3
    weights = torch.rand(2, 3, 5, generator=rng)
    found = prototype_entropy(scores, (6, 9), content, weights=weights, confident=confident)
    expected = loop(scores, (6, 9), content, weights, confident)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert expected < 0.9 * loop(scores, (6, 9), content, weights, False) or not confident


def test_padding_alone_gives_zero_and_no_gradient():
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = prototype_entropy(scores, (8, 8), torch.zeros(1, 8, 8, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not scores.grad.any()


def test_a_cosine_does_not_know_lengths_and_a_dot_product_does():
    embedding, prototypes = torch.randn(1, 6, 2, 2), torch.randn(4, 6)
    for scale in (0.0, 5.0):
        scores = prototype_scores(embedding, prototypes, scale)
        torch.testing.assert_close(prototype_scores(embedding, 7 * prototypes, scale), scores)
        longer = prototype_scores(3 * embedding, prototypes, scale)
        torch.testing.assert_close(longer, scores if scale else 3 * scores)
    assert scores.abs().max() <= 5


def test_a_class_is_as_similar_as_its_nearest_centroid():
    embedding, prototypes = torch.randn(2, 6, 3, 2), torch.randn(4, 3, 6)
    scores = prototype_scores(embedding, prototypes)
    for c in range(4):
        single = torch.stack([prototype_scores(embedding, prototypes[c, k][None])[:, 0] for k in range(3)])
        torch.testing.assert_close(scores[:, c], single.amax(0))
