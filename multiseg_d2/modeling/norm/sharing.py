"""What is said behind the names of the backbone's and the head's norms: what datasets share, and the momentum.

``MODEL.RESNETS.NORM`` and ``MODEL.SEM_SEG_HEAD.NORM`` name the norm of the backbone and of the head. With
``MODEL.DATASET_NORM.ENABLED``

* ``BN`` has statistics, scale and shift per dataset: CDCL's dataset-aware block;
* ``BN/shared_affine`` has statistics per dataset, and one scale and shift;
* ``BN/shared`` is one norm for all datasets.

(Or any other batch norm's name in front.) So ``MODEL.SEM_SEG_HEAD.NORM BN/shared`` gives norms per dataset to the
backbone only. ``BN/momentum=0.01`` says what share a batch has in the running statistics (0.1 where nothing is said).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from detectron2.config import CfgNode
from torch import nn

from ...yaml_file import did_you_mean

__all__ = [
    "SHARING",
    "is_per_dataset",
    "set_momentum",
    "shared_by_part",
    "sharing_problems",
    "with_plain_norms",
]

#: What datasets can share.
SHARING = ("shared_affine", "shared")
_BATCH_NORMS = ("BN", "SyncBN", "nnSyncBN", "naiveSyncBN")
#: Part of the model -> the section of the config that names its norm.
_SECTIONS = {"backbone": "RESNETS", "sem_seg_head": "SEM_SEG_HEAD"}
_MOMENTUM = "momentum="


class _NormName(NamedTuple):
    """``norm`` is what Detectron2 knows; it allows a function in place of a name."""

    norm: object
    sharing: str = ""
    momentum: float | None = None
    unknown: tuple[str, ...] = ()


def shared_by_part(cfg: CfgNode) -> dict[str, str]:
    """Part of the model ("backbone", "sem_seg_head") -> one of :data:`SHARING`, "" where its norms share nothing."""
    return {part: name.sharing for part, _, name in _names(cfg)}


def is_per_dataset(cfg: CfgNode, part: str) -> bool:
    """Whether a part of the model ("backbone", "sem_seg_head") has norms with statistics per dataset."""
    return cfg.MODEL.DATASET_NORM.ENABLED and shared_by_part(cfg)[part] != "shared"


def with_plain_norms(cfg: CfgNode) -> CfgNode:
    """The config as builders of backbones and heads know it: with the names of the norms alone.

    Raises:
        ValueError: see :func:`sharing_problems`.
    """
    problems = list(sharing_problems(cfg))
    if problems:
        raise ValueError("; ".join(problems))
    if all(name == _NormName(name.norm) for _, _, name in _names(cfg)):
        return cfg
    plain = cfg.clone()
    plain.defrost()
    for part, _, name in _names(cfg):
        plain.MODEL[_SECTIONS[part]].NORM = name.norm
    if cfg.is_frozen():
        plain.freeze()
    return plain


def set_momentum(cfg: CfgNode, model: nn.Module) -> None:
    """Gives the batch norms of a model's parts the momentum that is said behind their name."""
    for part, _, name in _names(cfg):
        for module in getattr(model, part).modules() if name.momentum is not None else ():
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                module.momentum = name.momentum


def sharing_problems(cfg: CfgNode) -> Iterator[str]:
    """What cannot be meant in the names of the norms, one line each."""
    for _, key, (norm, sharing, momentum, unknown) in _names(cfg):
        for text in unknown:
            choices = (*SHARING, f"{_MOMENTUM}0.1")
            hint = did_you_mean(text, choices)
            yield f"{key}: {text!r} behind {norm}/ says nothing: choose of {', '.join(choices)}{hint}"
        if (sharing or momentum is not None) and norm not in _BATCH_NORMS:
            yield f"{key} says more than {norm}, but only batch norms ({', '.join(_BATCH_NORMS)}) can have that"
        if sharing and not cfg.MODEL.DATASET_NORM.ENABLED:
            yield f"{key}: /{sharing} means nothing while MODEL.DATASET_NORM.ENABLED is False, leave it out"
        if momentum is not None and not 0 < momentum <= 1:
            yield f"{key}: momentum {momentum} is not a share of the batch, in (0, 1]"


def _names(cfg: CfgNode) -> Iterator[tuple[str, str, _NormName]]:
    """(part of the model, key of the config, what its value says)."""
    for part, section in _SECTIONS.items():
        yield part, f"MODEL.{section}.NORM", _parsed(cfg.MODEL[section].NORM)


def _parsed(value: object) -> _NormName:
    if not isinstance(value, str) or "/" not in value:
        return _NormName(value)
    norm, *rest = value.split("/")
    sharing, momentum, unknown = "", None, []
    for text in rest:
        number = text.removeprefix(_MOMENTUM)
        if text in SHARING and not sharing:
            sharing = text
        elif number != text and momentum is None and _is_number(number):
            momentum = float(number)
        else:
            unknown.append(text)
    return _NormName(norm, sharing, momentum, tuple(unknown))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
