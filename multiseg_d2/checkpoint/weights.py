"""The weights that a run or an evaluation starts from: ImageNet's for the backbone, or a whole model's.

:mod:`.file` reads files, :mod:`.names` knows what other programs call the tensors in them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..modeling.norm.conversion import dataset_norms
from .file import CheckpointError, read_state
from .names import KEY_FORMATS, KeyFormat, PixelConvention
from .published import pixels_of

__all__ = [
    "LoadReport",
    "PretrainedWeights",
    "borrowed_weights",
    "class_names",
    "load_pretrained",
    "load_weights",
    "read_pretrained",
]

logger = logging.getLogger(__name__)

_SHOWN = 10


def load_weights(model: nn.Module, path: str, *, complete: bool = False, cfg: CfgNode | None = None) -> None:
    """Loads ``path`` into a model, in place. No code from the file is run.

    A file with tensors of this model's backbone under their own names (``backbone.*``) is matched by name; what the
    file lacks (the classifier of a new dataset, say) is listed and stays as it was initialised. Any other file is taken
    for the weights of a backbone, out of whatever model of another program. A file of which nothing fits is an error.

    Args:
        model: a segmentor.
        path: local path, or anything that Detectron2's PathManager resolves; "" leaves the model as it is.
        complete: every tensor of the model must be in the file: for evaluation.
        cfg: for a warning where ``INPUT.FORMAT`` and the pixel mean are not those of an ImageNet file.

    Raises:
        CheckpointError: the file is broken or unsafe, or its classes, norms or shapes are not the model's.
    """
    model = _unwrapped(model)
    if not path:
        if complete:
            raise CheckpointError("MODEL.WEIGHTS is empty: there is no trained model to evaluate")
        logger.info("MODEL.WEIGHTS is empty: the model starts from its random initialisation")
        return
    state, _, run = read_state(path)
    own = model.state_dict()
    found = {key.split(".", 1)[0] for key in state if key in own}
    if complete and found == {"backbone"}:
        raise CheckpointError(f"{path} holds a backbone only: name a trained model in MODEL.WEIGHTS to evaluate it")
    if "backbone" in found:
        _load_model(model, path, state, run, complete)
    elif complete:
        raise CheckpointError(f"{path} is no model that could be evaluated here. {_no_match(state, own)}")
    else:
        load_pretrained(model, path, **({} if cfg is None else _pixel_settings(cfg)))


@contextmanager
def borrowed_weights(model: nn.Module, path: str) -> Iterator[None]:
    """Context in which a model has the weights of a file; its own ones are back afterwards. "" changes nothing.

    Args:
        model: a segmentor.
        path: as of :func:`load_weights`; a whole model, which may lack what the head does not measure with.

    Raises:
        CheckpointError: as :func:`load_weights`, and where the file lacks tensors that the head measures with.
    """
    if not path:
        yield
        return
    _check_measurable(model, path)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load_weights(model, path)
        yield
    finally:
        model.load_state_dict(own)


def _check_measurable(model: nn.Module, path: str) -> None:
    """Refuses a file with which backbone, decoder and what else the head measures with would stay at random."""
    parts = ("backbone", *(f"sem_seg_head.{part}" for part in getattr(model.sem_seg_head, "measures_with", ("trunk",))))
    state = read_state(path)[0]
    missing = [
        key
        for key in model.state_dict()
        if key not in state
        and key.startswith(tuple(f"{part}." for part in parts))
        and not key.startswith("sem_seg_head.trunk.auxiliary")
        and not key.endswith("num_batches_tracked")
    ]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} tensors that the classes would be measured with: {_shortened(missing)}. Name "
            "a checkpoint of a model with these parts in MODEL.SEM_SEG_HEAD.CLASS_STATISTICS"
        )


def class_names(model: nn.Module) -> dict[str, list[str]]:
    """Class names of each label space that a model knows, {} where it does not say."""
    model = _unwrapped(model)
    return model.class_names() if hasattr(model, "class_names") else {}


def _no_match(state: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """That not one tensor of a file is the model's, with examples."""
    kept = sorted(key for key in own if not key.endswith("num_batches_tracked"))
    return (
        f"None of its {len(state)} tensors is one of the {len(kept)} of the model's: the file has "
        f"{sorted(state)[:3]}, the model {kept[:3]}"
    )


