"""Any network of the timm library that gives features, by its name there, with Detectron2's backbone interface."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ...compat import MissingDependencyError
from ...user_error import ConfigError
from ...yaml_file import did_you_mean

__all__ = ["NormAct", "TimmBackbone", "build_timm_backbone"]

#: Strides at which timm's networks end unless they are asked to keep more resolution.
FULL_STRIDE = 32
#: Arguments that let networks of one fixed input size (transformers) take others; a network knows one of them or none.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False})


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The network ``MODEL.TIMM.NAME``, its last stages at ``MODEL.TIMM.OUTPUT_STRIDE``.

    ``MODEL.RESNETS.NORM`` says what becomes of its batch norms (BN, SyncBN, FrozenBN), and
    ``MODEL.BACKBONE.FREEZE_AT`` whether it is trained (0) or frozen as a whole (5, the last stage).

    Raises:
        ValueError: a network, stride, norm or freezing that there is not.
    """
    network = TimmBackbone(
        cfg.MODEL.TIMM.NAME, output_stride=cfg.MODEL.TIMM.OUTPUT_STRIDE, in_channels=input_shape.channels
    )
    frozen = {0: False, 5: True}.get(cfg.MODEL.BACKBONE.FREEZE_AT)
    if frozen is None:
        raise ConfigError(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}: a timm backbone is trained (0) or frozen as "
            "a whole (5)"
        )
    if frozen:
        for parameter in network.parameters():
            parameter.requires_grad = False
    return _with_norm(network, "FrozenBN" if frozen else cfg.MODEL.RESNETS.NORM)


class TimmBackbone(Backbone):
    """A ``features_only`` network of timm, its features named ``res1`` to ``res5`` by their strides 2 to 32.

    A stage that keeps its resolution for the sake of the output stride keeps its name, and the features of a plain
    transformer, all at one stride, are the last ones (``res3`` to ``res5``). HRNets give the four branches of their
    last stage as they are (``res2`` to ``res5``, for ``ConcatDecoder``). A layer that is batch norm and activation in
    one becomes a plain batch norm and an activation, so that it can be given a branch per dataset.

    Args:
        name: of the network in timm, ``timm.list_models()``; weights come by ``MODEL.WEIGHTS``, not from here.
        output_stride: of the deepest feature, where timm offers it.
        in_channels: channels of the images.

    Raises:
        ValueError: timm has no such network, or the network cannot give features or not at this stride.
        MissingDependencyError: timm is not installed.
    """

    def __init__(self, name: str, *, output_stride: int = FULL_STRIDE, in_channels: int = 3) -> None:
        super().__init__()
        self.timm_name = name
        self.network = _separate_norms(_create(name, output_stride, in_channels))
        strides, channels = self.network.feature_info.reduction(), self.network.feature_info.channels()
        if output_stride != FULL_STRIDE and max(strides) != output_stride:
            raise ConfigError(
                f"MODEL.TIMM.OUTPUT_STRIDE is {output_stride}, but {name} gives its features at strides {strides} only"
            )
        names = _names(strides)
        # The three attributes from which Detectron2's Backbone makes output_shape().
        self._out_features = names
        self._out_feature_strides = dict(zip(names, strides))
        self._out_feature_channels = dict(zip(names, channels))
        self._channels_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")

    @property
    def size_divisibility(self) -> int:
        """Images are padded to a multiple of this: "same" padding of an odd size would shift the features."""
        deepest = max(self._out_feature_strides.values())
        return FULL_STRIDE if FULL_STRIDE % deepest == 0 else deepest

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> features by name, each (N, C, H / stride, W / stride)."""
        features = self.network(x)
        if self._channels_last:
            features = [f.permute(0, 3, 1, 2).contiguous() for f in features]
        return dict(zip(self._out_features, features))

    def published_names(self) -> dict[str, str]:
        """What each tensor is called in timm's own files -> its key in this module's state dict."""
        timm = _import_timm()
        with torch.device("meta"):
            known = set(timm.create_model(self.timm_name, pretrained=False).state_dict())
        inside = [f"{path}.norm." for path, module in self.named_modules() if isinstance(module, NormAct)]
        names = {}
        for key in self.state_dict():
            published = key
            for norm in inside:
                if key.startswith(norm):
                    published = norm.removesuffix("norm.") + key.removeprefix(norm)
            published = published.removeprefix("network.")
            names[next((n for n in _unwrapped_names(published) if n in known), published)] = key
        return names


class NormAct(nn.Sequential):
    """timm's fused norm and activation as two layers: ``norm`` (a plain ``nn.BatchNorm2d``), then ``act``."""

    def __init__(self, fused: nn.BatchNorm2d) -> None:
        norm = nn.BatchNorm2d(
            fused.num_features, fused.eps, fused.momentum, fused.affine, fused.track_running_stats, device="meta"
        )
        norm._parameters, norm._buffers = fused._parameters, fused._buffers
        norm.train(fused.training)
        layers = [("norm", norm), ("drop", fused.drop), ("act", fused.act)]
        super().__init__(OrderedDict((name, m) for name, m in layers if not isinstance(m, nn.Identity)))


