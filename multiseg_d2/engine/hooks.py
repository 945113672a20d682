"""What happens around the steps: learning rate, checkpoints, evaluation, stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from .ranks import broadcast, unwrapped
from .signals import Stopped

__all__ = ["CheckpointHook", "EvaluationHook", "LearningRateHook", "StopHook"]


class LearningRateHook(HookBase):
    """Steps the trainer's schedule after every iteration and writes the rate of the first parameter group.

    The first group holds the first layer of the backbone, so what is shown is ``SOLVER.BASE_LR`` on its way down. The
    schedule's state is part of the trainer's own.
    """

    def after_step(self) -> None:
        """Writes the rate of the step that was done, sets that of the next one."""
        self.trainer.storage.put_scalar("lr", self.trainer.optimizer.param_groups[0]["lr"], smoothing_hint=False)
        self.trainer.scheduler.step()


class CheckpointHook(HookBase):
    """Saves ``model_<last step>.pth`` periodically and ``model_final.pth`` after the last step.

    Runs on all processes; register it after everything that changes what is saved.

    Args:
        period: steps between checkpoints.
    """

    def __init__(self, period: int) -> None:
        self.period = period
        self._saved_at = -1

    def after_step(self) -> None:
        """Saves where the step's number says so."""
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.save("model_final")
        elif done % self.period == 0:
            self.save()

    def save(self, name: str = "") -> None:
        """Saves the state after the step in hand, unless that has been done."""
        if self._saved_at == self.trainer.iter:
            return
        broadcast(unwrapped(self.trainer.model).buffers())
        step = self.trainer.iter
        self.trainer.checkpointer.save(name or f"model_{step:07d}", iteration=step)
        self._saved_at = step


class EvaluationHook(HookBase):
    """Evaluates periodically and after the last step; writes every number of the result to the event storage.

    The state is saved first, so that a signal can end the run in the middle of a long evaluation. Nothing is evaluated
    after a step that failed.

    Args:
        period: steps between evaluations, 0 for after the last step only.
        evaluate: returns nested results by name.
        checkpoints: where to save.
    """

    def __init__(self, period: int, evaluate: Callable[[], Mapping[str, Any]], checkpoints: CheckpointHook) -> None:
        self.period, self.evaluate, self.checkpoints = period, evaluate, checkpoints

    def after_step(self) -> None:
        """Evaluates where the step's number says so."""
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done < self.trainer.max_iter:
            self.checkpoints.save()
            self._run()

    def after_train(self) -> None:
        """Evaluates the trained model."""
        if self.trainer.iter >= self.trainer.max_iter:  # not after a failure, not after a signal
            self._run()

    def _run(self) -> None:
        with self.trainer.signals.all_saved():
            results = self.evaluate()
        self.trainer.storage.put_scalars(**dict(flat_numbers(results or {})), smoothing_hint=False)
        comm.synchronize()  # evaluation takes different times on the processes


def flat_numbers(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a nested result: ``{"camvid_val": {"mIoU": 61.2}}`` gives ``("camvid_val/mIoU", 61.2)``."""
    for key, value in results.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)


class StopHook(HookBase):
    """Ends the run once all processes know that one of them was asked to; register it last.

    Args:
        checkpoints: saves the state first.
    """

    def __init__(self, checkpoints: CheckpointHook) -> None:
        self.checkpoints = checkpoints

    def after_step(self) -> None:
        """Saves and leaves where that was agreed on."""
        if self.trainer.stop_agreed:
            self.checkpoints.save()
            raise Stopped
