"""What pixels of several datasets look like to a network: a map by t-SNE, and which classes lie next to each other."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..atomic_file import write_atomically

__all__ = ["PixelSample", "draw_map", "nearest_classes", "tsne", "write_points"]

_MARKERS = "o^sDvP*X<>"


@dataclass(frozen=True)
class PixelSample:
    """Features of some labelled pixels.

    Attributes:
        features: (P, D).
        datasets: (P,) index into ``names``' keys, in their order.
        classes: (P,) local ids.
        names: dataset -> class names.
    """

    features: np.ndarray
    datasets: np.ndarray
    classes: np.ndarray
    names: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, pixels: Mapping[str, Sequence[np.ndarray]], names: Mapping[str, Sequence[str]], most: int):
        """At most so many pixels of each class, evenly spread.

        Args:
            pixels: dataset -> for each class (P_c, D) features.
            names: dataset -> class names, likewise.
            most: largest P_c that is kept.

        Raises:
            ValueError: there are no pixels.
        """
        features, datasets, classes = [], [], []
        for index, (_, by_class) in enumerate(pixels.items()):
            for class_id, vectors in enumerate(by_class):
                chosen = np.unique(np.linspace(0, len(vectors) - 1, min(most, len(vectors))).round().astype(int))
                features.append(vectors[chosen])
                datasets += [index] * len(chosen)
                classes += [class_id] * len(chosen)
        if not datasets:
            raise ValueError(f"no labelled pixel in {list(pixels)}")
        return cls(np.concatenate(features), np.array(datasets), np.array(classes), {d: names[d] for d in pixels})


def tsne(features: np.ndarray) -> np.ndarray:
    """(P, 2) places by t-SNE (scikit-learn), always the same for the same features; (P, D) features of any length."""
    from sklearn.manifold import TSNE  # optional: an extra of the package

    perplexity = min(30.0, max((len(features) - 1) / 3, 1.0))
    return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(features.astype(np.float64))


def nearest_classes(sample: PixelSample) -> list[dict[str, object]]:
    """For each class and other dataset the class there whose mean has the largest cosine, around the common mean.

    Returns:
        Rows with dataset, class, other dataset, nearest class and cosine.
    """
    centred = sample.features.astype(np.float64) - sample.features.mean(0)
    means = {}
    for index, (dataset, names) in enumerate(sample.names.items()):
        for class_id, name in enumerate(names):
            own = centred[(sample.datasets == index) & (sample.classes == class_id)]
            if len(own):
                mean = own.mean(0)
                means[dataset, name] = mean / max(np.linalg.norm(mean), 1e-12)
    rows = []
    for (dataset, name), mean in means.items():
        for other in sample.names:
            found = {n: float(mean @ m) for (d, n), m in means.items() if d == other}
            if other != dataset and found:
                best = max(found, key=found.__getitem__)
                rows.append({"dataset": dataset, "class": name, "other": other, "nearest": best, "cosine": found[best]})
    return rows


def write_points(path: str | os.PathLike, sample: PixelSample, places: np.ndarray) -> None:
    """CSV of x, y, dataset and class of every pixel."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["x", "y", "dataset", "class"])
    datasets = list(sample.names)
    for (x, y), index, class_id in zip(places, sample.datasets, sample.classes):
        dataset = datasets[index]
        writer.writerow([f"{x:.4f}", f"{y:.4f}", dataset, sample.names[dataset][class_id]])
    write_atomically(path, text.getvalue())


def draw_map(path: str | os.PathLike, sample: PixelSample, places: np.ndarray, title: str = "") -> None:
    """PNG of the places: a colour per class name, a marker per dataset, the name at the median of each class."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no display
    from matplotlib.figure import Figure

    names = sorted({name for own in sample.names.values() for name in own})
    colors = colormaps["nipy_spectral"](np.linspace(0.05, 0.95, len(names)))
    figure = Figure(figsize=(11, 8), dpi=110)
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    for index, (dataset, own) in enumerate(sample.names.items()):
        for class_id, name in enumerate(own):
            chosen = places[(sample.datasets == index) & (sample.classes == class_id)]
            if not len(chosen):
                continue
            color, marker = colors[names.index(name)], _MARKERS[index % len(_MARKERS)]
            axes.scatter(*chosen.T, s=14, color=color, marker=marker, alpha=0.7, linewidths=0)
            axes.annotate(name, np.median(chosen, 0), fontsize=7, color="black")
        axes.scatter([], [], color="grey", marker=_MARKERS[index % len(_MARKERS)], label=dataset)
    axes.legend(loc="best")
    axes.set(title=title, xticks=[], yticks=[])
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_atomically(path, buffer.getvalue())
