"""Turns the batch norms of a built model into batch norms per dataset, and back into plain ones for one dataset."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn

from ...user_error import ConfigError
from ..catalog import training_datasets
from .dataset_norm import DatasetBatchNorm2d, DatasetBranchError
from .sharing import set_momentum, shared_by_part

__all__ = [
    "add_dataset_branch",
    "apply_dataset_norm",
    "convert_dataset_norm",
    "dataset_norms",
    "norm_report",
    "single_dataset_model",
]

logger = logging.getLogger(__name__)
_SYNCHRONISED = (nn.SyncBatchNorm, NaiveSyncBatchNorm)
#: Norms without statistics of the data: nothing in them belongs to a dataset's domain that CDCL would separate.
_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def convert_dataset_norm(
    model: nn.Module,
    datasets: Sequence[str],
    sync: bool | None = None,
    *,
    init_from: str = "",
    sharing: Mapping[str, str] | None = None,
) -> nn.Module:
    """Replaces every batch norm by a :class:`DatasetBatchNorm2d` whose branches start as that batch norm.

    Works on any model after it is built: ``nn.BatchNorm2d``, ``nn.SyncBatchNorm`` and Detectron2's own, wherever they
    are. ``FrozenBatchNorm2d`` and norms without batch statistics (group, layer) stay, and the log says so. Layers that
    are converted already stay as well.

    Args:
        model: changed in place, unless it is itself a batch norm.
        datasets: names of the branches.
        sync: whether statistics run over all processes; None = where the layer was a synchronised one.
        init_from: dataset whose branch fills in for those that a loaded checkpoint lacks; "" = that is an error.
        sharing: child of the model ("backbone") -> one of :data:`~.sharing.SHARING`, what its norms share all the same;
            nothing where a child is not named.

    Returns:
        The model.

    Raises:
        ValueError: there is no batch norm to convert, or ``init_from`` cannot be a donor.
        TypeError: a batch norm with a forward pass of its own, which would be lost.
        DatasetBranchError: a layer is converted already, for other datasets.
    """
    done: dict[int, nn.Module] = {}  # a layer that is used in two places stays one layer

    def shared(path: str) -> str:
        return (sharing or {}).get(path.split(".", 1)[0], "")

    def convert(norm: nn.Module, path: str) -> nn.Module:
        if id(norm) not in done:
            done[id(norm)] = DatasetBatchNorm2d.from_norm(
                norm,
                datasets,
                sync=isinstance(norm, _SYNCHRONISED) if sync is None else sync,
                init_from=init_from,
                shared_affine=shared(path) == "shared_affine",
                path=path,
            )
        return done[id(norm)]

    for path, layer in dataset_norms(model):
        if set(layer.datasets) != set(datasets):
            raise DatasetBranchError(f"{path} is converted already, for {layer.datasets} instead of {tuple(datasets)}")
    model = _replace(model, lambda m, path: _is_batch_norm(m, path) and shared(path) != "shared", convert)
    report = norm_report(model)
    if not report["per dataset"]:
        raise ConfigError(
            "the model has no batch norm to convert, only "
            f"{ {kind: len(names) for kind, names in report.items() if names} }. Set MODEL.RESNETS.NORM and "
            "MODEL.SEM_SEG_HEAD.NORM to BN or SyncBN (and MODEL.BACKBONE.FREEZE_AT to 0), or switch "
            "MODEL.DATASET_NORM.ENABLED off."
        )
    _log(report, datasets)
    return model


def apply_dataset_norm(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Converts a model as ``cfg.MODEL.DATASET_NORM`` says; one branch per dataset of ``cfg.DATASETS.TRAIN``.

    Catalog entries of one dataset (its fine and coarse splits, say) share a branch.

    Args:
        cfg: the names of its norms may say what is shared all the same, and the momentum, see :mod:`.sharing`.
        model: with parts ``backbone`` and ``sem_seg_head``; changed in place.
    """
    set_momentum(cfg, model)
    if not cfg.MODEL.DATASET_NORM.ENABLED:
        return model
    datasets = tuple(dict.fromkeys(training_datasets(cfg)))
    return convert_dataset_norm(
        model, datasets, init_from=cfg.MODEL.DATASET_NORM.INIT_FROM, sharing=shared_by_part(cfg)
    )


