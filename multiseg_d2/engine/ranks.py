"""What the processes of one run do together: a drawn seed, averaged gradients, equal buffers, agreement on a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

__all__ = ["average_gradients", "broadcast", "draw_seed", "unwrapped", "wrap_model"]

_BUCKET_ELEMENTS = 16 * 2**20  # 64 MB of float32 per message: bounds the extra memory


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a ``DistributedDataParallel``, or the model itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def draw_seed() -> int:
    """A seed in [0, 2**31) from the operating system, the same on all processes."""
    seed = int(np.random.SeedSequence().generate_state(1)[0] >> 1)
    return comm.all_gather(seed)[0]


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Runs of tensors of one type, each of bounded size."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET_ELEMENTS
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _scatter_back(flat: Tensor, bucket: list[Tensor]) -> None:
    for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces every gradient by its mean over the processes, in place.

    A gradient that is absent on this process counts as zero, so that processes may hold different datasets. One that is
    absent everywhere stays absent: the optimizer leaves such a parameter alone, as it does in a single process.

    Args:
        parameters: the same ones, in the same order, on all processes.
    """
    world_size = comm.get_world_size()
    if world_size == 1:
        return
    device = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    gradients = []
    for parameter, somewhere in zip(parameters, present.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        _scatter_back(flat.div_(world_size), bucket)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Gives every process the values of rank 0, in place.

    Batch norms that are not synchronised count their own images on every process, so their buffers drift apart. What is
    saved and what is evaluated is rank 0's, everywhere: a resumed run is then the same as an unbroken one on every
    process.

    Args:
        tensors: the same ones, in the same order, on all processes.
    """
    if comm.get_world_size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.broadcast(flat, src=0)
        _scatter_back(flat, bucket)


def wrap_model(cfg: CfgNode, model: nn.Module, entries: Sequence[str] | None = None) -> nn.Module:
    """The model in ``DistributedDataParallel`` for fused steps over several processes.

    A step of several passes averages gradients itself: there, and in a single process, it is the model itself. All
    processes have the weights of rank 0 afterwards.

    Args:
        cfg: ``SOLVER`` and ``DATALOADER`` are used.
        model: in training mode.
        entries: what is trained on, where that is not ``DATASETS.TRAIN``.
    """
    if cfg.SOLVER.STEP_MODE != "fused":
        broadcast([*model.parameters(), *model.buffers()])
        return model
    if comm.get_world_size() == 1:
        return model
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if next(model.parameters()).is_cuda else None,
        broadcast_buffers=False,
        find_unused_parameters=entries is not None or _some_step_lacks_a_dataset(cfg),
    )


def _some_step_lacks_a_dataset(cfg: CfgNode) -> bool:
    """Whether a process may meet a step without images of some dataset, whose parameters then get no gradient there."""
    loader, world_size = cfg.DATALOADER, comm.get_world_size()
    if loader.SCHEDULE == "alternation":
        return cfg.SOLVER.IMS_PER_BATCH % world_size > 0 or (loader.INTERVAL > 1 and len(cfg.DATASETS.TRAIN) > 1)
    if loader.SCHEDULE == "fixed":
        return any(weight == 0 or weight % world_size for weight in loader.WEIGHTS)
    return len(cfg.DATASETS.TRAIN) > 1
