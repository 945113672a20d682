"""Evaluating a dataset that the model was not trained on: ``MODEL.DATASET_NORM.UNSEEN`` put into effect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from ..data.mapper import EvaluationMapper
from ..evaluation import Coverage
from ..modeling.heads import registered_heads
from ..modeling.norm import CHOICES, Show, UnseenChoice, is_unseen, unseen_dataset
from ..yaml_file import did_you_mean

__all__ = ["NUM_IMAGES", "coverage_of", "ready_for", "unseen_problems"]

#: Images that are looked at, spread evenly over the set; the same on every process, so that all choose alike.
NUM_IMAGES = 16


@contextmanager
def ready_for(
    cfg: CfgNode, model: nn.Module, entry: str, show: Show, number: int = NUM_IMAGES
) -> Iterator[UnseenChoice | None]:
    """Context in which a model can score an entry of the catalog, whether it was trained on its dataset or not.

    Args:
        cfg: ``MODEL.DATASET_NORM.UNSEEN`` and ``INPUT`` are used.
        model: a segmentor, not wrapped.
        entry: name in the catalogs; labels are not looked at.
        show: the pass over images that are looked at, see :func:`.branch_distances`.
        number: of these images.

    Yields:
        What was chosen for an unseen dataset, else None.
    """
    metadata, choice = MetadataCatalog.get(entry), cfg.MODEL.DATASET_NORM.UNSEEN
    samples = []
    if is_unseen(model, metadata.dataset) and choice in CHOICES[1:]:
        dicts, mapper = DatasetCatalog.get(entry), EvaluationMapper(cfg)
        number = min(number, len(dicts))
        samples = [mapper(dicts[i * len(dicts) // number]) for i in range(number)]
    with unseen_dataset(model, metadata.dataset, metadata.label_space, choice, samples, show) as chosen:
        yield chosen


def coverage_of(model: nn.Module, entry: str) -> Coverage:
    """Whether a segmentor was trained on an entry's dataset, and which of its classes it can never predict.

    For an unseen dataset that needs it, to be called inside :func:`ready_for`.
    """
    metadata = MetadataCatalog.get(entry)
    seen = not is_unseen(model, metadata.dataset)
    return Coverage(seen, tuple(model.unnameable(metadata.dataset, metadata.label_space)))


def unseen_problems(cfg: CfgNode) -> Iterator[str]:
    """What is wrong with ``MODEL.DATASET_NORM.UNSEEN``, one line each, before anything is trained."""
    registered = set(DatasetCatalog.list())
    trained = [MetadataCatalog.get(name).dataset for name in cfg.DATASETS.TRAIN if name in registered]
    choice, known = cfg.MODEL.DATASET_NORM.UNSEEN, [*CHOICES, *dict.fromkeys(trained)]
    if choice not in known:
        yield f"MODEL.DATASET_NORM.UNSEEN is {choice!r}: choose one of {known}{did_you_mean(choice, known)}"
    head = registered_heads().get(cfg.MODEL.SEM_SEG_HEAD.NAME)
    needs_choice = cfg.MODEL.DATASET_NORM.ENABLED or not (head and head.scores_any_space)
    for name in cfg.DATASETS.TEST if choice == "error" and needs_choice else ():
        if name in registered and MetadataCatalog.get(name).dataset not in trained:
            yield (
                f"DATASETS.TEST: {name} is of a dataset that is not in DATASETS.TRAIN; which batch norm and classifier "
                f"it uses is not guessed: set MODEL.DATASET_NORM.UNSEEN to one of {known[1:]}"
            )
