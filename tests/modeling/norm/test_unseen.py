"""Norm and classifier of a dataset that the model was not trained on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from multiseg_d2.label_space import IGNORE
from multiseg_d2.modeling.active import active_datasets
from multiseg_d2.modeling.norm.conversion import dataset_norms, single_dataset_model
from multiseg_d2.modeling.norm.dataset_norm import DatasetBatchNorm2d, DatasetBranchError
from multiseg_d2.modeling.norm.statistics import InputStatistics, branch_distances, divergence, posing_as, shown_to
from multiseg_d2.modeling.norm.unseen import CHOICES, average_branch, is_unseen, unseen_dataset
from multiseg_d2.modeling.translate import translate_scores

SIZE, MADE = (24, 32), {}


@pytest.fixture
def model(make_model, make_sample):
    """Two datasets of different contrast: alpha is dark, beta is bright. Made once, a copy for each test."""
    if "model" not in MADE:
        MADE["model"] = trained(make_model, make_sample)
    return copy.deepcopy(MADE["model"])


def trained(make_model, make_sample):
    model = make_model("MODEL.DATASET_NORM.ENABLED", True, "MODEL.SEM_SEG_HEAD.DROPOUT", 0.0)
    for _, layer in dataset_norms(model):
        for branch in layer.branches.values():
            branch.momentum = None  # so that two batches are enough
    for step in range(2):
        batch = [look(make_sample(2 * step + i, "alpha", SIZE), 0.3) for i in range(2)]
        batch += [look(make_sample(2 * step + i, "beta", SIZE), 1.0) for i in range(2)]
        with torch.no_grad():
            model(batch)
    return model.eval()


def look(sample, contrast, **changes):
    return {**sample, "image": (sample["image"] * contrast).to(torch.uint8), **changes}


@pytest.fixture
def unseen(make_sample):
    """Bright images of gamma."""
    return [look(make_sample(900 + i, "gamma", SIZE), 0.95) for i in range(3)]


def same_state(model, before):
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(v, before[k]) for k, v in now.items())


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_pooled_statistics_are_those_of_all_inputs_together():
    layer = DatasetBatchNorm2d(3, ["a"]).eval()
    model, parts = nn.Sequential(layer), [torch.randn(n, 3, 4, n + 1) * 5 + 100 for n in (1, 2, 4)]
    statistics = InputStatistics(model)
    with statistics.open(), active_datasets([("a", 1)]):
        layer(parts[0])
    with statistics.open():
        for part in parts[1:]:
            with active_datasets([("a", len(part))]):
                layer(part)
    with active_datasets([("a", 1)]):
        layer(torch.full((1, 3, 2, 2), 1e6))  # not measured
    everything = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1).double()
    mean, var = statistics.gaussians()["0"]
    torch.testing.assert_close(mean, everything.mean(1))
    torch.testing.assert_close(var, everything.var(1, unbiased=False))


def test_divergence_against_torch_distributions():
    mean, other = torch.randn(2, 7).double()
    var, other_var = torch.rand(2, 7).double() + 0.1
    p = torch.distributions.Normal(mean, (var + 1e-5).sqrt())
    q = torch.distributions.Normal(other, (other_var + 1e-5).sqrt())
    kl = torch.distributions.kl_divergence
    want = (kl(p, q) + kl(q, p)).log1p().mean()
    assert divergence((mean, var), (other, other_var), 1e-5) == pytest.approx(float(want))
    assert divergence((mean, var), (mean, var), 1e-5) == 0


def test_distances_find_the_look(model, make_sample):
    before = copy.deepcopy(model.state_dict())
    for contrast, nearest, other in ((0.33, "alpha", "beta"), (0.9, "beta", "alpha")):
        distances = branch_distances(model, [look(make_sample(800 + i, "gamma", SIZE), contrast) for i in range(4)])
        assert set(distances) == {"alpha", "beta"}
        assert 0 < 2 * distances[nearest] < distances[other]
    assert same_state(model, before)


# ---- branches -------------------------------------------------------------------------------------------------------


def test_average_is_that_of_the_mixture():
    layer = DatasetBatchNorm2d(4, ["a", "b", "c"])
    values = [torch.randn(1000, 4).double() * (k + 1) + 3 * k for k in range(3)]
    for branch, x in zip(layer.branches.values(), values):
        branch.running_mean.copy_(x.mean(0))
        branch.running_var.copy_(x.var(0, unbiased=False))
        branch.weight.data.uniform_()
    average, mixture = average_branch(layer), torch.cat(values)
    torch.testing.assert_close(average.running_mean.double(), mixture.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(average.running_var.double(), mixture.var(0, unbiased=False), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(average.weight, sum(b.weight for b in layer.branches.values()) / 3)
    assert average.weight.data_ptr() not in {b.weight.data_ptr() for b in layer.branches.values()}


def test_reestimated_statistics_are_those_of_plain_batch_norms_in_training_mode(model, unseen, spaces):
    plain = single_dataset_model(model, "beta")
    norms, values = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)], {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, x: values.__setitem__(m, x[0].numel() // x[0].shape[1]))
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        plain([{**s, "dataset": "beta", "label_space": "beta"} for s in unseen])
    with unseen_dataset(model, "gamma", spaces["gamma"], "reestimate", unseen) as choice:
        assert choice.classifier == "alpha" and choice.norm == "of beta, statistics of 3 of its own images"
        checked = 0
        for (path, layer), norm in zip(dataset_norms(model), norms):
            if path.startswith("sem_seg_head.trunk.auxiliary"):
                continue  # only used in training
            branch = model.stand_ins["gamma"].branches[layer]
            torch.testing.assert_close(branch.running_mean, norm.running_mean, rtol=1e-3, atol=1e-4, msg=path)
            biased = norm.running_var * (1 - 1 / values[norm])
            torch.testing.assert_close(branch.running_var, biased, rtol=1e-3, atol=1e-4, msg=path)
            torch.testing.assert_close(branch.weight, layer.branches["beta"].weight)
            assert not branch.training
            checked += 1
    assert checked > 20


def test_reestimation_from_single_images_of_different_sizes(model, make_sample, spaces):
    samples = [make_sample(i, "gamma", size=(24, 32 + 8 * i)) for i in range(3)]
    with unseen_dataset(model, "gamma", spaces["gamma"], "reestimate", samples):
        branches = model.stand_ins["gamma"].branches.values()
        assert branches and all(torch.isfinite(v).all() for branch in branches for v in branch.state_dict().values())


@pytest.mark.parametrize("choice", [*CHOICES[1:], "alpha", "beta"])
def test_the_model_scores_the_unseen_dataset_and_is_as_before_afterwards(model, unseen, spaces, choice):
    before, space = copy.deepcopy(model.state_dict()), spaces["gamma"]
    assert is_unseen(model, "gamma") and not is_unseen(model, "alpha")
    model.train()
    with unseen_dataset(model, "gamma", space, choice, unseen) as chosen:
        assert model.training
        assert same_state(model, before)  # what it uses is not part of the model
        model.eval()
        out = model(unseen)
        assert all(o["sem_seg"].shape == (5, *SIZE) and o["sem_seg"].isfinite().all() for o in out)
        assert chosen.classifier == ("beta" if choice == "beta" else "alpha")  # alpha's can name all classes
        assert chosen.unnameable == (("sky", "tree") if choice == "beta" else ())
        if choice == "beta":  # the same as if the images were beta's, its classes translated
            as_beta = model([{**s, "dataset": "beta", "label_space": "beta"} for s in unseen])
            for mine, theirs in zip(out, as_beta):
                torch.testing.assert_close(mine["sem_seg"][:3], theirs["sem_seg"])
                assert (mine["sem_seg"].argmax(0) < 3).all()  # beta has no sky and no tree
        if choice == "nearest":  # beta's look, alpha's classes: two questions
            assert chosen.norm == "of beta" and chosen.distances["beta"] < chosen.distances["alpha"]
            mixed = model([{**s, "dataset": "beta", "label_space": "alpha"} for s in unseen])
            for mine, theirs in zip(out, mixed):
                torch.testing.assert_close(mine["sem_seg"], theirs["sem_seg"])
        trained = model([{**unseen[0], "dataset": "alpha", "label_space": "alpha"}])
        assert trained[0]["sem_seg"].shape[0] == 5
    assert model.training is True
    assert same_state(model, before)
    with pytest.raises(DatasetBranchError, match="'gamma' has no branch"):
        model.eval()(unseen)


def test_an_exception_inside_leaves_the_model_as_before(model, unseen, spaces):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), unseen_dataset(model, "gamma", spaces["gamma"], "average", unseen):
        raise KeyError("x")
    assert same_state(model, before) and not model.stand_ins


def test_a_trained_dataset_is_left_alone(model, spaces):
    before = list(model.state_dict())
    with unseen_dataset(model, "alpha", spaces["alpha"], "error") as chosen:
        assert chosen is None and list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("error", "not on 'gamma'.*'nearest', 'average', 'reestimate', 'alpha'"),
        ("neerest", "did you mean 'nearest'"),
        ("nearest", "got none"),
    ],
)
def test_what_cannot_be_chosen(model, spaces, choice, message):
    with pytest.raises(DatasetBranchError, match=message), unseen_dataset(model, "gamma", spaces["gamma"], choice):
        pass


def test_a_model_with_shared_norms_only_needs_a_classifier(make_model, unseen, spaces):
    model = make_model("DATASETS.TRAIN", ("modeling_beta_train", "modeling_alpha_train")).eval()
    before = copy.deepcopy(model.state_dict())
    with unseen_dataset(model, "gamma", spaces["gamma"], "nearest") as chosen:
        assert chosen.classifier == "alpha" and chosen.norm == "shared by all datasets"  # it has all five classes
        out = model(unseen)
    want = model([{**s, "dataset": "alpha", "label_space": "alpha"} for s in unseen])
    torch.testing.assert_close(out[0]["sem_seg"], want[0]["sem_seg"])
    assert same_state(model, before)


# ---- classes --------------------------------------------------------------------------------------------------------


def test_translated_scores_add_up_probabilities():
    logits = torch.randn(2, 4, 3, 5).double() * 4
    table = np.array([2, 0, 2, IGNORE], np.uint8)
    out = translate_scores(logits, table, 4)
    probability = logits.softmax(1)
    for n in range(2):
        for y in range(3):
            for x in range(5):
                zero, p = torch.zeros((), dtype=torch.float64), probability[n, :, y, x]
                want = torch.stack([p[1], zero, p[0] + p[2], zero]) / (1 - p[3])
                torch.testing.assert_close(out[n, :, y, x].softmax(0), want, rtol=1e-6, atol=1e-9)
    assert out.isfinite().all()


def test_images_of_one_size_are_looked_at_together(model, make_sample, spaces):
    sizes = []
    handle = model.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape)))
    samples = [make_sample(i, size=(16, 16 + 16 * (i % 2))) for i in range(11)]
    batches = posing_as(samples, "alpha", spaces["alpha"])
    shown_to(model)(batches)
    assert not any("sem_seg" in sample for batch in batches for sample in batch)
    handle.remove()
    assert sorted(sizes) == [(1, 3, 16, 32), (2, 3, 16, 16), (4, 3, 16, 16), (4, 3, 16, 32)]
