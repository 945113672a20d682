"""The weights that a run or an evaluation starts from: ImageNet's for the backbone, or a whole model's."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from multiseg_d2.modeling.weight_files import read_state
from multiseg_d2.modeling.weights import load_pretrained

from .checkpoint_file import CheckpointError, read_checkpoint
from .ranks import unwrapped

__all__ = ["class_names", "load_weights"]

logger = logging.getLogger(__name__)

_SHOWN = 10


def load_weights(model: nn.Module, path: str, *, complete: bool = False, cfg: CfgNode | None = None) -> None:
    """Loads ``path`` into a model, in place. No code from the file is run.

    A file with tensors of a whole model (``backbone.*`` and a head) is matched by name; what the file lacks (the
    classifier of a new dataset, say) is listed and stays as it was initialised. Any other file is taken as a backbone's
    ImageNet weights.

    Args:
        model: a segmentor.
        path: local path, or anything that Detectron2's PathManager resolves; "" leaves the model as it is.
        complete: every tensor of the model must be in the file: for evaluation.
        cfg: for a warning where ``INPUT.FORMAT`` and the pixel mean are not those of an ImageNet file.

    Raises:
        CheckpointError: the file is broken or unsafe, or its classes, norms or shapes are not the model's.
    """
    model = unwrapped(model)
    if not path:
        if complete:
            raise CheckpointError("MODEL.WEIGHTS is empty: there is no trained model to evaluate")
        logger.info("MODEL.WEIGHTS is empty: the model starts from its random initialisation")
        return
    content = _read(path)
    prefixes = {key.split(".", 1)[0] for key in content["model"]}
    if "backbone" in prefixes and len(prefixes) > 1:
        _load_model(model, path, content, complete)
        return
    if complete:
        raise CheckpointError(f"{path} holds a backbone only: name a trained model in MODEL.WEIGHTS to evaluate it")
    pixels = {} if cfg is None else _pixel_settings(cfg)
    load_pretrained(model, path, **pixels)


def class_names(model: nn.Module) -> dict[str, list[str]]:
    """Class names of each label space that a model knows, {} where it does not say."""
    model = unwrapped(model)
    return model.class_names() if hasattr(model, "class_names") else {}


def _read(path: str) -> dict[str, Any]:
    """``{"model": tensors by name, "run": facts of the run or nothing}``."""
    local = Path(PathManager.get_local_path(path))
    if not local.is_file():
        raise CheckpointError(f"MODEL.WEIGHTS: there is no file {path}")
    if zipfile.is_zipfile(local):  # written by torch, so that its checksums can be compared
        content = read_checkpoint(local)
        if isinstance(content.get("model"), Mapping):
            return {"model": dict(content["model"]), "run": content.get("run", {})}
    return {"model": read_state(str(local))[0], "run": {}}


def _pixel_settings(cfg: CfgNode) -> dict[str, Any]:
    return {
        "input_format": cfg.INPUT.FORMAT,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
    }


def _load_model(model: nn.Module, path: str, content: Mapping[str, Any], complete: bool) -> None:
    state, own = content["model"], model.state_dict()
    problems = [
        *_class_problems(content["run"].get("classes", {}), class_names(model)),
        *_norm_problems(state, own),
        *_shape_problems(state, own),
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit the model:\n" + "\n".join(f"  - {p}" for p in problems))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing and complete:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of the model: {_shortened(missing)}")
    if missing:
        logger.warning("%s lacks %d tensors, which stay as initialised: %s", path, len(missing), _shortened(missing))
    if unexpected:
        logger.warning("%s has %d tensors that the model has not: %s", path, len(unexpected), _shortened(unexpected))
    logger.info("loaded %d tensors from %s", len(state) - len(unexpected), path)


def _class_problems(trained: Mapping[str, list[str]], own: Mapping[str, list[str]]) -> list[str]:
    return [
        f"dataset {name!r} has other classes:\n    in the file:  {trained[name]}\n    in the model: {own[name]}"
        for name in own
        if name in trained and list(trained[name]) != list(own[name])
    ]


def _norm_problems(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Norms per dataset read into plain ones: their plain keys hold what training began with, not what it learned."""
    datasets = _norm_datasets(state)
    if not datasets or _norm_datasets(own):
        return []
    return [
        f"it has norms per dataset ({', '.join(datasets)}), the model has plain ones: set MODEL.DATASET_NORM.ENABLED, "
        "or make a model of one dataset first (modeling.norm_conversion.single_dataset_model)"
    ]


def _norm_datasets(state: Mapping[str, Tensor]) -> list[str]:
    """Datasets that have a branch in the norms: their keys beside the plain ones of the same norm."""
    found = set()
    for key in state:
        norm, branches, rest = key.rpartition(".branches.")
        dataset, _, entry = rest.partition(".")
        if branches and f"{norm}.{entry}" in state:
            found.add(dataset)
    return sorted(found)


def _shape_problems(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and tuple(state[key].shape) != tuple(own[key].shape)
    ]


def _shortened(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f", ... ({len(keys) - _SHOWN} more)" if len(keys) > _SHOWN else "")
