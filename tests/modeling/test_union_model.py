"""Whole models with a head over the union: norms per dataset, unseen datasets, merged classifiers of several heads."""

from __future__ import annotations

import copy

import pytest
import torch

from multiseg_d2.modeling.norm import unseen_dataset

UNION = "MODEL.SEM_SEG_HEAD.NAME", "UnifiedHead", "MODEL.SEM_SEG_HEAD.DROPOUT", 0.0
DATASET_NORM = "MODEL.DATASET_NORM.ENABLED", True
NO_AUX = "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", 0.0


@pytest.fixture
def samples(make_sample):
    return [make_sample(0, "alpha"), make_sample(1, "beta"), make_sample(2, "beta"), make_sample(3, "alpha")]


@pytest.mark.parametrize("loss_type", ["cross_entropy", "null_bce"])
def test_fused_and_sequential_passes_have_the_same_gradients(make_model, samples, loss_type):
    """With norms per dataset no image depends on another dataset's, so that only the divisor could differ."""
    model = make_model(*UNION, *DATASET_NORM, "MODEL.SEM_SEG_HEAD.LOSS_TYPE", loss_type)
    other = copy.deepcopy(model)
    losses = model(samples)
    assert set(losses) == {"loss_alpha", "loss_beta", "loss_aux_alpha", "loss_aux_beta"}
    sum(losses.values()).backward()
    counts = {
        d: torch.tensor(float(sum(int((s["sem_seg"] != 255).sum()) for s in samples if s["dataset"] == d)))
        for d in ("alpha", "beta")
    }
    for dataset in ("alpha", "beta"):
        sum(other([s for s in samples if s["dataset"] == dataset], num_valid=counts).values()).backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_union_is_part_of_what_a_checkpoint_is_compared_by(make_model):
    names = make_model(*UNION).class_names()
    assert ["road", "car", "rider", "sky", "tree"] in names.values() and len(names) == 3


@pytest.mark.parametrize("choice", ["alpha", "nearest", "average"])
def test_norm_choices_for_an_unseen_dataset(make_model, make_sample, spaces, choice):
    """Gamma has alpha's classes; the head scores them itself, the norm is chosen as for CDCL."""
    model = make_model(*UNION, *DATASET_NORM)
    for seed in range(3):  # statistics that differ between the datasets
        model([make_sample(seed, "alpha"), make_sample(seed, "beta"), make_sample(9 + seed, "beta")])
    model.eval()
    sample = make_sample(0, "gamma")
    with torch.no_grad(), unseen_dataset(model, "gamma", spaces["gamma"], choice, [make_sample(5, "gamma")]):
        scores = model([sample])[0]["sem_seg"]
    assert scores.shape == (5, 48, 64) and scores.isfinite().all()
    if choice == "alpha":
        as_alpha = model([{**sample, "dataset": "alpha", "entry": "modeling_alpha_val"}])[0]["sem_seg"]
        torch.testing.assert_close(scores, as_alpha)


def test_maximum_over_heads(make_model, make_sample, spaces):
    """By hand: beta's three classes mean alpha's first three, which gamma asks for."""
    options = ("MODEL.SEM_SEG_HEAD.NAME", "MaxOverHeads", *NO_AUX)
    model = make_model(*options).eval()
    with torch.no_grad():
        for classifier in model.sem_seg_head.classifiers.values():
            torch.nn.init.normal_(classifier.weight, generator=torch.Generator().manual_seed(7))
    head, sample = model.sem_seg_head, make_sample(0, "gamma")
    batch = model.make_batch([sample], with_targets=False)
    with torch.no_grad():
        features = model.backbone(batch.images)
        decoded = head.trunk(features)
        alpha, beta = (head.classifiers[d](decoded).log_softmax(1) for d in ("alpha", "beta"))
        scores = head.logits(features, spaces["gamma"])
    expected = torch.stack([torch.maximum(alpha[:, c], beta[:, c]) if c < 3 else alpha[:, c] for c in range(5)], 1)
    torch.testing.assert_close(scores, expected)
    with torch.no_grad():
        torch.testing.assert_close(head.logits(features, spaces["beta"]), head.classifiers["beta"](decoded))
    assert head.unnameable(spaces["gamma"]) == ()
    plain = make_model("MODEL.SEM_SEG_HEAD.NAME", "PerDatasetHead", *NO_AUX)
    assert list(plain.state_dict()) == list(model.state_dict())  # one's checkpoints are the other's


def test_weights_of_datasets_are_refused(make_model):
    with pytest.raises(ValueError, match="UnifiedHead has one mean"):
        make_model(*UNION, "MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS", (1.0, 0.5))
