"""Batch normalisation with statistics over all processes, of a batch that consists of several runs of images.

One autograd function that writes all runs into one output and keeps for the backward pass what plain batch norm keeps:
input, mean, deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Run", "synchronised_batch_norm", "synchronised_statistics"]

_AXES = (0, 2, 3)


class Run(NamedTuple):
    """Images [start, stop) of the batch belong to branch ``branch``."""

    branch: int
    start: int
    stop: int


def synchronised_statistics(x: Tensor, runs: Sequence[Run], num_branches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of every branch over the images of all processes, by one all-reduce.

    The sums travel in float64: E[x^2] - E[x]^2 then loses nothing that float32 statistics would keep, and processes
    with different numbers of values (none, too) need no second exchange.

    Returns:
        Number of values per channel (B,) float64 (0 for a branch that no process used), mean and biased variance (B, C)
        in the type of ``x``, float32 at least.
    """
    channels, dtype = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    packed = x.new_zeros((num_branches, 2 * channels + 1), dtype=torch.float64)
    for branch, start, stop in runs:
        part = x[start:stop].to(dtype)
        count = part.numel() // channels
        var, mean = (s.double() for s in torch.var_mean(part, _AXES, correction=0))
        packed[branch, 0] = count
        packed[branch, 1 : channels + 1] = count * mean
        packed[branch, channels + 1 :] = count * (var + mean.square())
    dist.all_reduce(packed)
    total = packed[:, 0]
    mean, square = (packed[:, 1:] / total.clamp(min=1)[:, None]).split(channels, 1)  # (B, C) each
    # Rounding may leave a constant channel a variance below zero, of which the deviation would be NaN.
    return total, mean.to(dtype), (square - mean.square()).clamp(min=0).to(dtype)


class _SynchronisedBatchNorm(torch.autograd.Function):
    """Normalises with given statistics that depend on every process's input; one all-reduce in the backward pass."""

    @staticmethod
    def forward(ctx, x, runs, total, mean, var, eps, *affine):
        # affine: weight and bias of every branch of the layer, flat, so that every process has the same graph
        eps = eps[0] if len(set(eps)) == 1 else var.new_tensor(eps)[:, None]  # a tensor only where it is needed
        invstd = torch.rsqrt(var + eps)  # (B, C)
        out = torch.empty_like(x)
        for branch, start, stop in runs:
            weight, bias = affine[2 * branch : 2 * branch + 2]
            scale = invstd[branch] if weight is None else invstd[branch] * weight
            shift = -mean[branch] * scale if bias is None else bias - mean[branch] * scale
            out[start:stop] = torch.addcmul(_per_channel(shift), x[start:stop], _per_channel(scale))
        ctx.save_for_backward(x, total, mean, invstd, *affine[::2])
        ctx.runs = runs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        x, total, mean, invstd, *weights = ctx.saved_tensors
        branches, channels = mean.shape
        sums = mean.new_zeros((2, branches, channels))  # of dy, and of dy * (x - mean)
        for branch, start, stop in ctx.runs:
            grad = grad_out[start:stop].to(mean.dtype)
            sums[0, branch] = grad.sum(_AXES)
            sums[1, branch] = (grad * (x[start:stop] - _per_channel(mean[branch]))).sum(_AXES)
        local = sums.clone()
        dist.all_reduce(sums)
        sums /= total.clamp(min=1).to(sums.dtype)[:, None]  # now means over all processes
        grad_in = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for branch, start, stop in ctx.runs if grad_in is not None else ():
            scale = invstd[branch] if weights[branch] is None else invstd[branch] * weights[branch]
            slope = sums[1, branch] * invstd[branch].square()
            centred = x[start:stop] - _per_channel(mean[branch])
            grad = grad_out[start:stop] - _per_channel(sums[0, branch]) - centred * _per_channel(slope)
            grad_in[start:stop] = grad * _per_channel(scale)
        return grad_in, None, None, None, None, None, *_affine_grads(ctx, local, total, invstd)


def _affine_grads(ctx, local: Tensor, total: Tensor, invstd: Tensor) -> list[Tensor | None]:
    """Gradients of this process's loss; none for a branch that no process used, so that optimizers skip it."""
    here, grads = {run.branch for run in ctx.runs}, []
    used = total.tolist() if len(here) < len(invstd) else [1] * len(invstd)  # a device wait only where it is needed
    for branch, count in enumerate(used):
        want_weight, want_bias = ctx.needs_input_grad[6 + 2 * branch : 8 + 2 * branch]
        grads.append(local[1, branch] * invstd[branch] if want_weight and count else None)
        grads.append(local[0, branch] if want_bias and count else None)
    return grads


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def synchronised_batch_norm(
    x: Tensor,
    runs: Sequence[Run],
    affine: Sequence[tuple[Tensor | None, Tensor | None]],
    statistics: tuple[Tensor, Tensor, Tensor],
    eps: Sequence[float],
) -> Tensor:
    """Training-mode batch norm of each run with its branch's statistics over all processes.

    Every process must call this the same number of times, but may hold any of the branches, or none.

    Args:
        x: (N, C, H, W); the runs tile its first axis.
        runs: non-empty runs.
        affine: (C,) weight and bias of *every* branch of the layer, or (None, None).
        statistics: what :func:`synchronised_statistics` gave for this very input.
        eps: added to the variance, of every branch.

    Returns:
        (N, C, H, W) in the type and memory format of ``x``. Gradients are those of the sum of all processes' losses.
    """
    flat = [tensor for pair in affine for tensor in pair]
    return _SynchronisedBatchNorm.apply(x, tuple(runs), *statistics, tuple(eps), *flat)
