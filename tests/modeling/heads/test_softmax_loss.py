"""The loss of softmax heads against loops over pixels: hard and soft labels, confidences, regularisers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from multiseg_d2.modeling.batch import Batch
from multiseg_d2.modeling.heads.softmax_loss import REGULARIZERS, SoftmaxLoss

SIZE = (4, 5)


def example(seed: int = 0):
    """Three images: one with hard labels, one with soft ones and confidences, one pseudo-labelled."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 3, *SIZE, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(0, 3, (3, *SIZE), generator=generator)
    target[:, 0, :2] = 255
    shares = torch.rand(3, *SIZE, generator=generator).softmax(0) * (target[1] != 255)
    confidence = torch.rand(*SIZE, generator=generator)
    samples = [
        {"dataset": "a"},
        {"dataset": "a", "soft_label": shares, "confidence": confidence},
        {"dataset": "a", "pseudo": True},
    ]
    batch = Batch(torch.zeros(3, 3, *SIZE), target, (("a", 3),), [SIZE] * 3, samples)
    return logits, target, batch


def log_softmax(scores) -> list[float]:
    scores = scores.detach()
    norm = math.log(sum(math.exp(float(s)) for s in scores))
    return [float(s) - norm for s in scores]


def loop(logits, target, batch, divisor: float) -> float:
    total = 0.0
    for n, y, x in np.ndindex(3, *SIZE):
        log_p, sample = log_softmax(logits[n, :, y, x]), batch.inputs[n]
        if "soft_label" in sample:
            share = [float(s) for s in sample["soft_label"][:, y, x]]
            total -= float(sample["confidence"][y, x]) * sum(q * p for q, p in zip(share, log_p))
        elif target[n, y, x] != 255:
            total -= log_p[int(target[n, y, x])]
    return total / divisor


def test_hard_soft_and_weighted_labels_against_a_loop():
    logits, target, batch = example()
    loss = SoftmaxLoss()(logits, target, batch, slice(0, 3), torch.tensor(17.0))
    assert loss.item() == pytest.approx(loop(logits.detach(), target, batch, 17.0), rel=1e-6)


def test_without_a_divisor_the_labelled_pixels_count():
    logits, target, batch = example()
    loss = SoftmaxLoss()(logits, target, batch, slice(0, 3), None)
    assert loss.item() == pytest.approx(loop(logits.detach(), target, batch, float((target != 255).sum())), rel=1e-6)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_regulariser_counts_labelled_pixels_of_pseudo_labels_only(name):
    logits, target, batch = example()
    plain = SoftmaxLoss()(logits, target, batch, slice(0, 3), torch.tensor(17.0))
    loss = SoftmaxLoss(name, 0.1)(logits, target, batch, slice(0, 3), torch.tensor(17.0))
    terms = []
    for y, x in np.ndindex(*SIZE):
        if target[2, y, x] != 255:
            log_p = log_softmax(logits[2, :, y, x])
            p = [math.exp(v) for v in log_p]
            terms.append(
                {
                    "mrent": sum(a * b for a, b in zip(p, log_p)),
                    "mrkld": -sum(log_p) / 3,
                    "mrl2": sum(a * a for a in p),
                }[name]
            )
    assert (loss - plain).item() == pytest.approx(0.1 * sum(terms) / len(terms), rel=1e-5)


def test_the_regulariser_is_off_without_weight_and_for_lrent():
    assert SoftmaxLoss("mrkld", 0.0).regularizer == ""
    assert SoftmaxLoss("lrent", 0.25).regularizer == ""


def test_nothing_labelled_is_zero_and_attached():
    logits, target, batch = example()
    del batch.inputs[1]["soft_label"], batch.inputs[1]["confidence"]
    loss = SoftmaxLoss("mrkld", 0.1)(logits, torch.full_like(target, 255), batch, slice(0, 3), None)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0
