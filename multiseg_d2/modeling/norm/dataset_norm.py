"""Batch norm with one set of affine parameters and running statistics per dataset (CDCL's dataset-aware block)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ...user_error import ConfigError, UserError
from ..active import current_groups, is_recomputing, stand_in_branch
from .synchronised import Run, synchronised_batch_norm, synchronised_statistics

__all__ = ["DatasetBatchNorm2d", "DatasetBranchError"]

logger = logging.getLogger(__name__)

_AFFINE, _STATISTICS = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")
_ENTRIES = (*_AFFINE, *_STATISTICS)


_Affine = tuple[Tensor | None, Tensor | None]  # weight and bias


class DatasetBranchError(UserError, RuntimeError):
    """The datasets of a model's norm branches are not those of a checkpoint or of the batch."""


class DatasetBatchNorm2d(nn.Module):
    """Batch norm that treats each dataset's images by themselves; the convolutions around it stay shared.

    State: ``branches.<dataset>.*`` hold the values that are trained and used. The plain keys (``weight``, ``bias``,
    ``running_mean``, ``running_var``, ``num_batches_tracked``) are buffers: the template that a checkpoint without
    branches is read into, and that is then copied to every branch. Without them Detectron2's loader, which matches keys
    by suffix, would drop ImageNet's statistics.

    With ``shared_affine`` only the statistics are per dataset: ``weight`` and ``bias`` are parameters under their plain
    keys, and branches have none.

    Args:
        num_features: C.
        datasets: names of the branches.
        eps: added to the variance.
        momentum: share of a batch in the running statistics; None = cumulative average.
        affine: whether branches have a weight and a bias.
        track_running_stats: whether branches have running statistics.
        sync: compute statistics over all processes, per dataset.
        init_from: branch that fills in for datasets that a loaded checkpoint lacks; "" = that is an error.
        shared_affine: one weight and bias for all datasets (a variant of our own).
        path: name in the model, for messages.

    Source: CDCL (arXiv 2103.11351), dataset-aware block; DSBN (CVPR 2019).
    """

    _version = 2  # as nn.BatchNorm2d: checkpoints since version 2 know num_batches_tracked

    def __init__(
        self,
        num_features: int,
        datasets: Sequence[str],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        sync: bool = False,
        init_from: str = "",
        shared_affine: bool = False,
        path: str = "",
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.affine, self.track_running_stats = affine, track_running_stats
        self.sync, self.init_from, self.shared_affine, self.path = sync, init_from, shared_affine, path
        self._told_of_single = False
        plain = nn.BatchNorm2d(num_features, eps, momentum, affine, track_running_stats)
        for entry in _ENTRIES:
            value = getattr(plain, entry)
            if shared_affine and entry in _AFFINE:
                self.register_parameter(entry, value)
            else:
                self.register_buffer(entry, None if value is None else value.detach().clone())
        if shared_affine:
            plain = nn.BatchNorm2d(num_features, eps, momentum, False, track_running_stats)
        self.branches = nn.ModuleDict({name: copy.deepcopy(plain) for name in _checked_names(datasets)})

    @classmethod
    def from_norm(
        cls,
        norm: nn.Module,
        datasets: Sequence[str],
        *,
        sync: bool = False,
        init_from: str = "",
        shared_affine: bool = False,
        path: str = "",
    ) -> DatasetBatchNorm2d:
        """A layer whose branches all start as the given batch norm (values, device, type, mode, frozen parameters)."""
        layer = cls(
            norm.num_features,
            datasets,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            sync=sync,
            init_from=init_from,
            shared_affine=shared_affine,
            path=path,
        )
        for target in (layer, *layer.branches.values()):
            for entry in _STATISTICS if shared_affine and target is not layer else _ENTRIES:
                source = getattr(norm, entry)
                if source is None:
                    setattr(target, entry, None)  # a batch norm without bias, say
                    continue
                tensor = getattr(target, entry)
                tensor.data = source.detach().clone()
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(source.requires_grad)
        return layer.train(norm.training)

    @property
    def eps(self) -> float:
        """Added to the variance. Each branch uses its own; setting it here sets it in all of them."""
        return next(iter(self.branches.values())).eps

    @eps.setter
    def eps(self, value: float) -> None:
        for branch in self.branches.values():
            branch.eps = value

    @property
    def momentum(self) -> float | None:
        """Share of a batch in the running statistics; likewise."""
        return next(iter(self.branches.values())).momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        for branch in self.branches.values():
            branch.momentum = value

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the branches."""
        return tuple(self.branches)

    def extra_repr(self) -> str:
        """Arguments as ``print(model)`` shows them."""
        shared = ", shared_affine=True" if self.shared_affine else ""
        return (
            f"{self.num_features}, {self.datasets}, eps={self.eps}, momentum={self.momentum}, sync={self.sync}{shared}"
        )

    def plain(self, dataset: str) -> nn.Module:
        """One dataset's norm by itself, as a layer that needs to know of no datasets; nothing is copied.

        Raises:
            DatasetBranchError: there is no such branch.
        """
        if dataset not in self.branches:
            raise DatasetBranchError(f"{self._here()}: no branch {dataset!r}, only {self.datasets}")
        branch = self.branches[dataset]
        if self.shared_affine:
            branch = copy.copy(branch)
            branch._parameters = {"weight": self.weight, "bias": self.bias}
            branch.affine = self.affine
        return branch

    def add_branch(self, dataset: str, init_from: str) -> nn.BatchNorm2d:
        """Adds a branch that starts as a copy of another one.

        Raises:
            DatasetBranchError: ``dataset`` has a branch already, or ``init_from`` has none.
        """
        if dataset in self.branches:
            raise DatasetBranchError(f"{self._here()}: there already is a branch {dataset!r} in {self.datasets}")
        if init_from not in self.branches:
            raise DatasetBranchError(f"{self._here()}: no branch {init_from!r} to start from, only {self.datasets}")
        _checked_names([dataset])
        self.branches[dataset] = copy.deepcopy(self.branches[init_from])
        return self.branches[dataset]

    def forward(self, x: Tensor) -> Tensor:
        """Normalises every image by its dataset's branch.

        Args:
            x: (N, C, H, W), N images in the order of :func:`~.active.current_groups`.

        Returns:
            (N, C, H, W), same type and memory format.

        Raises:
            RuntimeError: no dataset is active.
            DatasetBranchError: an active dataset has no branch.
            ValueError: the batch is not what is active, or every dataset has one value per channel. Where only some
                have, as happens in mixtures at pooled maps of 1 x 1, those are normalised by their running statistics,
                if there are any.
        """
        runs = self._runs(x)
        if self.sync and self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return self._synchronised(x, runs)
        branches = [self._branch(dataset) for dataset, _ in runs]
        area = x.shape[2] * x.shape[3]
        single = [_uses_batch(branch) and count * area == 1 for branch, (_, count) in zip(branches, runs)]
        if any(single):
            names = [dataset for one, (dataset, _) in zip(single, runs) if one]
            self._check_single(names, mixed=not all(single))
        how = [_normalise_by_running if one else _normalise for one in single]
        if len(runs) == 1:
            return how[0](branches[0], x, self._shared())
        parts = x.split([count for _, count in runs])
        shared = self._shared()
        return torch.cat([f(branch, part, shared) for f, branch, part in zip(how, branches, parts)]) if parts else x

    def _runs(self, x: Tensor) -> list[tuple[str, int]]:
        """The runs of at least one image: (dataset, number of images)."""
        groups = current_groups()
        if sum(count for _, count in groups) != x.shape[0]:
            raise ValueError(f"{self._here()}: the batch has {x.shape[0]} images, but the active datasets are {groups}")
        for dataset, _ in groups:
            self._branch(dataset)
        return [(dataset, count) for dataset, count in groups if count]

    def _branch(self, dataset: str) -> nn.Module:
        branch = self.branches[dataset] if dataset in self.branches else stand_in_branch(dataset, self)
        if branch is None:
            raise DatasetBranchError(
                f"{self._here()}: dataset {dataset!r} has no branch, only {self.datasets}. Add one with "
                "`add_dataset_branch`, or say at test time which one it uses (MODEL.DATASET_NORM.UNSEEN)."
            )
        return branch

    def _shared(self) -> _Affine | None:
        """Weight and bias of all branches; None where each has its own."""
        return (self.weight, self.bias) if self.shared_affine else None

    def _synchronised(self, x: Tensor, groups: list[tuple[str, int]]) -> Tensor:
        branches, index = list(self.branches.values()), {name: i for i, name in enumerate(self.branches)}
        modes = {name: _uses_batch(branch) for name, branch in self.branches.items()}
        if not all(modes.values()):
            if any(modes.values()):
                raise RuntimeError(f"{self._here()}: with sync, all branches train or none does, not {modes}")
            parts = x.split([count for _, count in groups])
            how = [_normalise(self.branches[dataset], p, self._shared()) for (dataset, _), p in zip(groups, parts)]
            return torch.cat(how) if parts else x
        runs, start = [], 0
        for dataset, count in groups:
            runs.append(Run(index[dataset], start, start + count))
            start += count
        with torch.no_grad():
            statistics = synchronised_statistics(x.detach(), runs, len(branches))
        values = [0] * len(branches)
        for run in runs:
            values[run.branch] = (run.stop - run.start) * x.shape[2] * x.shape[3]
        if min(values) <= 1:  # only then can a total be 1; on every process alike, so that none waits for the others
            totals = statistics[0].tolist()
            single = [i for i, total in enumerate(totals) if total == 1]
            if single:
                self._check_single([self.datasets[i] for i in single], mixed=max(totals) > 1)
                statistics = _by_running(statistics, single, branches)
        if not is_recomputing():
            for i, branch in enumerate(branches):
                _update_running(branch, *(s[i] for s in statistics))
        affine, eps = [self._shared() or (b.weight, b.bias) for b in branches], [b.eps for b in branches]
        return synchronised_batch_norm(x, runs, affine, statistics, eps)

    def _here(self) -> str:
        return f"norm layer {self.path or '(unnamed)'}"

    def _check_single(self, datasets: list[str], *, mixed: bool) -> None:
        """One value per channel has no variance. In a mixture that happens by chance; elsewhere in every step."""
        if not mixed or not self.track_running_stats:
            raise ConfigError(
                f"{self._here()}: {datasets} need more than 1 value per channel in a training step. Give each dataset "
                "at least two images per step (SOLVER.IMS_PER_BATCH, DATALOADER.WEIGHTS), or use SyncBN."
            )
        if not self._told_of_single:
            logger.warning(
                "%s: one value per channel of %s in a mixed step: normalised by running statistics (told once)",
                self._here(),
                datasets,
            )
            self._told_of_single = True

    # ---- loading ------------------------------------------------------------------------------------------------
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        old = (local_metadata.get("version") or 0) < 2
        if old and self.track_running_stats and prefix + "running_mean" in state_dict:
            state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(0, dtype=torch.long))
        stem = prefix + "branches."
        known = {key[len(stem) :].split(".", 1)[0] for key in state_dict if key.startswith(stem)}
        sources = self._donors(known, stem) if known else dict.fromkeys(self.datasets, prefix)
        for dataset, source in sources.items():
            for entry in _STATISTICS if self.shared_affine else _ENTRIES:
                if source + entry in state_dict:  # cloned: `load_state_dict(assign=True)` keeps the tensors themselves
                    state_dict[f"{stem}{dataset}.{entry}"] = state_dict[source + entry].clone()
        if known:
            self._read_affine(state_dict, prefix, known)
        for dataset in known.difference(self.datasets):
            for entry in _ENTRIES:
                state_dict.pop(f"{stem}{dataset}.{entry}", None)  # of load_state_dict's own copy
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _read_affine(self, state_dict: dict[str, Tensor], prefix: str, known: set[str]) -> None:
        """Weight and bias where the checkpoint and the model do not share them alike."""
        stem = prefix + "branches."
        for entry in _AFFINE:
            own = [name for name in known if f"{stem}{name}.{entry}" in state_dict]
            if self.shared_affine and own:
                if self.init_from not in known:
                    raise DatasetBranchError(
                        f"{self._here()}: each of {sorted(own)} has a {entry} in the checkpoint, the model shares one. "
                        "Say whose is taken by MODEL.DATASET_NORM.INIT_FROM, or leave '/shared_affine' out of "
                        "MODEL.RESNETS.NORM and MODEL.SEM_SEG_HEAD.NORM."
                    )
                state_dict[prefix + entry] = state_dict[f"{stem}{self.init_from}.{entry}"].clone()
                for name in own:
                    state_dict.pop(f"{stem}{name}.{entry}")
            elif not self.shared_affine and not own and prefix + entry in state_dict:
                for name in self.datasets:  # what all shared becomes each one's own
                    state_dict[f"{stem}{name}.{entry}"] = state_dict[prefix + entry].clone()

    def _donors(self, known: set[str], stem: str) -> dict[str, str]:
        """Where the branches that the checkpoint lacks are read from: dataset -> prefix of the donor's keys."""
        if known == set(self.datasets):
            return {}
        lists = f"the checkpoint's branches are {sorted(known)}, the model's are {sorted(self.datasets)}"
        if not self.init_from:
            raise DatasetBranchError(
                f"{self._here()}: {lists}. To start new datasets from a trained one (and leave out datasets that the "
                "model does not have), name it in MODEL.DATASET_NORM.INIT_FROM."
            )
        if self.init_from not in known:
            raise DatasetBranchError(
                f"{self._here()}: MODEL.DATASET_NORM.INIT_FROM is {self.init_from!r}, but {lists}."
            )
        return {name: f"{stem}{self.init_from}." for name in self.datasets if name not in known}


def _checked_names(datasets: Sequence[str]) -> list[str]:
    names = list(datasets)
    if isinstance(datasets, str) or not names or len(set(names)) != len(names):
        raise ValueError(f"a dataset norm needs a list of different dataset names, not {datasets!r}")
    for name in names:
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"{name!r} cannot name a norm branch: it is empty, has a dot, or is a name of ModuleDict")
    return names


