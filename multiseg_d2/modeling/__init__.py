"""The network: importing this package registers backbones, decoders, heads and the meta-architecture."""

from __future__ import annotations

from . import backbones, decoders, heads  # noqa: F401  (registration)
from .active import active_datasets, current_groups
from .batch import Batch
from .heads import Head
from .segmentor import MultiDatasetSegmentor

__all__ = ["Batch", "Head", "MultiDatasetSegmentor", "active_datasets", "current_groups"]
