"""Relations between classes of a union: what a label says about classes that its dataset does not have. numpy only.

For each dataset a (U, U) int8 matrix: row = the labelled class, column = the class that is scored. ``POSITIVE``: a
pixel with this label is that class as well; ``NEGATIVE``: it is not; ``NULL``: the label does not say, and there is no
loss.

Source: UniSeg (ECCV 2022), class-relational loss; the rule and its threshold reproduce the relations that its authors
released. Relations from a taxonomy are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .array_file import read_arrays
from .atomic_file import write_atomically
from .unified import NO_CLASS, UnifiedClasses
from .user_error import ConfigError

__all__ = [
    "ClassResponses",
    "NEGATIVE",
    "NULL",
    "POSITIVE",
    "THRESHOLD",
    "measured_relations",
    "no_relations",
    "relation_pairs",
    "relations_text",
    "taxonomy_relations",
]

POSITIVE, NEGATIVE, NULL = 1, 0, -1
#: Least mean cosine of a relation: that of UniSeg's HRNet-W18 with a classifier of scale 20. It depends on both.
THRESHOLD = -0.08


def no_relations(present: np.ndarray) -> np.ndarray:
    """Relations of a dataset if nothing is known beyond its labels; the relational loss is then the null loss.

    Args:
        present: (U,) bool, the classes of the dataset.

    Returns:
        (U, U) int8; rows of classes that the dataset does not have are 0 and not used.
    """
    size = len(present)
    relations = np.where(present, NEGATIVE, NULL).astype(np.int8)[None].repeat(size, 0)
    np.fill_diagonal(relations, POSITIVE)
    relations[~present] = 0
    return relations


def measured_relations(
    responses: np.ndarray, pixels: np.ndarray, present: np.ndarray, threshold: float = THRESHOLD
) -> np.ndarray:
    """Relations of one dataset by the mean responses of its labelled pixels.

    Args:
        responses: (U, U) mean cosine of the pixels of class i (row) with the classifier of class j.
        pixels: (U,) number of pixels behind each row; a class of the dataset without any keeps :func:`no_relations`.
        present: (U,) bool, the classes of the dataset.
        threshold: a class is related if it responds more than the label's own class and more than this.

    Returns:
        (U, U) int8; rows of classes that the dataset does not have are 0 and not used.
    """
    relations = no_relations(present)
    related = (responses > np.diagonal(responses)[:, None]) & (responses > threshold)
    relations[related & (present & (pixels > 0))[:, None]] = POSITIVE
    return relations


@dataclass(frozen=True, eq=False)
class ClassResponses:
    """What a model's classifiers answer to the labelled pixels of its training sets.

    Attributes:
        classes: names of the U classes of the union.
        present: dataset -> (U,) bool, its classes.
        responses: dataset -> (U, U) float64, mean cosine of the pixels of class i (row) with the classifier of class j.
        pixels: dataset -> (U,) int64, pixels behind each row.
        threshold: see :func:`measured_relations`.
    """

    classes: tuple[str, ...]
    present: Mapping[str, np.ndarray]
    responses: Mapping[str, np.ndarray]
    pixels: Mapping[str, np.ndarray]
    threshold: float = THRESHOLD

    def relations(self) -> dict[str, np.ndarray]:
        """Dataset -> (U, U) int8, by :func:`measured_relations`."""
        return {
            d: measured_relations(self.responses[d], self.pixels[d], self.present[d], self.threshold)
            for d in self.present
        }

    def save(self, path: str | Path) -> None:
        """Writes an ``.npz`` file."""
        arrays = {"classes": np.array(self.classes), "datasets": np.array(list(self.present))}
        arrays["threshold"] = np.array(self.threshold)
        for kind in _KINDS:
            arrays |= {f"{kind}_{dataset}": array for dataset, array in getattr(self, kind).items()}
        write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))

    @classmethod
    def load(cls, path: str | Path) -> ClassResponses:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file is not one of those.
        """
        file = read_arrays(path, ConfigError)
        try:
            datasets = file["datasets"].tolist()
            kinds = {kind: {d: file[f"{kind}_{d}"] for d in datasets} for kind in _KINDS}
            return cls(tuple(file["classes"].tolist()), **kinds, threshold=float(file["threshold"]))
        except (KeyError, TypeError, ValueError) as problem:
            raise ConfigError(f"{path} does not hold class responses: {problem}") from None


_KINDS = ("present", "responses", "pixels")