def _create(name: str, output_stride: int, in_channels: int) -> nn.Module:
    timm = _import_timm()
    if not timm.is_model(name):
        raise ConfigError(
            f"MODEL.TIMM.NAME: timm {timm.__version__} has no {name!r}{did_you_mean(name, timm.list_models())}"
        )
    options: dict[str, Any] = {"in_chans": in_channels}
    if output_stride != FULL_STRIDE:
        options["output_stride"] = output_stride
    if name.startswith("hrnet"):
        options["feature_location"] = ""  # the branches, not the widened maps of the classification head
    fixed_size = timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
    problem: Exception | None = None
    for further in _ANY_SIZE if fixed_size else ({},):
        try:
            return timm.create_model(name, pretrained=False, features_only=True, **options, **further)
        except (TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
            problem = error
    raise ConfigError(
        f"MODEL.TIMM: timm cannot build {name} as a backbone at output stride {output_stride}: {problem}"
    ) from problem


def _import_timm() -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"MODEL.BACKBONE.NAME build_timm_backbone needs the library timm ({error}). Install the extra, "
            "`pip install multiseg-d2[timm]`, or, where that would exchange your torch or torchvision, "
            "`pip install --no-deps timm` and `pip install safetensors huggingface_hub`."
        ) from error
    return timm


def _names(strides: list[int]) -> list[str]:
    """``res1`` to ``res5`` for the strides 2 to 32; a repeated stride counts on."""
    if len(set(strides)) == 1:  # a plain transformer
        return [f"res{6 - len(strides) + i}" for i in range(len(strides))]
    levels: list[int] = []
    for stride in strides:
        levels.append(max(stride.bit_length() - 1, levels[-1] + 1 if levels else 0))
    return [f"res{level}" for level in levels]


def _unwrapped_names(key: str) -> list[str]:
    """Names that a tensor may have had before timm made an extractor of the network, which joins levels by ``_``."""
    key = key.removeprefix("model.")
    first, dot, rest = key.partition(".")
    joints = [i for i, letter in enumerate(first) if letter == "_"]
    return [key, *(first[:i] + "." + first[i + 1 :] + dot + rest for i in joints)]


def _separate_norms(network: nn.Module) -> nn.Module:
    """Replaces fused batch norms, in place. One that is used in several places stays one."""
    from timm.layers import BatchNormAct2d

    done: dict[int, NormAct] = {}
    for module in list(network.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is BatchNormAct2d:
                module._modules[name] = done.setdefault(id(child), NormAct(child))
    return network


def _with_norm(backbone: TimmBackbone, norm: str) -> TimmBackbone:
    if norm == "SyncBN":
        return nn.SyncBatchNorm.convert_sync_batchnorm(backbone)
    if norm == "FrozenBN":
        return FrozenBatchNorm2d.convert_frozen_batchnorm(backbone)
    if norm != "BN":
        raise ConfigError(
            f"MODEL.RESNETS.NORM is {norm!r}: the batch norms of a timm backbone can be BN, SyncBN, FrozenBN"
        )
    return backbone
