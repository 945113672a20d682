"""What must agree between a checkpoint and the run that resumes from it, and how a disagreement is told."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from .file import CheckpointError
from .weights import class_names

__all__ = [
    "ResumeError",
    "check_parameter_names",
    "check_sizes",
    "differences",
    "log_config_changes",
    "run_facts",
    "state_differences",
]

logger = logging.getLogger(__name__)


class ResumeError(CheckpointError):
    """A checkpoint is from a run that this one cannot continue exactly."""


def run_facts(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """What must be the same in a run that resumes another: plain values."""
    loader_keys = ("SCHEDULE", "WEIGHTS", "TEMPERATURE", "INTERVAL")
    schedule = {f"DATALOADER.{key}": cfg.DATALOADER[key] for key in loader_keys}
    schedule["SOLVER.IMS_PER_BATCH"] = cfg.SOLVER.IMS_PER_BATCH
    return {
        "DATASETS.TRAIN": list(cfg.DATASETS.TRAIN),
        "classes": class_names(model),
        "labels": model.label_meanings() if hasattr(model, "label_meanings") else {},
        "schedule": {key: list(value) if isinstance(value, tuple) else value for key, value in schedule.items()},
        "processes": comm.get_world_size(),
        "seed": cfg.SEED,
    }


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two nested plain values, one line per difference, with the exact entries.

    >>> differences({"classes": {"a": ["x", "y"]}}, {"classes": {"a": ["x", "z"]}})
    ["classes.a: the checkpoint has 'y' in addition; this run has 'z' in addition"]
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            line
            for key in dict.fromkeys([*before, *now])
            for line in differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
        ]
    if _is_list(before) and _is_list(now):
        return _list_differences(list(before), list(now), where)
    return [] if before == now else [f"{where}: {_shown(before)} in the checkpoint, {_shown(now)} in this run"]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _list_differences(before: list, now: list, where: str) -> list[str]:
    if before == now:
        return []
    if not any(isinstance(item, str) for item in (*before, *now)):  # a size, a range: one value
        return [f"{where}: {before} in the checkpoint, {now} in this run"]
    gone = ", ".join(repr(item) for item in before if item not in now)
    new = ", ".join(repr(item) for item in now if item not in before)
    if not gone and not new:
        return [f"{where}: other order: {before} in the checkpoint, {now} in this run"]
    parts = [f"the checkpoint has {gone} in addition"] if gone else []
    return [f"{where}: " + "; ".join(parts + ([f"this run has {new} in addition"] if new else []))]


def state_differences(loaded: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """One line for each of the tensors that are missing, superfluous or of another shape."""
    problems = [f"the checkpoint lacks {key}" for key in own if key not in loaded]
    problems += [f"the model has no {key}" for key in loaded if key not in own]
    problems += [
        f"{key} is {tuple(loaded[key].shape)} in the checkpoint, {tuple(own[key].shape)} in the model"
        for key in own
        if key in loaded and own[key].shape != loaded[key].shape
    ]
    return problems if len(problems) <= 20 else [*problems[:20], f"... and {len(problems) - 20} more tensors"]


def check_parameter_names(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """An optimizer's state goes by position; names make sure that each parameter gets its own."""
    before = [group.get("names") for group in state["param_groups"]]
    now = [group.get("names") for group in optimizer.param_groups]
    if before != now:
        lines = differences({"parameter groups": before}, {"parameter groups": now})
        raise ResumeError("the optimizer's parameters are grouped differently than in the checkpoint: " + lines[0])


def check_sizes(before: Mapping[str, int] | None, now: Mapping[str, int], resumed: bool) -> None:
    """Refuses to go on with training sets that have gained or lost images: every later batch would be another one.

    Raises:
        ResumeError: naming the sets and their numbers of images.
    """
    problems = differences(before, now) if resumed and before is not None else []
    if problems:
        raise ResumeError(
            "the numbers of training images have changed since the checkpoint was written, and with them the order of "
            "the data: " + "; ".join(problems)
        )


def log_config_changes(before: str, cfg: CfgNode) -> None:
    """Warns of keys that have other values than in the checkpoint's config (``before``, YAML)."""
    lines = differences(yaml.safe_load(before), yaml.safe_load(cfg.dump()))
    if lines:
        logger.warning(
            "the config has changed since the checkpoint was written. From here on the new values hold; the learning "
            "rate of a step follows from its number and these values, as if the whole run had had them. Momenta go on "
            "as they were:\n%s",
            "\n".join(f"  - {line}" for line in lines),
        )
