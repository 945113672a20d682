"""Losses: pure functions on tensors."""

from __future__ import annotations

from .cross_entropy import pixel_cross_entropy
from .unified import null_bce_loss, plain_bce_loss, relational_bce_loss

__all__ = ["null_bce_loss", "pixel_cross_entropy", "plain_bce_loss", "relational_bce_loss"]
