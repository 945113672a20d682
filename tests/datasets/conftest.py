"""Loads the scripts of datasets/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for label_files.py

FOLDER = Path(__file__).resolve().parent.parent.parent / "datasets"


@pytest.fixture(scope="session")
def script():
    """A function: name of a script in datasets/ -> the loaded module."""

    def load(name: str):
        module_name = f"datasets_{name}"
        if module_name not in sys.modules:
            spec = importlib.util.spec_from_file_location(module_name, FOLDER / f"{name}.py")
            sys.modules[module_name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module_name])
        return sys.modules[module_name]

    return load
