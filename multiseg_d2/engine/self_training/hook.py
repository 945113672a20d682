"""Self-training in rounds, as a hook of the trainer: label the target, train on source and target, again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm

from ...data.loader import build_test_loader
from ...data.mapper import EvaluationMapper
from ...data.spec import DatasetSpec
from ...label_space import LabelSpace
from ...modeling.heads.per_dataset import REGULARIZERS
from ...user_error import ConfigError
from ..dataset_pass import run_over
from ..ranks import unwrapped
from .collapse import CollapseError, has_collapsed
from .data import check_target_is_not_scored, first_images, most_confident, source_and_target
from .folder import PseudoLabelError, PseudoLabels
from .labelling import ConfidenceCollector, LabelWriter, all_sum
from .mining import MiningRule
from .plots import round_curves, write_label_pictures, write_round_plots
from .priors import NO_PRIOR, load_prior
from .rounds import Portion, RoundPlan
from .target_space import TargetClasses
from .thresholds import ConfidenceSamples

__all__ = ["POLICIES", "SelfTrainingHook"]

logger = logging.getLogger(__name__)

#: Value of SELF_TRAINING.POLICY -> one list of confidences per class, or one for all.
POLICIES = {"global": False, "class_balanced": True, "spatial_prior": True}
_FOLDER = "self_training"


class SelfTrainingHook(HookBase):
    """Runs CBST's rounds: ``SELF_TRAINING.ROUNDS`` of equal length over the run.

    The round is a function of the step. In front of its first step the target is labelled with the weights of that
    moment (the averaged ones, where ``MODEL.EMA_DECAY`` keeps them), unless that has been done by a run that was
    killed; then training goes on with the round's share of the source and the labels. Labels of the target itself are
    never read: it must be an unlabelled view or split.

    Args:
        cfg: ``SELF_TRAINING``, ``DATASETS`` and ``TEST.AUG`` (views of the labelling) are used.

    Raises:
        ValueError: the config contradicts itself.

    Source: CBST (ECCV 2018) and CRST (ICCV 2019).
    """

    def __init__(self, cfg: CfgNode) -> None:
        keys = cfg.SELF_TRAINING
        if keys.POLICY not in POLICIES:
            known = ", ".join((*POLICIES, "online", "consistency"))
            raise ConfigError(f"SELF_TRAINING.POLICY is {keys.POLICY!r}: choose one of {known}")
        if keys.REGULARIZER[0] not in ("none", "lrent", *REGULARIZERS):
            known = ", ".join(("none", "lrent", *REGULARIZERS))
            raise ConfigError(f"SELF_TRAINING.REGULARIZER is {tuple(keys.REGULARIZER)}: its name is one of {known}")
        if keys.POLICY == "spatial_prior" and not keys.PRIOR:
            raise ConfigError(NO_PRIOR)
        self.cfg = cfg
        self.plan = RoundPlan(
            keys.ROUNDS,
            cfg.SOLVER.MAX_ITER,
            Portion.of("SELF_TRAINING.PORTION", keys.PORTION),
            Portion.of("SELF_TRAINING.SOURCE_PORTION", keys.SOURCE_PORTION),
        )
        self.images = Portion.of("SELF_TRAINING.TARGET_PORTION", keys.TARGET_PORTION)
        self.root = Path(cfg.OUTPUT_DIR, _FOLDER)
        self.alpha = float(keys.REGULARIZER[1]) if keys.REGULARIZER[0] == "lrent" else 0.0
        self.mining = MiningRule.of("SELF_TRAINING.MINING", keys.MINING)
        self.source, self.target = source_and_target(cfg)
        self._pseudo: frozenset[str] = frozenset(
            labels.entry for number in range(keys.ROUNDS) for labels in self._labels(number)
        )

    # ---- the trainer's calls ----

    def before_train(self) -> None:
        """Registers the labels that a resumed run was trained on."""
        if not self.cfg.SELF_TRAINING.LABEL_SCORED:
            check_target_is_not_scored(self.cfg)
        self.trainer.transforms.append(self._mark)
        if not 0 < self.trainer.start_iter < self.trainer.max_iter:
            return
        number = self.plan.round_of(self.trainer.start_iter)
        if self.plan.starts_round(self.trainer.start_iter):
            number -= 1  # the state is that of the end of the round before
        self._check_round(number)
        for labels in self._labels(number):
            if labels.manifest() is None:
                raise PseudoLabelError(
                    f"{labels.folder}: the run stopped in round {number}, whose pseudo-labels are gone. Restore the "
                    "folder, or start the run anew."
                )
            labels.check_files()
            labels.register()
        self._mine(number)

    def _check_round(self, number: int) -> None:
        """Refuses to go on inside a round that a changed config cuts otherwise, or trains on other data."""
        entries = self._entries(number, [labels.entry for labels in self._labels(number)])
        wanted = (tuple(entries), self.plan.origin(number))
        if self.trainer.training_data != wanted:
            (had, since), (now, begin) = self.trainer.training_data, wanted
            raise PseudoLabelError(
                f"the checkpoint is of a round that began at step {since} with {list(had)}; by this config step "
                f"{self.trainer.start_iter - 1} belongs to round {number}, which begins at step {begin} with "
                f"{list(now)}. Undo the change of SELF_TRAINING or SOLVER.MAX_ITER to resume, or start a new run from "
                "the checkpoint's weights (MODEL.WEIGHTS)"
            )

    def before_step(self) -> None:
        """Begins a round where the step is its first."""
        if self.plan.starts_round(self.trainer.iter):
            self._begin(self.plan.round_of(self.trainer.iter))

    def after_step(self) -> None:
        """Evaluates and saves after the last step of a round; the trainer itself does so after the last round."""
        if self.plan.ends_round(self.trainer.iter) and self.trainer.iter + 1 < self.trainer.max_iter:
            self.trainer.evaluation_wanted = True

    def after_train(self) -> None:
        """Draws the rounds with the last score."""
        if self.trainer.iter >= self.trainer.max_iter:
            write_round_plots(self.root, self.target)

    def _mark(self, samples: list[dict]) -> list[dict]:
        """Says which samples have pseudo-labels: the loss may regularise these."""
        return [{**s, "pseudo": True} if s["entry"] in self._pseudo else s for s in samples]

    # ---- a round ----

    def _begin(self, number: int) -> None:
        weights = _hash_of_weights(self.trainer)
        labelled = []
        for labels in self._labels(number):
            known = labels.manifest() if self.trainer.iter == self.trainer.start_iter else None
            if known is None or known["weights"] != weights or known["settings"] != self._settings(number):
                self._label(labels, number, weights)
            else:
                labels.check_files()
                logger.info("round %d: the labels of %s are there", number, labels.target)
            labelled.append(labels.register())
        write_round_plots(self.root, self.target)
        round_curves(self.trainer.storage, self._labels(number))
        self._mine(number)
        self.trainer.use_training_data(self._entries(number, labelled), self.plan.origin(number))

    def _label(self, labels: PseudoLabels, number: int, weights: str) -> None:
        model = unwrapped(self.trainer.model)
        classes = TargetClasses.of(model.sem_seg_head, self.source, labels.target)
        space, allowed = classes.space, classes.allowed
        wants_prior = self.cfg.SELF_TRAINING.POLICY == "spatial_prior"
        prior = load_prior(self.cfg.SELF_TRAINING.PRIOR, space) if wants_prior else None
        folder, portion = labels.begin(), self.plan.target.of_round(number)
        samples = ConfidenceSamples(space.num_classes, folder, all_sum=all_sum)
        batches = build_test_loader(self.cfg, labels.target, _asking_for(EvaluationMapper(self.cfg), space.name))
        score = partial(run_over, self.cfg, model, labels.target, batches=batches)
        activation = model.sem_seg_head.activation
        try:
            with self.trainer.evaluated_weights(), self.trainer.signals.all_saved():
                logger.info("round %d: labelling %s", number, labels.target)
                _check_other_classes(self.cfg, labels.target, classes)
                found = score(ConfidenceCollector(samples, activation, prior, allowed))
                thresholds = samples.thresholds(portion, POLICIES[self.cfg.SELF_TRAINING.POLICY])
                chosen = most_confident(found["images"], self.images.of_round(number))
                written = score(LabelWriter(folder, thresholds, activation, prior, self.alpha, chosen, allowed))
        finally:
            samples.close()
        _report(labels, portion, space.classes, thresholds, found["predicted"], written)
        facts = {
            "round": number,
            "step": self.trainer.iter,
            "weights": weights,
            "settings": self._settings(number),
            "thresholds": dict(zip(space.classes, map(float, thresholds))),
            "predicted_pixels": dict(zip(space.classes, found["predicted"].tolist())),
            "kept_pixels": dict(zip(space.classes, written["kept"].tolist())),
            "pixels": written["pixels"],
            "left_out": list(classes.left_out),
            "unnameable": list(classes.unnameable),
            "confidence_of_images": found["images"],
            "files": written["files"],
        }
        write_label_pictures(labels, space, chosen, self.cfg.TEST.NUM_PICTURES)
        named = _classes(space, self._spec_of(space))
        remapped = self.cfg.DATASETS.REMAP_TO if allowed is not None else ""
        labels.finish(facts, named, chosen, self.alpha > 0, remapped)

    def _spec_of(self, space: LabelSpace) -> DatasetSpec | None:
        """The spec of a label space, which the target itself or another entry has; None where no entry has it."""
        for entry in (*self.target, *self.source, *self.cfg.DATASETS.TEST):
            metadata = MetadataCatalog.get(entry)
            if metadata.label_space.name == space.name:
                return metadata.spec
        return None

    def _mine(self, number: int) -> None:
        """Centres crops on the classes that are rare in this round's predictions."""
        manifests = [labels.manifest() for labels in self._labels(number)]  # all whole: the round has begun
        predicted = [list(one["predicted_pixels"].values()) for one in manifests if one is not None]
        self.trainer.crop_centre = self.mining.crops(np.sum(predicted, axis=0))

    def _settings(self, number: int) -> dict[str, Any]:
        """What labels depend on beside the weights."""
        keys = self.cfg.SELF_TRAINING
        return {
            "policy": keys.POLICY,
            "portion": self.plan.target.of_round(number),
            "images": self.images.of_round(number),
            "lrent_alpha": self.alpha,
            "views": [list(self.cfg.TEST.AUG.SCALES), self.cfg.TEST.AUG.FLIP] if self.cfg.TEST.AUG.ENABLED else [],
        }

    def _labels(self, number: int) -> list[PseudoLabels]:
        return [PseudoLabels(self.root, number, target) for target in self.target]

    def _entries(self, number: int, labelled: Sequence[str]) -> list[str]:
        """The round's data: in place of each entry of DATASETS.TRAIN its share, or its labelled version."""
        share, by_target = self.plan.source.of_round(number), dict(zip(self.target, labelled))
        return [by_target.get(entry) or first_images(entry, share) for entry in self.cfg.DATASETS.TRAIN]


