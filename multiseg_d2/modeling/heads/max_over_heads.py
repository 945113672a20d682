"""One classifier per dataset, and all of them together for an unseen one: the multi-head baseline of UniSeg's kind."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor

from ...label_space import LabelSpace
from ...unified import UnifiedClasses
from ..catalog import UnknownLabelSpaceError
from .per_dataset import PerDatasetHead

__all__ = ["MaxOverHeads"]

#: How far below the lowest score of a pixel a class is that no classifier names; see :mod:`.unified`.
_NEVER = 30.0


@SEM_SEG_HEADS_REGISTRY.register()
class MaxOverHeads(PerDatasetHead):
    """Trained as :class:`.PerDatasetHead`, of which it can load checkpoints; scores any label space.

    A class of an unseen dataset gets the largest probability that any classifier gives to a class of its meaning (by
    exact names: of its name); see :meth:`.UnifiedClasses.columns_of`. A classifier that lacks a class spreads its
    probability over those that it has.

    Source: UniSeg (ECCV 2022) names a multi-head baseline; how its heads are merged is our choice.
    """

    scores_any_space = True

    def logits(self, features: dict[str, Tensor], space: LabelSpace) -> Tensor:
        """Scores by the dataset's own classifier, else log-probabilities by all of them; see :class:`.Head`."""
        try:
            own = self.classifiers[self.classifier_key(space)]
        except UnknownLabelSpaceError:
            return self._by_all(self.trunk(features), space)
        return own(self.trunk(features))

    def unnameable(self, space: LabelSpace) -> tuple[str, ...]:
        """Classes of a label space that no classifier names."""
        return tuple(space.classes[c] for c in self.union.columns_of(space)[1])

    def _by_all(self, decoded: Tensor, space: LabelSpace) -> Tensor:
        columns, missing = self.union.columns_of(space)
        if len(missing) == space.num_classes:
            raise UnknownLabelSpaceError(f"no classifier names any class of {space.name!r}")
        probabilities = {}
        for dataset in self.datasets:
            key = self.classifier_of[self.space_of[dataset]]
            if key not in probabilities:
                probabilities[key] = self.classifiers[key](decoded).float().log_softmax(1)  # (N, C_key, h, w)
        never = torch.stack([p.amin(1) for p in probabilities.values()]).amin(0) - _NEVER
        return torch.stack([self._largest(probabilities, ids) if ids else never for ids in columns], 1)

    def _largest(self, probabilities: dict[str, Tensor], union_ids: list[int]) -> Tensor:
        """(N, h, w): the largest log-probability of any classifier for any of some union classes."""
        found = []
        for dataset, table in self.union.tables.items():
            local_ids = np.flatnonzero(np.isin(table, union_ids)).tolist()
            if local_ids:
                found.append(probabilities[self.classifier_of[self.space_of[dataset]]][:, local_ids].amax(1))
        return torch.stack(found).amax(0)

    @cached_property
    def union(self) -> UnifiedClasses:
        """The classes of all datasets."""
        return UnifiedClasses.of({dataset: self.own_space(dataset) for dataset in self.datasets})
