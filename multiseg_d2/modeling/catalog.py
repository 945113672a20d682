"""What the model needs to know of the registered datasets: their names and label spaces, from Detectron2's catalog."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..label_space import LabelSpace
from ..taxonomy import BY_NAME, PACKAGED, Taxonomy
from ..user_error import ConfigError, UserError
from ..view_name import base_entry

__all__ = [
    "UnknownLabelSpaceError",
    "catalog_space",
    "class_meanings",
    "requested_space",
    "training_datasets",
    "training_spaces",
]


class UnknownLabelSpaceError(UserError, ValueError):
    """Scores were asked for in a label space that the model cannot name."""


def catalog_space(entry: str) -> tuple[str, LabelSpace]:
    """(dataset, label space) of a catalog entry.

    Raises:
        KeyError: no such entry, or one that was registered without a label space.
    """
    known = entry if entry in MetadataCatalog.list() else base_entry(entry)  # views share a space
    metadata = MetadataCatalog.get(known) if known in MetadataCatalog.list() else None
    if not hasattr(metadata, "label_space"):
        what = "is not registered" if metadata is None else "was registered without a label space"
        raise KeyError(
            f"dataset {entry!r} {what}. Registered with a label space: "
            f"{sorted(n for n in MetadataCatalog.list() if hasattr(MetadataCatalog.get(n), 'label_space'))}. "
            "Register it with multiseg_d2.register_dataset, or the config key DATASETS.SPECS (and then call "
            "multiseg_d2.engine.register_config(cfg) before a model is built)."
        )
    return metadata.get("dataset", metadata.label_space.name), metadata.label_space


def training_datasets(cfg: CfgNode) -> tuple[str, ...]:
    """Dataset of every entry of ``DATASETS.TRAIN``, in its order (a dataset may occur twice).

    Raises:
        ValueError: the list is empty.
        KeyError: an entry is not registered.
    """
    if not cfg.DATASETS.TRAIN:
        raise ConfigError(
            "DATASETS.TRAIN is empty: it names the datasets that the model knows, also for evaluation. Give the list "
            "that the checkpoint was trained with."
        )
    return tuple(catalog_space(name)[0] for name in cfg.DATASETS.TRAIN)


def training_spaces(cfg: CfgNode) -> dict[str, LabelSpace]:
    """Label space in which each training dataset's labels reach the model: its own, or that of ``DATASETS.REMAP_TO``.

    Raises:
        ValueError: two entries of one dataset have different classes, or no entry has the space of ``REMAP_TO``.
    """
    spaces: dict[str, LabelSpace] = {}
    for dataset, entry in zip(training_datasets(cfg), cfg.DATASETS.TRAIN):
        space = catalog_space(entry)[1]
        known = spaces.setdefault(dataset, space)
        if known.classes != space.classes:
            raise ConfigError(
                f"DATASETS.TRAIN holds two label spaces of one dataset {dataset!r}:\n  {list(known.classes)}\n  "
                f"{list(space.classes)} ({entry})\nGive one of the specs a `dataset` name of its own."
            )
    target = cfg.DATASETS.REMAP_TO
    if not target:
        return spaces
    candidates = dict(spaces)
    for entry in cfg.DATASETS.TEST:
        candidates.setdefault(*catalog_space(entry))
    if target not in candidates:
        raise ConfigError(f"DATASETS.REMAP_TO is {target!r}, but DATASETS.TRAIN and .TEST only hold {list(candidates)}")
    return dict.fromkeys(spaces, candidates[target])


def class_meanings(cfg: CfgNode) -> dict[str, np.ndarray]:
    """What the taxonomy says of the classes of each training dataset, also where label spaces are by exact names.

    That is the file of ``DATASETS.TAXONOMY`` or, by exact names, the packaged one.

    Returns:
        Dataset -> (C, L) bool, see :meth:`.Taxonomy.meaning`.
    """
    choice = cfg.DATASETS.TAXONOMY
    taxonomy = Taxonomy.load(PACKAGED if choice == "exact_names" else BY_NAME.get(choice, choice))
    meanings = {}
    for entry in cfg.DATASETS.TRAIN:
        dataset, space = catalog_space(entry)
        spec = MetadataCatalog.get(entry).get("spec")
        covers = {c.name: c.covers for c in spec.classes} if spec else dict.fromkeys(space.classes)
        meanings[dataset] = taxonomy.meaning(covers, dataset)
    return meanings


def requested_space(sample: dict, known: Mapping[str, LabelSpace]) -> LabelSpace:
    """Label space in which a sample wants its scores.

    It is the sample's ``label_space`` (a name or a :class:`LabelSpace`), else that of its ``dataset``. A name means the
    space of the sample's catalog entry where that has this name, else one of ``known``.

    Raises:
        UnknownLabelSpaceError: the name means neither.
    """
    wanted = sample.get("label_space", sample["dataset"])
    if isinstance(wanted, LabelSpace):
        return wanted
    if "entry" in sample:
        own = catalog_space(sample["entry"])[1]
        if own.name == wanted:
            return own
    if wanted not in known:
        raise UnknownLabelSpaceError(
            f"{sample.get('file_name', 'a sample')}: scores are wanted in the label space {wanted!r}, which the model "
            f"does not know. It knows {sorted(known)}; set the sample's `label_space` to one of them."
        )
    return known[wanted]