# ---- one branch ----------------------------------------------------------------------------------------------------
def _uses_batch(branch: nn.Module) -> bool:
    """Whether a branch normalises by the batch's statistics rather than by its running ones."""
    # A branch may have become a FrozenBatchNorm2d, by Detectron2's own conversion, which ignores the mode.
    return isinstance(branch, nn.BatchNorm2d) and (branch.training or branch.running_mean is None)


def _normalise(branch: nn.Module, x: Tensor, shared: _Affine | None) -> Tensor:
    """A branch's own forward pass; in a recomputation without a second update of its running statistics."""
    if not _uses_batch(branch):
        return branch(x) if shared is None else _normalise_by_running(branch, x, shared)
    if is_recomputing():
        # Copies, not None: a recomputation must save as many tensors as the forward pass did.
        running = [None if s is None else s.clone() for s in (branch.running_mean, branch.running_var)]
        return F.batch_norm(x, *running, *(shared or (branch.weight, branch.bias)), True, 0.0, branch.eps)
    if shared is None:
        return branch(x)
    return F.batch_norm(x, branch.running_mean, branch.running_var, *shared, True, _count_batch(branch), branch.eps)


def _count_batch(branch: nn.BatchNorm2d) -> float:
    """Share of the batch in hand in a branch's running statistics; the batch is counted, as nn.BatchNorm2d does it."""
    if branch.running_mean is None:
        return 0.0
    branch.num_batches_tracked.add_(1)
    return 1.0 / float(branch.num_batches_tracked) if branch.momentum is None else branch.momentum


