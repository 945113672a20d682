"""What a config brings along beside values: modules of the user's own, and dataset specs."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import sys
import traceback
from pathlib import Path
from types import ModuleType

from detectron2.config import CfgNode

from ..data.register import register_from_config
from ..user_error import ConfigError

__all__ = ["import_modules", "register_config"]

logger = logging.getLogger(__name__)


def register_config(cfg: CfgNode) -> None:
    """Makes known what a config names: imports ``IMPORTS``, registers ``DATASETS.SPECS`` and the taxonomy.

    Call it between reading a config and building a model from it; ``train_net.py``, the tools and
    :class:`.Predictor` do. May be called again.

    Raises:
        ConfigError: a module cannot be imported, or a spec, taxonomy or dataset name cannot be meant.
    """
    import_modules(cfg.IMPORTS)
    try:
        register_from_config(cfg)
    except ValueError as problem:  # of a spec, a taxonomy or a name: the message says where
        raise ConfigError(str(problem)) from problem


def import_modules(names: tuple[str, ...]) -> list[ModuleType]:
    """Imports modules by name (``my_package.heads``) or by path (``my_head.py``, from the working directory).

    This runs their code, as Python's own import does, and each only once in a process. Nothing else that a config says
    is ever run.

    Raises:
        ConfigError: naming the entry, and the line in the user's file where its import failed.
    """
    return [_import(name) for name in names]


def _import(name: str) -> ModuleType:
    path = Path(name).expanduser().resolve() if name.endswith(".py") else None
    if path is not None and not path.is_file():
        raise ConfigError(f"IMPORTS: there is no file {name} (relative paths start from the working directory)")
    try:
        module = importlib.import_module(name) if path is None else _from_file(path)
    except Exception as problem:
        frames = traceback.extract_tb(problem.__traceback__)
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
        raise ConfigError(
            f"IMPORTS: {name} cannot be imported: {type(problem).__name__}: {problem}{where}"
        ) from problem
    logger.info("IMPORTS: %s", getattr(module, "__file__", name))
    return module


def _from_file(path: Path) -> ModuleType:
    """A module of a name of its own, so that it hides no other of the same file name."""
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends with .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
