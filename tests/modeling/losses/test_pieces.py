"""Losses in pieces against the plain functions on resized scores, and against loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from multiseg_d2.modeling.losses import (
    binary_loss,
    cross_entropy,
    kernels,
    loss_in_pieces,
    null_bce_loss,
    pieces,
    pixel_cross_entropy,
    plain_bce_loss,
    relational_bce_loss,
    soft_cross_entropy,
    soft_pixel_cross_entropy,
)

#: (N, C, h, w) and (H, W): stride 8, odd sizes, labels smaller than the scores, no resizing, more than 255 classes.
SHAPES = [
    ((2, 19, 16, 32), (128, 256)),
    ((3, 5, 9, 13), (50, 77)),
    ((2, 4, 20, 21), (13, 10)),
    ((2, 3, 17, 9), (17, 9)),
    ((2, 300, 5, 6), (33, 31)),
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that also small images come in several pieces."""
    monkeypatch.setattr(pieces, "_CPU_SCORES", 1 << 13)


def resized(logits, size):
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def random(shape, size, ignore=-1, dtype=torch.float32):
    """Logits, ids, weights, soft labels, masks and relations."""
    rng = torch.Generator().manual_seed(sum(shape))
    (images, classes, *_), size = shape, tuple(size)
    target = torch.randint(0, classes, (images, *size), generator=rng)
    target[torch.rand(images, *size, generator=rng) < 0.2] = ignore
    soft = torch.rand(images, classes, *size, generator=rng, dtype=dtype) ** 4
    soft *= (torch.rand(images, 1, *size, generator=rng) < 0.8) / soft.sum(1, keepdim=True)
    present = torch.rand(images, classes, generator=rng) < 0.5
    present[:, 0], present[-1] = True, present[0]  # the last image has the first one's classes
    relations = torch.randint(-1, 2, (images, classes, classes), generator=rng)
    relations[-1] = relations[0]
    return {
        "logits": 3 * torch.randn(shape, generator=rng, dtype=dtype),
        "target": target,
        "weights": torch.rand(images, *size, generator=rng, dtype=dtype),
        "soft": soft,
        "present": present,
        "relations": relations,
    }


PAIRS = {  # name -> (in pieces, plain on scores of full size)
    "cross_entropy": (
        lambda z, d: cross_entropy(z, d["target"], ignore=-1),
        lambda z, d: pixel_cross_entropy(z, d["target"], ignore=-1),
    ),
    "soft": (
        lambda z, d: soft_cross_entropy(z, d["soft"]),
        lambda z, d: soft_pixel_cross_entropy(z, d["soft"]),
    ),
    "plain_bce": (
        lambda z, d: binary_loss(z, d["target"], ignore=-1),
        lambda z, d: plain_bce_loss(z, d["target"], ignore=-1),
    ),
    "null_bce": (
        lambda z, d: binary_loss(z, d["target"], d["present"], ignore=-1),
        lambda z, d: null_bce_loss(z, d["target"], d["present"], ignore=-1),
    ),
    "relational_bce": (
        lambda z, d: binary_loss(z, d["target"], relations=d["relations"], ignore=-1),
        lambda z, d: relational_bce_loss(z, d["target"], d["relations"], ignore=-1),
    ),
}


def loss_and_gradient(function, logits):
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits)
    loss.backward()
    return loss.detach(), logits.grad


def assert_same(found, expected, tolerance=2e-6):
    (loss, gradient), (plain_loss, plain_gradient) = found, expected
    torch.testing.assert_close(loss, plain_loss, rtol=tolerance, atol=0)
    assert (gradient - plain_gradient).norm() <= tolerance * plain_gradient.norm()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_equals_the_plain_loss_on_resized_scores(name, shape, size):
    data, (in_pieces, plain) = random(shape, size), PAIRS[name]
    found = loss_and_gradient(lambda z: in_pieces(z, data), data["logits"])
    assert_same(found, loss_and_gradient(lambda z: plain(resized(z, size), data), data["logits"]))


