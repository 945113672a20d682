"""The training step, in one place: batch, losses, gradients, checks, update."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..label_space import IGNORE
from ..user_error import UserError
from .ranks import average_gradients, unwrapped
from .solver import load_optimizer_state

__all__ = ["STEP_MODES", "NonFiniteLossError", "TrainStep", "seed_step"]

logger = logging.getLogger(__name__)

Sample = dict[str, Any]
Losses = dict[str, Tensor]

STEP_MODES = ("fused", "sequential", "per_entry")
#: Steps in a row that the scaler of float16 may skip: from its first scale, 2 ** 16, down to 2 ** -4. Gradients that
#: overflow even then are not finite by themselves.
_MAX_SKIPPED = 20


class NonFiniteLossError(UserError, FloatingPointError):
    """A loss or a gradient is NaN or infinite; raised on all processes."""


def seed_step(seed: int, step: int, rank: int | None = None) -> None:
    """Seeds torch (CPU and GPU), NumPy and ``random`` from (seed, step, rank) alone.

    Dropout and whatever else a model draws is then the same in a resumed run, with no generator state to save.

    Args:
        seed: of the run, >= 0.
        step: >= 0.
        rank: of this process; None looks it up.
    """
    rank = comm.get_rank() if rank is None else rank
    word, short = np.random.SeedSequence((seed, step, rank)).generate_state(2, np.uint64)
    torch.manual_seed(int(word) >> 1)
    np.random.seed(int(short) & 0xFFFFFFFF)  # noqa: NPY002  (other people's code may draw from it)
    random.seed(int(short))


class TrainStep:
    """One optimizer update from one batch, where a batch is a list of samples of any datasets.

    Modes: ``"fused"`` runs one forward and one backward pass over all datasets. ``"sequential"`` runs one pass per
    dataset and adds up the gradients, which needs the memory of one dataset only. Every pass is told the labelled
    pixels of the *whole* step, so both modes give the same gradients, whatever a head divides its losses by (up to the
    order of float additions, and to what dropout draws), as long as no image's result depends on another dataset's
    images. A batch norm *shared* by the datasets breaks that condition in training: it normalises over all images of
    the pass, so fused and sequential are then two different methods. ``"per_entry"`` runs one pass per entry of
    ``DATASETS.TRAIN``, so that labelled and unlabelled images of one dataset are normalised apart; an entry without
    annotations goes through in chunks, each weighted by its share of the entry's images in the step.

    Over several processes, the gradient is the mean of the processes' gradients: by ``DistributedDataParallel`` in a
    fused step, by one explicit reduction after the last pass of a sequential one.

    Args:
        model: ``model(samples, num_valid=None)`` -> dict of ``loss_...`` scalars; where a step has several passes,
            ``num_valid`` are the labelled pixels of each dataset in the whole step, mean over the processes. Wrapped
            in ``DistributedDataParallel`` by the caller for the fused mode over several processes.
        optimizer: over the model's parameters.
        make_loader: first step -> iterable of this process's batches for that step, the next one, and so on.
        seed: of the run; what a step draws depends on (seed, step, rank) only.
        mode: one of :data:`STEP_MODES`.
        chunk: images of this process in one pass of an unlabelled entry, for ``"per_entry"``.
        amp_dtype: ``torch.bfloat16`` or ``torch.float16`` for autocast, None for full precision.
        clip: clips gradients in place, or None.

    Attributes:
        transforms: functions from the step's samples to those that are trained on (a teacher's labels, mixed images),
            called in order between the loader and the model. They may draw: the generators are seeded for the step.
        last_batch: what the last step was trained on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        make_loader: Callable[[int], Iterable[list[Sample]]],
        *,
        seed: int,
        mode: str = "fused",
        chunk: int = 1,
        amp_dtype: torch.dtype | None = None,
        clip: Callable[[Sequence[nn.Parameter]], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.make_loader = model, optimizer, make_loader
        self.seed, self.mode, self.chunk, self.amp_dtype, self.clip = seed, mode, chunk, amp_dtype, clip
        self.transforms: list[Callable[[list[Sample]], list[Sample]]] = []
        self._backward = self._fused if mode == "fused" else self._in_passes
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device_type = self.parameters[0].device.type
        self.scaler = _grad_scaler(self.device_type, enabled=amp_dtype == torch.float16)
        self.data_loader: Iterable[list[Sample]] | None = None
        self.last_batch: list[Sample] = []
        self._batches: Iterator[list[Sample]] | None = None
        self._unlabelled_batches: dict[str, int] = {}
        self._all_used = False  # whether that was looked at
        self._skipped = 0  # steps in a row, by the scaler

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
        samples = self._next_batch(step)
        data_time = time.perf_counter() - started

        seed_step(self.seed, step)
        for transform in self.transforms:
            samples = transform(samples)
        self.last_batch = samples
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(samples)
        report = self._report(losses, samples)
        reports = comm.all_gather(report | {"time": data_time, "stop": wants_stop()})
        self._stop_if_not_finite(step, reports)
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

    def _backward_pass(self, model: nn.Module, samples: list[Sample], factor: float = 1.0, **counts: Any) -> Losses:
        with torch.autocast(self.device_type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            losses = model(samples, **counts)
        if factor != 1.0:
            losses = {name: loss * factor for name, loss in losses.items()}
        self.scaler.scale(sum(losses.values())).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def _fused(self, samples: list[Sample]) -> Losses:
        losses = self._backward_pass(self.model, samples)
        if not self._all_used:
            self._check_all_used()
        return losses

    def _check_all_used(self) -> None:
        """Once, after the first pass: otherwise the second one ends with an error that names nothing."""
        self._all_used = True
        needed = isinstance(self.model, nn.parallel.DistributedDataParallel) and not self.model.find_unused_parameters
        named = unwrapped(self.model).named_parameters() if needed else ()
        if unused := [name for name, p in named if p.requires_grad and p.grad is None]:
            shown = ", ".join(unused[:10]) + (f", ... ({len(unused) - 10} more)" if len(unused) > 10 else "")
            raise RuntimeError(
                f"no loss depends on {len(unused)} trainable parameters: {shown}. A fused step of several processes "
                "needs a gradient of each. Build the model without them (MODEL.RESNETS.OUT_FEATURES, "
                "MODEL.SEM_SEG_HEAD.IN_FEATURES), freeze them, or set SOLVER.STEP_MODE to sequential, which needs none"
            )

    def _in_passes(self, samples: list[Sample]) -> Losses:
        """One pass after another; gradients add up, and are averaged over the processes at the end."""
        passes = _by_dataset(samples) if self.mode == "sequential" else _by_entry(samples, self.chunk)
        plans = comm.all_gather(([one.key for one in passes], _labelled_pixels(samples)))
        if any(keys != plans[0][0] for keys, _ in plans):
            passes = self._one_pass(samples, plans)
        total: Losses = {}
        for part in passes:
            num_valid = _mean_counts([counts for _, counts in plans], self.parameters[0].device)
            losses = self._backward_pass(unwrapped(self.model), part.samples, part.share, num_valid=num_valid)
            for name, loss in losses.items():
                total[name] = total[name] + loss if name in total else loss
        average_gradients(self.parameters)
        return total

    def _one_pass(self, samples: list[Sample], plans: list) -> list[_Pass]:
        """Where the processes hold images of different datasets (in a mixture), their passes would not meet.

        A pass may count pixels, and normalise, over all processes. Done in one pass, a sequential step means the same.
        """
        if self.mode == "per_entry":
            shown = "; ".join(f"rank {rank}: {keys}" for rank, (keys, _) in enumerate(plans))
            raise RuntimeError(
                "SOLVER.STEP_MODE 'per_entry': the processes would do different passes in this step. Let DATALOADER."
                f"SCHEDULE ('alternation' or 'fixed') give each of them equally many images of every entry. {shown}"
            )
        return [_Pass(None, samples)]

    def _report(self, losses: Losses, samples: list[Sample]) -> dict[str, Any]:
        """What the other processes need to know about this one's part of the step."""
        norm = _gradient_norm(self.parameters)
        *values, norm = torch.stack([*(loss.float() for loss in losses.values()), norm]).tolist()  # the one sync point
        report: dict[str, Any] = {"losses": dict(zip(losses, values, strict=True)), "norm": norm}
        if not all(map(_is_finite, [*values, norm])):
            report["files"] = [f"{s['dataset']}: {s.get('file_name', '?')} (draw {s.get('draw')})" for s in samples]
        return report

    def _stop_if_not_finite(self, step: int, reports: list[dict[str, Any]]) -> None:
        """Raises on all processes, or on none."""
        bad_loss = any(not all(map(_is_finite, report["losses"].values())) for report in reports)
        bad_gradient = any(not _is_finite(report["norm"]) for report in reports)
        if bad_loss or (bad_gradient and not self.scaler.is_enabled()):
            raise NonFiniteLossError(_not_finite(step, reports))
        # A float16 gradient may overflow: the scaler skips that step and lowers its scale. It must not go on so.
        self._skipped = self._skipped + 1 if bad_gradient else 0
        if self._skipped >= _MAX_SKIPPED:
            raise NonFiniteLossError(
                f"{_not_finite(step, reports)}. This is the {self._skipped}th step in a row that the scaler of float16 "
                f"had to skip (its scale is {self.scaler.get_scale():.3g}): SOLVER.AMP.DTYPE bfloat16 needs no scaler"
            )

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
        for dataset, count in _labelled_pixels(samples).items():
            if count == 0 and any("sem_seg" in s for s in samples if s["dataset"] == dataset):
                self._unlabelled_batches[dataset] = self._unlabelled_batches.get(dataset, 0) + 1
                if self._unlabelled_batches[dataset] == 1:
                    files = [s.get("file_name", "?") for s in samples if s["dataset"] == dataset]
                    logger.warning("all labels of %s are ignored in this batch, so its loss is 0: %s", dataset, files)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer and of the gradient scaler."""
        return {"optimizer": self.optimizer.state_dict(), "grad_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`, but for the optimizer's settings: those are the config's."""
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["grad_scaler"])


class _Pass(NamedTuple):
    """Samples that go through the network together; their losses count by ``share``."""

    key: Any
    samples: list[Sample]
    share: float = 1.0


def _by_dataset(samples: list[Sample]) -> list[_Pass]:
    names = sorted({sample["dataset"] for sample in samples})
    return [_Pass(name, [sample for sample in samples if sample["dataset"] == name]) for name in names]


def _by_entry(samples: list[Sample], chunk: int) -> list[_Pass]:
    """One pass per entry of the training data; several, of ``chunk`` images, where it has no annotations.

    Losses of unlabelled images are means over a pass, so a chunk counts by its share. Those of labels that a teacher
    made are sums divided by a count of the whole step: such chunks just add up.
    """
    passes = []
    for entry in sorted({sample["draw"].dataset for sample in samples}):
        own = [sample for sample in samples if sample["draw"].dataset == entry]
        taught = all(sample.get("pseudo") for sample in own)
        size = len(own) if any(map(_is_annotated, own)) and not taught else chunk
        parts = [own[start : start + size] for start in range(0, len(own), size)]
        passes += [_Pass((entry, i), part, 1.0 if taught else len(part) / len(own)) for i, part in enumerate(parts)]
    return passes


def _is_annotated(sample: Sample) -> bool:
    return "sem_seg" in sample or sample.get("annotation", "none") != "none"


def _labelled_pixels(samples: list[Sample]) -> dict[str, int]:
    counts = dict.fromkeys([sample["dataset"] for sample in samples], 0)
    for sample in samples:
        if "sem_seg" in sample:
            counts[sample["dataset"]] += int(torch.count_nonzero(sample["sem_seg"] != IGNORE))
    return counts


def _mean_counts(counts: list[dict[str, int]], device: torch.device) -> dict[str, Tensor]:
    names = sorted(set().union(*counts))
    sums = torch.tensor([sum(one.get(name, 0) for one in counts) for name in names], device=device)
    return dict(zip(names, (sums / len(counts)).unbind()))


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


def _not_finite(step: int, reports: list[dict[str, Any]]) -> str:
    lines = [f"step {step}: a loss or gradient is not finite. Nothing was updated in this step"]
    for rank, report in enumerate(reports):
        if "files" in report:
            losses = ", ".join(f"{name} {value:.6g}" for name, value in report["losses"].items())
            lines.append(f"rank {rank}: {losses}, gradient norm {report['norm']:.6g}; its batch was")
            lines += [f"  {file}" for file in report["files"]]
    lines.append(
        "Look at these files (datasets/check.py), or lower SOLVER.BASE_LR, clip gradients (SOLVER.CLIP_GRADIENTS), or "
        "switch SOLVER.AMP.ENABLED off"
    )
    return "\n".join(lines)
