"""Prototypes of classes: means of what the decoder says of a class's labelled pixels, brought to few dimensions."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from ..array_file import read_arrays
from ..atomic_file import write_atomically
from ..label_space import IGNORE
from ..user_error import ConfigError
from .catalog import catalog_space
from .class_means import class_sums

if TYPE_CHECKING:
    from .heads.entropy import EntropyHead

__all__ = ["PROTOTYPES_FILE", "PixelFeatures", "PixelStatistics", "PrototypeSource", "Prototypes", "principal_axes"]

logger = logging.getLogger(__name__)

#: What was measured, in OUTPUT_DIR.
PROTOTYPES_FILE = "prototypes.npz"
#: Weights of a backbone alone begin so.
_BACKBONES = ("package://", "timm://")
#: Pixels of a class that k-means sees; where there are more, every second one is dropped again and again.
_MAX_SAMPLE = 4096


@dataclass(frozen=True)
class Prototypes:
    """Prototypes of all datasets.

    Attributes:
        classes: dataset -> names of its classes.
        vectors: dataset -> (C, K, d) float32 of length 1; zero for a class without labelled pixels.
        projection: (d, D) float32: features minus ``centre`` -> embedding; None for random prototypes.
        centre: (D,) float32 mean of all pixel features.
        momentum: share that prototypes keep when they follow the labelled pixels of a step; 1 = they are frozen.
    """

    classes: Mapping[str, tuple[str, ...]]
    vectors: Mapping[str, np.ndarray]
    projection: np.ndarray | None = None
    centre: np.ndarray | None = None
    momentum: float = 1.0

    def save(self, path: str | os.PathLike) -> None:
        """Writes them to an ``.npz`` file."""
        arrays = {"projection": self.projection, "centre": self.centre, "momentum": np.array(self.momentum)}
        arrays |= {f"vectors_{dataset}": vectors for dataset, vectors in self.vectors.items()}
        arrays |= {f"classes_{dataset}": np.array(names) for dataset, names in self.classes.items()}
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Prototypes:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file is not one of those, or is damaged.
        """
        found = read_arrays(path, ConfigError)
        classes = {k.removeprefix("classes_"): tuple(v.tolist()) for k, v in found.items() if k.startswith("classes_")}
        try:
            vectors = {dataset: found[f"vectors_{dataset}"] for dataset in classes}
            momentum = float(found.get("momentum", 1.0))
            prototypes = cls(classes, vectors, found["projection"], found["centre"], momentum)
        except KeyError as missing:
            raise ConfigError(f"{path} does not hold prototypes: {missing}") from None
        if len({vectors.shape[1:] for vectors in prototypes.vectors.values()}) != 1:
            raise ConfigError(f"{path} does not hold prototypes of one size: {[v.shape for v in vectors.values()]}")
        return prototypes

    @property
    def shape(self) -> tuple[int, int]:
        """(K, d): prototypes per class, and their dimensions."""
        return next(iter(self.vectors.values())).shape[1:]


