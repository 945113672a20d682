"""Decoders: backbone features -> one feature map that all datasets share. Each is a registered nn.Module."""

from __future__ import annotations

import math
from typing import ClassVar

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ASPP, Conv2d, ShapeSpec, get_norm
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from ..user_error import ConfigError

__all__ = [
    "DECODER_REGISTRY",
    "ConcatDecoder",
    "Decoder",
    "DeepLabV3PlusDecoder",
    "FPNDecoder",
    "PSPDecoder",
    "build_decoder",
    "conv_norm_relu",
]

DECODER_REGISTRY = Registry("DECODER")
DECODER_REGISTRY.__doc__ = """
Decoders by name (``MODEL.SEM_SEG_HEAD.DECODER``), built as ``decoder(cfg, input_shape)``.

A decoder maps the backbone's dict of features to (N, D, h, w), see :class:`Decoder`.
"""


class Decoder(nn.Module):
    """Base of all decoders.

    Attributes:
        in_features: names of the features that it reads.
        out_channels: D.
        pools_globally: whether it averages whole images to one value per channel, which a plain batch norm cannot
            normalise for one image alone (of the class: asked before a model is built).
    """

    in_features: list[str]
    out_channels: int
    pools_globally: ClassVar[bool] = False


def build_decoder(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Builds the decoder of ``MODEL.SEM_SEG_HEAD`` on the features ``IN_FEATURES`` of the backbone.

    Raises:
        ValueError: the backbone does not give one of these features.
    """
    wanted = list(cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES)
    missing = [name for name in wanted if name not in input_shape]
    if missing or not wanted:
        raise ConfigError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {wanted}, but the backbone gives {list(input_shape)} "
            "(MODEL.RESNETS.OUT_FEATURES, p2 to p5 of an FPN backbone, or what MODEL.TIMM.NAME has)"
        )
    decoder = DECODER_REGISTRY.get(cfg.MODEL.SEM_SEG_HEAD.DECODER)
    return decoder(cfg, {name: input_shape[name] for name in wanted})


def conv_norm_relu(in_channels: int, out_channels: int, size: int, norm: str) -> Conv2d:
    """Stride-1 convolution, norm, ReLU; a bias only where there is no norm."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=size,
        padding=size // 2,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        activation=F.relu,
    )
    weight_init.c2_msra_fill(conv)
    return conv


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _by_stride(input_shape: dict[str, ShapeSpec]) -> list[str]:
    return sorted(input_shape, key=lambda name: (input_shape[name].stride, input_shape[name].channels))


def _from_config(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
    keys = cfg.MODEL.SEM_SEG_HEAD
    return {"input_shape": input_shape, "channels": keys.CONVS_DIM, "norm": keys.NORM}


@DECODER_REGISTRY.register()
class PSPDecoder(Decoder):
    """Pyramid pooling on the deepest feature: averages over 1, 2x2, 3x3 and 6x6 cells beside the feature itself.

    Args:
        input_shape: shapes of the features; the one with the largest stride is read.
        channels: width of each pooled branch and of the output.
        norm: name of the norm.
        bins: cells per side.

    Source: PSPNet (CVPR 2017), section 3.2.
    """

    pools_globally = True

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        channels: int,
        norm: str,
        bins: tuple[int, ...] = (1, 2, 3, 6),
    ) -> None:
        super().__init__()
        self.in_features = _by_stride(input_shape)[-1:]
        self.out_channels, self.bins = channels, bins
        in_channels = input_shape[self.in_features[0]].channels
        self.branches = nn.ModuleList(conv_norm_relu(in_channels, channels, 1, norm) for _ in bins)
        self.bottleneck = conv_norm_relu(in_channels + len(bins) * channels, channels, 3, norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments by ``MODEL.SEM_SEG_HEAD``."""
        return _from_config(cfg, input_shape)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(N, D, h, w) at the resolution of the deepest feature."""
        x = features[self.in_features[0]]  # (N, C, h, w)
        pyramid = [x]
        for cells, branch in zip(self.bins, self.branches):
            pooled = self._branch(branch, F.adaptive_avg_pool2d(x, cells))  # (N, D, cells, cells)
            pyramid.append(_resize(pooled, x.shape[-2:]))
        return self.bottleneck(torch.cat(pyramid, dim=1))

    def _branch(self, branch: nn.Module, pooled: Tensor) -> Tensor:
        try:
            return branch(pooled)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                "pyramid pooling averages each image to 1x1, and a norm cannot be trained on one such value per "
                "channel or group: give each process at least two images (SOLVER.IMS_PER_BATCH), or set "
                "MODEL.SEM_SEG_HEAD.NORM to SyncBN (several processes) or GN (CONVS_DIM of 64 and more)"
            ) from error


