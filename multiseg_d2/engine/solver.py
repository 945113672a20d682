"""Optimizer, learning-rate schedule and gradient clipping, as the config asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import PolynomialDecayParamScheduler
from torch import nn

from ..modeling.norm import dataset_norms
from ..user_error import ConfigError

__all__ = [
    "CLIP_TYPES",
    "LR_SCHEDULERS",
    "OPTIMIZERS",
    "build_gradient_clipper",
    "build_lr_scheduler",
    "build_optimizer",
    "load_optimizer_state",
    "parameter_groups",
    "set_scheduler_step",
]

OPTIMIZERS = ("SGD", "AdamW")
LR_SCHEDULERS = ("WarmupPolyLR", "WarmupMultiStepLR", "WarmupCosineLR")
CLIP_TYPES = ("value", "norm", "full_model")

_BACKBONE_PREFIX = "backbone."


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Sorts the trainable parameters into groups with equal learning rate and weight decay.

    Weight decay of norms and the factors of biases follow Detectron2's ``get_default_optimizer_params``; everything
    outside the backbone gets its learning rate times ``SOLVER.HEAD_LR_FACTOR``.

    Args:
        cfg: reads ``SOLVER``.
        model: its backbone is the child called ``backbone``, as in all of Detectron2's architectures.

    Returns:
        Groups in the order of the model's parameters. Each has ``params``, ``names`` (by which a resumed optimizer
        recognises its parameters), ``lr`` and, where it is not the optimizer's, ``weight_decay``.
    """
    settings = _settings(cfg, model) | _settings(cfg, _shared_affine(model))
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in settings:  # frozen
            continue
        own = dict(settings[id(parameter)])
        if not name.startswith(_BACKBONE_PREFIX):
            own["lr"] *= cfg.SOLVER.HEAD_LR_FACTOR
        group = groups.setdefault(tuple(sorted(own.items())), {"params": [], "names": [], **own})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _settings(cfg: CfgNode, model: nn.Module) -> dict[int, dict[str, float]]:
    """Settings of every trainable parameter, by its id."""
    settings: dict[int, dict[str, float]] = {}
    for item in get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    ):
        own = {key: value for key, value in item.items() if key != "params"}
        settings.update((id(parameter), own) for parameter in item["params"])
    return settings


def _shared_affine(model: nn.Module) -> nn.Module:
    """Scales and shifts that the branches of dataset norms share, as norms that Detectron2 recognises as such."""
    layers = [layer for _, layer in dataset_norms(model) if layer.shared_affine]
    return nn.ModuleList(layer.plain(layer.datasets[0]) for layer in layers)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds ``SOLVER.OPTIMIZER`` over :func:`parameter_groups`.

    Raises:
        ValueError: an unknown optimizer, or a model without trainable parameters.
    """
    groups = parameter_groups(cfg, model)
    if not groups:
        raise ValueError("the model has no trainable parameter: every one has requires_grad=False")
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        return torch.optim.SGD(
            groups, solver.BASE_LR, solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY, nesterov=solver.NESTEROV
        )
    if solver.OPTIMIZER == "AdamW":
        return torch.optim.AdamW(groups, solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    raise ConfigError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}: choose one of {', '.join(OPTIMIZERS)}")


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Builds ``SOLVER.LR_SCHEDULER_NAME``: ``WarmupPolyLR``, or one of Detectron2's own.

    ``WarmupPolyLR`` multiplies every group's learning rate by ``(1 - step / MAX_ITER) ** POLY_LR_POWER``, after a
    warm-up of ``WARMUP_ITERS`` steps that ends on that curve, exactly as Detectron2 warms up its cosine schedule.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_detectron2_lr_scheduler(cfg, optimizer)
    factor = WarmupParamScheduler(
        PolynomialDecayParamScheduler(1.0, solver.POLY_LR_POWER),
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
    )
    return LRMultiplier(optimizer, multiplier=factor, max_iter=solver.MAX_ITER)


def set_scheduler_step(
    scheduler: torch.optim.lr_scheduler.LRScheduler, step: int, state: Mapping[str, Any] | None = None
) -> None:
    """Sets the learning rates of a step, as a function of the step and the config alone where that is possible.

    Args:
        scheduler: Detectron2's :class:`LRMultiplier`, or one of the user's own.
        step: the next step, >= 0.
        state: of a scheduler of the user's own, which is all that can be said about it.
    """
    if not isinstance(scheduler, LRMultiplier):
        scheduler.load_state_dict(dict(state or {}))
        return
    scheduler.last_epoch = step
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restores momenta and counters; rates, decays and other settings stay those that the config gave."""
    settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def build_gradient_clipper(cfg: CfgNode) -> Callable[[Sequence[nn.Parameter]], None] | None:
    """Builds what ``SOLVER.CLIP_GRADIENTS`` describes.

    ``"value"`` clips every element and ``"norm"`` every parameter's gradient, as in Detectron2; ``"full_model"`` clips
    the norm over all parameters together.

    Returns:
        A function that clips the gradients of the given parameters in place, or None where clipping is off.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return None
    limit, norm_type = float(clip.CLIP_VALUE), float(clip.NORM_TYPE)

    def clip_value(parameters: Sequence[nn.Parameter]) -> None:
        nn.utils.clip_grad_value_(parameters, limit)

    def clip_each_norm(parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, limit, norm_type)

    def clip_full_norm(parameters: Sequence[nn.Parameter]) -> None:
        nn.utils.clip_grad_norm_(parameters, limit, norm_type)

    clippers = dict(zip(CLIP_TYPES, (clip_value, clip_each_norm, clip_full_norm), strict=True))
    if clip.CLIP_TYPE not in clippers:
        raise ConfigError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}: choose one of {', '.join(CLIP_TYPES)}"
        )
    return clippers[clip.CLIP_TYPE]