@dataclass(frozen=True)
class PrototypeSource:
    """Where prototypes come from.

    Attributes:
        statistics: ``""`` = measured on ``entries`` with the weights that training starts from; ``"random"`` = drawn,
            which is what USSS's code does when it is given no file; else a file (``.npz``) or a checkpoint with whose
            weights they are measured.
        entries: labelled catalog entries of the training sets.
        folder: where measured prototypes are written; "" = nowhere.
        start: ``MODEL.WEIGHTS``, for a warning where the decoder starts from random weights.
    """

    statistics: str = ""
    entries: Sequence[str] = ()
    folder: str = ""
    start: str | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> PrototypeSource:
        """By ``MODEL.SEM_SEG_HEAD.CLASS_STATISTICS`` and ``DATASETS.TRAIN``."""
        entries = [e for e in cfg.DATASETS.TRAIN if MetadataCatalog.get(e).get("annotation", "pixel") == "pixel"]
        return cls(cfg.MODEL.SEM_SEG_HEAD.CLASS_STATISTICS, tuple(entries), cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS)

    def module_settings(self) -> dict[str, Any]:
        """What a file says of the module that it is for: d, K and momentum; empty where there is no file."""
        if not self.statistics.endswith(".npz"):
            return {}
        found = Prototypes.load(self.statistics)
        return {"centroids": found.shape[0], "dim": found.shape[1], "momentum": found.momentum}

    def find(self, head: EntropyHead, run_over: Callable[..., Any], dim: int, centroids: int = 1) -> Prototypes:
        """Prototypes of a head's datasets; says in the log what they are.

        Args:
            head: with whose decoder they are measured.
            run_over: ``run_over(entry, evaluator, labels=True, embeddings=True, weights="")``.
            dim: d.
            centroids: K.

        Raises:
            ValueError: a file is of other classes or another shape.
        """
        classes = {dataset: head.own_space(dataset).classes for dataset in head.datasets}
        if self.statistics == "random":
            logger.warning("prototypes are RANDOM (CLASS_STATISTICS 'random'): they know nothing of the classes")
            return Prototypes(classes, {d: _random(len(names), centroids, dim) for d, names in classes.items()})
        if self.statistics.endswith(".npz"):
            return self._load(classes, dim, centroids)
        if self.statistics == "" and self.start is not None and (not self.start or self.start.startswith(_BACKBONES)):
            logger.warning(
                "prototypes are measured with a decoder of RANDOM weights (MODEL.WEIGHTS is %r): train on the labelled "
                "images first, and name that checkpoint in MODEL.SEM_SEG_HEAD.CLASS_STATISTICS or MODEL.WEIGHTS",
                self.start,
            )
        found = self._measure(head, classes, run_over, dim, centroids)
        if self.folder and comm.is_main_process():
            found.save(os.path.join(self.folder, PROTOTYPES_FILE))
        for dataset, vectors in found.vectors.items():
            missing = [name for name, own in zip(classes[dataset], vectors) if not own.any()]
            source = f"the weights of {self.statistics}" if self.statistics else "the weights that training starts from"
            logger.info("prototypes of %s: %d classes, measured with %s", dataset, len(vectors) - len(missing), source)
            if missing:
                logger.warning("%s: no labelled pixel, so no prototype, of %s", dataset, ", ".join(missing))
        return found

    def _load(self, classes: Mapping[str, tuple[str, ...]], dim: int, centroids: int) -> Prototypes:
        found = Prototypes.load(self.statistics)
        if dict(found.classes) != dict(classes):
            raise ConfigError(f"{self.statistics} is of {dict(found.classes)}, the model has {dict(classes)}")
        if found.shape != (centroids, dim):
            raise ConfigError(
                f"{self.statistics} has prototypes of shape {found.shape}, the model wants {(centroids, dim)}"
            )
        logger.info("prototypes are those of %s", self.statistics)
        return found

    def _measure(
        self,
        head: EntropyHead,
        classes: Mapping[str, tuple[str, ...]],
        run_over: Callable[..., Any],
        dim: int,
        centroids: int,
    ) -> Prototypes:
        """One pass over the labelled images of each dataset; the axes are those of the pixels of all datasets."""
        channels = head.trunk.out_channels
        parts: dict[str, PixelStatistics] = {}
        for entry in self.entries:
            dataset = catalog_space(entry)[0]
            evaluator = PixelFeatures(len(classes[dataset]), channels, sample=centroids > 1)
            result = run_over(entry, evaluator, labels=True, embeddings=True, weights=self.statistics)
            own = result["pixels"]
            parts[dataset] = parts[dataset] + own if dataset in parts else own
        count = sum(own.count for own in parts.values())
        if not count:
            raise ConfigError(f"prototypes need labelled pixels: there is none in {list(self.entries)}")
        centre = sum(own.sum for own in parts.values()) / count
        projection = principal_axes(sum(own.outer for own in parts.values()) / count - np.outer(centre, centre), dim)
        vectors = {}
        for dataset, names in classes.items():
            own = parts.get(dataset, PixelStatistics.empty(len(names), channels))
            vectors[dataset] = _prototypes(own, projection, centre, centroids)
        return Prototypes(classes, vectors, projection.astype(np.float32), centre.astype(np.float32))


@dataclass(frozen=True)
class PixelStatistics:
    """Sums over the labelled pixels of a dataset, over all processes.

    Attributes:
        class_sums: (C, D) float64 sums of the features at full size by class.
        class_counts: (C,) their pixels.
        sum: (D,) float64 sum over the labelled cells of the feature map.
        outer: (D, D) float64 sum of their outer products.
        count: number of these cells.
        sample: for each class (P, D) float32 features of some of its cells.
    """

    class_sums: np.ndarray
    class_counts: np.ndarray
    sum: np.ndarray
    outer: np.ndarray
    count: int
    sample: tuple[np.ndarray, ...] = ()

    @classmethod
    def empty(cls, num_classes: int, channels: int) -> PixelStatistics:
        """Nothing counted yet."""
        zeros = np.zeros((num_classes, channels))
        return cls(zeros, np.zeros(num_classes, np.int64), zeros.sum(0), np.zeros((channels, channels)), 0)

    def __add__(self, other: PixelStatistics) -> PixelStatistics:
        """Both together, of the same classes."""
        return PixelStatistics(
            self.class_sums + other.class_sums,
            self.class_counts + other.class_counts,
            self.sum + other.sum,
            self.outer + other.outer,
            self.count + other.count,
            tuple(np.concatenate(pair) for pair in zip(self.sample, other.sample)),  # none where one has none
        )


