"""Optimizers and schedules against formulas and Detectron2's own builders."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from torch import nn

from multiseg_d2.engine.config_file import default_config
from multiseg_d2.engine.solver import build_lr_scheduler, build_optimizer, parameter_groups
from multiseg_d2.modeling.norm.conversion import convert_dataset_norm


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), FrozenBatchNorm2d(4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
        self.head[0].weight.requires_grad_(False)


@pytest.fixture
def make_cfg():
    def make(**solver):
        cfg = default_config()
        for key, value in solver.items():
            cfg.SOLVER[key] = value
        return cfg

    return make


def settings(optimizer, model) -> dict[str, tuple[float, float]]:
    """Parameter name -> (learning rate, weight decay)."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize(
    "solver",
    [
        {},
        {"WEIGHT_DECAY": 5e-4, "WEIGHT_DECAY_NORM": 1e-3},
        {"WEIGHT_DECAY_BIAS": 0.0, "BIAS_LR_FACTOR": 2.0, "WEIGHT_DECAY_NORM": 0.0},
        {"BASE_LR": 0.2, "MOMENTUM": 0.5, "NESTEROV": True},
    ],
)
def test_sgd_is_detectron2s_where_the_head_has_no_factor(make_cfg, solver):
    cfg, model = make_cfg(**solver), Small()
    ours, theirs = build_optimizer(cfg, model), build_detectron2_optimizer(cfg, model)
    assert settings(ours, model) == settings(theirs, model)
    for key in ("momentum", "nesterov"):
        assert {g[key] for g in ours.param_groups} == {g[key] for g in theirs.param_groups}
    assert not ours.param_groups[0].get("dampening")


def test_weight_decay_of_biases_follows_weight_decay_in_every_detectron2(make_cfg):
    model = Small()
    decays = settings(build_optimizer(make_cfg(WEIGHT_DECAY=3e-3), model), model)
    assert decays["head.2.bias"][1] == 3e-3


def test_the_head_has_a_factor_of_its_own(make_cfg):
    model = Small()
    rates = settings(build_optimizer(make_cfg(HEAD_LR_FACTOR=10.0, BASE_LR=0.1, BIAS_LR_FACTOR=2.0), model), model)
    assert rates["backbone.0.weight"][0] == pytest.approx(0.1) and rates["backbone.0.bias"][0] == pytest.approx(0.2)
    assert rates["head.2.weight"][0] == pytest.approx(1.0) and rates["head.2.bias"][0] == pytest.approx(2.0)
    assert "head.0.weight" not in rates  # frozen


def test_norms_per_dataset_are_norms(make_cfg):
    model = convert_dataset_norm(Small(), ("a", "b"))
    decays = settings(build_optimizer(make_cfg(WEIGHT_DECAY_NORM=0.7), model), model)
    assert decays["backbone.1.branches.b.weight"][1] == 0.7 and decays["backbone.0.weight"][1] != 0.7


def test_groups_are_few_named_and_in_the_models_order(make_cfg):
    model = Small()
    groups = parameter_groups(make_cfg(WEIGHT_DECAY_NORM=0.5, HEAD_LR_FACTOR=2.0), model)
    assert len(groups) == 4 and groups[0]["names"][0] == "backbone.0.weight"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(name for g in groups for name in g["names"]) == sorted(trained)
    parameters = dict(model.named_parameters())
    assert all(parameters[n] is p for g in groups for n, p in zip(g["names"], g["params"]))


def test_adamw(make_cfg):
    model = Small()
    cfg = make_cfg(OPTIMIZER="AdamW", BASE_LR=1e-4, WEIGHT_DECAY=0.05, WEIGHT_DECAY_NORM=0.0)
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is torch.optim.AdamW
    assert settings(optimizer, model)["head.2.weight"] == (1e-4, 0.05)
    assert settings(optimizer, model)["head.1.weight"] == (1e-4, 0.0)


def test_what_cannot_be_trained_is_refused(make_cfg):
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(make_cfg(), Small().requires_grad_(False))
    with pytest.raises(ValueError, match="SGD, AdamW"):
        build_optimizer(make_cfg(OPTIMIZER="Adam"), Small())


def rates(cfg, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_poly(make_cfg):
    cfg = make_cfg(LR_SCHEDULER_NAME="WarmupPolyLR", BASE_LR=0.01, MAX_ITER=100, WARMUP_ITERS=0, POLY_LR_POWER=0.9)
    assert rates(cfg, 100) == pytest.approx([0.01 * (1 - s / 100) ** 0.9 for s in range(100)])


def test_poly_with_warm_up(make_cfg):
    cfg = make_cfg(LR_SCHEDULER_NAME="WarmupPolyLR", BASE_LR=0.01, MAX_ITER=100, WARMUP_ITERS=20, WARMUP_FACTOR=0.1)
    end = 0.8**0.9
    expected = [0.01 * (0.1 + (end - 0.1) * s / 20) for s in range(20)]
    expected += [0.01 * (1 - s / 100) ** 0.9 for s in range(20, 100)]
    assert rates(cfg, 100) == pytest.approx(expected)


def test_step_and_cosine_are_detectron2s(make_cfg):
    cfg = make_cfg(LR_SCHEDULER_NAME="WarmupMultiStepLR", BASE_LR=1.0, MAX_ITER=30, STEPS=(10, 20), WARMUP_ITERS=0)
    assert rates(cfg, 30) == pytest.approx([1.0] * 10 + [0.1] * 10 + [0.01] * 10)
    cfg = make_cfg(LR_SCHEDULER_NAME="WarmupCosineLR", BASE_LR=1.0, MAX_ITER=30, WARMUP_ITERS=0)
    assert rates(cfg, 30) == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 30)) for s in range(30)])
    with pytest.raises(ValueError, match="Unknown LR scheduler: Poly"):
        rates(make_cfg(LR_SCHEDULER_NAME="Poly"), 1)


@pytest.mark.parametrize("name", ["WarmupPolyLR", "WarmupMultiStepLR", "WarmupCosineLR"])
def test_a_schedule_ends_without_an_error(make_cfg, name):
    assert len(rates(make_cfg(LR_SCHEDULER_NAME=name, MAX_ITER=7, WARMUP_ITERS=3, STEPS=(5,)), 7)) == 7
