"""Polite stopping: a signal lets the step in hand finish, a checkpoint is written, and the exit code says so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from detectron2.utils import comm

__all__ = ["EXIT_STOPPED", "StopSignals", "Stopped", "leave_if_asked"]

#: Exit code of a run that a signal stopped after its state was saved: run the same command with ``--resume``.
EXIT_STOPPED = 75  # EX_TEMPFAIL: try again later

#: Sent by schedulers before they take a machine away, and by a person's Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_entered: list[StopSignals] = []  # innermost last


class Stopped(SystemExit):
    """Ends the run with :data:`EXIT_STOPPED`; everything is saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class StopSignals:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into :attr:`requested` while entered as a context.

    A second Ctrl-C aborts at once, without saving. After :class:`Stopped` the process is on its way out: schedulers,
    and the process that started this one, may send SIGTERM once more, which no longer does anything. Outside the main
    thread nothing is installed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._saved = False
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        _entered.append(self)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        _entered.remove(self)
        for number, handler in self._before.items():
            if isinstance(error, Stopped):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
            else:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    @contextmanager
    def all_saved(self) -> Iterator[None]:
        """Inside, nothing is lost by leaving: a signal ends the run soon (a long evaluation is not waited for).

        In a single process it does so at once. Several processes leave together, at the next :func:`leave_if_asked`:
        one that left alone would break the others' collective operations.
        """
        self._saved = True
        try:
            self._leave_if_asked()
            yield
        finally:
            self._saved = False

    def _leave_if_asked(self) -> None:
        if self._saved and any(comm.all_gather(self.requested)):
            raise Stopped

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a data-loading worker inherited this; its parent decides
            return
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # also works where Python code cannot run, in a collective
        if self._saved and comm.get_world_size() == 1:
            raise Stopped
        hint = "; press Ctrl-C again to abort without saving" if number == signal.SIGINT else ""
        name, what = signal.Signals(number).name, "soon" if self._saved else "after this step, with a checkpoint"
        # not logging: its locks and buffers may be held by the code that the signal interrupted
        os.write(2, f"\n{name}: stopping {what}{hint}\n".encode())


def leave_if_asked() -> None:
    """Ends the run if a signal came to any process and everything is saved; else, and outside a run, does nothing.

    A collective operation inside :meth:`StopSignals.all_saved`: call it equally often on all processes.

    Raises:
        Stopped: on all processes.
    """
    if _entered:
        _entered[-1]._leave_if_asked()
