"""Fixtures of the evaluation tests."""

from __future__ import annotations

import importlib
import sys

import pytest

from multiseg_d2 import compat


@pytest.fixture(scope="session")
def classification():
    """``torchmetrics.functional.classification``, an independent count.

    torchmetrics imports more of torchvision than the stand-in has, and nothing where there is no torchvision at all.
    """
    hidden = {name: sys.modules.pop(name) for name in compat.stand_ins() if name.startswith("torchvision")}
    try:
        return importlib.import_module("torchmetrics.functional.classification")
    finally:
        sys.modules.update(hidden)
