"""Weights from files: names, values, refusals, warnings. The files are made here, in the styles of their writers."""

from __future__ import annotations

import logging
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.modeling import build_backbone

from multiseg_d2.checkpoint.file import CheckpointError, UnsafeCheckpointError, read_pickle
from multiseg_d2.checkpoint.names import KeyFormat, register_key_format, torchvision_key
from multiseg_d2.checkpoint.weights import load_pretrained, load_weights, read_pretrained

R18_BLOCKS = {"layer1": (64, 64), "layer2": (64, 128), "layer3": (128, 256), "layer4": (256, 512)}
RGB = {"input_format": "RGB", "pixel_mean": (123.675, 116.28, 103.53), "pixel_std": (58.395, 57.12, 57.375)}


def torchvision_resnet18() -> OrderedDict:
    """A state dict with the names and shapes of torchvision's resnet18, written out by hand."""
    rng = torch.Generator().manual_seed(7)
    state: OrderedDict = OrderedDict()

    def conv(name, *shape):
        state[f"{name}.weight"] = torch.randn(shape, generator=rng)

    def norm(name, channels):
        for entry in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{entry}"] = torch.rand(channels, generator=rng) + 0.1
        state[f"{name}.num_batches_tracked"] = torch.tensor(17)

    conv("conv1", 64, 3, 7, 7), norm("bn1", 64)
    for layer, (wide_in, wide) in R18_BLOCKS.items():
        for block in (0, 1):
            (
                conv(f"{layer}.{block}.conv1", wide, wide_in if block == 0 else wide, 3, 3),
                norm(f"{layer}.{block}.bn1", wide),
            )
            conv(f"{layer}.{block}.conv2", wide, wide, 3, 3), norm(f"{layer}.{block}.bn2", wide)
        if wide_in != wide:
            conv(f"{layer}.0.downsample.0", wide, wide_in, 1, 1), norm(f"{layer}.0.downsample.1", wide)
    conv("fc", 1000, 512)
    state["fc.bias"] = torch.zeros(1000)
    return state


#: A few pairs that cover every rule: torchvision's name, ours.
PAIRS = {
    "conv1.weight": "stem.conv1.weight",
    "bn1.running_var": "stem.conv1.norm.running_var",
    "layer1.0.conv1.weight": "res2.0.conv1.weight",
    "layer2.1.bn2.bias": "res3.1.conv2.norm.bias",
    "layer3.0.downsample.0.weight": "res4.0.shortcut.weight",
    "layer4.0.downsample.1.running_mean": "res5.0.shortcut.norm.running_mean",
}


def save(path, content):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return str(path)


def numpy_state(state):
    return {k: v.numpy() for k, v in state.items()}


def check(model, state):
    own = model.state_dict()
    for theirs, mine in PAIRS.items():
        torch.testing.assert_close(own[f"backbone.{mine}"], state[theirs])


