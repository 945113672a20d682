"""How far a long job is, and when it will be done: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["CONSOLE", "progress"]

#: Standard error. What is printed here while a bar is shown stands above it.
CONSOLE = Console(stderr=True)

#: Seconds between two lines, and between two pictures of a bar.
_LINES, _PICTURES = 10.0, 0.1


@contextmanager
def progress(
    title: str, total: int | None, unit: str, log: logging.Logger | None = None, bar: bool = True
) -> Iterator[Callable[[], None]]:
    """Context of a job; what it gives is called after each of its parts.

    On a terminal standard error has a bar with the time that is left. Elsewhere lines say the same every ten seconds.
    A log has the first and the last line in any case.

    Args:
        title: what is done.
        total: number of parts; None = not known.
        unit: what the parts are, plural.
        log: where lines go; None: to standard error, and on a terminal nowhere.
        bar: False: lines also on a terminal (of several processes only one can have the bar).
    """
    shown = bar and total != 0 and CONSOLE.file.isatty() and not CONSOLE.is_dumb_terminal
    say = log.info if log is not None else _nowhere if shown else _to_stderr
    lines = _Lines(title, total, unit, say, math.inf if shown else _LINES)
    say(f"{title}: {unit}" if total is None else f"{title}: {total} {unit}")
    with _bar(title, total, transient=log is not None) if shown else nullcontext(lambda: None) as advance:

        def step() -> None:
            lines.one_more()
            advance()

        yield step
    lines.say_how_far()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _nowhere(line: str) -> None:
    """A bar says it."""


@contextmanager
def _bar(title: str, total: int | None, transient: bool) -> Iterator[Callable[[], None]]:
    """No thread keeps it up to date: processes that read data may be forked meanwhile, and Ctrl-C may come."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"))
    with Progress(*columns, TimeRemainingColumn(), console=CONSOLE, transient=transient, auto_refresh=False) as shown:
        task, last = shown.add_task(title, total=total), -math.inf

        def advance() -> None:
            nonlocal last
            shown.advance(task)
            if (now := time.perf_counter()) - last >= _PICTURES:
                last = now
                shown.refresh()

        shown.refresh()
        yield advance


class _Lines:
    """Says from time to time how far a job is, and when it will be done."""

    def __init__(self, title: str, total: int | None, unit: str, say: Callable[[str], object], period: float) -> None:
        self._title, self._total, self._unit, self._say, self._period = title, total, unit, say, period
        self._done = 0
        self._started = self._said = time.perf_counter()

    def one_more(self) -> None:
        self._done += 1
        now = time.perf_counter()
        if now - self._said >= self._period and self._done != self._total:
            self._said = now
            self.say_how_far()

    def say_how_far(self) -> None:
        if not self._done:
            return
        each = (time.perf_counter() - self._started) / self._done
        of, left = "", ""
        if self._total is not None:
            of = f" of {self._total}"
            left = f", ETA {timedelta(seconds=int(each * (self._total - self._done)))}"
        self._say(f"{self._title}: {self._done}{of} {self._unit}, {each:.3f} s each{left}")
