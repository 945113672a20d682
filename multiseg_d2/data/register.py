"""Dataset specs -> Detectron2's ``DatasetCatalog`` and ``MetadataCatalog``, one entry ``<name>_<split>`` per split.

Registering reads spec and taxonomy files only; the data root is looked at when an entry is loaded. Metadata of an
entry: ``stuff_classes``, ``stuff_colors``, ``ignore_label``, ``evaluator_type``, ``label_space``, ``dataset``,
``split``, ``spec``, ``annotation`` and ``universal_classes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ..label_space import IGNORE, LabelSpace
from ..taxonomy import BY_NAME, Taxonomy
from ..user_error import UserError
from ..view_name import ViewNameError, base_entry
from ..yaml_file import did_you_mean
from .files import data_root, list_pairs
from .spaces import label_spaces
from .spec import DatasetSpec, SplitSpec, load_spec, packaged_specs
from .views import refresh_views, register_views

__all__ = [
    "EVALUATOR_TYPE",
    "EXACT_NAMES",
    "RegistrationError",
    "current_taxonomy",
    "data_root",
    "is_registered",
    "named_spaces",
    "register_dataset",
    "register_from_config",
    "register_packaged",
    "unregister_dataset",
    "use_taxonomy",
]

EVALUATOR_TYPE = "multiseg_sem_seg"
#: Value of ``DATASETS.TAXONOMY`` for a union by exact class name.
EXACT_NAMES = "exact_names"


class RegistrationError(UserError, ValueError):
    """A dataset cannot be registered beside those that are, or a name is not registered."""


class _State:
    """What is registered; ``base`` is the taxonomy as chosen, ``taxonomy`` that with unlisted datasets added."""

    def __init__(self) -> None:
        self.specs: dict[str, DatasetSpec] = {}
        self.choice: tuple[str, tuple[str, ...]] = ("", ())
        self.base: Taxonomy | None = None
        self.taxonomy: Taxonomy | None = None
        self.used: tuple[str, ...] | None = None


_state = _State()


def register_dataset(path_or_name: str | Path) -> list[str]:
    """Registers a dataset spec.

    Args:
        path_or_name: path of a spec file, or the name of a packaged spec.

    Returns:
        Names of the catalog entries, for example ``["camvid_train", "camvid_val", "camvid_test"]``. Registering the
        same spec again does nothing.

    Raises:
        SpecError: something is wrong with the file.
        RegistrationError: the name is taken by another spec, or the classes differ from those of its ``dataset``.
        TaxonomyError: a class covers a concept that the taxonomy does not have.
    """
    return _register(load_spec(path_or_name))


def register_packaged() -> list[str]:
    """Registers the specs that come with the package; returns the names of their entries."""
    return [name for spec in packaged_specs() for name in _register(_packaged_spec(spec))]


def register_from_config(cfg: CfgNode) -> None:
    """Registers ``cfg.DATASETS.SPECS`` and rebuilds all label spaces for ``cfg.DATASETS.TAXONOMY``.

    A union by exact names is that of the datasets in ``cfg.DATASETS.TRAIN``; what only other datasets have comes after.

    Raises:
        RegistrationError: also for a name in ``DATASETS.TRAIN`` or ``DATASETS.TEST`` that is not registered.
    """
    for item in cfg.DATASETS.SPECS:
        register_dataset(item)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            _spec_of(name, f"DATASETS.{key}")
        register_views(cfg.DATASETS[key])
    use_taxonomy(cfg.DATASETS.TAXONOMY, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)


def use_taxonomy(choice: str = "", train: Sequence[str] = (), test: Sequence[str] = ()) -> Taxonomy:
    """Chooses the taxonomy and rebuilds the label spaces of all entries; the only way in which metadata change.

    ``MetadataCatalog.get(name)`` returns a new object afterwards; one that was taken before keeps the old label space.

    Args:
        choice: as ``DATASETS.TAXONOMY``: ``""`` or ``"packaged"``, ``"mseg"``, ``"exact_names"``, or a file's path.
        train: catalog entries; for ``"exact_names"`` their class names make up the union.
        test: further entries that are used. In a file of the user's, the concepts that the `covers` of used datasets
            name must exist; other datasets get classes of their own where they do not.

    Returns:
        The taxonomy, with the datasets that it did not list added at its end.

    Raises:
        RegistrationError: there is no such taxonomy, or an entry is not registered.
        TaxonomyError: something is wrong with the file, or a dataset does not fit it.
    """
    trained = {spec.dataset: spec.class_names for spec in (_spec_of(name, "train") for name in train)}
    used = tuple(dict.fromkeys((*trained, *(_spec_of(name, "test").dataset for name in test))))
    new_choice = (choice, tuple(trained) if choice == EXACT_NAMES else ())
    if new_choice == _state.choice and choice in (*BY_NAME, EXACT_NAMES) and _state.taxonomy is not None:
        return _state.taxonomy  # a file of the user's is read again: it may have changed
    if choice == EXACT_NAMES:
        base = Taxonomy.exact_names(trained)
    elif choice in BY_NAME:
        base = _named_taxonomy(BY_NAME[choice])
    elif Path(choice).is_file():
        base = Taxonomy.load(choice)
    else:
        names = [name for name in (*BY_NAME, EXACT_NAMES) if name]
        raise RegistrationError(
            f"DATASETS.TAXONOMY: {choice!r} is none of {', '.join(names)}, and no file{did_you_mean(choice, names)}"
        )
    _rebuild(base, None if choice in ("", "packaged") else used)
    _state.choice = new_choice
    return current_taxonomy()


def current_taxonomy() -> Taxonomy:
    """The taxonomy behind the label spaces: the chosen one and, at its end, what registered datasets brought along."""
    if _state.taxonomy is None:
        _state.base = _state.taxonomy = _named_taxonomy(BY_NAME[""])
    return _state.taxonomy


def named_spaces() -> dict[str, LabelSpace]:
    """Every registered label space by each name that a user may know it by: its dataset's, and its specs'."""
    entries = [MetadataCatalog.get(name) for name in MetadataCatalog.list()]
    entries = [entry for entry in entries if hasattr(entry, "label_space")]
    by_spec = {entry.spec.name: entry.label_space for entry in entries if hasattr(entry, "spec")}
    return {**by_spec, **{entry.dataset: entry.label_space for entry in entries}}


def unregister_dataset(name: str) -> list[str]:
    """Removes the entries of a spec, for example to register a changed version of its file.

    Args:
        name: of the spec, for example ``"camvid"``.

    Returns:
        Names of the removed entries.
    """
    if name not in _state.specs:
        raise RegistrationError(f"no dataset spec {name!r} is registered{did_you_mean(name, _state.specs)}")
    removed = [split.entry for split in _state.specs.pop(name).splits.values()]
    for entry in removed:
        DatasetCatalog.pop(entry, None)
        MetadataCatalog.pop(entry, None)
    _rebuild(_state.base, _state.used)  # universal classes that this dataset brought along go with it
    return removed


def is_registered(name: str) -> bool:
    """Whether a spec of this name is registered."""
    return name in _state.specs


def _register(spec: DatasetSpec) -> list[str]:
    names = [split.entry for split in spec.splits.values()]
    known = _state.specs.get(spec.name)
    if known == spec and all(name in DatasetCatalog for name in names):
        return names
    if known is not None and known != spec:
        raise RegistrationError(
            f"{spec.path}: a dataset spec called {spec.name!r} is registered already, from {known.path}, with other "
            f"content. Choose another `name`, or call unregister_dataset({spec.name!r}) first."
        )
    for name in names:
        owner = next((s.name for s in _state.specs.values() for t in s.splits.values() if t.entry == name), None)
        if known is None and (owner or name in DatasetCatalog):
            by = f"dataset spec {owner!r}" if owner else "other code"
            raise RegistrationError(
                f"{spec.path}: the entry {name!r} is registered already, by {by}. Choose another `name`."
            )
    _check_same_classes(spec)
    current_taxonomy()
    spaces, _state.taxonomy = label_spaces([spec], _state.base, _state.taxonomy)
    _state.specs[spec.name] = spec
    for split in spec.splits.values():
        _set_metadata(split, spaces[spec.name])
        DatasetCatalog.pop(split.entry, None)
        DatasetCatalog.register(split.entry, lambda split=split: list_pairs(split, data_root()))
    return names


def _check_same_classes(spec: DatasetSpec) -> None:
    """Specs of one dataset share norm branch and classifier, so their classes must be the same, in the same order."""
    for other in _state.specs.values():
        if other.dataset != spec.dataset or other.name == spec.name:
            continue
        ours, theirs = ([(c.name, c.covers) for c in s.classes] for s in (spec, other))
        if ours != theirs:
            raise RegistrationError(
                f"{spec.path}: dataset {spec.dataset!r} has, in the spec {other.name!r}, the classes "
                f"{list(other.class_names)}, but here {list(spec.class_names)} (or other `covers`). "
                "Give this spec a `dataset` of its own."
            )


def _rebuild(base: Taxonomy, used: tuple[str, ...] | None) -> None:
    """Builds all label spaces anew on a taxonomy, those of used datasets first; if that fails, nothing has changed."""
    rank = {dataset: position for position, dataset in enumerate(used or ())}
    specs = sorted(_state.specs.values(), key=lambda spec: rank.get(spec.dataset, len(rank)))
    spaces, taxonomy = label_spaces(specs, base, base, used)
    _state.base, _state.taxonomy, _state.used = base, taxonomy, used
    for name, spec in _state.specs.items():
        for split in spec.splits.values():
            _set_metadata(split, spaces[name])
    refresh_views()


def _set_metadata(split: SplitSpec, space: LabelSpace) -> None:
    """Sets metadata. Detectron2 refuses to change a value, so the entry is replaced; keys of others stay."""
    values: dict[str, Any] = {
        "stuff_classes": list(space.classes),
        "stuff_colors": space.colors.tolist(),
        "ignore_label": IGNORE,
        "evaluator_type": EVALUATOR_TYPE,
        "label_space": space,
        # Names of the columns of `membership`; what the taxonomy got later stands behind them.
        "universal_classes": list(current_taxonomy().universal[: space.membership.shape[1]]),
        "dataset": split.spec.dataset,
        "split": split.name,
        "spec": split.spec,
        "annotation": split.annotation,
    }
    others = MetadataCatalog.pop(split.entry, Metadata()).as_dict()
    MetadataCatalog.get(split.entry).set(**{**others, **values, "name": split.entry})


def _spec_of(entry: str, where: str) -> DatasetSpec:
    """The spec behind an entry or a view of one."""
    entries = {split.entry: spec for spec in _state.specs.values() for split in spec.splits.values()}
    try:
        base = base_entry(entry)
    except ViewNameError as problem:
        raise RegistrationError(f"{where}: {problem}") from None
    if base not in entries:
        raise RegistrationError(
            f"{where}: {base!r} is not registered with a label space{did_you_mean(base, entries)}. Add the file of "
            f"its spec to DATASETS.SPECS. Registered specs: {', '.join(_state.specs)}."
        )
    return entries[base]


@cache
def _named_taxonomy(path: Path) -> Taxonomy:
    return Taxonomy.load(path)


@cache
def _packaged_spec(name: str) -> DatasetSpec:
    return load_spec(name)
