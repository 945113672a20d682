"""Entropy and regularisers: loops, autograd, and the authors' values of CRST and of the entropy module."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from multiseg_d2.modeling.losses.confidence import CONFIDENCE_LOSSES, confidence_loss, plain_confidence
from multiseg_d2.modeling.losses.pieces import cross_entropy


def loop(logits: torch.Tensor, name: str) -> float:
    """Sum over all pixels, in double precision."""
    total = 0.0
    for n, y, x in np.ndindex(logits.shape[0], *logits.shape[2:]):
        scores = [float(s) for s in logits[n, :, y, x]]
        norm = sum(map(math.exp, scores))
        p = [math.exp(s) / norm for s in scores]
        total += {
            "entropy": -sum(q * math.log(q) for q in p),
            "mrent": sum(q * math.log(q) for q in p),
            "mrkld": -sum(map(math.log, p)) / len(p),
            "mrl2": sum(q * q for q in p),
        }[name]
    return total


@pytest.mark.parametrize("name", CONFIDENCE_LOSSES)
def test_values_and_gradients(name):
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    assert confidence_loss(logits, (4, 3), name).item() == pytest.approx(loop(logits.detach(), name) / 24, rel=1e-12)
    assert plain_confidence(logits, name).sum().item() == pytest.approx(loop(logits.detach(), name), rel=1e-12)
    mask = torch.rand(2, 9, 7) < 0.6
    (gradient,) = torch.autograd.grad(confidence_loss(logits, (9, 7), name, mask), logits)
    full = F.interpolate(logits, size=(9, 7), mode="bilinear", align_corners=False)
    (expected,) = torch.autograd.grad(plain_confidence(full, name)[mask].mean(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CONFIDENCE_LOSSES)
def test_nothing_to_count_is_zero_and_attached(name):
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = confidence_loss(logits, (4, 4), name, torch.zeros(1, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("name", CONFIDENCE_LOSSES)
def test_certain_pixels_stay_finite(name):
    logits = torch.tensor([300.0, -300.0]).view(1, 2, 1, 1).requires_grad_()
    confidence_loss(logits, (2, 2), name).backward()
    assert torch.isfinite(logits.grad).all()


def test_an_unknown_name():
    with pytest.raises(ValueError, match="mrkld"):
        confidence_loss(torch.zeros(1, 2, 1, 1), (1, 1), "mrkl")


def test_mrkld_of_the_authors_code(reference):
    """Cross-entropy over the valid pixels of all images, divergence over those of the target images."""
    with np.load(reference / "cbst_selection.npz", allow_pickle=False) as file:
        logits = torch.from_numpy(file["mrkld_logits"]).double().requires_grad_()
        target = torch.from_numpy(file["mrkld_target"])
        weights, factor = file["mrkld_image_weight"], float(file["mrkld_global_weight"])
        expected, expected_gradient = float(file["mrkld_loss"]), torch.from_numpy(file["mrkld_grad"]).double()
    target_images = torch.from_numpy(weights > 0)
    (weight,) = set(weights[weights > 0].tolist())
    mask = (target != 255) & target_images.view(-1, 1, 1)
    loss = cross_entropy(logits, target) + factor * weight * confidence_loss(logits, (8, 8), "mrkld", mask)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-8)
