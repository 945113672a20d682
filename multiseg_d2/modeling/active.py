"""Which datasets the batch in hand belongs to: said once by whoever holds the batch, read by every norm layer.

A batch is the concatenation of runs of images, one run per dataset::

    with active_datasets((("camvid", 4), ("bdd100k", 4))):
        features = backbone(images)        # images[:4] are CamVid's, images[4:] BDD100K's

There is no default. Outside a context, and wherever a layer would have to guess (another thread, a recomputation in the
backward pass that nobody told about its datasets), :func:`current_groups` raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as _torch_checkpoint

__all__ = [
    "Groups",
    "StandIns",
    "active_datasets",
    "checkpoint",
    "current_groups",
    "is_recomputing",
    "stand_in_branch",
]

#: (dataset, number of images) runs in batch order. A count of 0 says: in this step, but not on this process.
Groups = tuple[tuple[str, int], ...]
#: Dataset without norm branches of its own -> norm layer -> the branch that it uses there.
StandIns = Mapping[str, Mapping[nn.Module, nn.Module]]


@dataclass(frozen=True)
class _Active:
    groups: Groups
    stand_ins: StandIns = field(default_factory=dict)
    recomputing: bool = False


_ACTIVE: ContextVar[_Active | None] = ContextVar("multiseg_active_datasets", default=None)


def _checked(groups: Sequence[tuple[str, int]]) -> Groups:
    checked = tuple((str(name), int(count)) for name, count in groups)
    names = [name for name, _ in checked]
    doubles = sorted({n for n in names if names.count(n) > 1})
    if not checked:
        raise ValueError("active_datasets needs at least one (dataset, number of images) run")
    if doubles:
        raise ValueError(
            f"the images of one dataset must be contiguous in the batch, but {doubles} occur in several runs of "
            f"{checked}: sort the batch by dataset"
        )
    if any(count < 0 for _, count in checked):
        raise ValueError(f"numbers of images must not be negative: {checked}")
    return checked


@contextmanager
def _enter(active: _Active) -> Iterator[Groups]:
    token = _ACTIVE.set(active)
    try:
        yield active.groups
    finally:
        _ACTIVE.reset(token)


def active_datasets(groups: Sequence[tuple[str, int]], stand_ins: StandIns | None = None):
    """Context in which the batch consists of these runs of images.

    Contexts nest (an evaluation in the middle of a step hides the step's context and gives it back), and each thread
    has its own.

    Args:
        groups: (dataset, number of images) in batch order, every dataset once. A run may be empty.
        stand_ins: branches for datasets that the norm layers have none for (at test time, see :mod:`.norm.unseen`).

    Raises:
        ValueError: no run, a dataset in two runs, or a negative count.
    """
    return _enter(_Active(_checked(groups), stand_ins or {}))


def current_groups() -> Groups:
    """The (dataset, number of images) runs of the batch in hand.

    Raises:
        RuntimeError: no :func:`active_datasets` context is open here, or the backward pass recomputes a part of the
            network without :func:`checkpoint` of this module.
    """
    active = _ACTIVE.get()
    if active is None:
        raise RuntimeError(
            "no dataset is active, and which dataset's normalisation to use is not guessed. Call the model through "
            "its segmentor, or enter `active_datasets(((dataset, number of images), ...))`. If this is the backward "
            "pass: recompute with `multiseg_d2.modeling.active.checkpoint`, not with `torch.utils.checkpoint`."
        )
    if not active.recomputing and _in_backward():
        raise RuntimeError(
            "a layer runs again inside the backward pass, where the active datasets may be another step's and running "
            "statistics would be updated twice: use `multiseg_d2.modeling.active.checkpoint` instead of "
            "`torch.utils.checkpoint`."
        )
    return active.groups


def stand_in_branch(dataset: str, layer: nn.Module) -> nn.Module | None:
    """The branch that the context gives a norm layer for a dataset that it has none for; None where it gives none."""
    active = _ACTIVE.get()
    return None if active is None else active.stand_ins.get(dataset, {}).get(layer)


def is_recomputing() -> bool:
    """Whether a forward pass is being repeated for its activations only: running statistics must stay as they are."""
    active = _ACTIVE.get()
    return active is not None and active.recomputing


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Activation checkpointing that recomputes with the datasets of the forward pass.

    Like ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``; in addition the recomputation sees the active
    datasets that the forward pass saw, whatever is active when the backward pass runs, and norm layers leave their
    running statistics alone the second time.

    Args:
        function: the part of the network to recompute.
        *args: its inputs.
        **kwargs: its keyword inputs.

    Returns:
        ``function(*args, **kwargs)``.

    Raises:
        RuntimeError: no dataset is active.
    """
    if not is_recomputing():
        current_groups()  # raises where none is active
    active = replace(_ACTIVE.get(), recomputing=True)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)

    def contexts():
        return nullcontext(), _enter(active)

    return _torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)
