"""Losses over a union against the values of UniSeg's published code, and against a loop over pixels and classes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from multiseg_d2.class_relations import no_relations
from multiseg_d2.modeling.losses import null_bce_loss, pixel_cross_entropy, plain_bce_loss, relational_bce_loss


@pytest.fixture(scope="module")
def reference(samples):
    path = samples.parent / "reference" / "uniseg_losses.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there: losses are not compared with UniSeg's")
    return {key: torch.from_numpy(value) for key, value in np.load(path, allow_pickle=False).items()}


def losses(r):
    """Name in the reference file -> loss of given logits."""
    target = r["target"].long()
    return {
        "null_bce": lambda z: null_bce_loss(z, target, r["present"]),
        "plain_bce": lambda z: plain_bce_loss(z, target),
        "relational_bce": lambda z: relational_bce_loss(z, target, r["relations"]),
    }


@pytest.mark.parametrize("name", ["null_bce", "plain_bce", "relational_bce"])
def test_equals_unisegs_values_and_gradients(reference, name):
    logits = reference["logits"].clone().requires_grad_()
    loss = losses(reference)[name](logits)
    loss.backward()
    assert loss.item() == pytest.approx(reference[f"loss_{name}"].item(), rel=1e-6)
    torch.testing.assert_close(logits.grad, reference[f"grad_{name}"], rtol=1e-5, atol=1e-8)


def example(classes: int = 5, ignore: int = 255):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(2, classes, 3, 4, generator=generator, requires_grad=True)
    present = torch.rand(2, classes, generator=generator) < 0.6
    present[:, 0] = True
    target = torch.stack([p.nonzero()[torch.randint(int(p.sum()), (12,), generator=generator), 0] for p in present])
    target = target.view(2, 3, 4)
    target[0, 1], target[1, 0, 0] = ignore, ignore
    return logits, target, present


def bce(score: float, label: int) -> float:
    return math.log1p(math.exp(-score)) if label else math.log1p(math.exp(score))


def loop(logits, target, relations, ignore=255) -> float:
    """The definition: relations[n][i][k] in {-1, 0, 1}."""
    total, count, logits = 0.0, 0, logits.detach()
    for n, y, x in np.ndindex(*target.shape):
        label = int(target[n, y, x])
        if label != ignore:
            row = relations[n][label]
            total += sum(bce(float(logits[n, k, y, x]), t) for k, t in enumerate(row) if t != -1)
            count += 1
    return total / count


def test_null_loss_equals_a_loop():
    logits, target, present = example()
    relations = [no_relations(p.numpy()).tolist() for p in present]
    assert null_bce_loss(logits, target, present).item() == pytest.approx(loop(logits, target, relations), rel=1e-6)


def test_relational_loss_without_relations_is_the_null_loss():
    logits, target, present = example()
    relations = torch.stack([torch.from_numpy(no_relations(p.numpy())) for p in present])
    one, other = relational_bce_loss(logits, target, relations), null_bce_loss(logits, target, present)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_absent_classes_get_no_gradient():
    logits, target, present = example()
    null_bce_loss(logits, target, present).backward()
    assert (logits.grad[~present] == 0).all() and (logits.grad[present].abs().sum((1, 2)) > 0).all()


@pytest.mark.parametrize("classes", [300, 256])
def test_more_than_255_classes(classes):
    logits, target, present = example(classes, ignore=-1)
    target[0, 0, 0], present[0, 255] = 255, True  # a class like any other
    relations = [no_relations(p.numpy()) for p in present]
    expected = loop(logits, target, [r.tolist() for r in relations], ignore=-1)
    assert null_bce_loss(logits, target, present, ignore=-1).item() == pytest.approx(expected, rel=1e-5)
    stacked = torch.stack([torch.from_numpy(r) for r in relations])
    assert relational_bce_loss(logits, target, stacked, ignore=-1).item() == pytest.approx(expected, rel=1e-5)
    for loss in (null_bce_loss, relational_bce_loss):
        with pytest.raises(ValueError, match="255 of ignored pixels"):
            loss(logits, target, present if loss is null_bce_loss else stacked)


def test_nothing_labelled_gives_an_attached_zero():
    logits, target, present = example()
    target[:] = 255
    relations = torch.stack([torch.from_numpy(no_relations(p.numpy())) for p in present])
    loss = (
        null_bce_loss(logits, target, present)
        + plain_bce_loss(logits, target)
        + relational_bce_loss(logits, target, relations)
    )
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_a_count_given_from_outside_divides():
    logits, target, present = example()
    count = (target != 255).sum()
    whole = null_bce_loss(logits, target, present)
    parts = [null_bce_loss(logits[i : i + 1], target[i : i + 1], present[i : i + 1], count) for i in range(2)]
    torch.testing.assert_close(sum(parts), whole)


# ---- the conflict ----


def fit(loss) -> torch.Tensor:
    """Free logits of two classes, fitted to look-alike pixels: 70 of dataset A (class 0), 30 of B (class 1)."""
    logits = torch.zeros(2, requires_grad=True)
    target = torch.cat([torch.zeros(70), torch.ones(30)]).long().view(100, 1, 1)
    present = torch.eye(2, dtype=torch.bool)[target[:, 0, 0]]  # A has class 0 only, B class 1 only
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        loss(logits.view(1, 2, 1, 1).expand(100, 2, 1, 1), target, present).backward()
        optimizer.step()
    return logits.detach()


def test_the_conflict_of_two_datasets():
    """Cross-entropy and plain BCE share the confidence by amount of data; null BCE gives all of it to both."""
    torch.testing.assert_close(
        fit(lambda z, t, p: pixel_cross_entropy(z, t)).softmax(0), torch.tensor([0.7, 0.3]), atol=2e-3, rtol=0
    )
    torch.testing.assert_close(
        fit(lambda z, t, p: plain_bce_loss(z, t)).sigmoid(), torch.tensor([0.7, 0.3]), atol=2e-3, rtol=0
    )
    assert (fit(null_bce_loss).sigmoid() > 0.99).all()
