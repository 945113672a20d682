"""The running mean of the weights: its values, its exchange, its part in checkpoints and evaluation."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.engine import HookBase
from run_state import assert_same, final_state

from multiseg_d2.checkpoint.file import read_checkpoint
from multiseg_d2.engine import Trainer
from multiseg_d2.engine.ema import EMAHook

EMA = ["MODEL.EMA_DECAY", "0.6"]
TEST = ["DATASETS.TEST", "('tiny_a_val', 'tiny_b_val')"]


class Recorder(HookBase):
    """The weights after every step."""

    def __init__(self):
        self.states = []

    def after_step(self):
        self.states.append({k: v.clone() for k, v in self.trainer.model.state_dict().items()})


def brute_force(states: list[dict], decay: float) -> dict:
    """By the definition, in float64, one tensor after another."""
    mean = {key: value.double() for key, value in states[0].items()}
    for t, state in enumerate(states[1:], start=2):
        d = min(decay, 1 - 1 / t)
        for key, value in state.items():
            mean[key] = d * mean[key] + (1 - d) * value.double() if value.is_floating_point() else value.double()
    return mean


@pytest.fixture
def trained(tiny_cfg):
    trainer = Trainer(tiny_cfg(*EMA))
    trainer.register_hooks([recorder := Recorder()])
    trainer.train()
    return trainer, recorder.states


def test_the_mean_is_what_its_formula_says(trained):
    trainer, states = trained
    assert trainer.ema.updates == len(states) == 6
    expected = brute_force(states, 0.6)
    assert set(trainer.ema.mean) <= set(expected) and len(trainer.ema.mean) > 20
    for key, value in trainer.ema.mean.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
        assert value.is_floating_point() or torch.equal(value, states[-1][key])


def test_the_model_has_the_mean_inside_the_context_and_its_own_weights_after_it(trained):
    trainer, states = trained
    mean = {key: value.clone() for key, value in trainer.ema.mean.items()}
    with pytest.raises(ZeroDivisionError), trainer.ema.averaged():
        inside = trainer.model.state_dict()
        assert all(torch.equal(inside[key], mean[key]) for key in mean)
        raise ZeroDivisionError
    assert_same(dict(states[-1]), dict(trainer.model.state_dict()))
    assert_same(mean, trainer.ema.mean)


def test_one_tensor_with_two_names_is_exchanged_once():
    hook = EMAHook(0.5)
    first = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"a": first, "b": first})
    hook.trainer = type("T", (), {"model": model, "iter": 0, "max_iter": 9})()
    hook.after_step()
    before = first.weight.detach().clone()
    first.weight.data += 2
    hook.after_step()
    with hook.averaged():
        torch.testing.assert_close(first.weight.detach(), before + 1)
    torch.testing.assert_close(first.weight.detach(), before + 2)


def test_resumed_it_goes_on_in_every_bit(tiny_train):
    keys = [*EMA, "SOLVER.CHECKPOINT_PERIOD", "3"]
    whole, halves = tiny_train(*keys, out="whole"), tiny_train(*keys, out="halves")
    (halves / "model_final.pth").unlink()
    (halves / "last_checkpoint").write_text("model_0000002.pth")
    tiny_train("--resume", *keys, out="halves")
    state = final_state(whole)
    assert state["trainer"]["hooks"]["EMAHook"]["updates"] == 6
    assert_same(state, final_state(halves))
    assert_same(*(read_checkpoint(out / "weights" / "averaged.pth")["model"] for out in (whole, halves)))


def test_two_processes_stopped_and_resumed_have_the_mean_of_an_unbroken_run(start, tmp_path):
    keys = [*EMA, "SOLVER.IMS_PER_BATCH", "4"]
    stopped = start(*keys, fault="term@2@1", processes=2)
    assert stopped.wait() == [75, 75], stopped.text()
    again = start("--resume", *keys, processes=2)
    assert again.wait() == [0, 0], again.text()
    whole = start(*keys, processes=2, out="whole")
    assert whole.wait() == [0, 0], whole.text()
    means = [final_state(tmp_path / out)["trainer"]["hooks"]["EMAHook"] for out in ("out", "whole")]
    assert_same(*means)


def test_the_mean_is_what_is_evaluated_and_it_does_not_touch_training(tiny_train):
    plain, averaged = tiny_train(out="plain"), tiny_train(*EMA, *TEST, "TEST.EVAL_PERIOD", "2", out="averaged")
    assert_same(final_state(plain)["model"], final_state(averaged)["model"])
    report = json.loads((averaged / "inference" / "report.json").read_text())
    weights = str(averaged / "weights" / "averaged.pth")
    again = tiny_train("--eval-only", *TEST, "MODEL.WEIGHTS", weights, out="again")
    assert json.loads((again / "inference" / "report.json").read_text()) == report


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="EMA_DECAY"):
        EMAHook(decay)