@pytest.mark.parametrize("name", ["r18.pth", "r18.pt"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_torchvision_file(make_model, tmp_path, name, wrap):
    state = torchvision_resnet18()
    model = make_model()
    report = load_pretrained(model, save(tmp_path / name, wrap(state)), **RGB)
    check(model, state)
    assert report.missing == report.unexpected == []
    assert report.unused == ["fc.bias", "fc.weight"]
    assert len(report.matched) == len([k for k in model.state_dict() if k.startswith("backbone.")])


def test_every_branch_receives_the_weights(make_model, tmp_path):
    state = torchvision_resnet18()
    model = make_model("MODEL.DATASET_NORM.ENABLED", True)
    report = load_pretrained(model, save(tmp_path / "r18.pth", state), **RGB)
    assert report.missing == report.unexpected == []
    own = model.state_dict()
    for dataset in ("alpha", "beta"):
        branch = f"backbone.res3.1.conv2.norm.branches.{dataset}"
        torch.testing.assert_close(own[f"{branch}.running_mean"], state["layer2.1.bn2.running_mean"])
        torch.testing.assert_close(own[f"{branch}.weight"], state["layer2.1.bn2.weight"])


def converted_by_detectron2s_tool(state):
    """What Detectron2's script for torchvision files writes (its renaming, restated)."""
    result = {}
    for key, value in state.items():
        new = key if "layer" in key else "stem." + key
        for i in (4, 3, 2, 1):
            new = new.replace(f"layer{i}", f"res{i + 1}")
        for i in (1, 2, 3):
            new = new.replace(f"bn{i}", f"conv{i}.norm")
        result[new.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value.numpy()
    return {"model": result, "__author__": "torchvision", "matching_heuristics": True}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_detectron2_pkl_as_detectron2_loads_it(make_cfg, make_model, tmp_path, protocol):
    state = torchvision_resnet18()
    content = converted_by_detectron2s_tool(state)
    path = tmp_path / "r18.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    model = make_model()
    report = load_pretrained(model, str(path), **RGB)
    assert report.missing == report.unexpected == []
    assert report.unused == ["stem.fc.bias", "stem.fc.weight"]  # that is how the script names the classifier
    check(model, state)
    if protocol == 2:  # Detectron2's own loader on Detectron2's own network
        options = ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)
        theirs = build_backbone(make_cfg(*options))
        loaded = {k: torch.from_numpy(v) for k, v in content["model"].items()}
        matched = align_and_update_state_dicts(theirs.state_dict(), loaded, c2_conversion=False)
        theirs.load_state_dict(matched or loaded, strict=False)
        for key, value in theirs.state_dict().items():
            torch.testing.assert_close(model.backbone.state_dict()[key], value)


def test_caffe2_file_with_folded_norms(make_model, tmp_path, caplog):
    """MSRA's files: blob names, norms without statistics."""
    rng = np.random.default_rng(0)
    blobs = {
        "conv1_w": rng.normal(size=(64, 3, 7, 7)),
        "res_conv1_bn_s": rng.random(64),
        "res_conv1_bn_b": rng.random(64),
    }
    blobs["res2_0_branch2a_w"] = rng.normal(size=(64, 64, 1, 1))
    blobs["res2_0_branch1_w"] = rng.normal(size=(256, 64, 1, 1))
    blobs["res2_0_branch2c_bn_s"] = rng.random(256)
    blobs["fc1000_w"], blobs["conv1_w_momentum"] = rng.random((1000, 2048)), rng.random(3)
    blobs = {k: v.astype(np.float32) for k, v in blobs.items()}
    model = make_model("MODEL.RESNETS.DEPTH", 50)
    with caplog.at_level(logging.WARNING):
        report = load_pretrained(model, save(tmp_path / "R-50.pkl", {"blobs": blobs}), **{**RGB, "input_format": "BGR"})
    own = model.backbone.state_dict()
    for blob, key in (
        ("conv1_w", "stem.conv1.weight"),
        ("res_conv1_bn_s", "stem.conv1.norm.weight"),
        ("res2_0_branch2a_w", "res2.0.conv1.weight"),
        ("res2_0_branch1_w", "res2.0.shortcut.weight"),
        ("res2_0_branch2c_bn_s", "res2.0.conv3.norm.weight"),
    ):
        torch.testing.assert_close(own[key], torch.from_numpy(blobs[blob]))
    assert report.unused == ["fc1000_w"]
    assert "without statistics" in caplog.text
    assert "PIXEL_MEAN [103.53, 116.28, 123.675]" in caplog.text


def test_weights_reach_the_network_inside_an_fpn(make_model, tmp_path):
    model = make_model(
        *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
        *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT", 0.0),
        *("MODEL.SEM_SEG_HEAD.DECODER", "FPNDecoder", "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
    )
    state = torchvision_resnet18()
    report = load_pretrained(model, save(tmp_path / "r18.pth", state), **RGB)
    torch.testing.assert_close(model.state_dict()["backbone.bottom_up.stem.conv1.weight"], state["conv1.weight"])
    assert report.unexpected == []
    assert report.missing and all(k.startswith("fpn_") for k in report.missing)


@pytest.mark.parametrize(
    "names",
    [
        {
            "conv1": "conv1",
            "bn1": "conv1.norm",
            "conv2": "conv2",
            "bn2": "conv2.norm",
            "conv3": "conv3",
            "bn3": "conv3.norm",
        },
        {f"stem.{i}": n for i, n in ((0, "conv1"), (1, "conv1.norm"), (3, "conv2"), (4, "conv2.norm"), (6, "conv3"))},
    ],
    ids=["PSPNet", "v1c"],
)
def test_deep_stem_names(make_model, tmp_path, names):
    model = make_model("MODEL.BACKBONE.NAME", "build_deep_stem_resnet_backbone")
    own = {k: torch.rand_like(v, dtype=torch.float) for k, v in model.backbone.state_dict().items() if "stem" in k}
    state = {"layer1.0.conv2.weight": torch.rand(64, 64, 3, 3)}  # what tells the format
    for theirs, mine in names.items():
        for key, value in own.items():
            rest = key.removeprefix(f"stem.{mine}.")
            if rest != key and "." not in rest:
                state[f"{theirs}.{rest}"] = value
    assert len(state) > len(names)
    load_pretrained(model, save(tmp_path / "r18.pth", state))
    for key, value in own.items():
        if any(key.startswith(f"stem.{mine}.weight") for mine in names.values()):
            torch.testing.assert_close(model.backbone.state_dict()[key], value)


def test_another_network_is_refused(make_model, tmp_path):
    with pytest.raises(CheckpointError, match=r"other shapes.*DEPTH"):
        load_pretrained(make_model("MODEL.RESNETS.DEPTH", 50), save(tmp_path / "r18.pth", torchvision_resnet18()))


def test_missing_and_unexpected_are_listed(make_model, tmp_path, caplog):
    state = torchvision_resnet18()
    del state["layer4.1.conv2.weight"]
    state["layer4.2.conv1.weight"] = torch.zeros(512, 512, 3, 3)
    with caplog.at_level(logging.WARNING):
        report = load_pretrained(make_model(), save(tmp_path / "r18.pth", state))
    assert (report.missing, report.unexpected) == (["res5.1.conv2.weight"], ["res5.2.conv1.weight"])
    assert "res5.1.conv2.weight" in caplog.text and "res5.2.conv1.weight" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RGB, None),
        ({**RGB, "input_format": "BGR"}, "INPUT.FORMAT to RGB"),
        ({**RGB, "pixel_mean": (103.53, 116.28, 123.675)}, "PIXEL_MEAN"),
        ({**RGB, "pixel_std": (1.0, 1.0, 1.0)}, "PIXEL_STD"),
        ({}, None),
    ],
)
def test_images_that_do_not_fit_the_file_are_warned_of(make_model, tmp_path, caplog, settings, message):
    with caplog.at_level(logging.WARNING):
        load_pretrained(make_model(), save(tmp_path / "r18.pth", torchvision_resnet18()), **settings)
    assert (message in caplog.text) if message else not caplog.records


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth"])
def test_no_code_is_run(make_model, tmp_path, name):
    trap = tmp_path / "trap"
    path = save(tmp_path / name, {"model": {"x": Malicious(trap)}, "layer1.0.conv1.weight": torch.zeros(1)})
    with pytest.raises(UnsafeCheckpointError, match=name):
        read_pretrained(path)
    assert not trap.exists()


