"""Hierarchical classifiers over the classes of all datasets, taught by pixels, boxes and image tags: HTSS's head."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ...hierarchy import Hierarchy, read_nodes
from ...label_space import IGNORE, LabelSpace
from ...user_error import ConfigError
from ..batch import Batch
from ..catalog import UnknownLabelSpaceError, catalog_space, training_spaces
from ..chained import Chain, ChainedScores
from ..losses import cross_entropy, soft_cross_entropy
from ..losses.conditional import ClassifierTargets, conditional
from ..losses.pieces import loss_in_pieces
from ..score_maps import Resized, ScoreMap
from ..weak_maps import box_map, hard_box_map, tag_map
from .head import Head
from .trunk import Trunk

__all__ = ["LOSS_TYPES", "HierarchicalHead", "HierarchicalHeadWithoutVoid", "training_hierarchy"]

logger = logging.getLogger(__name__)

#: Value of LOSS_TYPE -> (boxes as hard maps, strong and weak pixels of a classifier have means of their own).
LOSS_TYPES = {
    "iv2018": (True, True),
    "iv2019": (False, False),
    "iv2018_shared_norm": (True, False),
    "iv2019_separate_norm": (False, True),
}
#: A weak pixel counts where some child has at least this share, and void leaves more than it.
_MIN_SHARE = 0.01


@SEM_SEG_HEADS_REGISTRY.register()
class HierarchicalHead(Head):
    """One softmax per inner node of the universal hierarchy, all of them channels of one convolution.

    Losses: ``loss_root``, the mean over the labelled pixels of all datasets, and ``loss_children``, ``child_weight``
    times the sum of the other classifiers' means. A classifier learns from pixels whose class lies below its node; from
    boxes and tags it learns where the classifiers above it *decide* for its node, without a gradient to these. The root
    never learns from boxes and tags. Means are taken over the images of a pass, so the step must be fused.

    Args:
        trunk: decoder and dropout; an auxiliary branch would have no loss here.
        label_spaces: for each dataset the space that its labels are in.
        hierarchy: the tree of these.
        loss_type: ``"iv2019"``: shares of boxes, one mean over strong and weak pixels of a classifier; ``"iv2018"``:
            every pixel takes the class of its box, and strong and weak pixels have means of their own;
            ``"iv2019_separate_norm"`` and ``"iv2018_shared_norm"`` have the other's means.
        child_weight: factor of all classifiers below the root.
        fill_void: in evaluation, whether void is replaced by the most probable class.

    Raises:
        ValueError: an unknown loss, or a trunk with an auxiliary branch.

    Source: HTSS (2023), whose loss is not public; masks and weights are those of its predecessors (IV 2018, IV 2019).
    """

    annotation_types = ("pixel", "box", "tag")
    step_modes = ("fused",)
    scores_any_space = True
    scores_void = True

    @configurable
    def __init__(
        self,
        *,
        trunk: Trunk,
        label_spaces: Mapping[str, LabelSpace],
        hierarchy: Hierarchy,
        loss_type: str = "iv2019",
        child_weight: float = 0.1,
        fill_void: bool = False,
    ) -> None:
        super().__init__(label_spaces)
        if loss_type not in LOSS_TYPES:
            raise ConfigError(f"MODEL.SEM_SEG_HEAD.LOSS_TYPE: {loss_type!r} is none of {', '.join(LOSS_TYPES)}")
        if trunk.auxiliary is not None:
            raise ConfigError("HierarchicalHead has no auxiliary loss: set MODEL.SEM_SEG_HEAD.AUX_LOSS_WEIGHT to 0")
        self.hard_boxes, self.separate_norm = LOSS_TYPES[loss_type]
        self.child_weight, self.fill_void = child_weight, fill_void
        self.trunk, self.hierarchy = trunk, hierarchy
        self.universal = tuple(f"{node.parent} > {node.name}" for node in hierarchy.nodes)
        sizes = [len(children) + 1 for children in hierarchy.children]
        ends = np.cumsum(sizes).tolist()
        self.channels = [(end - size, end) for end, size in zip(ends, sizes)]
        self.classifier = nn.Conv2d(trunk.out_channels, ends[-1], kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.targets = {dataset: self._targets(dataset) for dataset in self.datasets}
        self._chains: dict[tuple, Chain] = {}
        for line in hierarchy.problems():
            logger.info("hierarchy: %s", line)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments by ``MODEL.SEM_SEG_HEAD`` and the entries of ``DATASETS.TRAIN``."""
        return {
            "trunk": Trunk(cfg, input_shape),
            "label_spaces": training_spaces(cfg),
            "hierarchy": training_hierarchy(cfg),
            "loss_type": cfg.MODEL.SEM_SEG_HEAD.LOSS_TYPE or "iv2019",
        }

    def label_meanings(self) -> dict[str, list[str]]:
        """The children that each class teaches to each classifier, see :class:`.Head`."""
        tree, meanings = self.hierarchy, {}
        for dataset, paths in tree.paths.items():
            meanings[dataset] = []
            for name, path in zip(self.own_space(dataset).classes, paths):
                steps = ["|".join(tree.nodes[tree.children[s.classifier][k]].name for k in s.children) for s in path]
                meanings[dataset].append(f"{name} = {' > '.join(steps) or 'nothing'}")
        return meanings

    # ---- training ----

    def losses(self, features: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """See the class and :class:`.Head`."""
        scores = self.classifier(self.trunk(features))  # (N, S, h, w)
        strong = {d: part for d, part in batch.slices().items() if not self._is_weak(d)}
        weak = self._weak_terms(scores, batch)
        counts = self._strong_counts(batch, strong)  # (J,)
        weak_counts = scores.new_zeros(len(self.channels), dtype=torch.float64)
        for j, _, count in weak:
            weak_counts[j] += count
        shared = counts if self.separate_norm else counts + weak_counts
        factors = 1 / shared.clamp(min=1)
        factors[1:] *= self.child_weight
        zero = scores.sum() * 0.0  # attached to the graph, also where nothing is labelled
        root, children = zero.float(), zero.float()
        for dataset, part in strong.items():
            given = (scores[part], batch.targets[part], dataset)
            root = root + self._strong(*given, factors, range(1))
            children = children + self._strong(*given, factors, range(1, len(self.channels)))
        divisors = weak_counts if self.separate_norm else shared
        for j, loss, _ in weak:
            children = children + self.child_weight * loss / divisors[j].clamp(min=1).float()
        return {"loss_root": root, "loss_children": children}

    def _strong(self, scores: Tensor, target: Tensor, dataset: str, factors: Tensor, which: Sequence[int]) -> Tensor:
        chosen = [self.targets[dataset][j] for j in which]
        chosen = [replace(c, child=c.child.to(target.device), among=_to(c.among, target.device)) for c in chosen]
        if not chosen:
            return scores.sum() * 0.0
        first = chosen[0].channels[0]
        moved = [replace(c, channels=(c.channels[0] - first, c.channels[1] - first)) for c in chosen]
        kernel = functools.partial(
            conditional, classifiers=moved, factors=[factors[j].float().to(scores.device) for j in which]
        )
        own = scores[:, first : chosen[-1].channels[1]]
        return loss_in_pieces(own, target.shape[-2:], kernel, (target,))

    def _strong_counts(self, batch: Batch, strong: Mapping[str, slice]) -> Tensor:
        counts = torch.zeros(len(self.channels), dtype=torch.float64, device=batch.images.device)
        for dataset, part in strong.items():
            for j, one in enumerate(self.targets[dataset]):
                counts[j] += one.counted(batch.targets[part])
        return counts

    def _weak_terms(self, scores: Tensor, batch: Batch) -> list[tuple[int, Tensor, Tensor]]:
        """(classifier, sum of its loss, number of pixels) of every weak image that says something to it."""
        terms, content = [], None
        for dataset, part in batch.slices().items():
            if not self._is_weak(dataset):
                continue
            content = batch.content() if content is None else content
            for i in range(*part.indices(len(batch))):
                sample = batch.inputs[i]
                decided = _Decisions(self, scores[i], batch.images.shape[-2:])
                names = sample["instances"].gt_classes.tolist() if "instances" in sample else sample["image_tags"]
                for j in self._spoken_to(dataset, names):
                    term = self._weak_term(j, dataset, sample, scores[i : i + 1], decided, content[i])
                    terms += [] if term is None else [(j, *term)]
        return terms

    def _weak_term(
        self, j: int, dataset: str, sample: dict, scores: Tensor, decided: _Decisions, content: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        size, own = tuple(content.shape), slice(*self.channels[j])
        child, number = self.targets[dataset][j].child.to(scores.device), len(self.hierarchy.children[j])
        mask = decided.reaches(j) & content
        if "instances" in sample and self.hard_boxes:
            boxes = sample["instances"].gt_boxes.tensor.to(scores.device)
            hard = hard_box_map(boxes, child[sample["instances"].gt_classes.to(scores.device)], size)
            mask = mask & (hard >= 0)
            target = torch.where(mask, hard, IGNORE)
            ignore = IGNORE if number < IGNORE else -1
            target = target if ignore == IGNORE else torch.where(mask, hard, -1)
            loss = cross_entropy(scores[:, own], target[None], divisor=1.0, ignore=ignore)
            return (loss, mask.sum()) if bool(mask.any()) else None
        if "instances" in sample:
            boxes = sample["instances"].gt_boxes.tensor.to(scores.device)
            shares = box_map(boxes, child[sample["instances"].gt_classes.to(scores.device)], number, size)
        else:
            tags = torch.tensor(sample["image_tags"], dtype=torch.int64, device=scores.device)
            shares = tag_map(child[tags], number, content)
        mask = mask & (shares[:-1].amax(dim=0) >= _MIN_SHARE) & (1 - shares[-1] > _MIN_SHARE)
        if not bool(mask.any()):
            return None
        return soft_cross_entropy(scores[:, own], (shares * mask)[None], divisor=1.0), mask.sum()

    def _spoken_to(self, dataset: str, names: Sequence[int]) -> list[int]:
        """The classifiers below the root to which these classes of a dataset say something."""
        steps = (step for name in set(names) for step in self.hierarchy.paths[dataset][name])
        return sorted({step.classifier for step in steps if len(step.children) == 1} - {0})

    def _is_weak(self, dataset: str) -> bool:
        return dataset in self.hierarchy.weak

    def _targets(self, dataset: str) -> list[ClassifierTargets]:
        result = []
        for j, (channels, children) in enumerate(zip(self.channels, self.hierarchy.children)):
            child, among = np.full(256, -1), np.zeros((256, len(children) + 1), bool)
            for local_id, path in enumerate(self.hierarchy.paths[dataset]):
                for step in path:
                    if step.classifier == j and len(step.children) == 1:
                        child[local_id] = step.children[0]
                    elif step.classifier == j:
                        among[local_id, list(step.children)] = True
            several = torch.from_numpy(among) if among.any() else None
            result.append(ClassifierTargets(channels, torch.from_numpy(child), several))
        return result

    # ---- evaluation ----

    def logits(self, features: dict[str, Tensor], space: LabelSpace) -> Tensor:
        """(N, S, h, w) scores of all classifiers; :meth:`score_map` makes classes of them.

        Raises:
            UnknownLabelSpaceError: the tree names none of the classes.
        """
        self._chain(space)
        return self.classifier(self.trunk(features))

    def score_map(self, scores: ScoreMap, space: LabelSpace) -> ScoreMap:
        """Classes of a label space and void, by chained decisions, see :class:`.ChainedScores`."""
        return ChainedScores(scores, self._chain(space))

    def unnameable(self, space: LabelSpace) -> tuple[str, ...]:
        """Classes that no leaf of the tree means."""
        return tuple(space.classes[c] for c in self.hierarchy.answers(space)[1])

    def _chain(self, space: LabelSpace) -> Chain:
        key = (space.name, space.classes)
        if key not in self._chains:
            table, missing = self.hierarchy.answers(space)
            if len(missing) == space.num_classes:
                raise UnknownLabelSpaceError(f"no node of the hierarchy is a class of {space.name!r}")
            if missing:
                names = ", ".join(space.classes[c] for c in missing)
                logger.warning("%s: the hierarchy cannot name %s", space.name, names)
            self._chains[key] = Chain(
                tuple(self.channels), self.hierarchy.classifiers, self.hierarchy.children,
                torch.from_numpy(table), space.num_classes, self.fill_void,
            )  # fmt: skip
        return replace(self._chains[key], fill_void=self.fill_void)


@SEM_SEG_HEADS_REGISTRY.register()
class HierarchicalHeadWithoutVoid(HierarchicalHead):
    """The same, of which it can load checkpoints; in evaluation void is replaced by the most probable class."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments of :class:`HierarchicalHead`."""
        return {**super().from_config(cfg, input_shape), "fill_void": True}


def training_hierarchy(cfg: CfgNode) -> Hierarchy:
    """The tree of ``DATASETS.TRAIN``, from the file ``MODEL.SEM_SEG_HEAD.HIERARCHY`` or out of the label spaces.

    Raises:
        HierarchyError: the file is none, or a class has no place.
    """
    spaces, path = training_spaces(cfg), cfg.MODEL.SEM_SEG_HEAD.HIERARCHY
    kinds: dict[str, set[str]] = {}
    for entry in cfg.DATASETS.TRAIN:
        kinds.setdefault(catalog_space(entry)[0], set()).add(MetadataCatalog.get(entry).annotation)
    weak = [dataset for dataset, found in kinds.items() if found <= {"box", "tag"}]
    universal = max((MetadataCatalog.get(e).universal_classes for e in cfg.DATASETS.TRAIN), key=len)
    if path:
        return Hierarchy(read_nodes(path, universal), spaces, weak, where=path)
    return Hierarchy.build(spaces, universal, weak)


class _Decisions:
    """Where the classifiers decide for a node, in one image at full size, without a gradient."""

    def __init__(self, head: HierarchicalHead, scores: Tensor, size: Sequence[int]) -> None:
        self.head, self.scores, self.size = head, scores.detach(), tuple(size)
        self._best: dict[int, Tensor] = {}

    def reaches(self, classifier: int) -> Tensor:
        """(H, W) bool: every classifier above decides for the node of this one, or for what holds it."""
        tree, mask = self.head.hierarchy, torch.ones(self.size, dtype=torch.bool, device=self.scores.device)
        node = tree.classifiers[classifier]
        while node != 0:
            parent = tree.parent_of(node)
            above = tree.classifier_of(parent)
            mask &= self._choice(above) == tree.children[above].index(node)
            node = parent
        return mask

    def _choice(self, classifier: int) -> Tensor:
        if classifier not in self._best:
            own = self.scores[slice(*self.head.channels[classifier])]
            full = Resized(own, self.size)
            rows, columns = slice(0, self.size[0]), slice(0, self.size[1])
            self._best[classifier] = full.tile(rows, columns).argmax(dim=0)
        return self._best[classifier]


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
