"""Heads: a head is a method. It owns the shared decoder, the classifiers and the losses."""

from __future__ import annotations

from .head import Head, registered_heads
from .per_dataset import PerDatasetHead
from .trunk import Trunk

__all__ = ["Head", "PerDatasetHead", "Trunk", "registered_heads"]