@pytest.mark.parametrize("name", PAIRS)
def test_gradient_by_finite_differences_in_double_precision(name):
    data = random((2, 4, 3, 4), (7, 10), dtype=torch.float64)
    logits = data["logits"].requires_grad_()
    assert PAIRS[name][0](logits, data).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda z: PAIRS[name][0](z, data), logits)


@pytest.mark.parametrize("name", PAIRS)
def test_large_scores_do_not_overflow(name):
    data = random((1, 4, 5, 6), (20, 30), dtype=torch.float64)
    data["logits"] *= 300
    found = loss_and_gradient(lambda z: PAIRS[name][0](z, data), data["logits"].float())
    single = {key: value.float() if value.is_floating_point() else value for key, value in data.items()}
    expected = loss_and_gradient(lambda z: PAIRS[name][1](resized(z, (20, 30)), single), single["logits"])
    assert found[0].isfinite() and found[1].isfinite().all()
    assert_same(found, expected, 1e-5)


def loop(scores, target, weights) -> float:
    """Weighted sum of cross-entropies, one pixel at a time."""
    total = 0.0
    for n, y, x in np.ndindex(*target.shape):
        if target[n, y, x] != 255:
            column = [float(s) for s in scores[n, :, y, x]]
            total += float(weights[n, y, x]) * (math.log(sum(map(math.exp, column))) - column[target[n, y, x]])
    return total


def test_weights_multiply_each_pixels_loss():
    data = random((2, 4, 3, 4), (9, 11), ignore=255)
    logits, target, weights = data["logits"], data["target"], data["weights"]
    expected = loop(resized(logits, (9, 11)), target, weights)
    assert cross_entropy(logits, target, divisor=10.0, weights=weights).item() == pytest.approx(expected / 10, rel=1e-5)
    per_image = torch.tensor([0.0, 0.3])
    expected = loop(resized(logits, (9, 11)), target, per_image.view(2, 1, 1).expand(2, 9, 11))
    found = cross_entropy(logits, target, weights=per_image).item()
    assert found == pytest.approx(expected / int((target != 255).sum()), rel=1e-5)  # the divisor is not weighted


@pytest.mark.parametrize("name", ["soft", "null_bce", "relational_bce"])
def test_all_losses_take_weights(name):
    data = random((3, 5, 4, 4), (12, 13))
    calls = {
        "soft": lambda z, **k: soft_cross_entropy(z, data["soft"], **k),
        "null_bce": lambda z, **k: binary_loss(z, data["target"], data["present"], ignore=-1, **k),
        "relational_bce": lambda z, **k: binary_loss(z, data["target"], relations=data["relations"], ignore=-1, **k),
    }
    call, rows = calls[name], torch.arange(12) % 3 == 0
    weights = rows.float()[:, None].expand(3, 12, 13)  # every third row: as if the others had no label
    masked = {"target": data["target"].where(rows[:, None], -1), "soft": data["soft"] * weights[:, None]}
    found = loss_and_gradient(lambda z: call(z, divisor=50.0, weights=weights), data["logits"])
    data |= masked
    assert_same(found, loss_and_gradient(lambda z: call(z, divisor=50.0), data["logits"]))


@pytest.mark.parametrize("targets_size", [(8, 11), (4, 3), (40, 30)])
def test_soft_labels_of_another_resolution_are_resized(targets_size):
    data, coarse = random((2, 5, 4, 5), (21, 26)), random((2, 5, 4, 5), targets_size)["soft"]
    found = loss_and_gradient(lambda z: soft_cross_entropy(z, coarse, size=(21, 26), divisor=9.0), data["logits"])
    soft, count = resized(coarse, (21, 26)), torch.tensor(9)
    assert_same(
        found,
        loss_and_gradient(lambda z: soft_pixel_cross_entropy(resized(z, (21, 26)), soft, count), data["logits"]),
    )