class PixelFeatures(DatasetEvaluator):
    """Gathers :class:`PixelStatistics` of one entry.

    Args:
        num_classes: C.
        channels: D.
        sample: whether features of single cells are kept, for k-means.
    """

    def __init__(self, num_classes: int, channels: int, sample: bool = False) -> None:
        self._classes, self._channels, self._keeps = num_classes, channels, sample
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._total = PixelStatistics.empty(self._classes, self._channels)
        self._sample = [_Thinned() for _ in range(self._classes)]

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Adds samples with ``sem_seg`` (H, W) local ids and what ``MultiDatasetSegmentor.embed`` says of them."""
        for sample, output in zip(inputs, outputs, strict=True):
            labels, embedding = torch.as_tensor(sample["sem_seg"]), output["embedding"]
            # Labels have the size of the file, embeddings that of what the network was shown.
            covers = [
                round(pixels * full / shown)
                for pixels, full, shown in zip(output["covers"], labels.shape, sample["image"].shape[-2:])
            ]
            by_class = class_sums(embedding[None], labels[None], self._classes, covers)
            ids = cell_labels(labels, embedding.shape[-2:], covers).to(embedding.device)  # (h, w)
            cells = embedding[:, ids != IGNORE].T.double()  # (P, D)
            sums = (tensor.cpu().numpy() for tensor in (*by_class, cells.sum(0), cells.T @ cells))
            self._total += PixelStatistics(*sums, len(cells))
            if self._keeps:
                for class_id, thinned in enumerate(self._sample):
                    thinned.add(embedding[:, ids == class_id].T.float().cpu().numpy())

    def evaluate(self) -> dict[str, PixelStatistics]:
        """``{"pixels": statistics}`` over all processes."""
        own = replace(self._total, sample=tuple(thinned.values(self._channels) for thinned in self._sample))
        return {"pixels": functools.reduce(PixelStatistics.__add__, comm.all_gather(own))}


class _Thinned:
    """At most a fixed number of vectors of a stream, evenly spread over it."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._stride, self._seen = 1, 0

    def add(self, vectors: np.ndarray) -> None:
        first = -self._seen % self._stride
        self._seen += len(vectors)
        if len(vectors) > first:
            self._parts.append(vectors[first :: self._stride])
        while sum(map(len, self._parts)) > _MAX_SAMPLE:
            self._parts = [np.concatenate(self._parts)[::2]]
            self._stride *= 2

    def values(self, channels: int) -> np.ndarray:
        return np.concatenate([np.zeros((0, channels), np.float32), *self._parts])


def cell_labels(labels: Tensor, shape: Sequence[int], covers: Sequence[int]) -> Tensor:
    """Label at the centre of each cell of a feature map, ``IGNORE`` where the cell lies in the padding.

    Args:
        labels: (H, W) integer ids.
        shape: (h, w) of the feature map.
        covers: (height, width) in pixels of the labels that the feature map spans from the upper left corner.

    Returns:
        (h, w) of the labels' type.
    """
    places = [((torch.arange(n) + 0.5) * span / n).long() for n, span in zip(shape, covers)]
    inside = [place < side for place, side in zip(places, labels.shape)]
    rows, columns = (place.clamp(max=side - 1) for place, side in zip(places, labels.shape))
    found = labels[rows][:, columns].clone()
    found[~(inside[0][:, None] & inside[1][None])] = IGNORE
    return found


def principal_axes(covariance: np.ndarray, dim: int) -> np.ndarray:
    """(d, D) float64 the directions in which pixel features differ most, by decreasing variance (PCA).

    The axes are those of *pixels*: class means alone are fewer than the dimensions that are wanted. The sign of an axis
    is chosen so that its largest entry is positive.

    Args:
        covariance: (D, D) of pixel features.
        dim: d, at most D.
    """
    _, axes = np.linalg.eigh(covariance)  # by increasing variance, in columns
    axes = axes[:, ::-1][:, :dim].T
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    return axes * np.sign(largest)


def _prototypes(own: PixelStatistics, projection: np.ndarray, centre: np.ndarray, centroids: int) -> np.ndarray:
    """(C, K, d) float32 of length 1."""
    vectors = np.zeros((len(own.class_counts), centroids, len(projection)))
    for class_id, count in enumerate(own.class_counts):
        if not count:
            continue
        sample = own.sample[class_id] if own.sample else ()
        if centroids > 1 and len(sample) > centroids:
            vectors[class_id] = _cluster((sample - centre) @ projection.T, centroids)
        else:
            vectors[class_id] = (own.class_sums[class_id] / count - centre) @ projection.T
    lengths = np.linalg.norm(vectors, axis=2, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)


def _cluster(points: np.ndarray, centroids: int) -> np.ndarray:
    """(K, d) centres of k-means, always the same for the same points."""
    from sklearn.cluster import KMeans  # optional: only for several centroids

    return KMeans(centroids, n_init=4, random_state=0).fit(points).cluster_centers_


def _random(classes: int, centroids: int, dim: int) -> np.ndarray:
    vectors = torch.randn(classes, centroids, dim)
    return torch.nn.functional.normalize(vectors, dim=2).numpy()
