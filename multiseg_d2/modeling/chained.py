"""Scores of a hierarchy as the classes of one label space: chained decisions, taken where they are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .score_maps import ScoreMap

__all__ = ["Chain", "ChainedScores"]


@dataclass(frozen=True)
class Chain:
    """How the classifiers of a tree lead to the classes of a label space.

    Attributes:
        channels: for each classifier (first, last + 1) among all scores, the last of them void.
        nodes: the node at which each classifier decides; a classifier comes after those above it.
        children: for each classifier the nodes that its channels stand for.
        answers: (nodes,) int64 local class of each node, -1 for none.
        num_classes: C.
        fill_void: whether void is replaced by the most probable class.
    """

    channels: Sequence[tuple[int, int]]
    nodes: Sequence[int]
    children: Sequence[Sequence[int]]
    answers: Tensor
    num_classes: int
    fill_void: bool = False

    def decide(self, scores: Tensor) -> Tensor:
        """Local class of each pixel, C for void, by the chain of decisions.

        The root's best child; where that owns a classifier, its best child, and so on. Where a classifier says void,
        the answer is that of the node itself, and void if that has none.

        Args:
            scores: (S, r, c).

        Returns:
            (r, c) int64.
        """
        node = torch.zeros(scores.shape[1:], dtype=torch.int64, device=scores.device)
        answers = self.answers.to(scores.device)
        for own, at, children in zip(self.channels, self.nodes, self.children):
            here = node == at
            if not bool(here.any()):
                continue
            usable = scores[own[0] : own[1] - (1 if self.fill_void else 0)]  # void is no choice where it is filled
            best = usable.argmax(dim=0)
            below = torch.tensor([*children, at], device=scores.device)  # void: stays at this node, and goes no deeper
            node = torch.where(here, below[best], node)
        label = answers[node]
        label = torch.where(label < 0, self.num_classes, label)
        if self.fill_void:
            probable = self.probabilities(scores)[: self.num_classes].argmax(dim=0)
            label = torch.where(label == self.num_classes, probable, label)
        return label

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probability of each class and of void, the products along the tree.

        Args:
            scores: (S, r, c).

        Returns:
            (C + 1, r, c), summing to 1.
        """
        count = int(self.answers.numel())
        mass = scores.new_zeros(count, *scores.shape[1:])
        mass[0] = 1
        result = scores.new_zeros(self.num_classes + 1, *scores.shape[1:])
        inner = set(self.nodes)
        for own, at, children in zip(self.channels, self.nodes, self.children):
            shares = scores[slice(*own)].softmax(dim=0) * mass[at]  # (K + 1, r, c)
            mass[list(children)] = shares[:-1]
            answer = int(self.answers[at])
            result[answer if answer >= 0 else self.num_classes] += shares[-1]
        for node, answer in enumerate(self.answers.tolist()):
            if node not in inner:
                result[answer if answer >= 0 else self.num_classes] += mass[node]
        return result.clamp_(max=1)  # rounding may take a sum beyond


class ChainedScores(ScoreMap):
    """The classes of a label space out of the scores of a hierarchy; the largest one is the chain's decision.

    One map answers by decisions. In a mean over several views the probabilities along the tree are averaged.

    Args:
        inner: (S, H, W) scores of all classifiers.
        chain: from these to the classes.
    """

    activation = "softmax"

    def __init__(self, inner: ScoreMap, chain: Chain) -> None:
        self.inner, self.chain = inner, chain
        self.channels, self.size = chain.num_classes + 1, inner.size

    @property
    def parts(self) -> list[Tensor | ScoreMap]:
        """See :class:`.ScoreMap`."""
        return [self.inner]

    def probabilities(self, rows: slice, columns: slice) -> Tensor:
        """See :class:`.ScoreMap`."""
        return self.chain.probabilities(self.inner.tile(rows, columns))

    def comparable(self, rows: slice, columns: slice) -> Tensor:
        """See :class:`.ScoreMap`."""
        decided = self.chain.decide(self.inner.tile(rows, columns))
        return torch.nn.functional.one_hot(decided, self.channels).movedim(-1, 0).float()

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Logarithms of the mean of probability and decision: the decision has the largest."""
        scores = self.inner.tile(rows, columns)
        decided = torch.nn.functional.one_hot(self.chain.decide(scores), self.channels).movedim(-1, 0)
        mean = (self.chain.probabilities(scores) + decided) / 2
        return mean.clamp_(min=torch.finfo(mean.dtype).tiny).log_()
