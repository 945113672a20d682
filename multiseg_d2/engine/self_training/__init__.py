"""Self-training: in rounds (CBST, CRST), or in every step by a teacher."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from ...modeling.heads import registered_heads
from .consistency import ConsistencyHook
from .hook import SelfTrainingHook
from .online import OnlineSelfTrainingHook

__all__ = [
    "ConsistencyHook",
    "OnlineSelfTrainingHook",
    "SelfTrainingHook",
    "self_training_hooks",
    "self_training_problems",
]

#: Policies that label in every step.
_ONLINE: dict[str, type[OnlineSelfTrainingHook] | type[ConsistencyHook]] = {
    "online": OnlineSelfTrainingHook,
    "consistency": ConsistencyHook,
}


def self_training_hooks(cfg: CfgNode) -> list[HookBase]:
    """The hooks that ``SELF_TRAINING`` asks for; none where there are no rounds."""
    if cfg.SELF_TRAINING.ROUNDS == 0:
        return []
    if cfg.SELF_TRAINING.POLICY not in _ONLINE:
        return [SelfTrainingHook(cfg)]
    hook = _ONLINE[cfg.SELF_TRAINING.POLICY](cfg)
    return [hook, hook.watch]


def self_training_problems(cfg: CfgNode) -> Iterator[str]:
    """What is wrong with ``SELF_TRAINING``, before anything is built; the head is a known one."""
    try:
        self_training_hooks(cfg)
    except ValueError as problem:
        yield str(problem)
    keys, name = cfg.SELF_TRAINING, cfg.MODEL.SEM_SEG_HEAD.NAME
    if registered_heads()[name].weighs_pixels(cfg):
        return
    loss = f"{name} with LOSS_TYPE {cfg.MODEL.SEM_SEG_HEAD.LOSS_TYPE!r}"
    advice = "softmax heads only: PerDatasetHead, or UnifiedHead with LOSS_TYPE 'cross_entropy'"
    if keys.POLICY == "online":
        yield f"SELF_TRAINING.POLICY 'online' weighs pixels, which {loss} cannot: {advice}"
    if keys.REGULARIZER[0] != "none":
        yield (
            f"SELF_TRAINING.REGULARIZER {tuple(keys.REGULARIZER)} asks for soft labels or a term of a softmax, which "
            f"{loss} does not have; hard labels it learns from. For {advice}"
        )
