"""ImageNet weights for a backbone: from Detectron2's ``.pkl`` files, and from torchvision's and similar state dicts.

Files are read by :mod:`.weight_files`, which runs no code from them; :mod:`.weight_names` knows the names in them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .weight_files import UnsafeFileError, read_state
from .weight_names import KEY_FORMATS, KeyFormat, PixelConvention

__all__ = ["LoadReport", "PretrainedWeights", "UnsafeFileError", "load_pretrained", "read_pretrained"]

logger = logging.getLogger(__name__)


@dataclass
class PretrainedWeights:
    """Contents of a file.

    Attributes:
        path: where it was read.
        origin: name of its :class:`KeyFormat`.
        state: tensors by the backbone's own keys (``stem.conv1.weight``, ``res2.0.conv1.norm.bias``, ...).
        unused: keys of the file that are no part of a backbone (ImageNet's classifier).
        pixels: how images have to be presented, if the file's origin says so.
    """

    path: str
    origin: str
    state: dict[str, Tensor]
    unused: list[str]
    pixels: PixelConvention | None


@dataclass
class LoadReport:
    """What came of loading a file into a backbone: its keys that were matched, and those left as they were.

    Attributes:
        source: path and origin of the file.
        matched: the backbone's keys that were loaded.
        missing: the backbone's keys that the file does not have.
        unexpected: the file's keys that the backbone does not have.
        unused: the file's keys that are no part of a backbone.
    """

    source: str
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    unused: list[str]

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.matched)} tensors loaded"]
        for what, keys in (("not in the file", self.missing), ("not in the backbone", self.unexpected)):
            if keys:
                shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
                lines.append(f"{len(keys)} {what}: {shown}")
        return "; ".join(lines)


def read_pretrained(path: str) -> PretrainedWeights:
    """Reads a file of backbone weights and gives its tensors Detectron2's names.

    Args:
        path: local path or anything that Detectron2's PathManager resolves, ending in .pkl, .pth or .pt.

    Raises:
        UnsafeFileError: the file holds something else than tensors and plain containers.
        ValueError: its keys are of no known format, or it is broken.
    """
    state, author = read_state(path)
    for key_format in KEY_FORMATS:
        if key_format.matches(set(state), author):
            return _convert(path, key_format, state)
    raise ValueError(
        f"{path}: the keys are of no known format ({', '.join(f.name for f in KEY_FORMATS)}); the first are "
        f"{sorted(state)[:5]}"
    )


def load_pretrained(
    model: nn.Module,
    path: str,
    *,
    input_format: str | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
) -> LoadReport:
    """Loads ImageNet weights into ``model.backbone`` (or into ``model``, if it has none), logs and returns a report.

    Norms per dataset receive the file's values in every branch.

    Args:
        model: a segmentor or a backbone; a DistributedDataParallel is looked into.
        path: see :func:`read_pretrained`.
        input_format: ``INPUT.FORMAT``; a warning is logged where it, mean or deviation do not fit the file.
        pixel_mean: ``MODEL.PIXEL_MEAN``.
        pixel_std: ``MODEL.PIXEL_STD``.

    Raises:
        ValueError: nothing in the file fits, or tensors have other shapes (it is another network's).
    """
    weights = read_pretrained(path)
    model = getattr(model, "module", model)
    backbone = getattr(model, "backbone", model)
    names = _own_names(backbone.state_dict())
    shapes = {key: tuple(value.shape) for key, value in backbone.state_dict().items()}
    found = {names[key]: value for key, value in weights.state.items() if key in names}
    _check_fit(weights, found, shapes)
    missing = backbone.load_state_dict(found, strict=False).missing_keys
    report = LoadReport(
        source=f"{path} ({weights.origin})",
        matched=sorted(found),
        missing=sorted(k for k in missing if not k.endswith("num_batches_tracked")),
        unexpected=sorted(set(weights.state) - set(names)),
        unused=weights.unused,
    )
    logger.log(logging.WARNING if report.missing or report.unexpected else logging.INFO, "%s", report)
    if weights.pixels and input_format is not None:
        for problem in weights.pixels.problems(input_format, pixel_mean, pixel_std):
            logger.warning("%s was made for %s", path, problem)
    _warn_of_folded_norms(weights, backbone)
    return report


def _own_names(state: Mapping[str, Any]) -> dict[str, str]:
    """Keys without the modules around the network (``bottom_up.`` of an FPN) -> keys of the backbone."""
    names = {}
    for key in state:
        if ".branches." not in key:  # filled from the plain keys when these are loaded
            for prefix in ("bottom_up.", "module."):
                names.setdefault(key.removeprefix(prefix), key)
    return names


def _check_fit(weights: PretrainedWeights, found: dict[str, Tensor], shapes: dict[str, tuple]) -> None:
    if not found:
        raise ValueError(
            f"{weights.path} ({weights.origin}): none of its {len(weights.state)} tensors is in the backbone. The file "
            f"has {sorted(weights.state)[:3]}, the backbone {sorted(shapes)[:3]}"
        )
    other = [f"{k} {tuple(v.shape)} instead of {shapes[k]}" for k, v in found.items() if tuple(v.shape) != shapes[k]]
    if other:
        raise ValueError(
            f"{weights.path} is another network's: {len(other)} of {len(found)} tensors have other shapes, first "
            f"{other[0]}. Compare MODEL.RESNETS.DEPTH, DEEP_STEM and the widths with the file."
        )


def _warn_of_folded_norms(weights: PretrainedWeights, backbone: nn.Module) -> None:
    if any(k.endswith("running_mean") for k in weights.state) or not any("norm." in k for k in weights.state):
        return
    if any(hasattr(m, "running_mean") and hasattr(m, "momentum") for m in backbone.modules()):
        logger.warning(
            "%s has batch norms without statistics (they are folded into weight and bias), which only FrozenBN uses as "
            "they are meant; take a file with statistics, such as torchvision's, to train the norms",
            weights.path,
        )


def _convert(path: str, key_format: KeyFormat, state: Mapping[str, Any]) -> PretrainedWeights:
    converted, unused = {}, []
    for key, value in state.items():
        new = key_format.convert(key)
        if new is None:
            unused.append(key)
        elif new in converted:
            raise ValueError(f"{path}: two tensors become {new!r}, one of them {key!r}")
        else:
            converted[new] = _tensor(path, key, value)
    return PretrainedWeights(path, key_format.name, converted, sorted(unused), key_format.pixels)


def _tensor(path: str, key: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(np.array(value))  # a copy that is writable
    if isinstance(value, Tensor):
        return value.detach()
    raise ValueError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
