"""Rounds: every step belongs to one, portions grow to their maximum."""

from __future__ import annotations

import pytest

from multiseg_d2.engine.self_training.rounds import Portion, RoundPlan

TARGET, SOURCE = Portion(0.2, 0.05, 0.5), Portion(0.03, 0.0025, 0.06)


@pytest.mark.parametrize(("rounds", "steps"), [(1, 1), (3, 3), (3, 10), (4, 1000), (7, 50)])
def test_every_step_belongs_to_one_round(rounds, steps):
    plan = RoundPlan(rounds, steps, TARGET, SOURCE)
    of_step = [plan.round_of(step) for step in range(steps)]
    assert of_step == sorted(of_step)
    assert set(of_step) == set(range(rounds))
    lengths = [of_step.count(number) for number in range(rounds)]
    assert max(lengths) - min(lengths) <= 1
    starts = [step for step in range(steps) if plan.starts_round(step)]
    assert starts == [of_step.index(number) for number in range(rounds)] == [plan.origin(n) for n in range(rounds)]
    ends = [step for step in range(steps) if plan.ends_round(step)]
    assert ends == [start - 1 for start in starts[1:]] + [steps - 1]
    assert plan.origin(rounds) == steps


def test_steps_outside_the_run_are_refused():
    plan = RoundPlan(2, 10, TARGET, SOURCE)
    for step in (-1, 10):
        with pytest.raises(ValueError, match="outside"):
            plan.round_of(step)
    assert not plan.starts_round(10)


def test_portions_grow_as_published():
    assert [TARGET.of_round(n) for n in range(8)] == pytest.approx([0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.5])
    assert SOURCE.of_round(100) == 0.06


@pytest.mark.parametrize("values", [(0.2, 0.05), (0, 0.1, 0.5), (0.6, 0.1, 0.5), (0.2, -0.1, 0.5), (0.2, 0.1, 1.5)])
def test_portions_that_cannot_be_meant(values):
    with pytest.raises(ValueError, match="SELF_TRAINING.PORTION"):
        Portion.of("SELF_TRAINING.PORTION", values)


def test_more_rounds_than_steps():
    with pytest.raises(ValueError, match="5 rounds do not fit into 4 steps"):
        RoundPlan(5, 4, TARGET, SOURCE)
