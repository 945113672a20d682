"""Heads: a head is a method. It owns the shared decoder, the classifiers and the losses."""

from __future__ import annotations

from .entropy import EntropyHead
from .head import Head, registered_heads
from .hierarchical import HierarchicalHead
from .max_over_heads import MaxOverHeads
from .per_dataset import PerDatasetHead
from .trunk import Trunk
from .unified import UnifiedHead

__all__ = [
    "EntropyHead",
    "Head",
    "HierarchicalHead",
    "MaxOverHeads",
    "PerDatasetHead",
    "Trunk",
    "UnifiedHead",
    "registered_heads",
]
