"""A running mean of the weights, for evaluation and as a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor

from ..user_error import ConfigError
from .ranks import broadcast, unwrapped

__all__ = ["EMAHook"]


class EMAHook(HookBase):
    """Averages the weights after every step: mean <- d * mean + (1 - d) * weights.

    d is ``min(decay, 1 - 1 / t)`` after update t, so that the first updates are the plain mean of the weights so far.
    Floating-point buffers (statistics of norms) are averaged like the weights; counters are taken over. The mean is
    part of every checkpoint, and a resumed run goes on with it bit by bit. After the last step it is also written as
    weights to ``weights/averaged.pth`` in the output folder.

    Args:
        decay: in [0, 1): ``MODEL.EMA_DECAY``.

    Attributes:
        mean: state of the averaged model by name; empty before the first update.

    Source: Tarvainen and Valpola, Mean teachers (NeurIPS 2017), appendix on the ramp-up of the decay.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"MODEL.EMA_DECAY is {decay}: it must be in [0, 1); 0 switches it off")
        self.decay = decay
        self.mean: dict[str, Tensor] = {}
        self.updates = 0

    @torch.no_grad()
    def after_step(self) -> None:
        """Updates the mean; writes it after the last step."""
        weights = self._weights()
        self.updates += 1
        share = 1 - min(self.decay, 1 - 1 / self.updates)
        if not self.mean:
            self.mean = {name: tensor.clone() for name, tensor in weights.items()}
        else:
            floats = [name for name, tensor in weights.items() if tensor.is_floating_point()]
            torch._foreach_lerp_([self.mean[n] for n in floats], [weights[n] for n in floats], share)
            for name in weights.keys() - set(floats):
                self.mean[name].copy_(weights[name])
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self.synchronize()
            with self.averaged():
                self.trainer.save_weights("averaged")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; then its own again, in every bit.

        Before the first update nothing is changed. What the model's buffers become inside, the mean's become.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def synchronize(self) -> None:
        """Gives every process the statistics of rank 0: what a resumed run starts with."""
        buffers = [name for name, _ in unwrapped(self.trainer.model).named_buffers() if name in self.mean]
        broadcast(self.mean[name] for name in buffers)

    @torch.no_grad()
    def _exchange(self) -> None:
        weights = self._weights()
        for name, other in self.mean.items():
            kept = other.clone()
            other.copy_(weights[name])
            weights[name].copy_(kept)

    def _weights(self) -> dict[str, Tensor]:
        """The model's tensors; of several names for one tensor, the first."""
        found: dict[tuple[int, torch.Size], str] = {}
        state = unwrapped(self.trainer.model).state_dict()
        for name, tensor in state.items():
            found.setdefault((tensor.data_ptr(), tensor.shape), name)
        return {name: state[name].detach() for name in found.values()}

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"mean": self.mean, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        own = self._weights()
        self.mean = {name: tensor.to(own[name].device) for name, tensor in state["mean"].items()}
        self.updates = state["updates"]
