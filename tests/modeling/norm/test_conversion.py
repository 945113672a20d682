"""Conversion of built models, and every way in which a checkpoint reaches the branches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

from multiseg_d2.modeling.active import active_datasets
from multiseg_d2.modeling.norm.conversion import (
    add_dataset_branch,
    convert_dataset_norm,
    dataset_norms,
    norm_report,
    single_dataset_model,
)
from multiseg_d2.modeling.norm.dataset_norm import DatasetBatchNorm2d, DatasetBranchError

DATASETS = ("camvid", "bdd100k")
ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    """A small Detectron2 ResNet below a head, as in a segmentation model."""

    def __init__(self, norm="BN", head_norm="BN"):
        super().__init__()
        stages = ResNet.make_stage(BasicBlock, 1, stride_per_block=[2], in_channels=4, out_channels=8, norm=norm)
        self.backbone = ResNet(BasicStem(out_channels=4, norm=norm), [stages], out_features=["res2"])
        self.head = Conv2d(8, 32, 1, norm=get_norm(head_norm, 32))

    def forward(self, x):
        return self.head(self.backbone(x)["res2"])


def shake(model, seed=0):
    """Gives every entry of a model, counts too, a value of its own."""
    gen = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        value.copy_(torch.rand(value.shape, generator=gen) + 0.5 if value.is_floating_point() else torch.tensor(7))
    return model


def converted(**kwargs):
    return convert_dataset_norm(Net(), DATASETS, **kwargs)


def assert_fanned_out(model, plain):
    """Every branch, and the template, hold the plain model's values."""
    state, found = plain.state_dict(), 0
    for path, layer in dataset_norms(model):
        for target in (layer, *layer.branches.values()):
            for entry in ENTRIES:
                key = f"{path}.{entry}"
                if key in state:
                    torch.testing.assert_close(getattr(target, entry).detach(), state[key], rtol=0, atol=0, msg=key)
                    found += 1
        pointers = [t.data_ptr() for t in (*layer.parameters(), *layer.buffers())]
        assert len(set(pointers)) == len(pointers), f"{path}: branches share memory"
    assert found >= 3 * 5 * len(list(dataset_norms(model)))


