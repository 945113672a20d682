"""ResNet-18 to -152 with dilated last stages, from Detectron2's parts and with its state-dict keys."""

from __future__ import annotations

import fvcore.nn.weight_init as weight_init
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ...user_error import ConfigError

__all__ = ["DeepStem", "DilatedBasicBlock", "build_deep_stem_resnet_backbone", "build_dilated_resnet_backbone"]

#: Blocks of res2 to res5.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
#: (stride, dilation) of res2 to res5 by output stride. All blocks of a stage are dilated, as in PSPNet.
STAGES = {
    32: ((1, 1), (2, 1), (2, 1), (2, 1)),
    16: ((1, 1), (2, 1), (2, 1), (1, 2)),
    8: ((1, 1), (2, 1), (1, 2), (1, 4)),
}


class DilatedBasicBlock(CNNBlockBase):
    """The two-convolution block of ResNet-18 and -34 with dilation, which Detectron2's ``BasicBlock`` lacks.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution.
        dilation: of both convolutions.
        norm: name of the norm, see ``detectron2.layers.get_norm``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1, norm: str = "BN"
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, norm, stride=stride)
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride, dilation=dilation)
        self.conv2 = _conv(out_channels, out_channels, 3, norm, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, D, h / stride, w / stride)."""
        out = self.conv2(F.relu_(self.conv1(x)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions and a max-pool; keys ``conv1``, ``conv2``, ``conv3`` as in Detectron2's DeepLab project.

    Args:
        in_channels: channels of the images.
        out_channels: of the last convolution; the first two have half as many.
        norm: name of the norm.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 128, norm: str = "BN") -> None:
        super().__init__(in_channels, out_channels, 4)
        self.in_channels = in_channels
        self.conv1 = _conv(in_channels, out_channels // 2, 3, norm, stride=2)
        self.conv2 = _conv(out_channels // 2, out_channels // 2, 3, norm)
        self.conv3 = _conv(out_channels // 2, out_channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, D, H / 4, W / 4)."""
        x = F.relu_(self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x))))))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


@BACKBONE_REGISTRY.register()
def build_dilated_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """A ResNet whose last stages keep their resolution, from ``MODEL.RESNETS``.

    ``DEPTH`` and ``OUTPUT_STRIDE`` choose the network.
    ``NORM``, ``STRIDE_IN_1X1``, ``NUM_GROUPS``, ``WIDTH_PER_GROUP``, ``RES2_OUT_CHANNELS`` (50 and deeper),
    ``OUT_FEATURES`` and ``MODEL.BACKBONE.FREEZE_AT`` mean what they mean for Detectron2's ``build_resnet_backbone``.

    Raises:
        ValueError: an unknown depth or output stride, or keys that this network has no use for.
    """
    return _resnet(cfg, input_shape, BasicStem, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS)


@BACKBONE_REGISTRY.register()
def build_deep_stem_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """:func:`build_dilated_resnet_backbone` with three 3x3 convolutions in the stem, twice ``STEM_OUT_CHANNELS`` wide.

    Source: Zhao et al., Pyramid Scene Parsing Network (CVPR 2017), released models.
    """
    return _resnet(cfg, input_shape, DeepStem, 2 * cfg.MODEL.RESNETS.STEM_OUT_CHANNELS)


def _resnet(cfg: CfgNode, input_shape: ShapeSpec, stem_class: type[CNNBlockBase], stem_width: int) -> ResNet:
    keys = cfg.MODEL.RESNETS
    _check(keys)
    basic, norm = keys.DEPTH < 50, keys.NORM
    stem = stem_class(in_channels=input_shape.channels, out_channels=stem_width, norm=norm)
    in_channels, out_channels = stem_width, 64 if basic else keys.RES2_OUT_CHANNELS
    stages = []
    for index, (count, (stride, dilation)) in enumerate(zip(BLOCKS[keys.DEPTH], STAGES[keys.OUTPUT_STRIDE])):
        options = {"dilation": dilation, "norm": norm, "stride_per_block": [stride] + [1] * (count - 1)}
        if not basic:
            options["bottleneck_channels"] = keys.NUM_GROUPS * keys.WIDTH_PER_GROUP * 2**index
            options["num_groups"], options["stride_in_1x1"] = keys.NUM_GROUPS, keys.STRIDE_IN_1X1
        block = DilatedBasicBlock if basic else BottleneckBlock
        stages.append(ResNet.make_stage(block, count, in_channels=in_channels, out_channels=out_channels, **options))
        in_channels, out_channels = out_channels, 2 * out_channels
    return ResNet(stem, stages, out_features=keys.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


def _check(keys: CfgNode) -> None:
    if keys.DEPTH not in BLOCKS:
        raise ConfigError(f"MODEL.RESNETS.DEPTH is {keys.DEPTH}, possible are {sorted(BLOCKS)}")
    if keys.OUTPUT_STRIDE not in STAGES:
        raise ConfigError(f"MODEL.RESNETS.OUTPUT_STRIDE is {keys.OUTPUT_STRIDE}, possible are {sorted(STAGES)}")
    if keys.RES5_DILATION != 1:
        raise ConfigError(
            "MODEL.RESNETS.RES5_DILATION belongs to build_resnet_backbone; here OUTPUT_STRIDE says it all"
        )
    if any(keys.DEFORM_ON_PER_STAGE):
        raise ConfigError("the dilated ResNet has no deformable convolutions (MODEL.RESNETS.DEFORM_ON_PER_STAGE)")
    if keys.DEPTH < 50 and keys.NUM_GROUPS != 1:
        raise ConfigError(f"ResNet-{keys.DEPTH} has no grouped convolutions (MODEL.RESNETS.NUM_GROUPS must be 1)")


def _conv(
    in_channels: int, out_channels: int, size: int, norm: str, *, stride: int = 1, dilation: int = 1
) -> nn.Module:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=size,
        stride=stride,
        padding=dilation * (size // 2),
        dilation=dilation,
        bias=False,
        norm=get_norm(norm, out_channels),
    )
    weight_init.c2_msra_fill(conv)
    return conv
