"""Polite stopping: a signal lets the step in hand finish, a checkpoint is written, and the exit code says so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["EXIT_STOPPED", "StopSignals", "Stopped"]

#: Exit code of a run that a signal stopped after its state was saved: run the same command with ``--resume``.
EXIT_STOPPED = 75  # EX_TEMPFAIL: try again later

#: Sent by schedulers before they take a machine away, and by a person's Ctrl-C.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(SystemExit):
    """Ends the run with :data:`EXIT_STOPPED`; everything is saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class StopSignals:
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into :attr:`requested` while entered as a context.

    A second Ctrl-C aborts at once, without saving. Outside the main thread nothing is installed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._saved = False
        self._pid = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    @contextmanager
    def all_saved(self) -> Iterator[None]:
        """Inside, nothing is lost by leaving: a signal ends the run at once (a long evaluation is not waited for)."""
        self._saved = True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self._saved = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a data-loading worker inherited this; its parent decides
            return
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # also works where Python code cannot run, in a collective
        if self._saved:
            raise Stopped
        hint = "; press Ctrl-C again to abort without saving" if number == signal.SIGINT else ""
        name = signal.Signals(number).name
        # not logging: its locks and buffers may be held by the code that the signal interrupted
        os.write(2, f"\n{name}: stopping after this step, with a checkpoint{hint}\n".encode())