# ---- conversion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "nnSyncBN", "naiveSyncBN"])
def test_every_batch_norm_of_detectron2_is_converted(norm):
    plain = shake(Net(norm, norm))
    paths = [name for name, m in plain.named_modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    model = convert_dataset_norm(copy.deepcopy(plain), DATASETS)
    assert [path for path, _ in dataset_norms(model)] == paths == norm_report(model)["per dataset"]
    assert all(layer.sync == (norm != "BN") and layer.path == path for path, layer in dataset_norms(model))
    assert_fanned_out(model, plain)


def test_sync_can_be_switched_by_hand():
    assert all(layer.sync for _, layer in dataset_norms(converted(sync=True)))
    model = convert_dataset_norm(Net("SyncBN", "SyncBN"), DATASETS, sync=False)
    assert not any(layer.sync for _, layer in dataset_norms(model))


def test_the_converted_model_gives_what_the_plain_one_gave():
    plain = shake(Net()).eval()
    x = torch.randn(3, 3, 16, 16)
    want = plain(x)
    model = convert_dataset_norm(copy.deepcopy(plain), DATASETS)
    with active_datasets([("camvid", 1), ("bdd100k", 2)]):
        torch.testing.assert_close(model(x), want)


def test_frozen_and_group_norms_stay_and_are_reported(caplog):
    with caplog.at_level("INFO", logger="multiseg_d2"):
        model = convert_dataset_norm(Net("FrozenBN", "BN"), DATASETS)
    report = norm_report(model)
    assert [path for path, _ in dataset_norms(model)] == report["per dataset"] == ["head.norm"]
    assert len(report["frozen"]) == sum(isinstance(m, FrozenBatchNorm2d) for m in model.modules()) == 4
    assert "4 frozen batch norms stay" in caplog.text and "backbone.stem.conv1.norm" in caplog.text
    assert norm_report(convert_dataset_norm(Net("BN", "GN"), DATASETS))["other"] == ["head.norm"]
    assert norm_report(Net())["plain"] and not norm_report(Net())["per dataset"]


def test_nothing_to_convert_is_an_error_not_a_silent_shared_model():
    with pytest.raises(ValueError, match="no batch norm to convert"):
        convert_dataset_norm(Net("FrozenBN", "GN"), DATASETS)


def test_a_norm_that_is_the_model_and_a_norm_in_two_places():
    assert isinstance(convert_dataset_norm(nn.BatchNorm2d(2), DATASETS), DatasetBatchNorm2d)
    shared = nn.BatchNorm2d(2)
    model = convert_dataset_norm(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": shared}), DATASETS)
    assert model["a"] is model["b"][0] is model["c"] and isinstance(model["a"], DatasetBatchNorm2d)


def test_batch_norms_that_cannot_be_converted_are_named():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    class Renamed(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match="0: Odd has a forward pass of its own"):
        convert_dataset_norm(nn.Sequential(Odd(2)), DATASETS)
    assert norm_report(convert_dataset_norm(nn.Sequential(Renamed(2)), DATASETS))["per dataset"] == ["0"]


def test_converting_twice():
    model = converted()
    layers = [layer for _, layer in dataset_norms(model)]
    assert [layer for _, layer in dataset_norms(convert_dataset_norm(model, DATASETS))] == layers
    with pytest.raises(DatasetBranchError, match="converted already"):
        convert_dataset_norm(model, ("camvid",))


def test_detectron2_sees_the_branches_as_norm_parameters():
    model = converted()
    groups = get_default_optimizer_params(model, base_lr=1.0, weight_decay=0.1, weight_decay_norm=0.0)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if ".branches." in name else 0.1), name
    assert len(decay) == len(list(model.parameters()))


# ---- plain checkpoints reach every branch -------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_plain_state_dict_strict(assign):
    plain, model = shake(Net()), converted()
    state = plain.state_dict()
    keys = list(state)
    assert not any(model.load_state_dict(state, strict=True, assign=assign))
    assert list(state) == keys  # the caller's dict is left alone
    assert_fanned_out(model, plain)


def test_plain_state_dict_without_batch_counts():
    """Old files, and Detectron2's converted ones, have no num_batches_tracked."""
    plain, model = shake(Net()), shake(converted(), 1)
    state = {k: v for k, v in plain.state_dict().items() if not k.endswith("num_batches_tracked")}
    model.load_state_dict(state, strict=True)
    for _, layer in dataset_norms(model):
        for target in (layer, *layer.branches.values()):
            target.num_batches_tracked.fill_(7)
    assert_fanned_out(model, plain)


def test_detectron2_pkl_with_suffix_matching(tmp_path):
    """ImageNet files know nothing of `backbone.`; without the plain keys the loader would drop their statistics."""
    plain, model = shake(Net()), converted()
    weights = {
        k.removeprefix("backbone."): v.numpy()
        for k, v in plain.state_dict().items()
        if k.startswith("backbone.") and not k.endswith("num_batches_tracked")
    }
    with open(tmp_path / "R-18.pkl", "wb") as f:
        pickle.dump({"model": weights, "__author__": "torchvision", "matching_heuristics": True}, f)
    untouched = copy.deepcopy(model.head.state_dict())
    incompatible = DetectionCheckpointer(model).load(str(tmp_path / "R-18.pkl"))
    assert "model" not in incompatible
    for _, layer in dataset_norms(model.backbone):
        for target in (layer, *layer.branches.values()):
            target.num_batches_tracked.fill_(7)
    assert_fanned_out(model.backbone, plain.backbone)
    for key, value in model.backbone.state_dict().items():
        if "norm" not in key:
            assert torch.equal(value, plain.backbone.state_dict()[key]), key
    assert all(torch.equal(v, untouched[k]) for k, v in model.head.state_dict().items())


def test_caffe2_pkl_which_has_affine_parameters_only(tmp_path):
    model = converted()
    size = model.backbone.stem.conv1.norm.num_features
    blobs = {"res_conv1_bn_s": torch.rand(size).numpy(), "res_conv1_bn_b": torch.rand(size).numpy()}
    with open(tmp_path / "R.pkl", "wb") as f:
        pickle.dump({"blobs": blobs}, f)
    DetectionCheckpointer(model).load(str(tmp_path / "R.pkl"))
    for branch in model.backbone.stem.conv1.norm.branches.values():
        assert torch.equal(branch.weight.detach(), torch.from_numpy(blobs["res_conv1_bn_s"]))
        assert torch.equal(branch.bias.detach(), torch.from_numpy(blobs["res_conv1_bn_b"]))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_detectron2_pth_of_a_plain_model(tmp_path, prefix):
    plain, model = shake(Net()), converted()
    torch.save({"model": {prefix + k: v for k, v in plain.state_dict().items()}}, tmp_path / "plain.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "plain.pth"))
    assert_fanned_out(model, plain)


def test_strict_loading_still_finds_what_is_missing_or_odd():
    state = shake(Net()).state_dict()
    key = "head.norm.running_mean"
    with pytest.raises(RuntimeError, match="head.norm.running_mean"):
        converted().load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match="head.norm.odd"):
        converted().load_state_dict({**state, "head.norm.odd": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for head.norm"):
        converted().load_state_dict({**state, key: torch.zeros(3)})


# ---- checkpoints with branches go by name -------------------------------------------------------------------------


def test_branches_load_by_name_whatever_their_order(tmp_path):
    source = shake(converted())
    target = convert_dataset_norm(Net(), DATASETS[::-1])
    torch.save({"model": source.state_dict()}, tmp_path / "model.pth")
    DetectionCheckpointer(target).load(str(tmp_path / "model.pth"))
    want = source.state_dict()
    assert all(torch.equal(v, want[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize("names", [("camvid",), ("camvid", "coco"), ("camvid", "bdd100k", "coco")])
def test_other_branches_are_an_error_that_lists_both(names):
    state = shake(converted()).state_dict()
    model = convert_dataset_norm(Net(), names)
    with pytest.raises(DatasetBranchError) as error:
        model.load_state_dict(state, strict=False)
    assert str(sorted(names)) in str(error.value) and str(sorted(DATASETS)) in str(error.value)
    assert "INIT_FROM" in str(error.value)


def test_init_from_names_the_donor_at_load():
    source = shake(converted())
    model = convert_dataset_norm(Net(), ("camvid", "kitti", "coco"), init_from="bdd100k")
    assert not any(model.load_state_dict(source.state_dict(), strict=True))
    for (path, layer), (_, old) in zip(dataset_norms(model), dataset_norms(source)):
        for name, donor in (("camvid", "camvid"), ("kitti", "bdd100k"), ("coco", "bdd100k")):
            for entry in ENTRIES:
                assert torch.equal(getattr(layer.branches[name], entry), getattr(old.branches[donor], entry)), path
    with pytest.raises(DatasetBranchError, match="INIT_FROM is 'wilddash'"):
        convert_dataset_norm(Net(), ("kitti",), init_from="wilddash").load_state_dict(source.state_dict())


def test_adding_a_dataset_to_a_trained_model():
    model = shake(converted())
    before = copy.deepcopy(model.state_dict())
    parameters = add_dataset_branch(model, "kitti", init_from="bdd100k")
    for _, layer in dataset_norms(model):
        assert layer.datasets == ("camvid", "bdd100k", "kitti")
        for entry in ENTRIES:
            new, donor = (getattr(layer.branches[d], entry) for d in ("kitti", "bdd100k"))
            assert torch.equal(new, donor) and new.data_ptr() != donor.data_ptr()
    assert {id(p) for p in parameters} == {id(p) for k, p in model.named_parameters() if ".kitti." in k}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if ".kitti." not in k)
    reloaded = convert_dataset_norm(Net(), ("kitti", "camvid", "bdd100k"))
    reloaded.load_state_dict(model.state_dict())


@pytest.mark.parametrize("new, donor", [("camvid", "bdd100k"), ("kitti", "wilddash")])
def test_adding_what_is_there_or_from_what_is_not(new, donor):
    model = converted()
    keys = list(model.state_dict())
    with pytest.raises(DatasetBranchError):
        add_dataset_branch(model, new, donor)
    assert list(model.state_dict()) == keys
    with pytest.raises(DatasetBranchError, match="convert it first"):
        add_dataset_branch(Net(), "kitti", "camvid")


def test_one_dataset_as_a_plain_model():
    model = shake(converted()).eval()
    plain = single_dataset_model(model, "bdd100k")
    x = torch.randn(2, 3, 16, 16)
    with active_datasets([("bdd100k", 2)]):
        torch.testing.assert_close(plain(x), model(x))
    assert set(plain.state_dict()) == set(Net().state_dict())
    assert isinstance(model.head.norm, DatasetBatchNorm2d)
    with pytest.raises(DatasetBranchError, match="'kitti'"):
        single_dataset_model(model, "kitti")