def test_pickles_of_plain_things_only(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3).T,
        "b": [1, "x", None],
        "c": OrderedDict(z=np.float32([1])),
    }
    path = save(tmp_path / "plain.pkl", arrays)
    read = read_pickle(path)
    assert np.array_equal(read["a"], arrays["a"]) and read["b"] == arrays["b"]
    assert list(read["c"]) == ["z"]
    for thing in (np.sum, logging.getLogger(), torch.nn.ReLU()):
        with pytest.raises(UnsafeCheckpointError):
            read_pickle(save(tmp_path / "other.pkl", {"x": thing}))


@pytest.mark.parametrize("name", ["cut.pkl", "cut.pth"])
def test_broken_files_are_named(tmp_path, name):
    path = tmp_path / name
    save(path, torchvision_resnet18() if name.endswith("pth") else numpy_state(torchvision_resnet18()))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=name):
        read_pretrained(str(path))


def test_unknown_names_are_shown(tmp_path):
    with pytest.raises(CheckpointError, match=r"of no known format.*whatever\.weight"):
        read_pretrained(save(tmp_path / "x.pth", {"whatever.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="no tensors"):
        read_pretrained(save(tmp_path / "y.pth", {"epoch": 3}))


def test_a_new_backbone_brings_its_names(make_model, tmp_path, monkeypatch):
    from multiseg_d2.checkpoint import names, weights

    formats = list(names.KEY_FORMATS)
    monkeypatch.setattr(names, "KEY_FORMATS", formats)
    monkeypatch.setattr(weights, "KEY_FORMATS", formats)
    register_key_format(
        KeyFormat("made up", lambda keys, author: "first" in keys, lambda k: {"first": "stem.conv1.weight"}.get(k))
    )
    value = torch.rand(64, 3, 7, 7)
    model = make_model()
    report = load_pretrained(model, save(tmp_path / "x.pth", {"first": value, "second": value}))
    assert report.matched == ["stem.conv1.weight"] and report.unused == ["second"]
    torch.testing.assert_close(model.backbone.stem.conv1.weight.data, value)


# ---- whole models of other programs ------------------------------------------------------------------------------
def renamed(prefix, state):
    return {f"{prefix}{k}": v for k, v in state.items() if not k.startswith("fc.")}


def ours(state):
    """A state dict of torchvision's names in Detectron2's."""
    return {torchvision_key(k): v for k, v in state.items() if not k.startswith("fc.")}


HEAD = {"conv_seg.weight": torch.zeros(19, 512, 1, 1), "convs.0.conv.weight": torch.zeros(512, 2048, 3, 3)}
SIDES = {"classifier.0.weight": torch.zeros(2), "aux_classifier.4.bias": torch.zeros(2)}
#: Name of a program -> the contents of its files, from torchvision's state dict.
FOREIGN = {
    "MMSegmentation": lambda s: {"state_dict": renamed("backbone.", s) | renamed("decode_head.", HEAD), "meta": {}},
    "torchvision": lambda s: renamed("backbone.", s) | SIDES,
    "Detectron2": lambda s: {"model": renamed("backbone.bottom_up.", ours(s)) | renamed("sem_seg_head.x.", HEAD)},
    "module. one level down": lambda s: {"state_dict": renamed("backbone.module.", s) | renamed("head.module.", HEAD)},
    "nested": lambda s: {"epoch": 1, "checkpoint": {"model": {"state_dict": renamed("module.backbone.", s) | HEAD}}},
}


@pytest.mark.parametrize("program", FOREIGN)
def test_the_backbone_of_another_programs_model_is_used_and_nothing_else(make_model, tmp_path, program, caplog):
    caplog.set_level(logging.INFO)
    state = torchvision_resnet18()
    path = save(tmp_path / "model.pth", FOREIGN[program](state))
    model = make_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    load_weights(model, path)
    check(model, state)
    own = model.state_dict()
    assert all(torch.equal(before[k], own[k]) for k in own if not k.startswith("backbone."))
    assert f"{len(state) - 2} tensors loaded" in caplog.text
    with pytest.raises(
        CheckpointError, match=r"model.pth is no model that could be evaluated here. None of its \d+ tensors"
    ):
        load_weights(model, path, complete=True)


NOTHING = {
    "another network": {"state_dict": {"backbone.patch_embed.weight": torch.zeros(2), "decode_head.x": torch.zeros(1)}},
    "its names": {"model": {"backbone.stages.0.weight": torch.zeros(2), "roi_heads.x": torch.zeros(1)}},
    "a classifier alone": {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)},
}


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("kind", NOTHING)
def test_a_file_of_which_nothing_fits_is_an_error_with_examples(make_model, tmp_path, kind, complete):
    path = save(tmp_path / "model.pth", NOTHING[kind])
    with pytest.raises(CheckpointError, match=r"(?i)model\.pth.*none of its 2 tensors.*(backbone|fc)\.") as problem:
        load_weights(make_model(), path, complete=complete)
    assert "\n" not in str(problem.value)


def test_names_that_fit_a_format_but_not_the_network_are_an_error(make_model, tmp_path):
    path = save(
        tmp_path / "deeper.pth", {"layer4.9.conv1.weight": torch.zeros(1), "layer1.0.conv9.weight": torch.zeros(1)}
    )
    with pytest.raises(CheckpointError, match=r"deeper.pth \(torchvision\). None of its 2 tensors is one of the \d+"):
        load_weights(make_model(), path)
