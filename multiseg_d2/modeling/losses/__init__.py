"""Losses: pure functions on tensors."""

from .cross_entropy import pixel_cross_entropy

__all__ = ["pixel_cross_entropy"]
