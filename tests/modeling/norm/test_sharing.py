"""Statistics per dataset with one scale and shift, and norms per dataset in a part of the model only."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from multiseg_d2.checkpoint import CheckpointError, load_weights
from multiseg_d2.checkpoint.file import write_checkpoint
from multiseg_d2.engine.solver import parameter_groups
from multiseg_d2.modeling.active import active_datasets, checkpoint
from multiseg_d2.modeling.norm import (
    DatasetBatchNorm2d,
    DatasetBranchError,
    dataset_norms,
    norm_report,
    sharing_problems,
    single_dataset_model,
)
from multiseg_d2.modeling.norm.unseen import average_branch

C = 3
DATASETS = ("camvid", "bdd100k", "coco")
GROUPS = [
    (("camvid", 4),),
    (("camvid", 2), ("bdd100k", 3)),
    (("coco", 1), ("camvid", 2), ("bdd100k", 0)),
]
ENABLED = ("MODEL.DATASET_NORM.ENABLED", True)
SHARED_AFFINE = (
    *ENABLED,
    *("MODEL.RESNETS.NORM", "BN/shared_affine", "MODEL.SEM_SEG_HEAD.NORM", "BN/shared_affine"),
)


def images(groups, seed=0, size=(4, 3)):
    n = sum(count for _, count in groups)
    return torch.randn(n, C, *size, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def layer_of(shared=True, seed=0, **kwargs) -> DatasetBatchNorm2d:
    """A layer whose entries all differ."""
    layer = DatasetBatchNorm2d(C, DATASETS, shared_affine=shared, **kwargs)
    gen = torch.Generator().manual_seed(seed)
    for value in layer.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=gen) + 0.5 if value.is_floating_point() else torch.tensor(3))
    return layer


def normalised_by_hand(x, groups, weight, bias, eps):
    """Channel by channel and dataset by dataset, every value by itself."""
    out, start, scale, shift = torch.zeros_like(x), 0, weight.tolist(), bias.tolist()
    for _, count in groups:
        for c in range(C if count else 0):
            values = [float(v) for v in x[start : start + count, c].flatten()]
            mean = sum(values) / len(values)
            var = sum((v - mean) ** 2 for v in values) / len(values)
            part = x[start : start + count, c]
            for index in range(part.numel()):
                value = (float(part.flatten()[index]) - mean) / (var + eps) ** 0.5 * scale[c] + shift[c]
                out[start : start + count, c].view(count, -1)[index // part[0].numel(), index % part[0].numel()] = value
        start += count
    return out


@pytest.mark.parametrize("groups", GROUPS)
def test_a_training_step_by_hand(groups):
    layer = layer_of().double()
    x = images(groups).double()
    before = {name: branch.running_mean.clone() for name, branch in layer.branches.items()}
    with active_datasets(groups):
        out = layer(x)
    torch.testing.assert_close(out, normalised_by_hand(x, groups, layer.weight, layer.bias, layer.eps))
    start, counts = 0, dict(groups)
    for name, count in groups:
        mean = x[start : start + count].mean((0, 2, 3)) if count else before[name]
        torch.testing.assert_close(layer.branches[name].running_mean, 0.9 * before[name] + 0.1 * mean)
        start += count
    assert [int(b.num_batches_tracked) for b in layer.branches.values()] == [3 + bool(counts.get(n)) for n in DATASETS]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kwargs", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_plain_dataset_norm_with_tied_scales_and_shifts(groups, kwargs, training):
    """Own scales and shifts that are equal give the same scores; their gradients add up to the shared one's."""
    layer, own = layer_of(**kwargs), layer_of(shared=False, **kwargs)
    own.load_state_dict(layer.state_dict())
    for one in (layer, own):
        one.train(training)
    for step in range(2):
        x = images(groups, step).requires_grad_()
        y = x.detach().clone().requires_grad_()
        with active_datasets(groups):
            out, want = layer(x), own(y)
        assert torch.equal(out, want)
        grad = images(groups, 9)
        out.backward(grad)
        want.backward(grad)
        torch.testing.assert_close(x.grad, y.grad)
    for entry in ("weight", "bias") if layer.weight is not None else ():
        grads = [getattr(branch, entry).grad for branch in own.branches.values()]
        torch.testing.assert_close(getattr(layer, entry).grad, sum(g for g in grads if g is not None))
    statistics = {k: v for k, v in own.state_dict().items() if ".running" in k or ".num" in k}
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in statistics.items())


