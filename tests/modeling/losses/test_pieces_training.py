"""Training with losses in pieces is training with the usual losses: they drift apart by rounding alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from multiseg_d2.modeling.losses import cross_entropy, pieces

STEPS, CLASSES, SIZE = 8, 7, (45, 61)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "_CPU_SCORES", 1 << 12)


def full_size(logits: Tensor, target: Tensor) -> Tensor:
    scores = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, target, ignore_index=255)


def network(dtype: torch.dtype, changed: float) -> nn.Module:
    """Stride 8, batch norm; ``changed``: relative noise on all weights."""
    torch.manual_seed(0)
    layers, channels = [], 3
    for width, stride in ((16, 2), (32, 2), (32, 2), (32, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    model = nn.Sequential(*layers, nn.Conv2d(channels, CLASSES, 1)).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + changed * torch.randn_like(parameter))
    return model


def train(loss: Callable[..., Tensor], dtype: torch.dtype, changed: float = 0.0) -> tuple[Tensor, Tensor]:
    """Losses of all steps, and the weights after them."""
    model = network(dtype, changed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    rng, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        images = torch.randn(2, 3, *SIZE, generator=rng).to(dtype)
        target = torch.randint(0, CLASSES, (2, *SIZE), generator=rng)
        target[:, :5] = 255
        optimizer.zero_grad()
        value = loss(model(images), target)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])


def drift(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_double_precision_training_is_the_same():
    ours, theirs = train(cross_entropy, torch.float64), train(full_size, torch.float64)
    assert drift(theirs[1], train(full_size, torch.float64, 1e-7)[1]) > 1e-8  # a change this small would be seen
    assert (ours[0] - theirs[0]).abs().max() < 1e-12
    assert drift(ours[1], theirs[1]) < 1e-13


def test_single_precision_drifts_as_after_a_change_in_the_last_digit():
    ours, theirs = train(cross_entropy, torch.float32), train(full_size, torch.float32)
    changed = train(full_size, torch.float32, 1e-7)
    assert 0 < drift(ours[1], theirs[1]) < 3 * drift(changed[1], theirs[1])
    assert (ours[0] - theirs[0]).abs().max() < 2e-6
