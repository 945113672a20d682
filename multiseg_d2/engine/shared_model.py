"""A trained model in one small file, with its label spaces inside: built without config, specs or datasets.

What only training needs is left out: optimizer, averaged weights, auxiliary branch, prototypes, class relations.
Tensors of two and more axes are stored in float16 unless more is asked for; norms and biases stay float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import nn

from ..checkpoint import CheckpointError, load_weights
from ..checkpoint.file import read_checkpoint, write_checkpoint
from ..label_space import ILLEGAL, TABLE_SIZE, LabelSpace
from ..modeling.catalog import catalog_space, training_spaces
from ..text_file import read_text
from ..user_error import ConfigError
from ..yaml_file import did_you_mean
from .config_file import default_config
from .trainer import Trainer

__all__ = ["read_shared_model", "shared_space", "write_shared_model"]

_FORMAT = 1
_KIND = "multiseg_d2 shared model"
#: Keys that say where things lie on the machine that trained, or how it trained.
_TRAINING = ("DATASETS", "DATALOADER", "SOLVER", "SELF_TRAINING", "OUTPUT_DIR", "SEED", "IMPORTS", "VIS_PERIOD")


def write_shared_model(cfg: CfgNode, path: str | Path, half: bool = True) -> int:
    """Writes ``MODEL.WEIGHTS`` of a config as a file for others; whole or not at all.

    Args:
        cfg: a config, its datasets registered. The label spaces of ``DATASETS.TRAIN`` and ``.TEST`` go into the file.
        path: of the file.
        half: store what has two axes or more in float16.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: the weights are missing or of another model, or the file cannot be written.
        ConfigError: the model is built by modules of the user's own (``IMPORTS``), which no file can hold.
    """
    if cfg.IMPORTS:
        raise ConfigError(f"IMPORTS {tuple(cfg.IMPORTS)}: code cannot be put into a file of weights")
    stripped = _for_inference(cfg)
    model = Trainer.build_model(stripped)
    load_weights(model, cfg.MODEL.WEIGHTS, complete=True)
    tensors = {
        key: value.detach().cpu().half() if half and value.is_floating_point() and value.ndim > 1 else value.cpu()
        for key, value in model.state_dict().items()
    }
    content = {
        "kind": _KIND,
        "format": _FORMAT,
        "config": yaml.safe_dump(_changes(stripped, default_config())),
        "hierarchy": _hierarchy_text(cfg),
        "datasets": [_dataset(stripped, entry) for entry in _first_entries(stripped)],
        "spaces": [_plain(space) for space in _tested_spaces(cfg).values()],
        "model": tensors,
    }
    write_checkpoint(Path(path), content)
    return Path(path).stat().st_size


def read_shared_model(path: str | Path, device: str = "cpu") -> tuple[CfgNode, nn.Module, dict[str, LabelSpace]]:
    """Builds the model in a file of :func:`write_shared_model`. No code from the file is run.

    Args:
        path: of the file.
        device: where the model shall be.

    Returns:
        The config that it was built from, the model in evaluation mode, and the label spaces in the file by name.

    Raises:
        CheckpointError: the file is broken, or of another kind.
    """
    content = read_checkpoint(Path(path))
    if content.get("kind") != _KIND:
        raise CheckpointError(f"{path} is no model to share: tools/share.py makes one of a config and its weights")
    if content["format"] != _FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, this version reads {_FORMAT}")
    cfg = _config(content["config"], device, str(path))
    with _registered(content["datasets"]) as entries, ExitStack() as stack:
        cfg.DATASETS.TRAIN = entries
        if content["hierarchy"]:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder / "hierarchy.yaml").write_text(content["hierarchy"], encoding="utf-8")
            cfg.MODEL.SEM_SEG_HEAD.HIERARCHY = str(folder / "hierarchy.yaml")
        model = Trainer.build_model(cfg)
    own = model.state_dict()
    stored = {key: value.to(own[key].dtype) if key in own else value for key, value in content["model"].items()}
    try:
        model.load_state_dict(stored)
    except RuntimeError as problem:
        raise CheckpointError(f"{path} does not fit the model that its config describes: {problem}") from problem
    spaces = {space.name: space for space in map(_space, content["spaces"])}
    return cfg, model.eval(), spaces | model.sem_seg_head.spaces


def _for_inference(cfg: CfgNode) -> CfgNode:
    """The config of what is left when training is over: heads that only train differently become the plain ones."""
    cfg = cfg.clone()
    cfg.defrost()
    keys = cfg.MODEL.SEM_SEG_HEAD
    if keys.NAME == "EntropyHead":  # either loads the other one's checkpoints
        keys.NAME, keys.LOSS_TYPE, keys.COSINE_SCALE = "PerDatasetHead", "", 0.0
    if keys.NAME == "UnifiedHead" and keys.LOSS_TYPE == "relational_bce":
        keys.LOSS_TYPE = "null_bce"
    keys.CLASS_STATISTICS, keys.DATASET_LOSS_WEIGHTS, keys.AUX_LOSS_WEIGHT = "", (), 0.0
    cfg.MODEL.EMA_DECAY, cfg.MODEL.DEVICE = 0.0, "cpu"
    return cfg


def _changes(cfg: CfgNode, default: CfgNode) -> dict[str, Any]:
    """What a config says of model, input and test, where that is not the default: fit for other Detectron2 versions."""
    changes: dict[str, Any] = {}
    for key, value in cfg.items():
        if key in _TRAINING and cfg.keys() >= {"DATASETS", "MODEL"}:
            continue
        if isinstance(value, CfgNode):
            inside = _changes(value, default[key])
            changes |= {key: inside} if inside else {}
        elif value != default[key] and key not in ("WEIGHTS", "HIERARCHY"):
            changes[key] = list(value) if isinstance(value, tuple) else value
    return changes


def _config(text: str, device: str, path: str) -> CfgNode:
    cfg = default_config()
    try:
        cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(text) or {}))
    except (KeyError, ValueError, AssertionError) as problem:
        raise CheckpointError(f"{path}: its config is not one of this version: {problem}") from problem
    cfg.MODEL.DEVICE = device
    return cfg


def _hierarchy_text(cfg: CfgNode) -> str:
    path = cfg.MODEL.SEM_SEG_HEAD.HIERARCHY
    return read_text(path, ConfigError) if path else ""


def _first_entries(cfg: CfgNode) -> dict[str, str]:
    """The entries that say something new: of every dataset one per kind of annotation."""
    found: dict[tuple[str, str], str] = {}
    for entry in cfg.DATASETS.TRAIN:
        found.setdefault((catalog_space(entry)[0], MetadataCatalog.get(entry).get("annotation", "pixel")), entry)
    return {entry: dataset for (dataset, _), entry in found.items()}


def _dataset(cfg: CfgNode, entry: str) -> dict[str, Any]:
    dataset, metadata = catalog_space(entry)[0], MetadataCatalog.get(entry)
    return {
        "dataset": dataset,
        "annotation": metadata.get("annotation", "pixel"),
        "universal_classes": list(metadata.get("universal_classes", [])),
        "space": _plain(training_spaces(cfg)[dataset]),
    }


def _tested_spaces(cfg: CfgNode) -> dict[str, LabelSpace]:
    spaces = [catalog_space(entry)[1] for entry in cfg.DATASETS.TEST]
    return {space.name: space for space in spaces}


def _plain(space: LabelSpace) -> dict[str, Any]:
    arrays = {key: torch.from_numpy(np.array(getattr(space, key))) for key in _ARRAYS}
    return {"name": space.name, "classes": list(space.classes), **arrays}


_ARRAYS = ("colors", "membership", "main_universal")


def _space(content: Mapping[str, Any]) -> LabelSpace:
    """A label space for scores; label files cannot be read with it."""
    arrays: dict[str, Any] = {key: content[key].numpy() for key in _ARRAYS}
    table = np.full(TABLE_SIZE, ILLEGAL, np.uint8)
    return LabelSpace(content["name"], tuple(content["classes"]), raw_to_local=table, **arrays)


@contextmanager
def _registered(datasets: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Catalog entries without images, from which a model learns its label spaces while it is built."""
    names = [f"shared model, {index}: {item['dataset']}" for index, item in enumerate(datasets)]
    try:
        for name, item in zip(names, datasets):
            MetadataCatalog.get(name).set(
                dataset=item["dataset"],
                annotation=item["annotation"],
                universal_classes=item["universal_classes"],
                label_space=_space(item["space"]),
            )
        yield tuple(names)
    finally:
        for name in names:
            if name in MetadataCatalog.list():
                MetadataCatalog.remove(name)


def shared_space(spaces: Mapping[str, LabelSpace], wanted: str, trained: Mapping[str, str], path: str) -> LabelSpace:
    """The label space that is meant, of those in a file.

    Args:
        spaces: by name.
        wanted: name of a label space; "" = the only one that the model was trained on.
        trained: dataset -> name of its label space.
        path: for messages.

    Raises:
        ConfigError: there is none of this name, or several can be meant.
    """
    known = list(dict.fromkeys(trained.values()))
    if not wanted and len(known) > 1:
        raise ConfigError(f"{path} knows several label spaces: choose one of {known}")
    wanted = wanted or known[0]
    if wanted not in spaces:
        raise ConfigError(
            f"label space {wanted!r} is not in {path}, which has {sorted(spaces)}{did_you_mean(wanted, spaces)}"
        )
    return spaces[wanted]
