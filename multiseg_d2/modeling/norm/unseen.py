"""A dataset that a model was not trained on: which batch norm it uses, and which classifier.

CDCL leaves both open. Five answers, by ``MODEL.DATASET_NORM.UNSEEN``: the branch of the *nearest* dataset by the
statistics of the norms' inputs, the *average* of all branches, the nearest branch with statistics *reestimate*-d on the
unseen images, that of a *named* dataset, or an *error*. The classifier is a question of its own, unless the head can
score the wanted classes by itself: that of the named dataset, else the one that can name most of the wanted classes by
the taxonomy (the nearest of several).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ...label_space import LabelSpace
from ...sample import Sample
from ...yaml_file import did_you_mean
from ..translate import StandIn, unreached
from .conversion import dataset_norms
from .dataset_norm import DatasetBatchNorm2d, DatasetBranchError
from .statistics import InputStatistics, Show, branch_distances, posing_as, shown_to

__all__ = ["CHOICES", "UnseenChoice", "average_branch", "is_unseen", "unseen_dataset"]

logger = logging.getLogger(__name__)

#: Values of ``MODEL.DATASET_NORM.UNSEEN`` beside the names of datasets.
CHOICES = ("error", "nearest", "average", "reestimate")


@dataclass(frozen=True)
class UnseenChoice:
    """What an unseen dataset uses.

    Attributes:
        dataset: the unseen one.
        norm: where its norm branches come from, in words.
        classifier: dataset whose classifier scores it, where the head cannot do so by itself.
        unnameable: classes of the unseen dataset that can never be predicted.
        distances: trained dataset -> distance of the norms' inputs; empty where none was measured.
    """

    dataset: str
    norm: str
    classifier: str
    unnameable: tuple[str, ...] = ()
    distances: dict[str, float] = field(default_factory=dict)


def is_unseen(model: nn.Module, dataset: str) -> bool:
    """Whether a segmentor was trained without this dataset."""
    return dataset not in model.sem_seg_head.datasets


@contextmanager
def unseen_dataset(
    model: nn.Module,
    dataset: str,
    space: LabelSpace,
    choice: str,
    samples: Sequence[Sample] = (),
    show: Show | None = None,
) -> Iterator[UnseenChoice | None]:
    """Makes a model usable on a dataset that it was not trained on, inside the context; then it is as before.

    Args:
        model: a segmentor; what the dataset uses is put into its ``stand_ins``.
        dataset: name of the dataset. For one that the model was trained on, nothing is done.
        space: its label space.
        choice: one of :data:`CHOICES`, or the name of a trained dataset.
        samples: some images of the dataset, as a test loader gives them; labels are not looked at. Unused for a named
            dataset.
        show: how images are shown to the model, see :func:`.branch_distances`.

    Yields:
        What was chosen; None for a trained dataset.

    Raises:
        DatasetBranchError: the choice is "error" or unknown, or needs images and there are none.
    """
    trained, layers = tuple(model.sem_seg_head.datasets), [layer for _, layer in dataset_norms(model)]
    if not is_unseen(model, dataset) or (choice == "error" and not layers):
        yield None  # the norms are shared, and whether the classifier can name the classes is for the head to say
        return
    _check(dataset, choice, trained, bool(samples) or not layers)
    own_space, was_training = model.sem_seg_head.own_space, model.training
    model.eval()
    try:
        measured = layers and choice not in trained
        distances = branch_distances(model, samples, show) if measured else {}
        nearest = min(distances, key=distances.get) if measured else choice
        branches, norm = _branches(layers, nearest, choice)
        classifier = choice
        if choice not in trained:  # of those that can name most classes the nearest
            missing = {name: len(unreached(own_space(name), space)) for name in trained}
            classifier = min(trained, key=lambda name: (missing[name], distances.get(name, 0.0)))
        model.stand_ins[dataset] = StandIn(own_space(classifier), branches)
        if choice == "reestimate" and layers:
            _reestimate(model, dataset, nearest, samples, show or shown_to(model))
            norm += f", statistics of {len(samples)} of its own images"
        result = UnseenChoice(dataset, norm, classifier, model.unnameable(dataset, space), distances)
        _log(result, space)
        model.train(was_training)
        yield result
    finally:
        model.stand_ins.pop(dataset, None)
        model.train(was_training)


def _check(dataset: str, choice: str, trained: Sequence[str], has_images: bool) -> None:
    known = [*CHOICES, *trained]
    if choice == "error":
        raise DatasetBranchError(
            f"the model was trained on {list(trained)}, not on {dataset!r}. Which batch norm and classifier to use is "
            f"not guessed: set MODEL.DATASET_NORM.UNSEEN to one of {known[1:]} (tools/compare_unseen.py compares them)"
        )
    if choice not in known:
        raise DatasetBranchError(
            f"MODEL.DATASET_NORM.UNSEEN is {choice!r}: choose of {known}{did_you_mean(choice, known)}"
        )
    if choice not in trained and not has_images:
        raise DatasetBranchError(f"MODEL.DATASET_NORM.UNSEEN {choice!r} looks at images of {dataset!r}, and got none")


def _log(choice: UnseenChoice, space: LabelSpace) -> None:
    logger.info(
        "%s was not trained on: norm %s, classifier of %s, which can name %d of %d classes",
        *(choice.dataset, choice.norm, choice.classifier),
        *(space.num_classes - len(choice.unnameable), space.num_classes),
    )
    if choice.distances:
        logger.info("distances: %s", ", ".join(f"{k} {v:.3f}" for k, v in choice.distances.items()))


def _branches(layers: Sequence[DatasetBatchNorm2d], donor: str, choice: str) -> tuple[dict[nn.Module, nn.Module], str]:
    """The branch that every layer uses, and what it is, in words."""
    if not layers:
        return {}, "shared by all datasets"
    if choice == "average":
        return {layer: average_branch(layer) for layer in layers}, f"average of {', '.join(layers[0].datasets)}"
    if choice == "reestimate":  # copies, to be changed
        return {layer: copy.deepcopy(layer.branches[donor]) for layer in layers}, f"of {donor}"
    return {layer: layer.branches[donor] for layer in layers}, f"of {donor}"


@torch.no_grad()
def average_branch(layer: DatasetBatchNorm2d) -> nn.BatchNorm2d:
    """A branch with the mean of the affine parameters, and the statistics of all datasets put together.

    The variance is that of the equally weighted mixture: mean of the variances plus variance of the means.
    """
    branches = list(layer.branches.values())
    result = copy.deepcopy(branches[0])
    for entry in ("weight", "bias"):
        if getattr(result, entry) is not None:
            getattr(result, entry).copy_(torch.stack([getattr(b, entry) for b in branches]).mean(0))
    means = torch.stack([b.running_mean for b in branches]).double()  # (K, C)
    variances = torch.stack([b.running_var for b in branches]).double()
    result.running_mean.copy_(means.mean(0))
    result.running_var.copy_(variances.mean(0) + means.var(0, unbiased=False))
    return result


def _reestimate(model: nn.Module, dataset: str, donor: str, samples: Sequence[Sample], show: Show) -> None:
    """Replaces the running statistics of branches by those of images that are normalised by their own statistics.

    What is stored is pooled over all images, so the variance between them is in it. A batch with one value per channel
    (a pooled pyramid level of a single image) cannot be normalised by itself: there the donor's statistics serve.
    """
    layers, branches = dict(dataset_norms(model)), model.stand_ins[dataset].branches

    def choose_mode(layer: DatasetBatchNorm2d, inputs: tuple[torch.Tensor, ...]) -> None:
        branches[layer].train(inputs[0].numel() // inputs[0].shape[1] > 1)

    handles = [layer.register_forward_pre_hook(choose_mode) for layer in layers.values()]
    statistics = InputStatistics(model)
    try:
        with statistics.open():
            show(posing_as(samples, dataset, model.stand_ins[dataset].donor))
    finally:
        for handle in handles:
            handle.remove()
    for path, layer in layers.items():
        branch, old = branches[layer].eval(), layer.branches[donor]
        mean, var = statistics.gaussians().get(path, (old.running_mean, old.running_var))
        branch.running_mean.copy_(mean)
        branch.running_var.copy_(var)
        branch.num_batches_tracked.copy_(old.num_batches_tracked)