@pytest.mark.parametrize("name", ["null_bce", "plain_bce", "relational_bce"])
def test_equals_unisegs_values_and_gradients(reference, name):
    arrays = np.load(reference / "uniseg_losses.npz", allow_pickle=False)
    r = {key: torch.from_numpy(value) for key, value in arrays.items()}
    masks = {"null_bce": {"present": r["present"]}, "plain_bce": {}, "relational_bce": {"relations": r["relations"]}}
    loss, gradient = loss_and_gradient(lambda z: binary_loss(z, r["target"], **masks[name]), r["logits"])
    assert loss.item() == pytest.approx(r[f"loss_{name}"].item(), rel=1e-6)
    torch.testing.assert_close(gradient, r[f"grad_{name}"], rtol=1e-5, atol=1e-8)


def test_a_kernel_of_ones_own(reference):
    """MRKLD (CRST): cross-entropy plus a divergence from the uniform distribution over the labelled target pixels."""
    arrays = np.load(reference / "cbst_selection.npz", allow_pickle=False)
    logits, target, image_weight = (
        torch.from_numpy(arrays[f"mrkld_{k}"]) for k in ("logits", "target", "image_weight")
    )
    valid = (target != 255).flatten(1).sum(1)
    strength = float(arrays["mrkld_global_weight"]) * image_weight / valid[image_weight > 0].sum()

    def kernel(scores, target, strength):
        labelled = (target != 255).unsqueeze(1) * strength
        log_probability = scores.log_softmax(1)
        total, gradient = kernels.softmax(scores, target, ignore=255)
        total, gradient = total / valid.sum(), gradient / valid.sum()
        total = total - (log_probability.mean(1, keepdim=True) * labelled).sum()
        return total, gradient + labelled * (log_probability.exp() - 1 / scores.shape[1])

    loss, gradient = loss_and_gradient(
        lambda z: loss_in_pieces(z, target.shape[-2:], kernel, (target,), (strength.view(-1, 1, 1, 1),)), logits
    )
    assert loss.item() == pytest.approx(float(arrays["mrkld_loss"]), rel=1e-5)
    torch.testing.assert_close(gradient, torch.from_numpy(arrays["mrkld_grad"]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", PAIRS)
def test_nothing_labelled_is_zero_and_attached(name):
    data = random((2, 4, 3, 3), (10, 10))
    data["target"].fill_(-1), data["soft"].zero_()
    loss, gradient = loss_and_gradient(lambda z: PAIRS[name][0](z, data), data["logits"])
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_two_processes_with_the_mean_count_give_the_global_mean():
    data = random((2, 4, 5, 6), (33, 40), ignore=255)
    logits, target = data["logits"], data["target"]
    mean_count = (target != 255).sum() / 2
    parts = [cross_entropy(logits[i : i + 1], target[i : i + 1], divisor=mean_count) for i in range(2)]
    torch.testing.assert_close(sum(parts) / 2, cross_entropy(logits, target))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_targets_of_any_integer_type(dtype):
    data = random((2, 7, 5, 6), (33, 40), ignore=200)
    expected = cross_entropy(data["logits"], data["target"], ignore=200)
    assert torch.equal(cross_entropy(data["logits"], data["target"].to(dtype), ignore=200), expected)
    masked = [
        binary_loss(data["logits"], t, data["present"], ignore=200) for t in (data["target"], data["target"].to(dtype))
    ]
    assert torch.equal(*masked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_half_precision_is_computed_in_single(name, dtype):
    data = random((2, 7, 16, 16), (128, 128))
    half = data["logits"].to(dtype)
    loss, gradient = loss_and_gradient(lambda z: PAIRS[name][0](z, data), half)
    exact = loss_and_gradient(lambda z: PAIRS[name][0](z, data), half.float())
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(loss, exact[0])
    assert torch.equal(gradient, exact[1].to(dtype))


def test_autocast_changes_nothing():
    data = random((2, 7, 16, 16), (128, 128))
    run = lambda z: cross_entropy(z, data["target"], ignore=-1)  # noqa: E731
    expected = loss_and_gradient(run, data["logits"])
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradient(run, data["logits"])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_works_under_activation_checkpointing(reentrant):
    data = random((2, 7, 8, 8), (64, 64))
    run = lambda z: cross_entropy(2 * z, data["target"], ignore=-1)  # noqa: E731
    expected = loss_and_gradient(run, data["logits"])
    found = loss_and_gradient(lambda z: checkpoint(run, z, use_reentrant=reentrant), data["logits"])
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_memory_layout_of_the_logits_does_not_matter():
    data = random((2, 7, 8, 12), (64, 96))
    expected = loss_and_gradient(lambda z: cross_entropy(z, data["target"], ignore=-1), data["logits"])
    for view in (
        lambda z: z.to(memory_format=torch.channels_last),
        lambda z: z.mT.contiguous().mT,
        lambda z: torch.cat([z, z], 1)[:, :7],
    ):
        found = loss_and_gradient(lambda z, v=view: cross_entropy(v(z), data["target"], ignore=-1), data["logits"])
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_inputs_are_left_as_they_were():
    for size in ((5, 6), (20, 30)):  # without resizing the kernel must not write into the logits
        data = random((2, 7, 5, 6), size)
        before = {key: value.clone() for key, value in data.items()}
        for in_pieces, _ in PAIRS.values():
            loss_and_gradient(lambda z, f=in_pieces, d=data: f(z, d), data["logits"])
            in_pieces(data["logits"], data)
        assert all(torch.equal(data[key], before[key]) for key in data)


def test_no_piece_is_larger_than_the_limit():
    seen = []

    def kernel(scores):
        seen.append(scores.numel())
        return scores.sum(), torch.ones_like(scores)

    _, gradient = loss_and_gradient(lambda z: loss_in_pieces(z, (200, 300), kernel), torch.randn(3, 6, 25, 38))
    assert max(seen) <= 1 << 13
    assert sum(seen) == 3 * 6 * 200 * 300
    assert gradient.sum().item() == pytest.approx(3 * 6 * 200 * 300, rel=1e-5)


def test_second_order_gradients_are_refused():
    data = random((1, 4, 3, 3), (10, 10))
    logits = data["logits"].requires_grad_()
    loss = cross_entropy(logits, data["target"], ignore=-1)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second-order gradient"):
        gradient.square().sum().backward()


def test_illegal_ids_are_named():
    data = random((2, 7, 5, 6), (33, 40), ignore=255)
    data["target"][0, 3, 4:6] = 77
    for call in (
        lambda: cross_entropy(data["logits"], data["target"]),
        lambda: binary_loss(data["logits"], data["target"]),
        lambda: binary_loss(data["logits"], data["target"], data["present"]),
        lambda: binary_loss(data["logits"], data["target"], relations=data["relations"]),
    ):
        with pytest.raises(ValueError, match=r"0 to 6.*77 \(2 pixels\)"):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ignore": 3}, "ignore=3"),
        ({"ignore": -1, "target": torch.zeros(2, 9, 9, dtype=torch.uint8)}, "uint8 must be able to hold"),
        ({"target": torch.zeros(2, 9, 9)}, "integer ids"),
        ({"target": torch.zeros(3, 9, 9, dtype=torch.int64)}, "are needed"),
        ({"present": torch.ones(2, 5, dtype=torch.bool)}, r"present must be bool \(2, 7\)"),
        ({"present": torch.ones(2, 7)}, "present must be bool"),
        ({"present": torch.zeros(2, 7, dtype=torch.bool)}, "no class counts"),
        ({"relations": torch.ones(7, 7)}, r"relations must be \(2, 7, 7\)"),
        ({"relations": torch.ones(2, 7, 7), "present": torch.ones(2, 7, dtype=torch.bool)}, "present or relations"),
        ({"weights": torch.ones(9, 9)}, "weights must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"target": torch.zeros(2, 9, 9, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        binary_loss(torch.zeros(2, 7, 3, 3), arguments.pop("target"), **arguments)


def test_soft_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="soft targets must be"):
        soft_cross_entropy(torch.zeros(2, 7, 3, 3), torch.zeros(2, 6, 9, 9))
    with pytest.raises(ValueError, match="only floating ones may have another resolution"):
        loss_in_pieces(torch.zeros(2, 7, 3, 3), (9, 9), kernels.softmax, (torch.zeros(2, 3, 3, dtype=torch.int64),))
