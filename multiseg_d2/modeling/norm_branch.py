"""What one dataset's batch norm does with its running statistics; used by ``dataset_norm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .active import is_recomputing

__all__ = [
    "by_running",
    "has_kernel",
    "normalise",
    "normalise_by_running",
    "running_update",
    "update_running",
    "uses_batch",
]


def uses_batch(branch: nn.Module) -> bool:
    """Whether a branch normalises by the batch's statistics rather than by its running ones."""
    # A branch may have become a FrozenBatchNorm2d, by Detectron2's own conversion, which ignores the mode.
    return isinstance(branch, nn.BatchNorm2d) and (branch.training or branch.running_mean is None)


def has_kernel(branch: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether the kernel that writes into a given output takes these types; devices disagree on pure 16-bit models."""
    wide = x.dtype in (torch.float32, torch.float64) or (branch.affine and branch.weight.dtype == torch.float32)
    return wide and x.device.type in ("cpu", "cuda")


def normalise(branch: nn.Module, x: Tensor) -> Tensor:
    """A branch's own forward pass; in a recomputation without a second update of its running statistics."""
    if is_recomputing() and uses_batch(branch):
        # Copies, not None: a recomputation must save as many tensors as the forward pass did.
        running = [None if s is None else s.clone() for s in (branch.running_mean, branch.running_var)]
        return F.batch_norm(x, *running, branch.weight, branch.bias, True, 0.0, branch.eps)
    return branch(x)


def normalise_by_running(branch: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm as at test time, in a training step; running statistics stay as they are."""
    return F.batch_norm(x, branch.running_mean, branch.running_var, branch.weight, branch.bias, False, 0.0, branch.eps)


def by_running(
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


def running_update(branch: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None, float]:
    """Running statistics of a branch and the share of the batch in them; counts the batch."""
    if branch.running_mean is None or not branch.training:
        return None, None, 0.0
    branch.num_batches_tracked.add_(1)
    factor = 1.0 / float(branch.num_batches_tracked) if branch.momentum is None else branch.momentum
    return branch.running_mean, branch.running_var, factor


@torch.no_grad()
def update_running(branch: nn.BatchNorm2d, total: Tensor, mean: Tensor, var: Tensor) -> None:
    """The same for statistics over all processes; a branch that none used stays bit-identical."""
    if branch.running_mean is None or not branch.training:
        return
    used = (total > 0) & total.isfinite()  # infinite: the running statistics themselves, see `by_running`
    branch.num_batches_tracked.add_(used)
    factor = 1.0 / branch.num_batches_tracked.clamp(min=1) if branch.momentum is None else branch.momentum
    factor = torch.where(used, factor, 0.0).to(mean.dtype)
    total = torch.where(used, total, 1.0)
    unbiased = var * (total / (total - 1).clamp(min=1)).to(var.dtype)
    branch.running_mean.lerp_(mean.to(branch.running_mean.dtype), factor)
    branch.running_var.lerp_(unbiased.to(branch.running_var.dtype), factor)
