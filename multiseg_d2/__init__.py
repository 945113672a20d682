"""Semantic segmentation over many datasets on Detectron2."""

from __future__ import annotations

from . import compat

compat.install()  # before anything imports detectron2

__version__ = "0.1.0"
