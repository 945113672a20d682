"""Losses: pure functions on tensors. The ones that training uses work in pieces, the others say what they mean."""

from __future__ import annotations

from .cross_entropy import pixel_cross_entropy, soft_pixel_cross_entropy
from .entropy import prototype_entropy, prototype_scores
from .pieces import binary_loss, cross_entropy, loss_in_pieces, soft_cross_entropy
from .unified import null_bce_loss, plain_bce_loss, relational_bce_loss

__all__ = [
    "binary_loss",
    "cross_entropy",
    "loss_in_pieces",
    "null_bce_loss",
    "pixel_cross_entropy",
    "plain_bce_loss",
    "prototype_entropy",
    "prototype_scores",
    "relational_bce_loss",
    "soft_cross_entropy",
    "soft_pixel_cross_entropy",
]