def test_one_scale_and_one_shift_are_trained_and_stored():
    layer = layer_of()
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert sorted(key for key in layer.state_dict() if "weight" in key or "bias" in key) == ["bias", "weight"]
    assert "shared_affine=True" in repr(layer) and "shared_affine" not in repr(layer_of(shared=False))


def test_recomputation_copies_and_frozen_branches():
    groups = GROUPS[1]
    layer = layer_of()
    reference = copy.deepcopy(layer)
    x, y = images(groups).requires_grad_(), images(groups).requires_grad_()
    with active_datasets(groups):
        checkpoint(layer, x).square().sum().backward()
        reference(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad)
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in layer.state_dict().items())
    layer.eval()
    with active_datasets(groups), torch.no_grad():
        want = layer(x)
        torch.testing.assert_close(FrozenBatchNorm2d.convert_frozen_batchnorm(copy.deepcopy(layer))(x), want)


def test_a_single_value_in_a_mixed_step_is_normalised_by_running_statistics():
    layer, groups = layer_of(), (("camvid", 3), ("coco", 1))
    x = images(groups, size=(1, 1))
    with active_datasets(groups):
        out = layer(x)
    branch = layer.branches["coco"]
    want = (x[3, :, 0, 0] - branch.running_mean) / (branch.running_var + layer.eps).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(out[3, :, 0, 0], want)


def test_the_average_of_branches_and_one_dataset_as_a_plain_norm():
    layer = layer_of().eval()
    average, x = average_branch(layer), images([("kitti", 2)])
    assert average.weight is None
    with active_datasets([("kitti", 2)], {"kitti": {layer: average}}):
        out = layer(x)
    want = nn.functional.batch_norm(x, average.running_mean, average.running_var, layer.weight, layer.bias, False)
    torch.testing.assert_close(out, want)
    model = nn.Sequential(nn.Conv2d(C, C, 1), layer)
    plain = single_dataset_model(model, "coco").eval()
    assert set(plain.state_dict()) == set(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)).state_dict())
    with active_datasets([("coco", 2)]):
        torch.testing.assert_close(plain(x), model(x))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_plain_norm_fans_out():
    plain, layer = nn.BatchNorm2d(C), layer_of()
    for value in plain.state_dict().values():
        value.copy_(torch.rand(value.shape) if value.is_floating_point() else torch.tensor(5))
    assert not any(layer.load_state_dict(plain.state_dict()))
    made = DatasetBatchNorm2d.from_norm(plain, DATASETS, shared_affine=True)
    for one in (layer, made):
        assert torch.equal(one.weight, plain.weight) and torch.equal(one.bias, plain.bias)
        assert one.weight.data_ptr() != plain.weight.data_ptr()
        for branch in one.branches.values():
            assert torch.equal(branch.running_var, plain.running_var) and int(branch.num_batches_tracked) == 5


def test_between_shared_and_own_scales():
    shared, own = layer_of(), layer_of(shared=False, seed=1)
    target = layer_of(shared=False, seed=2)
    assert not any(target.load_state_dict(shared.state_dict()))
    for name, branch in target.branches.items():
        assert torch.equal(branch.weight, shared.weight) and torch.equal(branch.bias, shared.bias)
        assert torch.equal(branch.running_mean, shared.branches[name].running_mean)
    with pytest.raises(
        DatasetBranchError, match=r"'bdd100k'.* has a weight in the checkpoint, the model shares one.*INIT_FR"
    ):
        layer_of(seed=2).load_state_dict(own.state_dict())
    target = layer_of(seed=2, init_from="coco")
    assert not any(target.load_state_dict(own.state_dict()))
    assert torch.equal(target.weight, own.branches["coco"].weight)
    assert all(torch.equal(b.running_var, own.branches[n].running_var) for n, b in target.branches.items())


def test_a_new_dataset_starts_from_a_trained_ones_statistics():
    source = layer_of(seed=1)
    layer = DatasetBatchNorm2d(C, ("camvid", "kitti"), shared_affine=True, init_from="coco")
    assert not any(layer.load_state_dict(source.state_dict()))
    assert torch.equal(layer.branches["kitti"].running_var, source.branches["coco"].running_var)
    assert torch.equal(layer.weight, source.weight)
    branch = layer.add_branch("wilddash2", "kitti")
    assert branch.weight is None and list(dict(layer.named_parameters())) == ["weight", "bias"]