@DECODER_REGISTRY.register()
class DeepLabV3PlusDecoder(Decoder):
    """Atrous pyramid (Detectron2's ``ASPP``) on the deepest feature, refined with the shallowest one.

    Args:
        input_shape: shapes of at least two features; those with the smallest and the largest stride are read.
        channels: width of the pyramid and of the output.
        norm: name of the norm.
        low_level_channels: width of the shallow feature beside the pyramid.

    Source: DeepLabV3+ (ECCV 2018): dilations 6, 12, 18 at output stride 16, twice as much at 8; 48 low-level channels.
    """

    pools_globally = True

    @configurable
    def __init__(
        self, input_shape: dict[str, ShapeSpec], *, channels: int, norm: str, low_level_channels: int = 48
    ) -> None:
        super().__init__()
        if len(input_shape) < 2:
            raise ConfigError(
                f"DeepLabV3PlusDecoder reads a shallow and a deep feature, not only {list(input_shape)}: set "
                "MODEL.SEM_SEG_HEAD.IN_FEATURES to [res2, res5]"
            )
        names = _by_stride(input_shape)
        self.in_features, self.out_channels = [names[0], names[-1]], channels
        low, deep = (input_shape[name] for name in self.in_features)
        rates = [max(rate * 16 // deep.stride, 1) for rate in (6, 12, 18)]
        self.aspp = ASPP(deep.channels, channels, rates, norm=norm, activation=F.relu)
        self.low_level = conv_norm_relu(low.channels, low_level_channels, 1, norm)
        self.refine = nn.Sequential(
            conv_norm_relu(channels + low_level_channels, channels, 3, norm),
            conv_norm_relu(channels, channels, 3, norm),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments by ``MODEL.SEM_SEG_HEAD``."""
        return _from_config(cfg, input_shape)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(N, D, h, w) at the resolution of the shallow feature."""
        low, deep = (features[name] for name in self.in_features)
        context = _resize(self.aspp(deep), low.shape[-2:])
        return self.refine(torch.cat([context, self.low_level(low)], dim=1))


@DECODER_REGISTRY.register()
class FPNDecoder(Decoder):
    """Semantic FPN: every level brought to the finest resolution by convolutions and doublings, then summed.

    The levels of a pyramid (equally wide, as p2 to p5 of Detectron2's FPN) are used as they are; a plain backbone's get
    lateral convolutions and a top-down path first.

    Args:
        input_shape: shapes of the features.
        channels: width of the levels and of the output.
        norm: name of the norm.

    Source: Panoptic FPN (CVPR 2019), section 3.1; FPN (CVPR 2017).
    """

    @configurable
    def __init__(self, input_shape: dict[str, ShapeSpec], *, channels: int, norm: str) -> None:
        super().__init__()
        self.in_features, self.out_channels = _by_stride(input_shape), channels
        shapes = [input_shape[name] for name in self.in_features]
        self.laterals = self.outputs = None
        widths = [shape.channels for shape in shapes]
        if len(set(widths)) > 1:
            self.laterals = nn.ModuleList(conv_norm_relu(width, channels, 1, norm) for width in widths)
            self.outputs = nn.ModuleList(conv_norm_relu(channels, channels, 3, norm) for _ in widths)
            widths = [channels] * len(shapes)
        self.levels = nn.ModuleList()
        for width, shape in zip(widths, shapes):
            count = max(1, int(math.log2(shape.stride / shapes[0].stride)))
            self.levels.append(
                nn.ModuleList(conv_norm_relu(width if i == 0 else channels, channels, 3, norm) for i in range(count))
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments by ``MODEL.SEM_SEG_HEAD``."""
        return _from_config(cfg, input_shape)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(N, D, h, w) at the resolution of the finest level."""
        pyramid = [features[name] for name in self.in_features]
        if self.laterals is not None:
            pyramid = self._top_down(pyramid)
        size, total = pyramid[0].shape[-2:], None
        for x, convs in zip(pyramid, self.levels):
            for i, conv in enumerate(convs):
                x = conv(x)
                last = i == len(convs) - 1  # the last step lands on the exact size, which need not be a power of two
                target = size if last else (2 * x.shape[-2], 2 * x.shape[-1])
                x = x if tuple(x.shape[-2:]) == tuple(target) else _resize(x, target)
            total = x if total is None else total + x
        return total

    def _top_down(self, features: list[Tensor]) -> list[Tensor]:
        laterals = [conv(x) for conv, x in zip(self.laterals, features)]
        merged = laterals[-1:]
        for lateral in reversed(laterals[:-1]):
            merged.insert(0, lateral + F.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest"))
        return [conv(x) for conv, x in zip(self.outputs, merged)]


@DECODER_REGISTRY.register()
class ConcatDecoder(Decoder):
    """All features side by side at the finest stride, mixed by one 1x1 convolution: HRNetV2's head.

    Args:
        input_shape: shapes of the features.
        channels: width of the output; HRNetV2 keeps the sum of the features' widths (270 for W18, 720 for W48).
        norm: name of the norm.

    Source: HRNetV2 (arXiv 1904.04514), section 3.
    """

    @configurable
    def __init__(self, input_shape: dict[str, ShapeSpec], *, channels: int, norm: str) -> None:
        super().__init__()
        self.in_features, self.out_channels = _by_stride(input_shape), channels
        self.mix = conv_norm_relu(sum(shape.channels for shape in input_shape.values()), channels, 1, norm)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments by ``MODEL.SEM_SEG_HEAD``."""
        return _from_config(cfg, input_shape)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(N, D, h, w) at the resolution of the finest feature."""
        levels = [features[name] for name in self.in_features]
        size = levels[0].shape[-2:]
        return self.mix(torch.cat([levels[0], *(_resize(x, size) for x in levels[1:])], dim=1))
