"""A trained model on single images, like Detectron2's ``DefaultPredictor``."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from ..checkpoint import load_weights
from ..data.augment import CropWindow
from ..data.register import named_spaces
from ..evaluation.evaluator import predicted_labels
from ..label_space import LabelSpace
from ..modeling.augmented import build_inference_model
from ..modeling.catalog import training_spaces
from ..modeling.norm import dataset_norms, unseen_dataset
from ..user_error import ConfigError
from ..yaml_file import did_you_mean
from .shared_model import read_shared_model, shared_space
from .trainer import Trainer
from .user_code import register_config

__all__ = ["Predictor", "wanted_space"]

logger = logging.getLogger(__name__)


class Predictor:
    """Builds the model of a config, loads ``MODEL.WEIGHTS`` and labels images in one label space.

    Test-time scales, mirroring and sliding windows are those of the config; an image that does not fit into memory is
    scored in tiles.

    Args:
        cfg: a config; what it names is registered, see :func:`.register_config`.
        space: dataset whose classes are wanted; "" = the only one that the model was trained on.
        norm: trained dataset whose batch norm (and, for a space that the model has no classifier for, whose classifier,
            translated by the taxonomy) is used; "" = that of ``space``.

    Attributes:
        space: the label space of the results.

    Raises:
        ConfigError: ``space`` or ``norm`` cannot be meant.
        CheckpointError: the weights are missing, broken or of another model.
    """

    def __init__(self, cfg: CfgNode, space: str = "", norm: str = "") -> None:
        register_config(cfg)
        wanted = wanted_space(cfg, space, norm)
        model = Trainer.build_model(_on_this_machine(cfg))
        load_weights(model, cfg.MODEL.WEIGHTS, complete=True)
        self._set_up(cfg, model.eval(), wanted, norm)

    @classmethod
    def from_checkpoint(cls, path: str | Path, space: str = "", norm: str = "", device: str = "cpu") -> Predictor:
        """A predictor out of a file of ``tools/share.py``, which needs no config, no specs and no datasets.

        Args:
            path: of the file; nothing in it is run.
            space: name of a label space in the file; "" = the only one that the model was trained on.
            norm: as above.
            device: where to compute.

        Raises:
            ConfigError: ``space`` or ``norm`` cannot be meant.
            CheckpointError: the file is broken, or no model to share.
        """
        cfg, model, spaces = read_shared_model(path, device)
        head = model.sem_seg_head
        if norm and norm not in head.datasets:
            raise ConfigError(f"norm {norm!r}: the model was trained on {list(head.datasets)}")
        predictor = cls.__new__(cls)
        predictor._set_up(cfg, model, shared_space(spaces, space, head.space_of, str(path)), norm)
        return predictor

    def _set_up(self, cfg: CfgNode, model: nn.Module, space: LabelSpace, norm: str) -> None:
        self.image_format = cfg.INPUT.FORMAT
        self._sizes = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        self.space = space
        head = model.sem_seg_head
        trained, known = tuple(head.datasets), self.space.name in head.spaces
        needs_norm = not head.scores_any_space or any(dataset_norms(model))
        if not norm and self.space.name not in trained and needs_norm:
            raise ConfigError(f"the model was not trained on {self.space.name!r}: choose the norm of {list(trained)}")
        self._sample = {"dataset": norm or self.space.name, "label_space": self.space}
        self._stack = ExitStack()
        if not known and norm:  # stays in place as long as the predictor
            self._stack.enter_context(unseen_dataset(model, self.space.name, self.space, norm))
            self._sample["dataset"] = self.space.name
        self.model = build_inference_model(cfg, model)

    @torch.no_grad()
    def __call__(self, image: np.ndarray, name: str = "an image") -> np.ndarray:
        """Labels one image.

        Args:
            image: (H, W, 3) uint8, channels in the order of ``INPUT.FORMAT`` (``image_format``).
            name: of the image, for messages.

        Returns:
            (H, W) uint8 local ids of ``space``.
        """
        height, width = image.shape[:2]
        planes = torch.from_numpy(np.ascontiguousarray(self._resized(image).transpose(2, 0, 1)))  # (3, h, w)
        sample = {**self._sample, "image": planes, "height": height, "width": width, "file_name": name}
        (output,) = self.model([sample])
        return predicted_labels(output, self.space.num_classes)

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """As :class:`~multiseg_d2.data.mapper.EvaluationMapper` does it."""
        (height, width), (min_size, max_size) = image.shape[:2], self._sizes
        scale = min_size / min(height, width) if min_size else 1.0
        if min_size and max_size:
            scale = min(scale, max_size / max(height, width))
        out_h, out_w = (max(1, int(side * scale + 0.5)) for side in (height, width))
        return CropWindow(0, 0, width, height, out_w, out_h).apply_image(image)


def wanted_space(cfg: CfgNode, space: str, norm: str = "") -> LabelSpace:
    """The label space that a user means, found without building a model.

    Args:
        cfg: of the model, its datasets registered.
        space: name of a dataset, or of a spec (``camvid_full`` has the classes of ``camvid``); "" = the only one that
            the model was trained on.
        norm: checked, too: "" or a dataset that the model was trained on.

    Raises:
        ConfigError: there is none of this name, or several can be meant.
    """
    spaces = training_spaces(cfg)
    if norm and norm not in spaces:
        raise ConfigError(f"norm {norm!r}: the model was trained on {list(spaces)}{did_you_mean(norm, spaces)}")
    return _label_space(space, tuple(spaces), {own.name: own for own in spaces.values()})


def _on_this_machine(cfg: CfgNode) -> CfgNode:
    if not cfg.MODEL.DEVICE.startswith("cuda") or torch.cuda.is_available():
        return cfg
    logger.warning("MODEL.DEVICE is %s, but there is no such device here: using the CPU", cfg.MODEL.DEVICE)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _label_space(wanted: str, trained: tuple[str, ...], known: dict[str, LabelSpace]) -> LabelSpace:
    if not wanted and len(known) > 1:
        raise ConfigError(f"the model knows several label spaces: choose one of {list(known)}")
    wanted = wanted or next(iter(known))
    if wanted in known:
        return known[wanted]
    registered = named_spaces()
    if wanted not in registered:
        raise ConfigError(
            f"label space {wanted!r}: no such dataset is registered{did_you_mean(wanted, registered)}. The model was "
            f"trained on {list(trained)}; all registered: {sorted({space.name for space in registered.values()})}"
        )
    return known.get(registered[wanted].name, registered[wanted])