def dataset_norms(model: nn.Module) -> Iterator[tuple[str, DatasetBatchNorm2d]]:
    """(path, layer) of every dataset norm in a model."""
    for path, module in model.named_modules():
        if isinstance(module, DatasetBatchNorm2d):
            yield path, module


def norm_report(model: nn.Module) -> dict[str, list[str]]:
    """Paths of a model's norm layers: "per dataset", "frozen", "plain" (shared batch norm), "other" (group, layer)."""
    report: dict[str, list[str]] = {"per dataset": [], "frozen": [], "plain": [], "other": []}
    inside: list[str] = []
    for path, module in model.named_modules():
        if inside and path.startswith(inside[-1]):
            continue  # the branches of a dataset norm
        if isinstance(module, DatasetBatchNorm2d):
            report["per dataset"].append(path)
            inside.append(path + "." if path else "")
        elif isinstance(module, FrozenBatchNorm2d):
            report["frozen"].append(path)
        elif isinstance(module, nn.modules.batchnorm._NormBase):  # 1d and 3d too, and instance norm
            report["plain"].append(path)
        elif isinstance(module, _OTHER_NORMS):
            report["other"].append(path)
    return report


def add_dataset_branch(model: nn.Module, new: str, init_from: str) -> list[nn.Parameter]:
    """Adds a dataset to a converted model; its branches start as those of a named other dataset.

    Args:
        model: with at least one :class:`DatasetBatchNorm2d`; changed in place.
        new: name of the dataset.
        init_from: dataset to copy from.

    Returns:
        The new parameters, for an optimizer that exists already.

    Raises:
        DatasetBranchError: no dataset norm, ``new`` exists, or ``init_from`` does not. The model is then unchanged.
    """
    layers = [layer for _, layer in dataset_norms(model)]
    if not layers:
        raise DatasetBranchError(f"the model has no dataset norms to add {new!r} to: convert it first")
    for layer in layers:
        if new in layer.branches or init_from not in layer.branches:
            layer.add_branch(new, init_from)  # raises, before anything is changed
    return [p for layer in layers for p in layer.add_branch(new, init_from).parameters()]


def single_dataset_model(model: nn.Module, dataset: str) -> nn.Module:
    """A copy of a converted model with plain batch norms: one dataset's, for deployment. Keys are the plain ones.

    Raises:
        DatasetBranchError: a layer has no such branch.
    """
    return _replace(
        copy.deepcopy(model),
        lambda module, _: isinstance(module, DatasetBatchNorm2d),
        lambda layer, _: layer.plain(dataset),
    )


def _is_batch_norm(module: nn.Module, path: str) -> bool:
    if not isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return False
    if isinstance(module, nn.SyncBatchNorm) and module.process_group is not None:
        raise TypeError(f"{path}: SyncBatchNorm over a part of the processes is not supported, only over all of them")
    if isinstance(module, _SYNCHRONISED) or type(module).forward is nn.BatchNorm2d.forward:
        return True
    raise TypeError(f"{path}: {type(module).__name__} has a forward pass of its own, which a conversion would lose")


def _replace(
    module: nn.Module,
    wanted: Callable[[nn.Module, str], bool],
    make: Callable[[nn.Module, str], nn.Module],
    path: str = "",
) -> nn.Module:
    if wanted(module, path):
        return make(module, path)
    if isinstance(module, DatasetBatchNorm2d):
        return module
    for name, child in list(module._modules.items()):  # named_children() shows a child with two names only once
        if child is not None:
            module.add_module(name, _replace(child, wanted, make, f"{path}.{name}" if path else name))
    return module


def _log(report: dict[str, list[str]], datasets: Sequence[str]) -> None:
    logger.info("%d batch norms converted, one branch each for %s", len(report["per dataset"]), tuple(datasets))
    for kind, why in (("frozen", "frozen batch norms"), ("plain", "norms with shared statistics")):
        if report[kind]:
            shown = ", ".join(report[kind][:5]) + (", ..." if len(report[kind]) > 5 else "")
            logger.warning("%d %s stay as they are, shared by all datasets: %s", len(report[kind]), why, shown)
    if report["other"]:
        logger.info("%d group or layer norms stay as they are", len(report["other"]))
