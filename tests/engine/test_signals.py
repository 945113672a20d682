"""Who a signal is for: the process that asked to be told, not those that it starts."""

from __future__ import annotations

import os
import signal

import pytest

from multiseg_d2.engine.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_forked_worker_leaves_signals_to_its_parent(number):
    """A loader's workers inherit the handler; what they would do with it is the parent's business."""
    with StopSignals() as signals:
        worker = os.fork()
        if worker == 0:
            os.kill(os.getpid(), number)
            os._exit(3 if signals.requested else 0)
        _, status = os.waitpid(worker, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert not signals.requested
        os.kill(os.getpid(), number)
        assert signals.requested
