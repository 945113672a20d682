"""The dilated ResNet against Detectron2's own blocks and networks."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.resnet import BasicBlock
from torch import nn

from multiseg_d2.modeling.backbones import DilatedBasicBlock


def build(make_cfg, *options) -> nn.Module:
    torch.manual_seed(1)
    return build_backbone(make_cfg(*options)).eval()


def shuffle_norms(model: nn.Module) -> nn.Module:
    """Gives the norms other values than the identity, so that a mixed-up key would show."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("DEPTH", 50, "OUTPUT_STRIDE", 32), ("DEPTH", 50)),
        (("DEPTH", 50, "OUTPUT_STRIDE", 16), ("DEPTH", 50, "RES5_DILATION", 2)),
        (("DEPTH", 18, "OUTPUT_STRIDE", 32), ("DEPTH", 18, "RES2_OUT_CHANNELS", 64)),
    ],
)
def test_equals_detectron2_with_the_same_weights(make_cfg, ours, theirs):
    def options(pairs):
        return [f"MODEL.RESNETS.{v}" if i % 2 == 0 else v for i, v in enumerate(pairs)]

    mine = shuffle_norms(build(make_cfg, *options(ours)))
    reference = build(make_cfg, "MODEL.BACKBONE.NAME", "build_resnet_backbone", *options(theirs))
    reference.load_state_dict(mine.state_dict())  # strict: the keys are the same
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = reference(x), mine(x)
    assert set(found) == {"res2", "res3", "res4", "res5"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert {k: s.stride for k, s in mine.output_shape().items()} == {
        k: s.stride for k, s in reference.output_shape().items()
    }


def test_dilated_stage_is_the_plain_stage_on_every_phase():
    """A stage with dilation d works on the d x d interleaved sub-images independently."""
    torch.manual_seed(3)
    dilated = nn.Sequential(DilatedBasicBlock(8, 16, dilation=4), DilatedBasicBlock(16, 16, dilation=4))
    plain = nn.Sequential(BasicBlock(8, 16), BasicBlock(16, 16))
    plain.load_state_dict(shuffle_norms(dilated).state_dict())
    dilated.eval(), plain.eval()
    x = torch.rand(2, 8, 24, 16)
    with torch.no_grad():
        whole = dilated(x)
        for i in range(4):
            for j in range(4):
                torch.testing.assert_close(whole[:, :, i::4, j::4], plain(x[:, :, i::4, j::4].contiguous()))


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
@pytest.mark.parametrize(("output_stride", "strides"), [(8, (4, 8, 8, 8)), (16, (4, 8, 16, 16)), (32, (4, 8, 16, 32))])
def test_shapes_are_as_announced(make_cfg, depth, output_stride, strides):
    with torch.device("meta"):
        backbone = build(make_cfg, "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.OUTPUT_STRIDE", output_stride)
        features = backbone(torch.rand(1, 3, 64, 96))
    widths = (64, 128, 256, 512) if depth < 50 else (256, 512, 1024, 2048)
    for name, stride, channels in zip(("res2", "res3", "res4", "res5"), strides, widths):
        shape = backbone.output_shape()[name]
        assert (shape.stride, shape.channels) == (stride, channels)
        assert features[name].shape == (1, channels, 64 // stride, 96 // stride)


def test_deep_stem(make_cfg):
    backbone = build(make_cfg, "MODEL.BACKBONE.NAME", "build_deep_stem_resnet_backbone")
    shapes = {k: tuple(v.shape) for k, v in backbone.state_dict().items() if k.startswith("stem.conv") and v.dim() == 4}
    assert shapes == {
        "stem.conv1.weight": (64, 3, 3, 3),
        "stem.conv2.weight": (64, 64, 3, 3),
        "stem.conv3.weight": (128, 64, 3, 3),
    }
    assert backbone.stem(torch.rand(1, 3, 32, 48)).shape == (1, 128, 8, 12)


def test_grouped_convolutions_are_detectron2s(make_cfg):
    options = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8)
    with torch.device("meta"):
        mine = build(make_cfg, *options)
        reference = build(make_cfg, *options, "MODEL.BACKBONE.NAME", "build_resnet_backbone")
    assert {k: v.shape for k, v in mine.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}


def test_freezing_is_detectron2s(make_cfg):
    backbone = build(make_cfg, "MODEL.BACKBONE.FREEZE_AT", 2)
    assert not any(p.requires_grad for n, p in backbone.named_parameters() if n.startswith(("stem", "res2")))
    assert all(p.requires_grad for n, p in backbone.named_parameters() if n.startswith(("res3", "res4", "res5")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("MODEL.RESNETS.OUTPUT_STRIDE", 4), "OUTPUT_STRIDE is 4"),
        (("MODEL.RESNETS.DEPTH", 20), "DEPTH is 20"),
        (("MODEL.RESNETS.RES5_DILATION", 2), "RES5_DILATION"),
        (("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]), "deformable"),
        (("MODEL.RESNETS.NUM_GROUPS", 32), "grouped"),
    ],
)
def test_keys_without_meaning_are_errors(make_cfg, options, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(make_cfg(*options), ShapeSpec(channels=3))
