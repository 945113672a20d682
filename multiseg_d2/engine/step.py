"""The training step, in one place: batch, losses, gradients, checks, update."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from multiseg_d2.label_space import IGNORE

from .ranks import average_gradients, seed_step, unwrapped

__all__ = ["NonFiniteLossError", "TrainStep"]

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
Losses = dict[str, Tensor]


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient is NaN or infinite; raised on all processes."""


class TrainStep:
    """One optimizer update from one batch, where a batch is a list of samples of any datasets.

    Modes: ``"fused"`` runs one forward and one backward pass over all datasets. ``"sequential"`` runs one pass per
    dataset and adds up the gradients, which needs the memory of one dataset only. As long as no dataset's result
    depends on another dataset's images, both give the same gradients (up to the order of float additions, and to what
    dropout draws). A batch norm *shared* by the datasets breaks that condition in training: it normalises over all
    images of the pass, so fused and sequential are then two different methods.

    Over several processes, the gradient is the mean of the processes' gradients: by ``DistributedDataParallel`` in a
    fused step, by one explicit reduction after the last pass of a sequential one.

    Args:
        model: samples -> dict of ``loss_...`` scalars. Wrapped in ``DistributedDataParallel`` by the caller for the
            fused mode over several processes.
        optimizer: over the model's parameters.
        make_loader: first step -> iterable of this process's batches for that step, the next one, and so on.
        seed: of the run; what a step draws depends on (seed, step, rank) only.
        mode: ``"fused"`` or ``"sequential"``.
        amp_dtype: ``torch.bfloat16`` or ``torch.float16`` for autocast, None for full precision.
        clip: clips gradients in place, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        make_loader: Callable[[int], Iterable[list[Sample]]],
        *,
        seed: int,
        mode: str = "fused",
        amp_dtype: torch.dtype | None = None,
        clip: Callable[[Sequence[nn.Parameter]], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.make_loader = model, optimizer, make_loader
        self.seed, self.amp_dtype, self.clip = seed, amp_dtype, clip
        self._backward = {"fused": self._fused, "sequential": self._sequential}[mode]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device_type = self.parameters[0].device.type
        self.scaler = _grad_scaler(self.device_type, enabled=amp_dtype == torch.float16)
        self.data_loader: Iterable[list[Sample]] | None = None
        self.last_batch: list[Sample] = []
        self._batches: Iterator[list[Sample]] | None = None
        self._unlabelled_batches: dict[str, int] = {}

    def run(self, step: int, wants_stop: Callable[[], bool] = lambda: False) -> bool:
        """Does step number ``step``; writes its losses to the event storage.

        Args:
            step: from 0.
            wants_stop: whether this process was asked to stop; called near the end of the step.

        Returns:
            Whether any process was asked to stop: the same answer on all of them.

        Raises:
            NonFiniteLossError: on all processes, naming the files of the batch; nothing was updated.
        """
        started = time.perf_counter()
        self.last_batch = samples = self._next_batch(step)
        data_time = time.perf_counter() - started

        seed_step(self.seed, step)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(samples)
        report = self._report(losses, samples)
        reports = comm.all_gather(report | {"time": data_time, "stop": wants_stop()})
        _stop_if_not_finite(step, reports)
        self._update()
        self._write_metrics(reports, samples)
        return any(report["stop"] for report in reports)

    def drop_loader(self) -> None:
        """Ends the loader and its worker processes; the next step, if there is one, builds a new one from there on."""
        self.data_loader = self._batches = None

    def _next_batch(self, step: int) -> list[Sample]:
        if self._batches is None:
            self.data_loader = self.make_loader(step)
            self._batches = iter(self.data_loader)
        try:
            return next(self._batches)
        except StopIteration:
            raise RuntimeError(f"step {step}: the training data ended; a training loader goes on for ever") from None

    def _forward(self, model: nn.Module, samples: list[Sample]) -> Losses:
        with torch.autocast(self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return model(samples)

    def _fused(self, samples: list[Sample]) -> Losses:
        losses = self._forward(self.model, samples)
        self.scaler.scale(sum(losses.values())).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _sequential(self, samples: list[Sample]) -> Losses:
        total: Losses = {}
        for part in _passes(samples):
            losses = self._forward(unwrapped(self.model), part)
            self.scaler.scale(sum(losses.values())).backward()
            for name, loss in losses.items():
                total[name] = total[name] + loss.detach() if name in total else loss.detach()
        average_gradients(self.parameters)
        return total

    def _report(self, losses: Losses, samples: list[Sample]) -> dict[str, Any]:
        """What the other processes need to know about this one's part of the step."""
        norm = _gradient_norm(self.parameters)
        *values, norm = torch.stack([*(loss.float() for loss in losses.values()), norm]).tolist()  # the one sync point
        report: dict[str, Any] = {"losses": dict(zip(losses, values, strict=True)), "norm": norm}
        finite = all(map(_is_finite, values)) and (self.scaler.is_enabled() or _is_finite(norm))
        if not finite:  # a float16 gradient may overflow: the scaler skips that step and lowers its scale
            report["files"] = [f"{s['dataset']}: {s.get('file_name', '?')} (draw {s.get('draw')})" for s in samples]
        return report

    def _update(self) -> None:
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.clip(self.parameters)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _write_metrics(self, reports: list[dict[str, Any]], samples: list[Sample]) -> None:
        self._count_unlabelled(samples)
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        names = dict.fromkeys(name for report in reports for name in report["losses"])
        # a process without a dataset has no loss of it: zero, as in the mean of the gradients
        means = {name: sum(r["losses"].get(name, 0.0) for r in reports) / len(reports) for name in names}
        storage.put_scalars(total_loss=sum(means.values()), **(means if len(means) > 1 else {}))
        storage.put_scalar("data_time", max(report["time"] for report in reports))
        if not self.scaler.is_enabled():
            storage.put_scalar("grad_norm", reports[0]["norm"])
        else:
            storage.put_scalar("grad_scale", self.scaler.get_scale(), smoothing_hint=False)
        for dataset, count in self._unlabelled_batches.items():
            storage.put_scalar(f"unlabelled_batches/{dataset}", count, smoothing_hint=False)

    def _count_unlabelled(self, samples: list[Sample]) -> None:
        """Counts the batches in which a labelled dataset had no labelled pixel (its loss was zero)."""
        labels: dict[str, list[Tensor]] = {}
        for sample in samples:
            if "sem_seg" in sample:
                labels.setdefault(sample["dataset"], []).append(sample["sem_seg"])
        for dataset, maps in labels.items():
            if all(bool((label == IGNORE).all()) for label in maps):
                self._unlabelled_batches[dataset] = self._unlabelled_batches.get(dataset, 0) + 1
                if self._unlabelled_batches[dataset] == 1:
                    files = [s.get("file_name", "?") for s in samples if s["dataset"] == dataset]
                    logger.warning("all labels of %s are ignored in this batch, so its loss is 0: %s", dataset, files)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer and of the gradient scaler."""
        return {"optimizer": self.optimizer.state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["grad_scaler"])


def _passes(samples: list[Sample]) -> list[list[Sample]]:
    """The samples of each pass of a sequential step: one dataset's each.

    A pass counts pixels, and may normalise, over all processes. Where these hold images of different datasets (in a
    mixture), their passes would not meet, so the step is done in one pass, which means the same.
    """
    datasets = sorted({sample["dataset"] for sample in samples})
    if any(others != datasets for others in comm.all_gather(datasets)):
        return [samples]
    return [[sample for sample in samples if sample["dataset"] == dataset] for dataset in datasets]


def _is_finite(value: float) -> bool:
    return value - value == 0.0


def _gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Norm over all gradients, on their device; not finite as soon as one element is not."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    return torch.stack(torch._foreach_norm(gradients)).float().norm()


def _grad_scaler(device_type: str, enabled: bool):
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device_type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)  # before torch 2.3


def _stop_if_not_finite(step: int, reports: list[dict[str, Any]]) -> None:
    guilty = {rank: report for rank, report in enumerate(reports) if "files" in report}
    if not guilty:
        return
    lines = [f"step {step}: a loss or gradient is not finite. Nothing was updated in this step"]
    for rank, report in guilty.items():
        losses = ", ".join(f"{name} {value:.6g}" for name, value in report["losses"].items())
        lines.append(f"rank {rank}: {losses}, gradient norm {report['norm']:.6g}; its batch was")
        lines += [f"  {file}" for file in report["files"]]
    lines.append(
        "Look at these files (datasets/check.py), or lower SOLVER.BASE_LR, clip gradients (SOLVER.CLIP_GRADIENTS), or "
        "switch SOLVER.AMP.ENABLED off"
    )
    raise NonFiniteLossError("\n".join(lines))
