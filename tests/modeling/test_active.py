"""The active-dataset context."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint as plain_checkpoint

from multiseg_d2.modeling.active import active_datasets, checkpoint, current_groups, is_recomputing


def test_groups_are_visible_inside_only_and_nest():
    with active_datasets([("a", 2), ("b", 1)]) as outer:
        assert current_groups() == outer == (("a", 2), ("b", 1))
        with active_datasets([("c", 4)]):
            assert current_groups() == (("c", 4),)
        assert current_groups() == (("a", 2), ("b", 1))
    with pytest.raises(RuntimeError, match="no dataset is active"):
        current_groups()


def test_an_exception_inside_does_not_leave_the_context_open():
    with pytest.raises(KeyError), active_datasets([("a", 1)]):
        raise KeyError("x")
    with pytest.raises(RuntimeError):
        current_groups()


def test_another_thread_sees_nothing():
    seen = []

    def look():
        try:
            seen.append(current_groups())
        except RuntimeError:
            seen.append(None)

    with active_datasets([("a", 1)]):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("groups", [(), (("a", 1), ("b", 1), ("a", 2)), (("a", -1),)])
def test_groups_that_make_no_sense_are_refused(groups):
    with pytest.raises(ValueError):
        active_datasets(groups)


class Spy:
    """Multiplies by itself and notes what was active at each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x):
        self.calls.append((current_groups(), is_recomputing()))
        return (x * x).sin()


def test_checkpoint_recomputes_with_the_groups_of_the_forward_pass():
    spy, x = Spy(), torch.randn(3, requires_grad=True)
    with active_datasets([("a", 3)]):
        y = checkpoint(spy, x)
    with active_datasets([("b", 3)]):  # the next sub-batch is already active when the backward pass runs
        y.sum().backward()
    assert spy.calls == [((("a", 3),), False), ((("a", 3),), True)]
    torch.testing.assert_close(x.grad, (2 * x * (x * x).cos()).detach())
    assert not is_recomputing()


def test_nested_checkpoints_and_backward_after_the_context():
    spy, x = Spy(), torch.randn(3, requires_grad=True)
    with active_datasets([("a", 3)]):
        y = checkpoint(lambda v: checkpoint(spy, v * 2), x)
    y.sum().backward()
    assert spy.calls[0] == ((("a", 3),), False)
    assert set(spy.calls[1:]) == {((("a", 3),), True)}
    torch.testing.assert_close(x.grad, (8 * x * (4 * x * x).cos()).detach())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_plain_checkpoint_raises_instead_of_guessing(reentrant, inside):
    spy, x = Spy(), torch.randn(3, requires_grad=True)
    with active_datasets([("a", 3)]):
        y = plain_checkpoint(spy, x, use_reentrant=reentrant)
        if inside:
            with pytest.raises(RuntimeError, match="active.checkpoint"):
                y.sum().backward()
    if not inside:
        with pytest.raises(RuntimeError, match="active.checkpoint"):
            y.sum().backward()


def test_checkpoint_outside_raises_and_without_gradients_runs_once():
    spy = Spy()
    with pytest.raises(RuntimeError, match="no dataset is active"):
        checkpoint(spy, torch.zeros(1))
    with active_datasets([("a", 1)]), torch.no_grad():
        checkpoint(spy, torch.zeros(1))
    assert len(spy.calls) == 1
