"""Losses: pure functions on tensors."""

from __future__ import annotations

from .cross_entropy import pixel_cross_entropy

__all__ = ["pixel_cross_entropy"]
