"""The pseudo-labels of one round: a folder with label files, a dataset spec and a manifest, whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from ...atomic_file import write_atomically
from ...data.register import register_dataset, unregister_dataset
from ...json_file import read_json
from ...label_space import IGNORE
from ...user_error import UserError

__all__ = ["PseudoLabelError", "PseudoLabels"]

_MANIFEST, _SPEC = "manifest.json", "spec.yaml"


class PseudoLabelError(UserError, RuntimeError):
    """Pseudo-labels cannot be used: they are not whole, of another run, or of no use."""


class PseudoLabels:
    """Where the labels of one entry in one round lie, and what is known of them.

    They are a dataset like any other: ``DATASETS.SPECS`` takes the ``spec.yaml``, ``tools/visualize.py`` shows it, and
    one can train on the entry without the hook that made it.

    Args:
        root: folder of all rounds of a run.
        number: of the round, from 0.
        target: catalog entry that is labelled.
    """

    def __init__(self, root: str | Path, number: int, target: str) -> None:
        self.number, self.target = number, target
        self.slug = re.sub(r"[^A-Za-z0-9_]+", "-", target).strip("-")
        self.name = f"pseudo_{self.slug}_round{number}"
        self.folder = Path(root, f"round_{number:02d}", self.slug)
        self.partial = self.folder.with_name(f".{self.slug}.partial")

    @property
    def entry(self) -> str:
        """Name in Detectron2's catalogs, once registered."""
        return f"{self.name}_train"

    # ---- writing ----

    def begin(self) -> Path:
        """An empty folder to write into, on all processes; what an interrupted labelling left there is removed."""
        if comm.is_main_process():
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        comm.synchronize()
        return self.partial

    def finish(
        self,
        facts: Mapping[str, Any],
        classes: Sequence[Mapping[str, Any]],
        images: Sequence[str],
        soft: bool,
        dataset: str = "",
    ) -> None:
        """Adds spec and manifest and renames the folder into place, on the main process.

        Args:
            facts: what the manifest says, plain values; ``files`` among them.
            classes: name, colour and ``covers`` of the classes that the label files number, in order.
            images: ids of the labelled images.
            soft: whether there are soft labels beside the label maps.
            dataset: whose classes these are; "" = the target's own.
        """
        if comm.is_main_process():
            write_atomically(
                self.partial / _SPEC, yaml.safe_dump(self._spec(classes, images, soft, dataset), sort_keys=False)
            )
            write_atomically(self.partial / _MANIFEST, json.dumps({**facts, "target": self.target}, indent=1))
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self.partial, self.folder)
        comm.synchronize()

    def _spec(
        self, classes: Sequence[Mapping[str, Any]], images: Sequence[str], soft: bool, dataset: str
    ) -> dict[str, Any]:
        metadata = MetadataCatalog.get(self.target)
        split = metadata.spec.splits[metadata.split]
        train = {"images": list(split.images), "labels": "./labels/{id}.png", "ids": list(images)}
        if soft:
            train["soft_labels"] = "./soft/{id}.npz"
        return {
            "name": self.name,
            "dataset": dataset or metadata.dataset,
            "title": f"Pseudo-labels of {self.target}, round {self.number}",
            "encoding": "index",
            "raw_ids": "position",
            "ignore": [IGNORE],
            "classes": [dict(c) for c in classes],
            "splits": {"train": train},
        }

    # ---- reading ----

    def manifest(self) -> dict[str, Any] | None:
        """What is known of the labels; None where there are no whole ones.

        Raises:
            PseudoLabelError: the manifest is damaged.
        """
        path = self.folder / _MANIFEST
        return read_json(path, PseudoLabelError, False, ("weights", "settings", "files")) if path.is_file() else None

    def check_files(self) -> None:
        """Compares every file with its hash in the manifest.

        Raises:
            PseudoLabelError: some are missing or have changed; says which.
        """
        expected = (self.manifest() or {}).get("files", {})
        changed = [name for name, value in expected.items() if _sha256(self.folder / name) != value]
        if changed:
            raise PseudoLabelError(
                f"{self.folder}: {len(changed)} of {len(expected)} files are missing or have changed since the round "
                f"was labelled, among them {changed[:3]}. Restore them, or start the run anew."
            )

    def register(self) -> str:
        """Registers the spec, also where another run of this process has one of the same name; returns the entry."""
        spec = self.folder / _SPEC
        if self.entry in DatasetCatalog.list():
            unregister_dataset(self.name)
        register_dataset(spec)
        return self.entry


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