def _report(
    labels: PseudoLabels,
    portion: float,
    classes: Sequence[str],
    thresholds: np.ndarray,
    predicted: np.ndarray,
    written: dict[str, Any],
) -> None:
    """One line on the round; warns of classes that keep nothing.

    Raises:
        CollapseError: see :func:`.has_collapsed`.
    """
    number, kept = labels.number, written["kept"]
    shares = 100 * kept / max(written["pixels"], 1)
    listing = ", ".join(f"{name} {t:.3f}/{share:.2f}%" for name, t, share in zip(classes, thresholds, shares))
    logger.info(
        "round %d, %s: portion %.3f, %.2f%% of all pixels kept; threshold/kept by class: %s",
        *(number, labels.target, portion, shares.sum(), listing),
    )
    empty = [name for name, k, p in zip(classes, kept, predicted) if p > 0 and k == 0]
    if empty:
        logger.warning("round %d: %s are predicted in %s, but none of it is kept", number, empty, labels.target)
    if has_collapsed(kept):
        raise CollapseError(
            f"round {number}: the pseudo-labels of {labels.target} have collapsed: {int(kept.sum())} of "
            f"{written['pixels']} pixels are kept, {dict(zip(classes, kept.tolist()))}. Begin with better weights, or "
            "a larger SELF_TRAINING.PORTION."
        )