def _pixel_settings(cfg: CfgNode) -> dict[str, Any]:
    return {
        "input_format": cfg.INPUT.FORMAT,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


def _load_model(
    model: nn.Module, path: str, state: Mapping[str, Tensor], run: Mapping[str, Any], complete: bool
) -> None:
    own, state = model.state_dict(), {key: _tensor(path, key, value) for key, value in state.items()}
    problems = [
        *_class_problems(run.get("classes", {}), class_names(model)),
        *_norm_problems(state, own),
        *_shape_problems(state, own),
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit the model:\n" + "\n".join(f"  - {p}" for p in problems))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing and complete:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of the model: {_shortened(missing)}")
    if missing:
        logger.warning("%s lacks %d tensors, which stay as initialised: %s", path, len(missing), _shortened(missing))
    if unexpected:
        logger.warning("%s has %d tensors that the model has not: %s", path, len(unexpected), _shortened(unexpected))
    logger.info("loaded %d of the %d tensors in %s", len(state) - len(unexpected), len(state), path)


def _class_problems(trained: Mapping[str, list[str]], own: Mapping[str, list[str]]) -> list[str]:
    return [
        f"dataset {name!r} has other classes:\n    in the file:  {trained[name]}\n    in the model: {own[name]}"
        for name in own
        if name in trained and list(trained[name]) != list(own[name])
    ]


def _norm_problems(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Norms per dataset read into plain ones: their plain keys hold what training began with, not what it learned."""
    datasets = _norm_datasets(state)
    if not datasets or _norm_datasets(own):
        return []
    return [
        f"it has norms per dataset ({', '.join(datasets)}), the model has plain ones: set MODEL.DATASET_NORM.ENABLED, "
        "or make a model of one dataset first (modeling.norm.conversion.single_dataset_model)"
    ]


def _norm_datasets(state: Mapping[str, Tensor]) -> list[str]:
    """Datasets that have a branch in the norms: their keys beside the plain ones of the same norm."""
    found = set()
    for key in state:
        norm, branches, rest = key.rpartition(".branches.")
        dataset, _, entry = rest.partition(".")
        if branches and f"{norm}.{entry}" in state:
            found.add(dataset)
    return sorted(found)


def _shape_problems(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and tuple(state[key].shape) != tuple(own[key].shape)
    ]


def _shortened(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f", ... ({len(keys) - _SHOWN} more)" if len(keys) > _SHOWN else "")


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


@dataclass
class PretrainedWeights:
    """Contents of a file.

    Attributes:
        path: where it was read.
        origin: name of its :class:`KeyFormat`.
        state: tensors by the backbone's own keys (``stem.conv1.weight``, ``res2.0.conv1.norm.bias``, ...).
        unused: keys of the file that are no part of a backbone (ImageNet's classifier).
        pixels: how images have to be presented, if the file's origin says so.
        networks: see :class:`KeyFormat`.
    """

    path: str
    origin: str
    state: dict[str, Tensor]
    unused: list[str]
    pixels: PixelConvention | None
    networks: tuple[str, ...] = ()


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


def read_pretrained(path: str, published: Collection[str] = ()) -> PretrainedWeights:
    """Reads a file of backbone weights and gives its tensors the names of a backbone.

    Args:
        path: local path or anything that Detectron2's PathManager resolves (``package://`` and ``timm://`` too, see
            :mod:`.published`): a .pkl, a .safetensors, or a file of torch.
        published: the backbone's own names, where they are those of its library's files; else Detectron2's ResNet's.

    Raises:
        CheckpointError: it holds more than tensors, is broken, or its keys are of no known format.
    """
    state, author, _ = read_state(path)
    if len(set(state) & set(published)) > len(state) // 2:
        return _convert(path, _as_is(path, published), state)
    for key_format in KEY_FORMATS:
        if key_format.matches(set(state), author):
            return _convert(path, key_format, state)
    known = ", ".join(key_format.name for key_format in KEY_FORMATS)
    raise CheckpointError(
        f"{path}: none of its {len(state)} tensors fits; the names are of no known format ({known}), the first are "
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
        CheckpointError: nothing in the file fits, or tensors have other shapes (it is another network's).
    """
    model = _unwrapped(model)
    backbone = getattr(model, "backbone", model)
    published = _published_names(backbone)
    weights = read_pretrained(path, published)
    _check_network(weights, backbone)
    names = published or _own_names(backbone)
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


def _published_names(backbone: nn.Module) -> dict[str, str]:
    """Names in the files of the network's library -> keys of the backbone; {} for Detectron2's own networks."""
    for path, module in backbone.named_modules():
        if hasattr(module, "published_names"):
            prefix, inside = f"{path}." if path else "", _branches(backbone)
            keys = {name: prefix + key for name, key in module.published_names().items()}
            return {name: key for name, key in keys.items() if not key.startswith(inside)}
    return {}


def _own_names(backbone: nn.Module) -> dict[str, str]:
    """Keys without the modules around the network (``bottom_up.`` of an FPN) -> keys of the backbone."""
    names: dict[str, str] = {}
    inside = _branches(backbone)
    for key in backbone.state_dict():
        if not key.startswith(inside):
            for prefix in ("bottom_up.", "module."):
                names.setdefault(key.removeprefix(prefix), key)
    return names


def _branches(backbone: nn.Module) -> tuple[str, ...]:
    """Prefixes of the tensors of norms per dataset; these are filled when the plain keys of the norm are loaded."""
    return tuple(f"{path}.branches." if path else "branches." for path, _ in dataset_norms(backbone))


def _check_network(weights: PretrainedWeights, backbone: nn.Module) -> None:
    """Refuses the variants of a network that a file fits in names and shapes, but not in what they compute."""
    found = [m.timm_name for m in backbone.modules() if hasattr(m, "timm_name")]
    if weights.networks and found and found[0] not in weights.networks:
        raise CheckpointError(
            f"{weights.path} ({weights.origin}) holds weights of {' or '.join(weights.networks)}; in {found[0]} they "
            f"would compute something else. Set MODEL.TIMM.NAME to {weights.networks[0]}"
        )


def _as_is(path: str, published: Collection[str]) -> KeyFormat:
    """The format of a file in the network's own names; what the backbone lacks is ImageNet's head."""
    return KeyFormat("timm", lambda keys, author: True, lambda key: key if key in published else None, pixels_of(path))


def _check_fit(weights: PretrainedWeights, found: dict[str, Tensor], shapes: dict[str, tuple]) -> None:
    if not found:
        raise CheckpointError(f"{weights.path} ({weights.origin}). {_no_match(weights.state, shapes)}")
    other = [f"{k} {tuple(v.shape)} instead of {shapes[k]}" for k, v in found.items() if tuple(v.shape) != shapes[k]]
    if other:
        raise CheckpointError(
            f"{weights.path} is another network's: {len(other)} of {len(found)} tensors have other shapes, first "
            f"{other[0]}. Compare MODEL.RESNETS.DEPTH, the stem (MODEL.BACKBONE.NAME) and the widths with the file."
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
            raise CheckpointError(f"{path}: two tensors become {new!r}, one of them {key!r}")
        else:
            converted[new] = _tensor(path, key, value)
    return PretrainedWeights(path, key_format.name, converted, sorted(unused), key_format.pixels, key_format.networks)


def _tensor(path: str, key: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        return torch.from_numpy(np.array(value))  # a copy that is writable
    if isinstance(value, Tensor):
        return value.detach()
    raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
