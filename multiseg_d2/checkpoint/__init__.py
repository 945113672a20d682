"""Files of weights: a run's own checkpoints, and where a run starts from."""

from __future__ import annotations

from .checkpointer import AtomicCheckpointer
from .file import CheckpointError
from .resume import ResumeError
from .weights import load_weights

__all__ = ["AtomicCheckpointer", "CheckpointError", "ResumeError", "load_weights"]