def taxonomy_relations(union: UnifiedClasses, meanings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Relations by what a taxonomy says of the classes.

    A label inside a class is a positive of it, a label disjoint from it a negative; where they overlap, where the label
    is the wider one, or where the meaning of either is unknown, it says nothing. Classes of the label's own dataset are
    negatives unless they contain it: a pixel of theirs would bear their label. A union class whose datasets mean
    different things by it (possible by exact names) contains or excludes a label only if it does so in all of them; if
    it contains it in some, nothing is said.

    Args:
        union: the classes.
        meanings: dataset -> (C, L) bool, universal classes that each class covers; all False where that is unknown.

    Returns:
        dataset -> (U, U) int8; rows of classes that the dataset does not have are 0 and not used.
    """
    width = max(meaning.shape[1] for meaning in meanings.values())
    meanings = {d: np.pad(m, ((0, 0), (0, width - m.shape[1]))) for d, m in meanings.items()}
    narrow, wide, known = _extents(union, meanings, width)
    result = {}
    for k, dataset in enumerate(union.datasets):
        relations = no_relations(union.present[k])
        for row, u in zip(meanings[dataset], union.tables[dataset].tolist()):
            if u != NO_CLASS and row.any():
                relations[u, known & ~(row & ~wide).any(1)] = NULL
                relations[u, known & ~(row & ~narrow).any(1)] = POSITIVE
                relations[u, known & ~(row & wide).any(1)] = NEGATIVE
                relations[u, u] = POSITIVE
        result[dataset] = relations
    return result


def relations_text(
    classes: Sequence[str], relations: Mapping[str, np.ndarray], measured: ClassResponses | None = None
) -> str:
    """A listing for people: every relation by dataset, and, if measured, how the threshold lies among the responses."""
    lines = []
    for dataset, matrix in relations.items():
        pairs = relation_pairs(matrix)
        lines.append(f"{dataset}: {len(pairs) or 'no'} relation{'s' * (len(pairs) != 1)}")
        for i, j in pairs:
            if measured is not None:
                row = measured.responses[dataset][i]
                cosine = f"  {row[j]:+.3f}, own {row[i]:+.3f}, {int(measured.pixels[dataset][i])} pixels"
            else:
                cosine = ""
            lines.append(f"  {classes[i]} -> {classes[j]}{cosine}")
    if measured is not None:
        lines += ["", *_distribution(measured)]
    return "\n".join(lines)


def _distribution(measured: ClassResponses, width: float = 0.05) -> list[str]:
    """Histogram of the responses that exceed those of the label's own class: what the threshold divides."""
    found = []
    for dataset, responses in measured.responses.items():
        above = responses > np.diagonal(responses)[:, None]
        found.append(responses[above & (measured.pixels[dataset] > 0)[:, None]])
    values = np.concatenate(found) if found else np.zeros(0)
    lines = [f"mean cosines above that of the label's own class ({values.size}; related above {measured.threshold:g}):"]
    cut = measured.threshold
    # Bins that meet at the threshold, so that it lies between two lines.
    below, over = int(np.ceil((cut + 1) / width)), int(np.ceil((1 - cut) / width))
    edges = cut + width * np.arange(-below, over + 1)
    counts, _ = np.histogram(values, edges)
    if not values.size:
        return lines
    for b in range(np.flatnonzero(counts)[0], np.flatnonzero(counts)[-1] + 1):
        if b == below:
            lines.append(f"  ------ threshold {cut:+.2f} ------")
        bar = "#" * int(np.ceil(40 * counts[b] / counts.max()))
        lines.append(f"  {edges[b]:+.2f} to {edges[b + 1]:+.2f} {counts[b]:6d} {bar}")
    return lines


def _extents(union: UnifiedClasses, meanings: Mapping[str, np.ndarray], width: int) -> tuple[np.ndarray, ...]:
    """What all datasets mean by each union class, what any of them means (U, L), and whether all say it (U,)."""
    narrow, wide = np.ones((union.size, width), bool), np.zeros((union.size, width), bool)
    known = np.ones(union.size, bool)
    for dataset, meaning in meanings.items():
        for row, u in zip(meaning, union.tables[dataset].tolist()):
            if u != NO_CLASS:
                narrow[u] &= row
                wide[u] |= row
                known[u] &= bool(row.any())
    return narrow, wide, known


def relation_pairs(relations: np.ndarray) -> list[tuple[int, int]]:
    """(labelled class, other class that is positive as well) of every relation beyond the diagonal, in row order."""
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(relations == POSITIVE)) if i != j]