def _check_other_classes(cfg: CfgNode, target: str, classes: TargetClasses) -> None:
    """Says in which classes a target is labelled where they are not its own; norms of its own are refused."""
    if classes.allowed is None:
        return
    names = [", ".join(part) or "none" for part in (classes.left_out, classes.unnameable)]
    logger.info("in the classes of %s without %s; not named: %s", classes.space.name, *names)
    if cfg.MODEL.DATASET_NORM.ENABLED:
        raise ConfigError(
            f"self-training: {target} is labelled in the classes of {cfg.DATASETS.REMAP_TO} and trained as images "
            "of it, so norms of its own would never be trained: set MODEL.DATASET_NORM.ENABLED to False"
        )


def _asking_for(mapper: Callable[[Any], Any], space: str) -> Callable[[dict], dict[str, Any]]:
    """The mapper's samples with the label space in which scores are wanted: with REMAP_TO it is not the dataset's."""
    return lambda record: {**mapper(record), "label_space": space}


def _classes(space: LabelSpace, spec: DatasetSpec | None) -> list[dict[str, Any]]:
    """Classes as a spec writes them, with what they cover; the names alone where no entry has the label space."""
    covers = {c.name: c.covers for c in spec.classes} if spec is not None else {}
    result = []
    for name, color in zip(space.classes, space.colors.tolist()):
        entry: dict[str, Any] = {"name": name, "color": color}
        if (covered := covers.get(name)) is not None:
            entry["covers"] = list(covered)
        result.append(entry)
    return result


def _hash_of_weights(trainer) -> str:
    """sha256 over all tensors of the model that labels."""
    digest = hashlib.sha256()
    with trainer.evaluated_weights():
        for name, tensor in sorted(unwrapped(trainer.model).state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return comm.all_gather(digest.hexdigest())[0]
