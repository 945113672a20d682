"""Backbones of timm: shapes, names, norms that can be converted, freezing, errors; without weights from anywhere."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import nn

from multiseg_d2.modeling.active import active_datasets
from multiseg_d2.modeling.backbones import TimmBackbone
from multiseg_d2.modeling.norm.conversion import convert_dataset_norm, norm_report, single_dataset_model

timm = pytest.importorskip("timm")
from timm.layers import BatchNormAct2d  # noqa: E402

#: Network -> strides of its features, from the papers; a small member of each family.
STRIDES = {
    "tf_efficientnet_lite0": (2, 4, 8, 16, 32),
    "hrnet_w18_small": (2, 4, 8, 16, 32),
    "resnet10t": (2, 4, 8, 16, 32),
    "regnetx_002": (2, 4, 8, 16, 32),
    "convnext_atto": (4, 8, 16, 32),
}
MORE_STRIDES = {
    "mobilenetv3_small_050": (2, 4, 8, 16, 32),
    "mnasnet_small": (2, 4, 8, 16, 32),
    "mixnet_s": (2, 4, 8, 16, 32),
    "fbnetc_100": (2, 4, 8, 16, 32),
    "ghostnet_050": (2, 4, 8, 16, 32),
    "rexnet_100": (2, 4, 8, 16, 32),
    "cspresnet50": (2, 4, 8, 16, 32),
    "densenet121": (2, 4, 8, 16, 32),
    "ese_vovnet19b_slim": (2, 4, 8, 16, 32),
    "resnetv2_50d": (2, 4, 8, 16, 32),
    "gernet_s": (2, 4, 8, 16, 32),
    "repvgg_a0": (2, 4, 8, 16, 32),
    "mobileone_s0": (2, 4, 8, 16, 32),
    "xception41": (2, 4, 8, 16, 32),
    "seresnet18": (2, 4, 8, 16, 32),
    "res2net50_14w_8s": (2, 4, 8, 16, 32),
    "efficientvit_b0": (4, 8, 16, 32),
    "edgenext_xx_small": (4, 8, 16, 32),
    "swin_tiny_patch4_window7_224": (4, 8, 16, 32),
    "vit_tiny_patch16_224": (16, 16, 16),
}
#: Networks without batch norms, and those whose batch norms are plain ones.
NO_BATCH_NORM = ("convnext_atto", "edgenext_xx_small", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224")
PLAIN_NORMS = ("hrnet_w18_small", "resnet10t", "seresnet18", "res2net50_14w_8s", "efficientvit_b0")


def families(*left_out: str) -> list:
    """All networks but some, those of MORE_STRIDES as slow tests."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in MORE_STRIDES else [])
        for name in STRIDES | MORE_STRIDES
        if name not in left_out
    ]


def make(name: str, **options) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(name, **options)


def fused_twin(name: str) -> nn.Module:
    """Timm's own extractor, untouched, with the same weights as :func:`make`."""
    torch.manual_seed(0)
    branches = {"feature_location": ""} if name.startswith("hrnet") else {}
    return timm.create_model(name, pretrained=False, features_only=True, **branches)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("size", [(64, 96), (96, 128)])
def test_features_have_the_shapes_that_it_says(name, size):
    backbone = make(name).eval()
    shapes = backbone.output_shape()
    assert tuple(shape.stride for shape in shapes.values()) == (STRIDES | MORE_STRIDES)[name]
    assert list(shapes)[-1] == "res5" and list(shapes) == sorted(shapes)
    assert backbone.size_divisibility == 32
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, *size))
    assert list(features) == list(shapes)
    for feature, (key, shape) in zip(features.values(), shapes.items()):
        assert feature.shape == (1, shape.channels, size[0] // shape.stride, size[1] // shape.stride), key


@pytest.mark.parametrize("name", families(*NO_BATCH_NORM, *PLAIN_NORMS))
def test_separated_norms_compute_what_the_fused_layers_do(name):
    """Outputs, gradients and running statistics of two steps, bit for bit where the operations are the same."""
    ours, theirs = make(name).train(), fused_twin(name).train()
    assert any(isinstance(m, BatchNormAct2d) for m in theirs.modules())
    assert not any(isinstance(m, BatchNormAct2d) for m in ours.modules())
    images = torch.randn(2, 3, 64, 64)
    for _ in range(2):
        torch.manual_seed(1)
        a = list(ours(images).values())
        torch.manual_seed(1)
        b = theirs(images)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
    sum(x.square().mean() for x in a).backward()
    sum(y.square().mean() for y in b).backward()
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    gradients = {key: (p.grad, q.grad) for (key, p), q in pairs if q.grad is not None}
    assert len(gradients) > 20
    for key, (p, q) in gradients.items():
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=key)
    for x, y in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", families(*NO_BATCH_NORM))
