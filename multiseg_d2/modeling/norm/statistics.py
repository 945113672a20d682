"""What flows into the dataset norms of a model: Gaussians per channel, and how far they are from a branch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...label_space import LabelSpace
from ...sample import Sample
from .conversion import dataset_norms
from .dataset_norm import DatasetBatchNorm2d

__all__ = ["InputStatistics", "Show", "branch_distances", "divergence", "posing_as", "shown_to"]

#: Images of equal size that are put through the network together.
_CHUNK = 4


class InputStatistics:
    """Mean and variance of the input of every dataset norm, pooled over all images that pass while it is open.

    Sums are kept in float64 on the layer's device.

    Args:
        model: with dataset norms.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = dict(dataset_norms(model))
        self._sums: dict[str, Tensor] = {}  # path -> (3, C): number, sum, sum of squares

    @contextmanager
    def open(self) -> Iterator[InputStatistics]:
        """Measures what passes inside the context."""
        handles = [layer.register_forward_pre_hook(self._hook(path)) for path, layer in self._layers.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str):
        def measure(layer: DatasetBatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double().transpose(0, 1).flatten(1)  # (C, N * H * W)
            number = torch.full_like(x[:, 0], x.shape[1])
            sums = torch.stack([number, x.sum(1), x.square().sum(1)])
            self._sums[path] = self._sums.get(path, 0) + sums

        return measure

    def gaussians(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(C,) float64 mean and biased variance by path, of the layers that anything passed."""
        result = {}
        for path, (number, total, squares) in self._sums.items():
            mean = total / number
            result[path] = mean, (squares / number - mean.square()).clamp(min=0)
        return result


def divergence(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], eps: float) -> float:
    """How different two sets of per-channel Gaussians are: mean over channels of log(1 + J).

    J is the symmetric Kullback-Leibler divergence, KL(p, q) + KL(q, p); the logarithm keeps a few channels that are
    dead in one of them from deciding everything.

    Args:
        first: (C,) mean and (C,) variance.
        second: likewise.
        eps: added to the variances.

    Returns:
        Nats, 0 for equal ones.
    """
    p, q = first[1].double() + eps, second[1].double() + eps
    gap = (first[0].double() - second[0].double()).square()
    symmetric = 0.5 * ((p + gap) / q + (q + gap) / p) - 1  # (C,)
    return float(symmetric.clamp(min=0).log1p().mean())


#: Shows lists of samples to a model in evaluation mode; what it predicts is dropped.
Show = Callable[[Sequence[list[Sample]]], object]


def branch_distances(model: nn.Module, samples: Sequence[Sample], show: Show | None = None) -> dict[str, float]:
    """Distance of images to each dataset of a model, by the statistics of its norms.

    The images run through the network once per dataset, each time with that dataset's branches; at every norm the
    Gaussians of its inputs are compared with the branch's running statistics, and the layers are added up.

    Args:
        model: a segmentor in evaluation mode, with dataset norms.
        samples: images, as a test loader gives them.
        show: see :data:`Show`; None: one list after another (the engine has a pass with progress and signals).

    Returns:
        Dataset -> distance.
    """
    layers = dict(dataset_norms(model))
    distances = {}
    for dataset in next(iter(layers.values())).datasets:
        statistics = InputStatistics(model)
        with statistics.open():
            (show or shown_to(model))(posing_as(samples, dataset, model.sem_seg_head.own_space(dataset)))
        parts = []
        for path, measured in statistics.gaussians().items():
            branch = layers[path].branches[dataset]
            parts.append(divergence(measured, (branch.running_mean, branch.running_var), branch.eps))
        distances[dataset] = math.fsum(parts)
    return distances


def posing_as(samples: Sequence[Sample], dataset: str, space: LabelSpace) -> list[list[Sample]]:
    """Images as if they were a dataset's, in lists of a few of equal size, without labels.

    Args:
        samples: images of any dataset.
        dataset: whose branches the norms use.
        space: whose classes are scored.
    """
    by_size: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        image = sample["image"]
        same: Sample = {"image": image, "dataset": dataset, "label_space": space}  # scores stay at the image's size
        by_size.setdefault(tuple(image.shape), []).append(same)
    return [alike[i : i + _CHUNK] for alike in by_size.values() for i in range(0, len(alike), _CHUNK)]


def shown_to(model: nn.Module) -> Show:
    """The plainest :data:`Show`."""

    @torch.no_grad()
    def show(batches: Sequence[list[Sample]]) -> None:
        for batch in batches:
            model(batch)

    return show
