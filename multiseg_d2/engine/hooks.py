"""What happens around the steps: learning rate, checkpoints, evaluation, stopping."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from ..atomic_file import write_atomically
from ..checkpoint import CheckpointError
from ..json_file import read_json
from ..yaml_file import did_you_mean
from .preview import PreviewHook
from .signals import Stopped

__all__ = [
    "BestWeightsHook",
    "CheckpointHook",
    "EvaluationHook",
    "LearningRateHook",
    "ProcessorTimeHook",
    "StopHook",
    "in_order",
]

logger = logging.getLogger(__name__)


class LearningRateHook(HookBase):
    """Steps the trainer's schedule after every iteration and writes the rate of the first parameter group.

    The first group holds the first layer of the backbone, so what is shown is ``SOLVER.BASE_LR`` on its way down. The
    schedule's state is part of the trainer's own.
    """

    def after_step(self) -> None:
        """Writes the rate of the step that was done, sets that of the next one."""
        self.trainer.storage.put_scalar("lr", self.trainer.optimizer.param_groups[0]["lr"], smoothing_hint=False)
        self.trainer.scheduler.step()


class ProcessorTimeHook(HookBase):
    """Writes the processor time of a step, loading of its data included where that has no processes of its own.

    Other programs on the machine do not add to it, as they do to Detectron2's ``time``.
    """

    def before_step(self) -> None:
        """Starts the clock."""
        self._start = time.process_time()

    def after_step(self) -> None:
        """Writes what has passed, on all threads."""
        self.trainer.storage.put_scalar("processor_seconds", time.process_time() - self._start)


class CheckpointHook(HookBase):
    """Saves ``model_<last step>.pth`` periodically and ``model_final.pth`` after the last step, on all processes.

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
        self.trainer.synchronize_buffers()
        step = self.trainer.iter
        self.trainer.checkpointer.save(name or f"model_{step:07d}", iteration=step)
        self._saved_at = step


class EvaluationHook(HookBase):
    """Evaluates periodically, where asked to, and after the last step; writes every number to the event storage.

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
        """Evaluates where the step's number says so, or another hook."""
        done = self.trainer.iter + 1
        wanted, self.trainer.evaluation_wanted = self.trainer.evaluation_wanted, False
        due = wanted or (self.period > 0 and done % self.period == 0)
        if due and done < self.trainer.max_iter:
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


class BestWeightsHook(HookBase):
    """Keeps the weights that were evaluated as best, in ``weights/best.pth``; ``weights/best.json`` says how good.

    Args:
        metric: name in the event storage, as ``metrics.json`` has it: ``camvid_val/sem_seg/mIoU``, ``mean/mIoU``.
        highest: whether more is better.
    """

    def __init__(self, metric: str, highest: bool = True) -> None:
        self.metric, self.highest = metric, highest
        self._best: float | None = None
        self._seen = 0  # evaluations that were looked at

    def before_train(self) -> None:
        """A resumed run goes on with what was best before."""
        record = Path(self.trainer.cfg.OUTPUT_DIR, "weights", "best.json")
        if self.trainer.start_iter > 0 and record.is_file():
            content = read_json(record, CheckpointError, keys=("metric", "value"))
            self._best = content["value"] if content["metric"] == self.metric else None
        self._best = comm.all_gather(self._best)[0]

    def after_step(self) -> None:
        """Looks at the metric where there was an evaluation."""
        self._look()

    def after_train(self) -> None:
        """Likewise, for the evaluation after the last step."""
        if self.trainer.iter >= self.trainer.max_iter:
            self._look()

    def _look(self) -> None:
        if self.trainer.evaluations == self._seen:
            return
        self._seen = self.trainer.evaluations
        known = self.trainer.storage.latest()
        value, iteration = comm.all_gather(known.get(self.metric, (None, -1)))[0]
        if value is None:
            logger.warning("TEST.BEST_METRIC: there is no %s%s", self.metric, did_you_mean(self.metric, known))
        elif self._best is None or (value > self._best if self.highest else value < self._best):
            self._best = value
            with self.trainer.evaluated_weights():
                self.trainer.save_weights("best")
            if comm.is_main_process():
                content = {"metric": self.metric, "value": value, "iteration": iteration}
                write_atomically(Path(self.trainer.cfg.OUTPUT_DIR, "weights", "best.json"), json.dumps(content))


def flat_numbers(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a nested result: ``{"camvid_val": {"mIoU": 61.2}}`` gives ``("camvid_val/mIoU", 61.2)``."""
    for key, value in results.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)


class StopHook(HookBase):
    """Ends the run once all processes know that one of them was asked to.

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


#: What comes after everything that changes the state of a run, in this order.
_CLOSING: Sequence[tuple[type, ...]] = (
    (CheckpointHook,),
    (EvaluationHook,),
    (BestWeightsHook,),
    (PreviewHook, hooks.PeriodicWriter),
    (StopHook,),
)


def in_order(registered: Sequence[HookBase | None]) -> list[HookBase]:
    """Hooks in the order in which they must run, whenever and wherever they were added.

    What is saved must be complete, what is evaluated saved, what is written down known, and stopping comes last. All
    others keep their order in front of these.
    """

    def place(hook: HookBase) -> int:
        return next((i for i, kinds in enumerate(_CLOSING, start=1) if isinstance(hook, kinds)), 0)

    return sorted((hook for hook in registered if hook is not None), key=place)
