"""The per-dataset head: losses by hand, classifiers, weights, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from multiseg_d2.modeling.active import active_datasets
from multiseg_d2.modeling.batch import Batch
from multiseg_d2.modeling.catalog import UnknownLabelSpaceError
from multiseg_d2.modeling.heads import Head
from multiseg_d2.modeling.heads.per_dataset import REGULARIZERS, SoftmaxLoss

BOTH = "DATASETS.TRAIN", ("modeling_alpha_train", "modeling_beta_train")
THREE = "DATASETS.TRAIN", ("modeling_alpha_train", "modeling_beta_train", "modeling_gamma_train")
NO_DROPOUT = "MODEL.SEM_SEG_HEAD.DROPOUT", 0.0


def loop_loss(logits, labels) -> float:
    """Mean cross-entropy over labelled pixels, one pixel at a time."""
    total, count = 0.0, 0
    for scores, label in zip(
        logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).tolist(), labels.flatten().tolist()
    ):
        if label != 255:
            total += math.log(sum(math.exp(s) for s in scores)) - scores[label]
            count += 1
    return total / count


@pytest.fixture
def two_datasets(make_sample):
    return [make_sample(0, "alpha"), make_sample(1, "beta"), make_sample(2, "alpha"), make_sample(3, "beta")]


def test_losses_by_hand(make_model, two_datasets):
    model = make_model(*NO_DROPOUT, "MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS", (1.0, 0.25)).train()
    model.sem_seg_head.eval(), model.backbone.eval()  # running statistics, so that each image stands for itself
    losses = model(two_datasets)
    head, expected = model.sem_seg_head, {}
    for dataset, weight in (("alpha", 1.0), ("beta", 0.25)):
        samples = [s for s in two_datasets if s["dataset"] == dataset]
        images = torch.stack([(s["image"].float() - model.pixel_mean) / model.pixel_std for s in samples])
        labels = torch.stack([s["sem_seg"] for s in samples])
        features = model.backbone(images)
        for prefix, decoded, classifiers, factor in (
            ("loss_", head.trunk.decoder(features), head.classifiers, weight),
            ("loss_aux_", head.trunk.auxiliary(features), head.auxiliary_classifiers, 0.4 * weight),
        ):
            logits = F.interpolate(classifiers[dataset](decoded), size=(48, 64), mode="bilinear", align_corners=False)
            expected[prefix + dataset] = factor * loop_loss(logits, labels)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_every_parameter_gets_a_gradient(make_model, make_sample):
    for options in (
        (),
        ("MODEL.SEM_SEG_HEAD.DECODER", "DeepLabV3PlusDecoder", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res5"]),
        (
            "MODEL.SEM_SEG_HEAD.DECODER",
            "FPNDecoder",
            "MODEL.SEM_SEG_HEAD.IN_FEATURES",
            ["res2", "res3", "res4", "res5"],
        ),
        ("MODEL.BACKBONE.NAME", "build_deep_stem_resnet_backbone", "MODEL.DATASET_NORM.ENABLED", True),
    ):
        model = make_model(*NO_DROPOUT, *options)
        batch = [make_sample(i, dataset) for dataset in ("alpha", "beta") for i in range(3)]
        sum(model(batch).values()).backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not without, (options, without)


def test_a_dataset_that_is_not_in_the_batch_keeps_its_classifier(make_model, make_sample):
    model = make_model()
    losses = model([make_sample(0, "beta"), make_sample(1, "beta")])
    assert set(losses) == {"loss_beta", "loss_aux_beta"}
    sum(losses.values()).backward()
    assert model.sem_seg_head.classifiers["alpha"].weight.grad is None


def test_unlabelled_images_give_zero_not_nan(make_model, make_sample):
    model = make_model()
    samples = [make_sample(0, "alpha"), make_sample(1, "alpha"), make_sample(2, "beta"), make_sample(3, "beta")]
    samples[2]["sem_seg"].fill_(255)
    del samples[3]["sem_seg"]
    losses = model(samples)
    assert losses["loss_beta"].item() == 0
    assert losses["loss_alpha"].item() > 0
    sum(losses.values()).backward()
    assert torch.equal(model.sem_seg_head.classifiers["beta"].weight.grad, torch.zeros(3, 32, 1, 1))
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_classifiers_are_per_dataset_unless_shared(make_model):
    head = make_model(*THREE).sem_seg_head
    assert {k: tuple(c.weight.shape) for k, c in head.classifiers.items()} == {
        "alpha": (5, 32, 1, 1),
        "beta": (3, 32, 1, 1),
        "gamma": (5, 32, 1, 1),
    }
    shared = make_model(*THREE, "MODEL.SEM_SEG_HEAD.SHARE_CLASSIFIERS", True).sem_seg_head
    assert set(shared.classifiers) == set(shared.auxiliary_classifiers) == {"alpha", "beta"}
    assert shared.classifier_of == {"alpha": "alpha", "beta": "beta", "gamma": "alpha"}


def test_remapped_labels_share_the_targets_classifier(make_model, make_sample):
    model = make_model(*BOTH, "DATASETS.REMAP_TO", "beta")
    assert model.class_names() == {"beta": ["ground", "vehicle", "person"]}
    mapped = [make_sample(i, "beta", dataset="alpha", entry="modeling_alpha_train") for i in range(2)]
    losses = model(mapped)
    assert set(losses) == {"loss_alpha", "loss_aux_alpha"}
    model.eval()
    wanted = dict(mapped[0], label_space="beta")
    assert model([wanted])[0]["sem_seg"].shape == (3, 48, 64)
    with pytest.raises(UnknownLabelSpaceError, match="'alpha'"):
        model([mapped[0]])


def test_remapping_to_an_unknown_space_is_an_error(make_cfg, make_model):
    with pytest.raises(ValueError, match=r"REMAP_TO is 'gamma'"):
        make_model("DATASETS.REMAP_TO", "gamma")
    make_model("DATASETS.REMAP_TO", "gamma", "DATASETS.TEST", ("modeling_gamma_val",))


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1.0,), "1 entries.*2"), ((1.0, -1.0), "'beta' is -1"), ((1.0, math.nan), "'beta' is nan")],
)
def test_loss_weights_are_checked(make_model, weights, message):
    with pytest.raises(ValueError, match=message):
        make_model("MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS", weights)


def test_two_entries_of_one_dataset_have_one_classifier_and_one_weight(make_model):
    twice = "DATASETS.TRAIN", ("modeling_alpha_train", "modeling_alpha_val")
    head = make_model(*twice, "MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS", (2.0, 2.0)).sem_seg_head
    assert head.datasets == ("alpha",)
    assert head.loss_weights == {"alpha": 2.0}
    with pytest.raises(ValueError, match="two different weights"):
        make_model(*twice, "MODEL.SEM_SEG_HEAD.DATASET_LOSS_WEIGHTS", (2.0, 1.0))


def test_no_auxiliary_branch_at_weight_zero(make_model, make_sample):
    model = make_model("MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", 0.0)
    assert not [n for n, _ in model.named_parameters() if "auxiliary" in n]
    assert set(model([make_sample(i) for i in range(2)])) == {"loss_alpha"}


def test_auxiliary_branch_without_its_feature_is_an_error(make_model):
    with pytest.raises(ValueError, match="res4.*OUT_FEATURES"):
        make_model("MODEL.RESNETS.OUT_FEATURES", ["res5"])


def test_it_has_the_shape_of_a_head(make_model):
    assert isinstance(make_model().sem_seg_head, Head)


def test_other_classes_under_a_known_name_print_both_lists(make_model, spaces):
    model = make_model().eval()
    features = model.backbone(torch.rand(1, 3, 32, 32))
    renamed = type(spaces["beta"])(**{**vars(spaces["beta"]), "classes": ("ground", "vehicle", "pedestrian")})
    with pytest.raises(UnknownLabelSpaceError, match=r"(?s)'person'.*'pedestrian'"):
        model.sem_seg_head.logits(features, renamed)


def test_only_the_datasets_own_slice_is_classified(make_model, two_datasets):
    model = make_model()
    counts = {}
    for name, classifier in model.sem_seg_head.classifiers.items():
        classifier.register_forward_hook(lambda _m, inputs, _out, name=name: counts.update({name: len(inputs[0])}))
    batch = model.make_batch([*two_datasets, dict(two_datasets[0])])
    with active_datasets(batch.groups):
        model.sem_seg_head.losses(model.backbone(batch.images), batch)
    assert counts == {"alpha": 3, "beta": 2}


# ---- its loss against loops over pixels: hard and soft labels, confidences, regularisers ----

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
