"""When two runs are the same run: by the content of everything that decides their result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..engine.config_file import load_config
from ..engine.user_code import register_config
from .claim import ClaimError, Phase

__all__ = ["PhaseIdentity", "identify", "source_hash"]

#: Keys that decide where files go and how fast the run is, not what comes out. (Of the spec files those count that are
#: used, see below.)
_NO_EFFECT = (
    *("DATASETS.SPECS", "OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "VIS_PERIOD"),
    *("TEST.NUM_PICTURES", "SOLVER.CHECKPOINT_PERIOD"),
)
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class PhaseIdentity:
    """What a phase is, and what the harness needs to know of its config.

    Attributes:
        key: hash of the resolved config with its seed, the dataset specs, and the content of all files that it names.
        tested: ``DATASETS.TEST``.
        steps: ``SOLVER.MAX_ITER``, 0 for an evaluation.
    """

    key: str
    tested: tuple[str, ...]
    steps: int


def identify(phase: Phase, seed: int, parent: str | None) -> PhaseIdentity:
    """Resolves a phase's config and hashes it.

    Args:
        phase: the phase.
        seed: overrides the config's.
        parent: key of the phase before it, whose weights it is handed; None for the first one.

    Raises:
        ClaimError: the config cannot be read, or its datasets are not registered.
    """
    handed = [text for key in phase.weights_as if parent for text in (key, f"weights of {parent}")]
    try:
        cfg = load_config(str(phase.config), [*phase.overrides, "SEED", str(seed), *handed])
        register_config(cfg)
    except (ValueError, KeyError) as problem:
        raise ClaimError(f"{phase.config}: {problem}") from problem
    facts = {
        "config": _plain(_without(cfg, _NO_EFFECT)),
        "specs": {n: _spec_identity(n) for n in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))},
        "eval_only": phase.eval_only,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return PhaseIdentity(key, tuple(cfg.DATASETS.TEST), 0 if phase.eval_only else cfg.SOLVER.MAX_ITER)


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Hash of every Python and YAML file of the package: another version of the code may give another result."""
    return _hash_files(p for p in sorted(_PACKAGE.rglob("*")) if p.suffix in (".py", ".yaml") and p.is_file())


def _hash_files(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(str(path.relative_to(_PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def _without(cfg: CfgNode, keys: Iterable[str]) -> CfgNode:
    cfg = cfg.clone()
    for key in keys:
        *sections, leaf = key.split(".")
        node: Any = cfg
        for section in sections:
            node = node[section]
        node.pop(leaf, None)
    return cfg


def _plain(value: Any) -> Any:
    """JSON values; a file that a key names counts by its content, wherever it lies."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str):
        return _file_identity(value)
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)


def _file_identity(path: str) -> str:
    """A local file by its content, anything else (empty, a name, a URL) by its text."""
    file = Path(path).expanduser()
    if not path or not file.is_file():
        return path
    total = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def _spec_identity(entry: str) -> str:
    """A split by its spec and the lists of its images, by their content; not by where the files lie."""
    spec = MetadataCatalog.get(entry).spec
    splits = {
        name: dataclasses.replace(split, ids=_file_identity(split.ids)) if isinstance(split.ids, str) else split
        for name, split in spec.splits.items()
    }
    return repr(dataclasses.replace(spec, path="", splits=splits))