# ---- the whole model, by the config --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backbone, head, in_backbone, in_head",
    [
        ("BN", "BN", "own", "own"),
        ("BN", "BN/shared", "own", "plain"),
        ("SyncBN/shared", "BN/shared_affine", "plain", "shared affine"),
        ("BN/shared_affine", "BN/shared_affine", "shared affine", "shared affine"),
    ],
)
def test_each_part_shares_what_the_name_of_its_norm_says(make_model, backbone, head, in_backbone, in_head):
    model = make_model(*ENABLED, "MODEL.RESNETS.NORM", backbone, "MODEL.SEM_SEG_HEAD.NORM", head)
    report, layers = norm_report(model), dict(dataset_norms(model))
    for part, want in (("backbone", in_backbone), ("sem_seg_head", in_head)):
        own = [layer.shared_affine for path, layer in layers.items() if path.startswith(part)]
        plain = [path for path in report["plain"] if path.startswith(part)]
        assert bool(plain) == (want == "plain") and bool(own) == (want != "plain")
        assert all(shared == (want == "shared affine") for shared in own)


@pytest.mark.parametrize(
    "keys, message",
    [
        (("MODEL.RESNETS.NORM", "BN/shared"), "/shared means nothing while MODEL.DATASET_NORM.ENABLED is False"),
        ((*ENABLED, "MODEL.RESNETS.NORM", "BN/shared_afine"), "did you mean 'shared_affine'"),
        (
            (*ENABLED, "MODEL.RESNETS.NORM", "BN/"),
            "MODEL.RESNETS.NORM: '' behind BN/ says nothing: choose of",
        ),
        ((*ENABLED, "MODEL.RESNETS.NORM", "BN/shared/shared"), "'shared' behind BN/ says nothing"),
        (("MODEL.RESNETS.NORM", "BN/momentum=1.5"), r"momentum 1.5 is not a share of the batch"),
        (("MODEL.RESNETS.NORM", "BN/momentum=slow"), "'momentum=slow' behind BN/ says nothing"),
        (("MODEL.SEM_SEG_HEAD.NORM", "GN/momentum=0.1"), "only batch norms"),
        ((*ENABLED, "MODEL.SEM_SEG_HEAD.NORM", "GN/shared_affine"), "says more than GN, but only batch norms"),
    ],
)
def test_what_cannot_be_meant_is_said(make_cfg, keys, message):
    (problem,) = sharing_problems(make_cfg(*keys))
    assert re.search(message, problem)


def test_a_model_is_not_built_with_what_cannot_be_meant(make_cfg):
    with pytest.raises(ValueError, match="MODEL.SEM_SEG_HEAD.NORM: 'stats' behind BN/"):
        build_model(make_cfg(*ENABLED, "MODEL.SEM_SEG_HEAD.NORM", "BN/stats"))


@pytest.mark.parametrize("enabled", [True, False])
def test_each_part_has_the_momentum_that_the_name_of_its_norm_says(make_model, enabled):
    shared = "/shared_affine" if enabled else ""
    model = make_model(
        *("MODEL.DATASET_NORM.ENABLED", enabled, "MODEL.RESNETS.NORM", f"BN{shared}/momentum=0.02"),
    )
    for part, want in ((model.backbone, 0.02), (model.sem_seg_head, 0.1)):
        found = {m.momentum for m in part.modules() if isinstance(m, (nn.BatchNorm2d, DatasetBatchNorm2d))}
        assert found == {want}


def test_scale_and_shift_decay_as_norms_do(make_cfg):
    cfg = make_cfg(*SHARED_AFFINE, "SOLVER.WEIGHT_DECAY", 0.1, "SOLVER.WEIGHT_DECAY_NORM", 0.003)
    model = build_model(cfg)
    decay = {name: group.get("weight_decay", 0.1) for group in parameter_groups(cfg, model) for name in group["names"]}
    norms = {f"{path}.{entry}" for path, _ in dataset_norms(model) for entry in ("weight", "bias")}
    assert norms <= set(decay) and set(decay) == {name for name, _ in model.named_parameters()}
    assert {decay[name] for name in norms} == {0.003}
    assert {decay[name] for name in decay if name.endswith("weight") and name not in norms} == {0.1}


def test_a_checkpoint_of_a_model_goes_into_the_same_kind_of_model(make_model, tmp_path):
    model, path = make_model(*SHARED_AFFINE), tmp_path / "model.pth"
    for _, layer in dataset_norms(model):
        nn.init.uniform_(layer.weight)
        for branch in layer.branches.values():
            nn.init.uniform_(branch.running_mean)
    write_checkpoint(path, {"model": dict(model.state_dict()), "run": {"classes": model.class_names()}})
    other = make_model(*SHARED_AFFINE)
    load_weights(other, str(path), complete=True)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="norms per dataset"):
        load_weights(make_model(), str(path), complete=True)
