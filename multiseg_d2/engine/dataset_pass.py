"""One pass of a model over a catalog entry: evaluation, labelling, class statistics are evaluators of this."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from ..checkpoint.weights import borrowed_weights
from ..data import loader
from ..data.mapper import EvaluationMapper
from ..evaluation import MultiDatasetEvaluator
from ..modeling.augmented import build_inference_model
from ..modeling.norm import UnseenChoice
from ..progress import progress
from .ranks import broadcast, unwrapped
from .signals import leave_if_asked
from .unseen import NUM_IMAGES, coverage_of, ready_for

__all__ = ["PassLoader", "evaluating", "run_over"]

logger = logging.getLogger(__name__)

#: Images after which the processes ask each other whether a signal came.
_CHUNK = 8


class PassLoader(Sized, Iterable[list[dict[str, Any]]], Protocol):
    """Lists of samples, this process's share of an entry; its length is their number."""


def run_over(
    cfg: CfgNode,
    model: nn.Module,
    entry: str,
    evaluator: Any,
    *,
    batches: PassLoader | None = None,
    views: bool = True,
    labels: bool = False,
    embeddings: bool = False,
    weights: str = "",
    amp_dtype: torch.dtype | None = None,
    on_ready: Callable[[UnseenChoice | None], object] = lambda _choice: None,
    looked_at: int = NUM_IMAGES,
) -> Any:
    """Shows every image of a catalog entry to a model, and image and scores to an evaluator.

    The model is in evaluation mode meanwhile, with the buffers of rank 0 on every process, and ready for the entry's
    dataset even where it was not trained on it (``MODEL.DATASET_NORM.UNSEEN``). Each process handles its share of the
    images; putting these together is the evaluator's business. Progress is shown with the time that is left.
    Inside :meth:`.StopSignals.all_saved` a signal to any process ends the pass, and the run, on all of them.

    Args:
        cfg: ``INPUT``, ``TEST`` and ``DATALOADER`` are used.
        model: a segmentor, wrapped in ``DistributedDataParallel`` or not.
        entry: name in Detectron2's catalogs.
        evaluator: a Detectron2 ``DatasetEvaluator``: ``reset()``, ``process(inputs, outputs)`` per list of samples,
            and ``evaluate()``, called once on all processes.
        batches: instead of the entry's test loader.
        views: score by the scales, mirrored images and windows of ``TEST``; False = one plain pass per image.
        labels: the entry's test loader gives the samples their ``sem_seg``; an evaluator in ``modeling`` needs them.
        embeddings: the evaluator gets what ``embed()`` returns instead of scores.
        weights: checkpoint whose weights the model has for this pass; "" = its own.
        amp_dtype: ``torch.bfloat16`` or ``torch.float16`` for autocast; None = full precision.
        on_ready: told, before the first image, what was chosen for a dataset that the model was not trained on.
        looked_at: number of images by which that is chosen, in passes of their own.

    Returns:
        What ``evaluate()`` returns, {} in place of None.

    Raises:
        Stopped: see above.
    """
    plain = unwrapped(model)
    broadcast(plain.buffers())
    if batches is None:
        batches = loader.build_test_loader(cfg, entry, EvaluationMapper(cfg, labels=labels))
    shown = build_inference_model(cfg, plain) if views and not embeddings else plain
    score = _in_precision(plain.embed if embeddings else shown, next(plain.parameters()).device.type, amp_dtype)
    look = partial(_show, f"{entry} (statistics of norms)", "groups of images", plain)
    with (
        borrowed_weights(plain, weights),
        evaluating(shown),
        torch.no_grad(),
        ready_for(cfg, plain, entry, look, looked_at) as choice,
    ):
        on_ready(choice)
        if isinstance(evaluator, MultiDatasetEvaluator):
            evaluator.coverage = coverage_of(plain, entry)
        evaluator.reset()
        _show(entry, "images", score, batches, evaluator.process)
        results = evaluator.evaluate()
    return {} if results is None else results


def _in_precision(model: Callable[[list[Any]], Any], device_type: str, dtype: torch.dtype | None):
    """The model under autocast, and nothing but the model."""

    def score(samples: list[Any]) -> Any:
        with torch.autocast(device_type, dtype=dtype) if dtype else nullcontext():
            return model(samples)

    return score


def _show(
    title: str,
    unit: str,
    model: Callable[[list[Any]], Any],
    batches: PassLoader,
    process: Callable[[list[Any], Any], object] = lambda _samples, _outputs: None,
) -> None:
    """Shows this process's lists of samples to a model, with progress, until a signal comes to any process."""
    unit = f"{unit} on this process" if comm.get_world_size() > 1 else unit
    rest = iter(batches)
    with progress(title, len(batches), unit, logger, bar=comm.is_main_process()) as one_more:
        for start in range(0, max(comm.all_gather(len(batches))), _CHUNK):  # equally often on all processes
            leave_if_asked()
            for _ in range(min(_CHUNK, len(batches) - start)):
                samples = next(rest)
                process(samples, model(samples))
                one_more()
        leave_if_asked()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in which all parts of a model are in evaluation mode; then each is as it was, whatever happened."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
