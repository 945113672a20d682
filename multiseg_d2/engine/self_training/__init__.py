"""Self-training in rounds (CBST, CRST): thresholds, selection, pseudo-labels, the hook."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from .hook import SelfTrainingHook
from .online import OnlineSelfTrainingHook

__all__ = ["OnlineSelfTrainingHook", "SelfTrainingHook", "self_training_hooks", "self_training_problems"]


def self_training_hooks(cfg: CfgNode) -> list[HookBase]:
    """The hooks that ``SELF_TRAINING`` asks for; none where there are no rounds."""
    if cfg.SELF_TRAINING.ROUNDS == 0:
        return []
    return [OnlineSelfTrainingHook(cfg) if cfg.SELF_TRAINING.POLICY == "online" else SelfTrainingHook(cfg)]


def self_training_problems(cfg: CfgNode) -> Iterator[str]:
    """What is wrong with ``SELF_TRAINING``, before anything is built."""
    try:
        self_training_hooks(cfg)
    except ValueError as problem:
        yield str(problem)