def test_every_batch_norm_can_have_a_branch_per_dataset(name):
    backbone = make(name)
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    plain = copy.deepcopy(backbone).eval()
    converted = convert_dataset_norm(backbone, ["a", "b"]).eval()
    report = norm_report(converted)
    assert len(report["per dataset"]) == len(norms) and not report["plain"] and not report["frozen"]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), active_datasets((("a", 1), ("b", 1))):
        features = converted(images)
    with torch.no_grad():
        expected = plain(images)
        alone = single_dataset_model(converted, "b")(images)
    for key, feature in features.items():
        torch.testing.assert_close(feature, expected[key], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", families())
def test_published_names_are_those_of_the_whole_network(name):
    backbone = make(name)
    whole = timm.create_model(name, pretrained=False).state_dict()
    names, own = backbone.published_names(), backbone.state_dict()
    assert sorted(names.values()) == sorted(own)
    strangers = [n for n in names if n not in whole and not n.endswith(("attn_mask", "relative_position_index"))]
    assert not strangers
    assert all(own[key].shape == whole[n].shape for n, key in names.items() if n in whole)


@pytest.mark.parametrize(
    ("name", "stride", "strides"),
    [
        ("tf_efficientnet_lite0", 16, (2, 4, 8, 16, 16)),
        ("tf_efficientnet_lite0", 8, (2, 4, 8, 8, 8)),
        ("resnet10t", 8, (2, 4, 8, 8, 8)),
        ("convnext_atto", 16, (4, 8, 16, 16)),
    ],
)
def test_output_stride(name, stride, strides):
    backbone = make(name, output_stride=stride).eval()
    shapes = backbone.output_shape()
    assert tuple(s.stride for s in shapes.values()) == strides and list(shapes)[-1] == "res5"
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 96))
    assert [f.shape[-1] for f in features.values()] == [96 // s for s in strides]


def test_the_branches_of_an_hrnet_are_raw():
    """Widths of the paper: C, 2C, 4C, 8C with C = 18, not those of the classification head."""
    shapes = make("hrnet_w18_small_v2").output_shape()
    assert [shapes[f"res{i}"].channels for i in range(2, 6)] == [18, 36, 72, 144]


def backbone_of(make_cfg, *options):
    return build_backbone(make_cfg("MODEL.BACKBONE.NAME", "build_timm_backbone", *options))


def test_from_the_config(make_cfg):
    backbone = backbone_of(make_cfg, "MODEL.TIMM.NAME", "resnet10t", "MODEL.TIMM.OUTPUT_STRIDE", 16)
    assert backbone.timm_name == "resnet10t" and backbone.output_shape()["res5"].stride == 16
    assert isinstance(backbone.output_shape()["res5"], ShapeSpec)
    assert all(p.requires_grad for p in backbone.parameters())


def test_norms_and_freezing_by_the_config(make_cfg):
    sync = backbone_of(make_cfg, "MODEL.RESNETS.NORM", "SyncBN")
    kinds = {type(m) for m in sync.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    frozen = backbone_of(make_cfg, "MODEL.BACKBONE.FREEZE_AT", 5).train()
    assert not any(p.requires_grad for p in frozen.parameters())
    assert any(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules())
    before = copy.deepcopy(frozen.state_dict())
    frozen(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())


def test_a_frozen_backbone_computes_what_it_did(make_cfg):
    torch.manual_seed(0)
    trained = backbone_of(make_cfg).eval()
    torch.manual_seed(0)
    frozen = backbone_of(make_cfg, "MODEL.BACKBONE.FREEZE_AT", 5)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(trained(images)["res5"], frozen(images)["res5"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.TIMM.NAME", "resnet19"), "did you mean"),
        (("MODEL.TIMM.NAME", "hrnet_w18_small", "MODEL.TIMM.OUTPUT_STRIDE", 8), "OUTPUT_STRIDE|output stride 8"),
        (("MODEL.TIMM.OUTPUT_STRIDE", 7), "OUTPUT_STRIDE|output stride 7"),
        (("MODEL.TIMM.NAME", "mixer_b16_224"), "cannot build mixer_b16_224 as a backbone"),
        (("MODEL.RESNETS.NORM", "GN"), "BN, SyncBN, FrozenBN"),
        (("MODEL.BACKBONE.FREEZE_AT", 2), "FREEZE_AT is 2"),
    ],
)
def test_what_it_cannot_do_it_says(make_cfg, options, message):
    with pytest.raises(ValueError, match=message):
        backbone_of(make_cfg, *options)


def test_without_timm_the_error_says_how_to_get_it(make_cfg, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"multiseg-d2\[timm\]"):
        backbone_of(make_cfg)
