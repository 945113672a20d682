"""Cross-entropy against a double loop over pixels and classes."""

from __future__ import annotations

import math

import pytest
import torch

from multiseg_d2.modeling.losses import pixel_cross_entropy


def loop(logits: torch.Tensor, targets: torch.Tensor) -> float:
    total, count = 0.0, 0
    images, _, height, width = logits.shape
    for n in range(images):
        for y in range(height):
            for x in range(width):
                label = int(targets[n, y, x])
                if label == 255:
                    continue
                scores = [float(s) for s in logits[n, :, y, x]]
                total += math.log(sum(math.exp(s) for s in scores)) - scores[label]
                count += 1
    return total / count


def example(seed: int = 0):
    torch.manual_seed(seed)
    logits = torch.randn(2, 4, 5, 3, requires_grad=True)
    targets = torch.randint(0, 4, (2, 5, 3))
    targets[0, 1], targets[1, 0, 0] = 255, 255
    return logits, targets


def test_equals_a_double_loop():
    logits, targets = example()
    assert pixel_cross_entropy(logits, targets).item() == pytest.approx(loop(logits.detach(), targets), rel=1e-6)


def test_ignored_pixels_have_no_gradient():
    logits, targets = example()
    pixel_cross_entropy(logits, targets).backward()
    ignored = (targets == 255)[:, None].expand_as(logits)
    assert (logits.grad[ignored] == 0).all()
    assert (logits.grad[~ignored] != 0).all()


def test_nothing_labelled_is_zero_and_attached():
    logits, targets = example()
    loss = pixel_cross_entropy(logits, torch.full_like(targets, 255))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_divides_by_the_given_count():
    logits, targets = example()
    count = (targets != 255).sum()
    half = pixel_cross_entropy(logits, targets, num_valid=2.0 * count)
    assert half.item() == pytest.approx(0.5 * loop(logits.detach(), targets), rel=1e-6)


def test_two_processes_with_the_mean_count_give_the_global_mean():
    logits, targets = example()
    counts = [(t != 255).sum() for t in targets]
    mean_count = sum(counts) / 2
    parts = [pixel_cross_entropy(logits[i : i + 1], targets[i : i + 1], mean_count) for i in range(2)]
    assert (sum(parts) / 2).item() == pytest.approx(loop(logits.detach(), targets), rel=1e-6)


def test_half_precision_is_summed_in_float32():
    logits, targets = torch.zeros(1, 2, 600, 600, dtype=torch.float16), torch.zeros(1, 600, 600, dtype=torch.int64)
    loss = pixel_cross_entropy(logits, targets)  # the sum, 249533, is beyond float16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
