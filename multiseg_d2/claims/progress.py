"""What runs, what is there already, and how long it takes: a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .jobs import Job

__all__ = ["ClaimProgress", "estimated_seconds"]

#: An evaluation in units of training steps, where nothing better is known.
_EVALUATION_STEPS = 20


def estimated_seconds(jobs: Sequence[Job]) -> float | None:
    """Duration of the jobs without a record, by that of those with one; None where none of them has run yet.

    A job that ran from the same config (with another seed) counts for itself; for any other its number of steps counts.
    """
    finished = [job for job in jobs if job.record is not None]
    if not finished:
        return None
    per_unit = sum(job.record.seconds for job in finished) / sum(map(_units, finished))
    alike: dict[object, list[float]] = {}
    for job in finished:
        alike.setdefault(job.phase, []).append(job.record.seconds)
    total = 0.0
    for job in jobs:
        if job.record is None:
            known = alike.get(job.phase)
            total += sum(known) / len(known) if known else per_unit * _units(job)
    return total


class ClaimProgress:
    """Shows the progress of a claim on standard error.

    Args:
        name: of the claim.
        jobs: all of them; those with a record are there already.
    """

    def __init__(self, name: str, jobs: Sequence[Job]) -> None:
        self._name, self._jobs = name, list(jobs)
        self._todo = [job for job in jobs if job.record is None]
        self._console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._units = 0
        self._position = 0
        self._started = time.monotonic()

    def __enter__(self) -> ClaimProgress:
        done, todo = len(self._jobs) - len(self._todo), len(self._todo)
        self._say(f"{self._name}: {len(self._jobs)} runs, {done} are there already, {todo} to do{self._left(0)}")
        self._progress.start()
        total = sum(map(_units, self._todo))
        self._task = self._progress.add_task(self._name, total=max(total, 1), left="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, job: Job) -> None:
        """A job begins."""
        self._position += 1
        self._started = time.monotonic()
        what = "evaluation" if job.phase.eval_only else f"{job.identity.steps} steps"
        how = ", goes on" if job.started else ""
        self._say(f"[{self._position} of {len(self._todo)}] {job.title}: {what}{how}; log: {job.folder}")
        self._progress.update(self._task, description=job.title, left=self._left(self._position - 1))

    def step(self, steps: int) -> None:
        """The job in hand has done ``steps`` steps."""
        self._progress.update(self._task, completed=self._units + steps)

    def end(self, job: Job) -> None:
        """A job ended, with a record or without."""
        self._jobs = [job if job.identity.key == other.identity.key else other for other in self._jobs]
        self._units += _units(job)
        outcome = "done" if job.record is not None else "FAILED"
        after = f"{outcome} after {_text(time.monotonic() - self._started)}{self._left(self._position)}"
        self._say(f"[{self._position} of {len(self._todo)}] {job.title}: {after}")
        self._progress.update(self._task, completed=self._units, left=self._left(self._position))

    def _left(self, first: int) -> str:
        keys = {job.identity.key for job in self._todo[first:]}
        seconds = estimated_seconds([job for job in self._jobs if job.record is not None or job.identity.key in keys])
        return f"; about {_text(seconds)} left" if keys and seconds is not None else ""

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _units(job: Job) -> int:
    return job.identity.steps + _EVALUATION_STEPS


def _text(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
