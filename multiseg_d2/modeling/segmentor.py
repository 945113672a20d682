"""The meta-architecture: one network for images of several datasets, each with a label space of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_sem_seg_head
from torch import Tensor, nn

from ..label_space import IGNORE, LabelSpace
from ..sample import Sample
from .active import active_datasets
from .batch import Batch, count_valid, group_by_dataset, pad_and_stack, runs
from .catalog import requested_space
from .heads import Head
from .inference import Prediction
from .norm import apply_dataset_norm, with_plain_norms
from .score_maps import Resized, ScoreMap
from .translate import StandIn

__all__ = ["MultiDatasetSegmentor"]


@META_ARCH_REGISTRY.register()
class MultiDatasetSegmentor(nn.Module):
    """Backbone and head over batches that mix datasets.

    In training a list of samples gives a dict of losses; in evaluation it gives one score map per sample. Which dataset
    an image belongs to is read from the sample, and told to the norm layers for the time of the pass.

    Args:
        backbone: a Detectron2 backbone: (N, 3, H, W) -> features by name.
        sem_seg_head: the method.
        pixel_mean: per channel, in the order of ``INPUT.FORMAT``, on the scale 0 to 255.
        pixel_std: likewise.

    Attributes:
        stand_ins: what datasets that the model was not trained on use for the time being, see :mod:`.norm.unseen`.
    """

    @configurable
    def __init__(
        self, *, backbone: nn.Module, sem_seg_head: Head, pixel_mean: Sequence[float], pixel_std: Sequence[float]
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.stand_ins: dict[str, StandIn] = {}
        # As in Detectron2 not part of the state dict: they are known from the config.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Builds backbone and head, and gives their norms a branch per dataset where the config wants it."""
        with_dataset_norms, cfg = cfg, with_plain_norms(cfg)
        backbone = build_backbone(cfg)
        head = build_sem_seg_head(cfg, backbone.output_shape())
        if not isinstance(head, Head):
            name = cfg.MODEL.SEM_SEG_HEAD.NAME
            raise TypeError(f"MODEL.SEM_SEG_HEAD.NAME: {name} does not derive from multiseg_d2.modeling.Head")
        parts = apply_dataset_norm(with_dataset_norms, nn.ModuleDict({"backbone": backbone, "sem_seg_head": head}))
        return {
            "backbone": parts["backbone"],
            "sem_seg_head": parts["sem_seg_head"],
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        """Where the model, and what it is given, is moved to."""
        return self.pixel_mean.device

    def class_names(self) -> dict[str, list[str]]:
        """Class names of each label space that the model knows, in local order: what a checkpoint is compared by.

        With the key ``universal`` also those that the head scores inside, if these are others.
        """
        names = {name: list(space.classes) for name, space in self.sem_seg_head.spaces.items()}
        return names | ({"universal": list(self.sem_seg_head.universal)} if self.sem_seg_head.universal else {})

    def label_meanings(self) -> dict[str, list[str]]:
        """What the labels of each dataset teach the head beyond their names, see :meth:`.Head.label_meanings`."""
        return self.sem_seg_head.label_meanings()

    def unnameable(self, dataset: str, space: LabelSpace) -> tuple[str, ...]:
        """Classes of a label space that the model can never predict on a dataset's images; they score 0.

        A dataset that it was not trained on must be made usable first, see :func:`.unseen_dataset`.
        """
        stand_in = self.stand_ins.get(dataset)
        return stand_in.unnameable(self.sem_seg_head, space) if stand_in else self.sem_seg_head.unnameable(space)

    def forward(
        self, batched_inputs: list[Sample], num_valid: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor] | list[Prediction]:
        """Losses in training, scores in evaluation.

        Args:
            batched_inputs: samples with these keys.

                * ``image``: (3, h, w) uint8 or float on the scale 0 to 255, channels in the order of ``INPUT.FORMAT``
                * ``dataset``: whose image it is; in evaluation not needed where the model knows one only
                * ``sem_seg``: (h, w) uint8 local ids, training only; unlabelled if absent
                * ``height``, ``width``: size of the wanted scores, evaluation only; default: the image's
                * ``label_space``: classes of the wanted scores, evaluation only; default: the dataset's
            num_valid: training in several passes: labelled pixels of each dataset in the whole step, see
                :class:`.Batch`; None counts those of the samples.

        Returns:
            Training: scalar losses by name (``loss_...``). Evaluation: for each sample a :class:`.Prediction`, whose
            ``"sem_seg"`` are (C, height, width) float32 logits of the C classes of its label space, C + 1 where the
            head scores void, and whose ``"sem_seg_labels"`` are made without these.
        """
        if not self.training:
            return self.inference(batched_inputs)
        batch = self.make_batch(batched_inputs, num_valid=num_valid)
        with active_datasets(batch.groups):
            return self.sem_seg_head.losses(self.backbone(batch.images), batch)

    def make_batch(
        self, samples: Sequence[Sample], with_targets: bool = True, num_valid: Mapping[str, Tensor] | None = None
    ) -> Batch:
        """Sorts samples by dataset, normalises and stacks them on the model's device."""
        known = tuple(self.sem_seg_head.datasets)
        samples, _ = group_by_dataset(samples, known)
        groups = runs([s["dataset"] for s in samples])
        images = [s["image"].to(self.device, non_blocking=True) for s in samples]
        sizes = [(int(i.shape[-2]), int(i.shape[-1])) for i in images]
        padded = self._padded_size(sizes)
        if all(size == padded for size in sizes):  # the rule in training: one call over the whole batch
            tensor = self._normalize(torch.stack(images))
        else:  # the padding is 0 after normalisation, as in Detectron2
            tensor = pad_and_stack([self._normalize(i) for i in images], padded, 0.0)
        batch = Batch(tensor, None, groups, sizes, list(samples))
        if with_targets:
            self._add_targets(batch, known, num_valid)
        return batch

    def _add_targets(self, batch: Batch, known: tuple[str, ...], num_valid: Mapping[str, Tensor] | None) -> None:
        unknown = [f"{s['dataset']} ({s.get('file_name')})" for s in batch.inputs if s["dataset"] not in known]
        if unknown:
            raise ValueError(f"the model was built for {list(known)} and cannot be trained on images of {unknown}")
        targets = [
            s["sem_seg"].to(self.device, non_blocking=True)
            if "sem_seg" in s
            else torch.full(size, IGNORE, dtype=torch.uint8, device=self.device)
            for s, size in zip(batch.inputs, batch.image_sizes)
        ]
        targets = pad_and_stack(targets, batch.images.shape[-2:], IGNORE)  # (N, H, W), as small as they came
        if num_valid is None:
            batch.num_valid = count_valid(targets, batch.slices(), known)
        else:
            none = torch.zeros((), device=self.device)
            batch.num_valid = {name: num_valid.get(name, none).to(self.device) for name in known}
        batch.targets = targets.long()

    def _normalize(self, images: Tensor) -> Tensor:
        return (images - self.pixel_mean).div_(self.pixel_std)  # uint8 - float32 is float32

    def _padded_size(self, sizes: list[tuple[int, int]]) -> tuple[int, int]:
        step = max(int(self.backbone.size_divisibility), 1)
        height, width = (max(side) for side in zip(*sizes))
        return -(-height // step) * step, -(-width // step) * step

    @torch.no_grad()
    def inference(self, samples: Sequence[Sample]) -> list[Prediction]:
        """Scores of each sample, see :meth:`forward`. A sample's scores do not depend on the others in the list."""
        samples = [self._of_a_dataset(sample) for sample in samples]
        spaces = [requested_space(s, self.sem_seg_head.spaces) for s in samples]
        results: dict[int, Prediction] = {}
        for indices in _alike(samples, [id(space) for space in spaces]):
            scores = self._scores([samples[i] for i in indices], spaces[indices[0]])
            results |= {i: Prediction(score, self.sem_seg_head.scores_void) for i, score in zip(indices, scores)}
        return [results[i] for i in range(len(samples))]

    def _of_a_dataset(self, sample: dict) -> dict:
        """The sample with its ``dataset``; Detectron2's own predictor names none, which one dataset does not need."""
        known = self.sem_seg_head.datasets
        if "dataset" not in sample and len(known) == 1:
            return {**sample, "dataset": known[0]}
        if "dataset" not in sample:
            raise ValueError(
                f"the sample of {sample.get('file_name', '(no file name)')} has no key 'dataset', and the model knows "
                f"{list(known)}: say which one's image it is, or use multiseg_d2.engine.Predictor(cfg, space=...)"
            )
        return sample

    @torch.no_grad()
    def embed(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """What the classifiers see of each sample: the decoder's output, in evaluation mode without dropout.

        Args:
            samples: as in evaluation, see :meth:`forward`.

        Returns:
            For each sample ``{"embedding": (D, h, w), "covers": (height, width)}``. The second is the size in pixels
            that the embedding spans from the upper left corner: the image's, or more where the backbone needs padding
            (:func:`.class_sums` takes it).
        """
        results: list[dict[str, Any]] = [{} for _ in samples]
        for indices in _alike(samples, [None] * len(samples)):
            with self._pass([samples[i] for i in indices]) as (batch, features, _):
                embeddings = self.sem_seg_head.embed(features)  # (N, D, h, w)
            for i, embedding in zip(indices, embeddings):
                results[i] = {"embedding": embedding, "covers": tuple(batch.images.shape[-2:])}
        return results

    @contextmanager
    def _pass(self, samples: list[Sample]) -> Iterator[tuple[Batch, dict[str, Tensor], StandIn | None]]:
        """Features of images of one dataset, inside whose context the head can be asked; and what stands in for it."""
        batch, dataset = self.make_batch(samples, with_targets=False), samples[0]["dataset"]
        stand_in = self.stand_ins.get(dataset)
        with active_datasets(batch.groups, {dataset: stand_in.branches} if stand_in else None):
            yield batch, self.backbone(batch.images), stand_in

    def _scores(self, samples: list[Sample], space: LabelSpace) -> list[ScoreMap]:
        with self._pass(samples) as (batch, features, stand_in):
            if stand_in is None:
                logits = self.sem_seg_head.logits(features, space)  # (N, C, h, w), C + 1 with void
            else:
                logits = stand_in.logits(self.sem_seg_head, features, space)
        padded, image_size = tuple(batch.images.shape[-2:]), batch.image_sizes[0]
        results = []
        for sample, one in zip(samples, logits):
            wanted = (sample.get("height", image_size[0]), sample.get("width", image_size[1]))
            scores: ScoreMap = Resized(one, padded, image_size, self.sem_seg_head.activation)
            if wanted != image_size:
                source = one if image_size == padded else scores
                scores = Resized(source, wanted, activation=self.sem_seg_head.activation)
            results.append(self._in_classes(scores, space))
        return results

    def _in_classes(self, scores: ScoreMap, space: LabelSpace) -> ScoreMap:
        scores = self.sem_seg_head.score_map(scores, space)
        wanted = space.num_classes + self.sem_seg_head.scores_void
        if scores.channels != wanted:
            raise ValueError(f"the head gave {scores.channels} channels for {space.name!r}, which has {wanted}")
        return scores


def _alike(samples: Sequence[Sample], asked: Sequence[Any]) -> list[list[int]]:
    """Indices of samples that go through the network together: so that none is padded for the sake of another."""
    groups: dict[tuple, list[int]] = {}
    for i, (sample, what) in enumerate(zip(samples, asked)):
        groups.setdefault((sample["dataset"], what, tuple(sample["image"].shape)), []).append(i)
    return list(groups.values())
