"""Views of catalog entries: some of the images, or the images without their labels. For the names see ``view_name``.

The images of a slice are ordered by a hash of their ids: fixed, alike on every machine whatever the file system lists
first, and nested (the first 30 are among the first 100). An unlabelled view reads no label file and no annotation file,
and needs none to be there. A view is registered like any entry, so whatever takes the name of an entry takes that of a
view.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata

from ..atomic_file import write_atomically
from ..json_file import read_json
from ..view_name import UNLABELLED, ViewName, parse_view
from .files import data_root, list_pairs
from .pairing import DatasetFilesError, composed, pair_files
from .spec import SplitSpec

__all__ = ["refresh_views", "register_views", "view_of_split", "write_view_lists"]

_LISTS = "views.json"
#: What a dataset dict says beyond the image; a view without labels drops it.
_LABEL_KEYS = (
    *("sem_seg_file_name", "pan_seg_file_name", "segments_info", "annotations", "image_tags"),
    "soft_label_file_name",
)


def register_views(names: Iterable[str]) -> None:
    """Registers those of the names that are views of registered entries and are not registered yet.

    Raises:
        ViewNameError: a name looks like that of a view and is none.
    """
    for name in names:
        view = None if name in DatasetCatalog.list() else parse_view(name)
        if view is not None and view.entry in DatasetCatalog.list():
            DatasetCatalog.register(name, lambda name=name, view=view: _records(name, view))
            _set_metadata(name, view)


def refresh_views() -> None:
    """Gives registered views the metadata that their entries have now; views of entries that are gone go as well."""
    for name in DatasetCatalog.list():
        view = parse_view(name)
        if view is not None and view.entry in DatasetCatalog.list():
            _set_metadata(name, view)
        elif view is not None:
            DatasetCatalog.pop(name)
            MetadataCatalog.pop(name, None)


def _set_metadata(name: str, view: ViewName) -> None:
    MetadataCatalog.pop(name, None)  # Detectron2 refuses to change a value
    values = {**MetadataCatalog.get(view.entry).as_dict(), "name": name}
    if not view.labelled:
        values["annotation"] = "none"
    MetadataCatalog.get(name).set(**values)


def _records(name: str, view: ViewName) -> list[dict[str, Any]]:
    """Dataset dicts of a view."""
    metadata: Metadata = MetadataCatalog.get(view.entry)
    if metadata.get("spec") is not None:
        root = data_root()
        return list_pairs(view_of_split(metadata.spec.splits[metadata.split], view, root), root)
    # Registered by other code than this package's.
    records = {str(r.get("image_id", r["file_name"])): r for r in DatasetCatalog.get(view.entry)}
    chosen = [records[image_id] for image_id in _slice(list(records), name, view)]
    if not view.labelled:
        chosen = [{k: v for k, v in r.items() if k not in _LABEL_KEYS} | {"annotation": "none"} for r in chosen]
    return [{**record, "entry": name} for record in chosen]


def view_of_split(split: SplitSpec, view: ViewName, root: str) -> SplitSpec:
    """The split that a view stands for: ids in place of the slice, no labels where it has none.

    Args:
        split: of the view's entry.
        view: what the name says.
        root: data root; the image files below it are listed, label files are not looked at.

    Raises:
        DatasetFilesError: no images, or fewer than the slice asks for.
    """
    bare = replace(split, labels=(), soft_labels="", annotation_file="", annotation="none")
    suffix = "" if view.labelled else UNLABELLED
    if view.sliced:
        suffix = f"[{view.start or ''}:{'' if view.stop is None else view.stop}]{suffix}"
    chosen = replace(split if view.labelled else bare, suffix=suffix)
    if not view.sliced:
        return chosen
    ids = _slice(list(pair_files(replace(bare, suffix=suffix), root).images), chosen.entry, view)
    return replace(chosen, ids=tuple(ids), count=None)


def _slice(image_ids: Sequence[str], name: str, view: ViewName) -> list[str]:
    if not view.sliced:
        return list(image_ids)
    last = view.start + 1 if view.stop is None else view.stop
    if last > len(image_ids):
        raise DatasetFilesError(f"{name}: {view.entry} has only {len(image_ids)} images")
    return sorted(image_ids, key=_place)[view.start : view.stop]


def _place(image_id: str) -> tuple[bytes, str]:
    """Sort key: a hash that is the same on every machine, also on those that decompose accents in file names."""
    text = composed(image_id)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest(), text


def write_view_lists(folder: str | os.PathLike, images: Mapping[str, Sequence[str]], resumed: bool) -> None:
    """Writes which images the views of a run stand for to ``views.json`` in its folder, beside those of earlier rounds.

    Args:
        folder: output folder of the run.
        images: view name -> image ids in order. Nothing is written where there is none.
        resumed: the run goes on, so that a view that stands for other images than before is an error.

    Raises:
        DatasetFilesError: a view has changed since the run began, or the file is damaged.
    """
    if not images:
        return
    path = Path(folder) / _LISTS
    known: dict[str, list[str]] = read_json(path, DatasetFilesError, keys=()) if path.is_file() else {}
    changed = [name for name, ids in images.items() if resumed and known.get(name, list(ids)) != list(ids)]
    if changed:
        raise DatasetFilesError(
            f"{', '.join(changed)}: other images than when this run began (the list is in {path}). Restore the folder "
            "of the images, or start anew in another OUTPUT_DIR."
        )
    known.update({name: list(ids) for name, ids in images.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(known, indent=1, ensure_ascii=False) + "\n")
