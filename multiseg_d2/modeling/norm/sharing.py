"""What norms per dataset share all the same, said behind the names of the backbone's and the head's norms.

``MODEL.RESNETS.NORM`` and ``MODEL.SEM_SEG_HEAD.NORM`` name the norm of the backbone and of the head. With
``MODEL.DATASET_NORM.ENABLED``

* ``BN`` has statistics, scale and shift per dataset: CDCL's dataset-aware block;
* ``BN/shared_affine`` has statistics per dataset, and one scale and shift;
* ``BN/shared`` is one norm for all datasets.

(Or any other batch norm's name in front.) So ``MODEL.SEM_SEG_HEAD.NORM BN/shared`` gives norms per dataset to the
backbone only.
"""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode

from ...yaml_file import did_you_mean

__all__ = ["SHARING", "is_per_dataset", "shared_by_part", "sharing_problems", "with_plain_norms"]

#: What may stand behind the name of a norm.
SHARING = ("shared_affine", "shared")
_BATCH_NORMS = ("BN", "SyncBN", "nnSyncBN", "naiveSyncBN")
#: Part of the model -> the section of the config that names its norm.
_SECTIONS = {"backbone": "RESNETS", "sem_seg_head": "SEM_SEG_HEAD"}


def shared_by_part(cfg: CfgNode) -> dict[str, str]:
    """Part of the model ("backbone", "sem_seg_head") -> one of :data:`SHARING`, "" where its norms share nothing.

    Raises:
        ValueError: see :func:`sharing_problems`.
    """
    problems = list(sharing_problems(cfg))
    if problems:
        raise ValueError("; ".join(problems))
    return {part: _split(cfg.MODEL[section].NORM)[1] for part, section in _SECTIONS.items()}


def is_per_dataset(cfg: CfgNode, part: str) -> bool:
    """Whether a part of the model ("backbone", "sem_seg_head") has norms with statistics per dataset."""
    return cfg.MODEL.DATASET_NORM.ENABLED and _split(cfg.MODEL[_SECTIONS[part]].NORM)[1] != "shared"


def with_plain_norms(cfg: CfgNode) -> CfgNode:
    """The config as builders of backbones and heads know it: with the names of the norms alone."""
    named = {section: _split(cfg.MODEL[section].NORM) for section in _SECTIONS.values()}
    if not any(shared for _, shared in named.values()):
        return cfg
    plain = cfg.clone()
    plain.defrost()
    for section, (norm, _) in named.items():
        plain.MODEL[section].NORM = norm
    if cfg.is_frozen():
        plain.freeze()
    return plain


def sharing_problems(cfg: CfgNode) -> Iterator[str]:
    """What cannot be meant in the names of the norms, one line each."""
    for section in _SECTIONS.values():
        key, (norm, shared) = f"MODEL.{section}.NORM", _split(cfg.MODEL[section].NORM)
        if not shared:
            continue
        if shared not in SHARING:
            yield f"{key} is {norm}/{shared}: choose of {', '.join(SHARING)}{did_you_mean(shared, SHARING)}"
        elif norm not in _BATCH_NORMS:
            yield f"{key} is {norm}/{shared}, but only batch norms ({', '.join(_BATCH_NORMS)}) can be per dataset"
        elif not cfg.MODEL.DATASET_NORM.ENABLED:
            yield f"{key} is {norm}/{shared}, which means nothing while MODEL.DATASET_NORM.ENABLED is False: say {norm}"


def _split(norm: object) -> tuple[object, str]:
    """Name of a norm and what stands behind it; Detectron2 allows a function in place of a name."""
    if not isinstance(norm, str) or "/" not in norm:
        return norm, ""
    name, shared = norm.split("/", 1)
    return name, shared or "nothing"
