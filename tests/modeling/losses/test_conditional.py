"""The loss of hierarchical classifiers against a loop over pixels, and against plain autograd at full size."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from multiseg_d2.modeling.losses.conditional import ClassifierTargets, conditional, plain_conditional
from multiseg_d2.modeling.losses.pieces import loss_in_pieces

#: Classes 0 and 1 are children 0 and 1 of the root (three children and void); class 2 is its child 2, whose own
#: classifier (two children and void) class 3 and 4 decide; class 5 is one of the root's children 0 and 2.
ROOT = {0: 0, 1: 1, 2: 2, 3: 2, 4: 2}
BELOW = {3: 0, 4: 1}


def classifiers(dtype=torch.bool) -> list[ClassifierTargets]:
    def table(children):
        child = torch.full((256,), -1)
        for local_id, k in children.items():
            child[local_id] = k
        return child

    among = torch.zeros(256, 4, dtype=torch.bool)
    among[5, [0, 2]] = True
    return [ClassifierTargets((0, 4), table(ROOT), among), ClassifierTargets((4, 7), table(BELOW))]


def example(seed: int, size=(6, 5), small=(3, 4)):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 7, *small, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(0, 7, (2, *size), generator=generator)  # 6: a class that says nothing to anybody
    target[0, 0] = 255
    return scores, target


def loop(scores, target, factors) -> float:
    total = 0.0
    for n, y, x in np.ndindex(*target.shape):
        z, label = [float(v) for v in scores[n, :, y, x]], int(target[n, y, x])
        for (first, last), right, factor in (((0, 4), ROOT, factors[0]), ((4, 7), BELOW, factors[1])):
            part = z[first:last]
            chosen = [part[right[label]]] if label in right else []
            chosen = [part[0], part[2]] if label == 5 and first == 0 else chosen
            if chosen:
                total += factor * (math.log(sum(map(math.exp, part))) - math.log(sum(map(math.exp, chosen))))
    return total


def test_plain_equals_a_loop():
    scores, target = example(0, size=(3, 4))
    expected = loop(scores.detach(), target, (0.5, 2.0))
    assert plain_conditional(scores, target, classifiers(), (0.5, 2.0)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_equal_plain_autograd(seed):
    scores, target = example(seed)
    kernel = functools.partial(conditional, classifiers=classifiers(), factors=(0.5, 2.0))
    loss = loss_in_pieces(scores, (6, 5), kernel, (target,))
    (gradient,) = torch.autograd.grad(loss, scores)
    full = F.interpolate(scores, size=(6, 5), mode="bilinear", align_corners=False)
    plain = plain_conditional(full, target, classifiers(), (0.5, 2.0))
    (expected,) = torch.autograd.grad(plain, scores)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_counts():
    target = torch.tensor([[[0, 1, 2, 3, 4, 5, 6, 255, 3]]])
    root, below = classifiers()
    assert root.counted(target) == 7
    assert below.counted(target) == 3


def test_channels_of_no_classifier_get_no_gradient():
    scores, target = example(4)
    kernel = functools.partial(conditional, classifiers=classifiers()[:1], factors=(1.0,))
    (gradient,) = torch.autograd.grad(loss_in_pieces(scores, (6, 5), kernel, (target,)), scores)
    assert gradient[:, :4].abs().min() > 0
    assert gradient[:, 4:].abs().max() == 0
