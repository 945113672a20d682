"""DatasetBatchNorm2d against plain batch norms, one per dataset."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.utils.checkpoint import checkpoint as plain_checkpoint

from multiseg_d2.modeling.active import active_datasets, checkpoint
from multiseg_d2.modeling.norm.dataset_norm import DatasetBatchNorm2d, DatasetBranchError

C = 5
DATASETS = ("camvid", "bdd100k", "coco")


def random_norm(seed=0, **kwargs) -> nn.BatchNorm2d:
    norm, gen = nn.BatchNorm2d(C, **kwargs), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (norm.weight, norm.running_var):
            if tensor is not None:
                tensor.uniform_(0.5, 2, generator=gen)
        for tensor in (norm.bias, norm.running_mean):
            if tensor is not None:
                tensor.normal_(generator=gen)
    return norm


def layer_and_plain(**kwargs):
    """A dataset norm whose branches differ, and the same branches as separate plain batch norms."""
    layer = DatasetBatchNorm2d.from_norm(random_norm(**kwargs), DATASETS)
    plain = {name: random_norm(seed=i + 1, **kwargs) for i, name in enumerate(DATASETS)}
    for name, norm in plain.items():
        layer.branches[name].load_state_dict(norm.state_dict())
    return layer, plain


def images(n, seed=0, size=(4, 3)):
    return torch.randn(n, C, *size, generator=torch.Generator().manual_seed(seed)) * 3 + 1


GROUPS = [
    (("camvid", 4),),
    (("camvid", 2), ("bdd100k", 3)),
    (("coco", 1), ("camvid", 2), ("bdd100k", 1)),
    (("coco", 2), ("bdd100k", 0), ("camvid", 2)),
]


def assert_same_state(a: nn.Module, b: nn.Module, equal=False) -> None:
    for (key, x), y in zip(a.state_dict().items(), b.state_dict().values()):
        if equal:
            assert torch.equal(x, y), key
        else:
            torch.testing.assert_close(x, y, msg=key)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}, {"affine": False}, {"track_running_stats": False}],
)
def test_training_step_equals_one_plain_batch_norm_per_dataset(groups, memory_format, kwargs):
    layer, plain = layer_and_plain(**kwargs)
    before = copy.deepcopy(layer)
    n = sum(count for _, count in groups)
    for step in range(2):  # twice: momentum=None counts batches
        x = images(n, step).contiguous(memory_format=memory_format).requires_grad_()
        want_x = x.detach().clone().requires_grad_()
        grad = images(n, step + 10).contiguous(memory_format=memory_format)
        with active_datasets(groups):
            out = layer(x)
        parts = want_x.split([count for _, count in groups])
        want = torch.cat([plain[name](part) for (name, count), part in zip(groups, parts) if count])
        out.backward(grad)
        want.backward(grad)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(x.grad, want_x.grad)
        assert out.is_contiguous(memory_format=memory_format)
    for name, norm in plain.items():
        assert_same_state(layer.branches[name], norm)
        for parameter, reference in zip(layer.branches[name].parameters(), norm.parameters()):
            if dict(groups).get(name):
                torch.testing.assert_close(parameter.grad, reference.grad)
            else:
                assert parameter.grad is None  # an optimizer passes it over
        if not dict(groups).get(name):
            assert_same_state(layer.branches[name], before.branches[name], equal=True)


@pytest.mark.parametrize("groups", GROUPS)
def test_evaluation_uses_running_statistics_and_changes_nothing(groups):
    layer, plain = layer_and_plain()
    layer.eval()
    before = copy.deepcopy(layer)
    x = images(sum(count for _, count in groups))
    with active_datasets(groups), torch.no_grad():
        out = layer(x)
    parts = x.split([count for _, count in groups])
    want = torch.cat([plain[name].eval()(part) for (name, count), part in zip(groups, parts) if count])
    torch.testing.assert_close(out, want)
    assert_same_state(layer, before, equal=True)


def test_a_step_of_one_dataset_leaves_the_others_bit_identical():
    layer, _ = layer_and_plain()
    before = copy.deepcopy(layer.state_dict())
    with active_datasets([("camvid", 4)]):
        layer(images(4))
    changed = {key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"branches.camvid.{k}" for k in ("running_mean", "running_var", "num_batches_tracked")}


def test_evaluation_in_the_middle_of_a_step_and_a_second_forward_pick_the_right_branch():
    layer, plain = layer_and_plain()
    x, y = images(2, 1), images(3, 2)
    with active_datasets([("camvid", 2)]):
        layer(x)
        layer.eval()
        with active_datasets([("coco", 3)]), torch.no_grad():
            torch.testing.assert_close(layer(y), plain["coco"].eval()(y))
        layer.train()
        layer(x)
    for _ in range(2):
        plain["camvid"](x)
    for name, norm in plain.items():
        assert_same_state(layer.branches[name], norm)


@pytest.mark.parametrize("groups", GROUPS)
def test_activation_checkpointing_gives_the_same_gradients_and_updates_statistics_once(groups):
    layer, _ = layer_and_plain()
    reference = copy.deepcopy(layer)
    x = images(sum(count for _, count in groups)).requires_grad_()
    want_x = x.detach().clone().requires_grad_()
    with active_datasets(groups):
        out = checkpoint(lambda v: layer(v).relu(), x)
        want = reference(want_x).relu()
    with active_datasets([("bdd100k", 1)]):  # what is active during the backward pass does not matter
        (out * out).sum().backward()
    (want * want).sum().backward()
    torch.testing.assert_close(x.grad, want_x.grad)
    assert_same_state(layer, reference, equal=True)
    for a, b in zip(layer.parameters(), reference.parameters()):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_plain_activation_checkpointing_raises_instead_of_updating_twice():
    layer, _ = layer_and_plain()
    x = images(2).requires_grad_()
    with active_datasets([("camvid", 2)]):
        out = plain_checkpoint(layer, x, use_reentrant=False)
        with pytest.raises(RuntimeError, match="active.checkpoint"):
            out.sum().backward()


def test_deep_copies_and_averaged_models_pick_the_branch_too():
    layer, plain = layer_and_plain()
    average = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    average.update_parameters(layer)
    x = images(3)
    for model in (copy.deepcopy(layer), average):
        model.eval()
        with active_datasets([("coco", 3)]), torch.no_grad():
            torch.testing.assert_close(model(x), plain["coco"].eval()(x))


def test_it_raises_rather_than_guesses():
    layer, _ = layer_and_plain()
    with pytest.raises(RuntimeError, match="no dataset is active"):
        layer(images(2))
    with active_datasets([("kitti", 2)]), pytest.raises(DatasetBranchError, match="'kitti' has no branch.*camvid"):
        layer(images(2))
    with active_datasets([("camvid", 2)]), pytest.raises(ValueError, match="3 images"):
        layer(images(3))
    with (
        active_datasets([("camvid", 1), ("coco", 1)]),
        pytest.raises(ValueError, match="'camvid', 'coco'. need more than 1 value"),
    ):
        layer(images(2, size=(1, 1)))
    layer.eval()
    with active_datasets([("coco", 1)]):
        layer(images(1, size=(1, 1)))


NOT_DENSE = {
    "channel chunk": lambda x: torch.cat([x, x], 1).chunk(2, 1)[1],
    "crop": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 1))[..., 1:-1, 1:-2],
    "stride slice": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expand": lambda x: x[..., :1].expand(x.shape),
    "transpose": lambda x: x.transpose(2, 3),
    "channels-last chunk": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[0],
    "every second image": lambda x: x.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("view", NOT_DENSE)
def test_inputs_that_are_views_of_others_are_normalised_alike(view):
    layer, plain = layer_and_plain()
    x = images(5).requires_grad_()
    y = x.detach().clone().requires_grad_()
    seen = NOT_DENSE[view](x)
    assert not seen.is_contiguous()
    with active_datasets([("camvid", 2), ("coco", 3)]):
        out = layer(seen)
    dense = NOT_DENSE[view](y).contiguous()
    want = torch.cat([plain["camvid"](dense[:2]), plain["coco"](dense[2:])])
    grad = images(5, 7, size=tuple(out.shape[-2:]))
    out.backward(grad)
    want.backward(grad)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(x.grad, y.grad)
    for name, norm in plain.items():
        assert_same_state(layer.branches[name], norm)


def set_on_layer(layer):
    layer.eps = 0.5


def set_on_branches(layer):
    for module in layer.modules():  # as scripts for plain models do
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.5


@pytest.mark.parametrize("change", [set_on_layer, set_on_branches])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("training", [True, False])
def test_an_eps_that_is_changed_later_counts_everywhere(change, groups, training):
    layer, plain = layer_and_plain()
    layer.train(training)
    change(layer)
    assert layer.eps == 0.5 and "eps=0.5" in repr(layer)
    x = images(sum(count for _, count in groups))
    with active_datasets(groups):
        out = layer(x)
    want = []
    for (name, count), part in zip(groups, x.split([count for _, count in groups])):
        plain[name].train(training).eps = 0.5
        want += [plain[name](part)] if count else []
    torch.testing.assert_close(out, torch.cat(want))


def test_momentum_can_be_changed_later_too():
    layer, _ = layer_and_plain()
    layer.momentum = None
    assert all(branch.momentum is None for branch in layer.branches.values()) and layer.momentum is None


def test_a_single_value_without_running_statistics_is_an_error_that_says_so():
    layer, _ = layer_and_plain(track_running_stats=False)
    with (
        active_datasets([("camvid", 3), ("coco", 1)]),
        pytest.raises(ValueError, match=r"\['coco'\] need more than 1 value per channel"),
    ):
        layer(images(4, size=(1, 1)))


def test_a_single_value_in_a_mixed_step_is_normalised_by_running_statistics(caplog):
    """A mixture gives a dataset one image by chance; at a pooled map of 1 x 1 that has no variance."""
    layer, plain = layer_and_plain()
    x = images(4, size=(1, 1)).requires_grad_()
    before = {k: v.clone() for k, v in layer.branches["coco"].state_dict().items()}
    for _ in range(2):
        with active_datasets([("camvid", 3), ("coco", 1)]):
            out = layer(x)
    camvid, coco = plain["camvid"], plain["coco"].eval()
    camvid(x[:3])
    torch.testing.assert_close(out, torch.cat([camvid(x[:3]), coco(x[3:])]))
    out.square().sum().backward()
    y = x.detach().clone().requires_grad_()
    coco(y[3:]).square().sum().backward()
    torch.testing.assert_close(x.grad[3], y.grad[3])
    assert all(torch.equal(v, before[k]) for k, v in layer.branches["coco"].state_dict().items())
    assert caplog.text.count("one value per channel of ['coco']") == 1


@pytest.mark.parametrize("names", ["camvid", [], ["a", "a"], ["a.b"], [""], ["keys"]])
def test_names_that_cannot_be_branches_are_refused(names):
    with pytest.raises(ValueError):
        DatasetBatchNorm2d(C, names)


@pytest.mark.parametrize("groups", GROUPS)
def test_autocast_in_bfloat16(groups):
    layer, plain = layer_and_plain()
    conv = nn.Conv2d(C, C, 1)
    n = sum(count for _, count in groups)
    with torch.autocast("cpu", torch.bfloat16), active_datasets(groups):
        y = conv(images(n))
        out = layer(y)
        parts = y.split([count for _, count in groups])
        want = torch.cat([plain[name](part) for (name, count), part in zip(groups, parts) if count])
    out.float().square().sum().backward()
    assert out.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(out, want)
    for name, norm in plain.items():
        assert_same_state(layer.branches[name], norm)
        assert all(p.dtype == torch.float32 for p in layer.branches[name].parameters())


def test_a_model_that_is_bfloat16_throughout():
    layer, plain = layer_and_plain()
    layer.bfloat16()
    x = images(4).bfloat16().requires_grad_()
    with active_datasets([("camvid", 2), ("coco", 2)]):
        out = layer(x)
    out.float().square().sum().backward()
    want = torch.cat([plain["camvid"].bfloat16()(x[:2]), plain["coco"].bfloat16()(x[2:])])
    torch.testing.assert_close(out, want)
    assert_same_state(layer.branches["coco"], plain["coco"])


def test_gradients_by_finite_differences():
    layer = layer_and_plain()[0].double()
    x = images(4, size=(2, 1)).double().requires_grad_()

    def step(v):
        with active_datasets([("coco", 2), ("camvid", 2)]):
            return layer(v)

    assert torch.autograd.gradcheck(step, (x,), nondet_tol=0)


def test_a_branch_that_was_frozen_keeps_its_statistics():
    layer, plain = layer_and_plain()
    layer.branches["coco"].eval()
    before = copy.deepcopy(layer.branches["coco"].state_dict())
    x = images(4)
    with active_datasets([("camvid", 2), ("coco", 2)]):
        out = layer(x)
    torch.testing.assert_close(out, torch.cat([plain["camvid"](x[:2]), plain["coco"].eval()(x[2:])]))
    assert all(torch.equal(v, before[k]) for k, v in layer.branches["coco"].state_dict().items())
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(layer)
    with active_datasets([("camvid", 2), ("coco", 2)]):
        torch.testing.assert_close(frozen(x)[2:], out[2:])


def test_branches_start_as_the_norm_they_come_from():
    norm = random_norm(eps=1e-3, momentum=0.01).double().eval()
    norm.weight.requires_grad_(False)
    layer = DatasetBatchNorm2d.from_norm(norm, DATASETS)
    for branch in layer.branches.values():
        assert_same_state(branch, norm, equal=True)
        assert (branch.eps, branch.momentum, branch.training) == (1e-3, 0.01, False)
        assert branch.weight.dtype == torch.float64 and not branch.weight.requires_grad and branch.bias.requires_grad
    assert len({p.data_ptr() for p in layer.parameters()}) == 2 * len(DATASETS)
    assert {k for k, _ in layer.named_parameters()} == {
        f"branches.{d}.{p}" for d in DATASETS for p in ("weight", "bias")
    }


def test_a_cumulative_average_counts_the_batches_of_each_dataset_also_with_shared_affine():
    """Momentum None is the plain mean over the batches so far, in PyTorch's own layer and here."""
    layer = DatasetBatchNorm2d(3, ("a", "b"), momentum=None, shared_affine=True)
    plain = {name: torch.nn.BatchNorm2d(3, momentum=None) for name in ("a", "b")}
    for dataset in ("a", "b", "a", "a", "b"):
        x = torch.randn(2, 3, 4, 5)
        with active_datasets([(dataset, 2)]):
            torch.testing.assert_close(layer(x), plain[dataset](x))
    for name, expected in plain.items():
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(layer.branches[name], statistic), getattr(expected, statistic))
