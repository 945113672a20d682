"""Two passes over the target of a round: one collects confidences, one writes label files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

from ...atomic_file import write_atomically
from ...data.soft_labels import encode_soft_label
from ...label_space import IGNORE
from ...modeling.inference import Prediction, confident_labels
from ...modeling.score_maps import Resized, Restricted, ScoreMap
from .selection import hard_labels, soft_labels
from .thresholds import ConfidenceSamples

__all__ = ["ConfidenceCollector", "LabelWriter", "all_sum"]

#: Rows of an image that are turned into labels at a time, so that memory holds the scores and little else.
_ROWS = 64
#: Classes per pixel that a soft label keeps: with LRENT's published alpha the others have shares below rounding.
SOFT_CLASSES = 4


def all_sum(counts: np.ndarray) -> np.ndarray:
    """Sum of an array over the processes."""
    return sum(comm.all_gather(counts)) if comm.get_world_size() > 1 else counts


class _Labeller(DatasetEvaluator):
    """What both passes share: the probabilities of an image, some rows at a time."""

    def __init__(
        self, num_classes: int, activation: str, prior: Tensor | None, allowed: np.ndarray | None = None
    ) -> None:
        self.num_classes, self.activation, self.prior = num_classes, activation, prior
        self.allowed = None if allowed is None else torch.from_numpy(allowed)

    def scores(self, output: Mapping[str, Any]) -> ScoreMap:
        """What a segmentor answered for an image, as scores that are computed where they are looked at."""
        if isinstance(output, Prediction):
            scores = output.scores
        else:
            scores = Resized(output["sem_seg"], output["sem_seg"].shape[-2:], activation=self.activation)
        if self.allowed is None:
            return scores
        void = torch.ones(scores.channels - self.num_classes, dtype=torch.bool)
        return Restricted(scores, torch.cat([self.allowed, void]))

    def bands(self, scores: ScoreMap) -> Iterator[Tensor]:
        """(1, C, rows, W) probabilities of the image from top to bottom, times the prior where there is one."""
        height, width = scores.size
        if self.prior is not None and tuple(self.prior.shape[-2:]) != (height, width):
            raise ValueError(
                f"the spatial prior is {tuple(self.prior.shape[-2:])}, but an image of the target is "
                f"{(height, width)}: make it of that size (tools/spatial_prior.py --size)"
            )
        for top in range(0, height, _ROWS):
            rows = slice(top, min(top + _ROWS, height))
            # a void channel, behind the classes, takes part in the softmax but is never a label
            probabilities = scores.probabilities(rows, slice(0, width))[: self.num_classes]
            if self.prior is not None:
                probabilities = probabilities * self.prior[:, rows].to(scores.device)
            yield probabilities[None]


class ConfidenceCollector(_Labeller):
    """First pass: how confident the predictions of each class are.

    Args:
        samples: takes the confidences in.
        activation: "softmax" or "sigmoid": what turns scores into probabilities.
        prior: (C, H, W) spatial prior in [0, 1] of the size of all images, or None.
        allowed: (C,) bool, classes that labels may have; None: all.
    """

    def __init__(
        self,
        samples: ConfidenceSamples,
        activation: str = "softmax",
        prior: Tensor | None = None,
        allowed: np.ndarray | None = None,
    ) -> None:
        super().__init__(samples.num_classes, activation, prior, allowed)
        self.samples = samples
        self.images: dict[str, float] = {}

    def reset(self) -> None:
        """Forgets the images' own confidences."""
        self.images = {}

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Takes in the scores ``sem_seg`` (C, H, W) of each image."""
        for sample, output in zip(inputs, outputs):
            confidence, labels = (t.cpu().numpy() for t in self._most_probable(self.scores(output)))  # (H, W) each
            self.samples.add(confidence, labels)
            self.images[sample["image_id"]] = _mean_class_confidence(confidence, labels, self.num_classes)

    def _most_probable(self, scores: ScoreMap) -> tuple[Tensor, Tensor]:
        if self.prior is None:
            labels, confidence = confident_labels(scores, void=scores.channels > self.num_classes)
            return confidence, labels
        bands = [band.max(dim=1) for band in self.bands(scores)]
        names = torch.cat([names[0] for _, names in bands]).to(torch.uint8)
        return torch.cat([values[0] for values, _ in bands]), names

    def evaluate(self) -> dict[str, Any]:
        """``predicted``: (C,) pixels per class; ``images``: image id -> mean over its classes of their confidence."""
        images: dict[str, float] = {}
        for part in comm.all_gather(self.images):
            images.update(part)
        return {"predicted": all_sum(self.samples.predicted), "images": images}


class LabelWriter(_Labeller):
    """Second pass: writes ``labels/<image id>.png`` (local ids, 255 = not kept), soft labels beside them.

    Args:
        folder: where the files go.
        thresholds: (C,) in (0, 1].
        activation: "softmax" or "sigmoid".
        prior: (C, H, W), or None.
        alpha: strength of the entropy regulariser of the labels (LRENT), 0 for hard labels.
        images: ids of the images that get labels; None: all.
        allowed: as for the first pass.
    """

    def __init__(
        self,
        folder: str | Path,
        thresholds: np.ndarray,
        activation: str = "softmax",
        prior: Tensor | None = None,
        alpha: float = 0.0,
        images: Collection[str] | None = None,
        allowed: np.ndarray | None = None,
    ) -> None:
        super().__init__(len(thresholds), activation, prior, allowed)
        self.images = None if images is None else frozenset(images)
        self.folder, self.alpha = Path(folder), alpha
        self.thresholds = torch.from_numpy(np.asarray(thresholds, np.float32))
        self.reset()

    def reset(self) -> None:
        """Begins anew; files that are there are written again."""
        self.kept = np.zeros(self.num_classes, np.int64)
        self.pixels = 0
        self.files: dict[str, str] = {}

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Writes the files of each image, each whole or not at all."""
        for sample, output in zip(inputs, outputs):
            if self.images is not None and sample["image_id"] not in self.images:
                continue
            labels, soft = self._labels(self.scores(output))
            self.kept += np.bincount(labels.ravel(), minlength=256)[: self.num_classes]
            self.pixels += labels.size
            self._write(f"labels/{sample['image_id']}.png", _png(labels))
            if soft is not None:
                content = encode_soft_label(soft, keep=SOFT_CLASSES)
                self._write(f"soft/{sample['image_id']}.npz", content)

    def _labels(self, scores: ScoreMap) -> tuple[np.ndarray, np.ndarray | None]:
        """(H, W) uint8 labels and (C, H, W) soft ones, None where these are not wanted."""
        thresholds = self.thresholds.to(scores.device)
        if self.alpha > 0:
            parts = [soft_labels(band, thresholds, self.alpha) for band in self.bands(scores)]
            shares = torch.cat([(share * (hard != IGNORE).unsqueeze(1))[0] for share, hard in parts], dim=1)
            return torch.cat([hard[0] for _, hard in parts]).cpu().numpy(), shares.cpu().numpy()
        if self.prior is not None:
            return torch.cat([hard_labels(band, thresholds)[0] for band in self.bands(scores)]).cpu().numpy(), None
        never = thresholds.new_full((scores.channels - self.num_classes,), torch.inf)  # void is no label
        labels, ratio = confident_labels(scores, thresholds=torch.cat([thresholds, never]))
        return labels.masked_fill_(ratio < 1, IGNORE).cpu().numpy(), None

    def evaluate(self) -> dict[str, Any]:
        """``kept``: (C,) pixels per class, ``pixels``: all, ``files``: name -> sha256; the same on all processes."""
        files: dict[str, str] = {}
        for part in comm.all_gather(self.files):
            files.update(part)
        pixels = sum(comm.all_gather(self.pixels))
        return {"kept": all_sum(self.kept), "pixels": pixels, "files": dict(sorted(files.items()))}

    def _write(self, name: str, content: bytes) -> None:
        write_atomically(self.folder / name, content)
        self.files[name] = hashlib.sha256(content).hexdigest()


def _mean_class_confidence(confidence: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """Mean over the classes of an image of their mean confidence: CBST's authors choose target images by it."""
    counts = np.bincount(labels.ravel(), minlength=num_classes)
    sums = np.bincount(labels.ravel(), weights=confidence.ravel(), minlength=num_classes)
    there = counts > 0
    return float((sums[there] / counts[there]).mean())


def _png(labels: np.ndarray) -> bytes:
    done, content = cv2.imencode(".png", labels, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise OSError(f"a label map of {labels.shape} could not be encoded as PNG")
    return content.tobytes()