def _normalise_by_running(branch: nn.Module, x: Tensor, shared: _Affine | None) -> Tensor:
    """Batch norm as at test time, in a training step; running statistics stay as they are."""
    affine = shared or (branch.weight, branch.bias)
    return F.batch_norm(x, branch.running_mean, branch.running_var, *affine, False, 0.0, branch.eps)


def _by_running(
    statistics: tuple[Tensor, Tensor, Tensor], chosen: Sequence[int], branches: Sequence[nn.BatchNorm2d]
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch statistics (total, mean, variance) with the chosen branches' rows replaced by their running statistics.

    Their totals become infinite: as many values as it takes for one more not to change the mean, so that the backward
    pass finds no gradient through them.
    """
    total, mean, var = (s.clone() for s in statistics)
    for i in chosen:
        total[i] = torch.inf
        mean[i], var[i] = branches[i].running_mean, branches[i].running_var
    return total, mean, var


@torch.no_grad()
def _update_running(branch: nn.BatchNorm2d, total: Tensor, mean: Tensor, var: Tensor) -> None:
    """Takes statistics over all processes into the running ones; a branch that none used stays bit-identical."""
    if branch.running_mean is None or not branch.training:
        return
    used = (total > 0) & total.isfinite()  # infinite: the running statistics themselves, see `_by_running`
    branch.num_batches_tracked.add_(used)
    batches = branch.num_batches_tracked.clamp(min=1).to(mean.dtype)
    share = 1 / batches if branch.momentum is None else torch.full_like(batches, branch.momentum)
    factor = torch.where(used, share, torch.zeros_like(share))
    total = torch.where(used, total, 1.0)
    unbiased = var * (total / (total - 1).clamp(min=1)).to(var.dtype)
    branch.running_mean.lerp_(mean.to(branch.running_mean.dtype), factor)
    branch.running_var.lerp_(unbiased.to(branch.running_var.dtype), factor)
