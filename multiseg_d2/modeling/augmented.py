"""Test-time variants of a segmentor: several scales, mirrored images, sliding window, tiles where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.nn import functional as F

from ..user_error import ConfigError
from .inference import Prediction
from .score_maps import MeanOverViews, MeanOverWindows, Mirrored, Resized

__all__ = ["AugmentedInference", "build_inference_model", "window_starts"]

logger = logging.getLogger(__name__)
#: Tiles are not made smaller than this when memory runs out: a network that fails here is too big for the device.
MIN_TILE = 128


def build_inference_model(cfg: CfgNode, model: nn.Module) -> AugmentedInference:
    """Wraps a segmentor as ``TEST.AUG`` and ``TEST.SLIDING_WINDOW`` say."""
    augment = cfg.TEST.AUG
    head = getattr(model, "module", model).sem_seg_head
    return AugmentedInference(
        model,
        scales=augment.SCALES if augment.ENABLED else (1.0,),
        flip=augment.FLIP if augment.ENABLED else False,
        window=cfg.TEST.SLIDING_WINDOW,
        activation=head.activation,
    )


class AugmentedInference(nn.Module):
    """A segmentor that is called like the one it wraps, in evaluation mode.

    Each view (scale, mirrored or not) is scored and brought back to the wanted size; the mean is taken over
    probabilities, at that size, but piece by piece as it is looked at (:class:`.ScoreMap`). The result is always
    *logits*: those of the segmentor where there is one view, else the log (for "sigmoid" the log-odds) of the mean
    probabilities, so that the activation gives the mean probabilities back.

    Beside the network's own needs for one view or window, memory holds the scores of all views and windows at the
    network's resolution. An image for which the device's memory does not suffice is scored in tiles, which is logged.

    Args:
        model: a segmentor, see :class:`~multiseg_d2.modeling.MultiDatasetSegmentor`.
        scales: factors of the image size.
        flip: whether each scale is also scored mirrored.
        window: (height, width) of the sliding window, which moves by two thirds of its size; logits are averaged where
            windows overlap. (0, 0) scores whole images. Applied at every scale.
        activation: "softmax" or "sigmoid".
    """

    def __init__(
        self,
        model: nn.Module,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: Sequence[int] = (0, 0),
        activation: str = "softmax",
    ) -> None:
        super().__init__()
        if not scales or min(scales) <= 0:
            raise ConfigError(f"TEST.AUG.SCALES must be positive factors, not {tuple(scales)}")
        if len(window) != 2 or min(window) < 0 or (min(window) == 0 and max(window) > 0):
            raise ConfigError(f"TEST.SLIDING_WINDOW must be (height, width), or (0, 0) for none, not {tuple(window)}")
        if activation not in ("softmax", "sigmoid"):
            raise ValueError(f"activation must be softmax or sigmoid, not {activation!r}")
        self.model, self.window, self.activation = model, tuple(window), activation
        self.views = [
            (float(scale), mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))
        ]
        self._tiles: dict[tuple[int, int], tuple[int, int]] = {}  # image size that was too big -> tile that fits

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[Prediction]:
        """Scores of each sample, see :class:`.Prediction`."""
        return [self._prediction(sample) for sample in batched_inputs]

    def _prediction(self, sample: dict) -> Prediction:
        views = [self._view(sample, scale, mirrored) for scale, mirrored in self.views]
        if len(views) == 1:
            return views[0]
        return Prediction(MeanOverViews([view.scores for view in views]), views[0].void)

    def _view(self, sample: dict, scale: float, mirrored: bool) -> Prediction:
        image = sample["image"]
        height, width = image.shape[-2:]
        view = {**sample, "height": sample.get("height", height), "width": sample.get("width", width)}
        if scale != 1:
            size = (max(round(height * scale), 1), max(round(width * scale), 1))
            image = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
        view["image"] = image.flip(-1) if mirrored else image
        found = self._fitting(view)
        return Prediction(Mirrored(found.scores), found.void) if mirrored else found

    def _fitting(self, view: dict) -> Prediction:
        """Scores of an image, in tiles if it does not fit at once."""
        size = tuple(view["image"].shape[-2:])
        window = self._tiles.get(size, self.window)
        while True:
            try:
                return self._windowed(view, window)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
            # Outside the handler, so that the failed pass is no longer held by the traceback.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            whole = tuple(min(w or s, s) for w, s in zip(window, size))
            smaller = tuple(min(max(w // 2, MIN_TILE), w) for w in whole)
            if smaller == whole:
                raise RuntimeError(f"out of memory even with tiles of {whole} pixels: {reason}")
            logger.warning(
                "%s: %s. Scoring images of %s in tiles of %s from now on; set TEST.SLIDING_WINDOW to choose the size.",
                view.get("file_name", "an image"), reason, size, smaller,
            )  # fmt: skip
            window = self._tiles[size] = smaller

    def _windowed(self, view: dict, window: tuple[int, int]) -> Prediction:
        image = view["image"]
        height, width = image.shape[-2:]
        tall, wide = (min(w or s, s) for w, s in zip(window, (height, width)))
        if (tall, wide) == (height, width):
            return self._answer(view)
        parts, void = [], False
        for top, left in _windows((height, width), (tall, wide)):
            part = image[:, top : top + tall, left : left + wide]
            answer = self._answer({**view, "image": part, "height": tall, "width": wide})
            parts.append((top, left, answer.scores))
            void = answer.void
        mean, size = MeanOverWindows(parts, (height, width)), (view["height"], view["width"])
        return Prediction(mean if size == (height, width) else Resized(mean, size), void)

    def _answer(self, view: dict) -> Prediction:
        """The segmentor's answer; one of another make only has full-size scores."""
        (answer,) = self.model([view])
        if isinstance(answer, Prediction):
            return answer
        scores = answer["sem_seg"]
        return Prediction(Resized(scores, scores.shape[-2:], activation=self.activation))


def window_starts(length: int, window: int) -> list[int]:
    """First pixels of the windows that cover ``length`` pixels: steps of two thirds, the last window ends flush."""
    last = max(length - window, 0)
    return [*range(0, last, max(2 * window // 3, 1)), last]


def _windows(size: tuple[int, int], window: tuple[int, int]) -> Iterator[tuple[int, int]]:
    for top in window_starts(size[0], window[0]):
        for left in window_starts(size[1], window[1]):
            yield top, left


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error).lower()  # the class of CUDA's error has moved between torch versions, CPU's has none of its own
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
