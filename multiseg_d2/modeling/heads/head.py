"""What the rest of the project asks of a head. A head is a method: it owns the classifiers and the losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from detectron2.config import CfgNode
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ...label_space import LabelSpace
from ..batch import Batch
from ..score_maps import ScoreMap

__all__ = ["Head", "registered_heads"]


class Head(nn.Module, ABC):
    """Base of all heads: what they are asked, with the answers of most of them.

    Register a head in Detectron2's ``SEM_SEG_HEADS_REGISTRY``; it is built as ``head(cfg, backbone.output_shape())``
    and chosen by ``MODEL.SEM_SEG_HEAD.NAME``. It gets its label spaces from
    :func:`multiseg_d2.modeling.catalog.training_spaces`, and usually holds a :class:`.Trunk` as ``trunk``.

    Args:
        label_spaces: for each dataset the space that its labels are in, in the order of ``DATASETS.TRAIN``.

    Attributes:
        annotation_types: what it can learn from, of "pixel", "box", "tag" and "none" (of the class: asked before a
            model is built).
        step_modes: values of ``SOLVER.STEP_MODE`` in which its losses mean the same (of the class).
        scores_any_space: whether :meth:`logits` answers in label spaces that it was not trained on, as far as it can
            name their classes; then no classifier has to stand in for an unseen dataset (of the class).
        measures_with: its parts that what :meth:`prepare` measures depends on: a checkpoint that lends its weights for
            that must have them (of the class).
        activation: "softmax" or "sigmoid": what turns its logits into probabilities. Averages over scales and flips
            are taken over these.
        scores_void: whether :meth:`logits` has one channel more than there are classes, the last one for "none of
            them" (void); where it wins, the label is 255.
        universal: names of the classes that it scores inside, in their order, where these are not those of its label
            spaces. They are part of what a checkpoint is compared by.
        datasets: the datasets that it can be trained on.
        spaces: label spaces that it can be asked for, by name.
        space_of: name of each dataset's label space.
    """

    annotation_types: ClassVar[tuple[str, ...]] = ("pixel",)
    step_modes: ClassVar[tuple[str, ...]] = ("fused", "sequential", "per_entry")
    scores_any_space: ClassVar[bool] = False
    measures_with: ClassVar[tuple[str, ...]] = ("trunk",)
    activation: str = "softmax"
    scores_void: bool = False
    universal: tuple[str, ...] = ()

    def __init__(self, label_spaces: Mapping[str, LabelSpace]) -> None:
        super().__init__()
        self.datasets = tuple(label_spaces)
        self.spaces = {space.name: space for space in label_spaces.values()}
        self.space_of = {dataset: space.name for dataset, space in label_spaces.items()}

    @classmethod
    def weighs_pixels(cls, cfg: CfgNode) -> bool:
        """Whether its losses know soft labels, weights of pixels and CRST's regularisers (:class:`.SoftmaxLoss`).

        Where they do not, self-training that needs these is refused rather than done without them.
        """
        return False

    @abstractmethod
    def losses(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Scalars to be summed, under names ``loss_...``; anything else goes to Detectron2's event storage.

        Each is the local sum over pixels divided by a count of the whole step (``batch.num_valid``, or
        ``batch.total_valid`` where all datasets share one mean), and is zero but attached to the graph where nothing is
        labelled.
        """

    @abstractmethod
    def logits(self, features: dict[str, Tensor], space: LabelSpace) -> Tensor:
        """(N, C, h, w) scores in the C classes of ``space`` (and void, see :attr:`scores_void`), at any resolution.

        Or other ones, of which :meth:`score_map` makes these.

        Raises:
            UnknownLabelSpaceError: the head cannot name these classes.
        """

    def score_map(self, scores: ScoreMap, space: LabelSpace) -> ScoreMap:
        """What :meth:`logits` gave for one image, at full size, as scores of the classes of ``space`` (and void).

        For a head whose decisions are taken at full size; by default the scores are those of the classes already.
        """
        return scores

    def embed(self, features: dict[str, Tensor]) -> Tensor:
        """(N, D, h, w) what the classifiers see, without dropout: the decoder's output."""
        return self.trunk.embed(features)

    def prepare(self, run_over: Callable[..., Any]) -> None:
        """Called once before the first step of a new run, with the weights that it starts from.

        For a head that measures something on the training data first; by default nothing is done.

        Args:
            run_over: ``run_over(entry, evaluator)`` runs one of Detectron2's evaluators over a catalog entry.
        """

    def label_meanings(self) -> dict[str, list[str]]:
        """What the labels of each dataset teach, where that depends on more than their names: one line per class.

        A run whose taxonomy or hierarchy gives other lines than before is not resumed; by default there are none.
        """
        return {}

    def knows(self, space: LabelSpace) -> bool:
        """Whether a label space is one of its own, with the same classes."""
        known = self.spaces.get(space.name)
        return known is not None and known.classes == space.classes

    def unnameable(self, space: LabelSpace) -> tuple[str, ...]:
        """Classes of a label space that it scores which it can never predict; of its own spaces there are none."""
        return ()

    def teaches(self, dataset: str, space: LabelSpace) -> bool:
        """Whether labels of a dataset train what scores the classes of one of its label spaces."""
        return self.scores_any_space or self.space_of[dataset] == space.name

    def own_space(self, dataset: str) -> LabelSpace:
        """Label space in which a dataset's labels reach the head."""
        return self.spaces[self.space_of[dataset]]


def registered_heads() -> dict[str, type[Head]]:
    """The heads that ``MODEL.SEM_SEG_HEAD.NAME`` may name: those of Detectron2's registry that derive from Head."""
    return {name: cls for name, cls in SEM_SEG_HEADS_REGISTRY if isinstance(cls, type) and issubclass(cls, Head)}
