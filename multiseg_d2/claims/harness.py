"""Runs what a claim needs and is not there yet, one job after another, and keeps the table up to date."""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .claim import Claim, ClaimError
from .identity import source_hash
from .jobs import Job
from .process import RunStoppedError
from .progress import ClaimProgress
from .records import read_failure, write_failure, write_record
from .table import Table, collect

__all__ = ["Runner", "last_failures", "run_claim"]

logger = logging.getLogger(__name__)

#: Runs a job in its folder and returns scores by catalog entry; the second argument is told the steps done.
Runner = Callable[[Job, Callable[[int], None]], dict[str, Any]]


def run_claim(
    claim: Claim, jobs: Sequence[Job], runner: Runner, on_table: Callable[[Table], None] = lambda table: None
) -> Table:
    """Runs every job that has no record; a failure ends its job, not the others.

    Args:
        claim: what is measured.
        jobs: see :func:`~.jobs.plan`.
        runner: runs one job.
        on_table: called with the table after every job, so that nothing is lost when the rest is cut off.

    Returns:
        The table, failures included.

    Raises:
        KeyboardInterrupt, RunStoppedError: from the runner; the same call goes on from there.
    """
    jobs, failures = list(jobs), {}
    with ClaimProgress(claim.name, jobs) as progress:
        for i, job in enumerate(jobs):
            if job.record is not None:
                continue
            progress.start(job)
            jobs[i], problem = _run(job, runner, progress.step)
            progress.end(jobs[i])
            if problem:
                failures[job.identity.key] = problem
            on_table(collect(claim, jobs, failures))
    return collect(claim, jobs, failures)


def _run(job: Job, runner: Runner, on_step: Callable[[int], None]) -> tuple[Job, str]:
    """The job with its record, or why there is none."""
    if job.weights is not None and not job.weights.is_file():
        return job, f"the phase before it left no {job.weights}"
    job.folder.mkdir(parents=True, exist_ok=True)
    with _locked(job):
        (job.folder / "started").touch()
        start = time.monotonic()
        try:
            results = runner(job, on_step)
        except RunStoppedError:
            raise
        except Exception as problem:  # whatever it is, it belongs into the table, and the other rows can be run
            logger.error("%s failed: %s", job.title, problem)
            write_failure(job.folder, str(problem))
            return job, str(problem)
        record = write_record(job.folder, job.identity.key, source_hash(), results, time.monotonic() - start)
    return replace(job, record=record), ""


def last_failures(jobs: Sequence[Job]) -> dict[str, str]:
    """Why jobs without a record failed the last time they were tried, by key."""
    messages = {job.identity.key: read_failure(job.folder) for job in jobs if job.record is None}
    return {key: message for key, message in messages.items() if message}


@contextmanager
def _locked(job: Job) -> Iterator[None]:
    """Two harnesses may share a folder, but not a run; the lock goes with the process, however that ends."""
    with open(job.folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise ClaimError(f"{job.title} is being run by another process in {job.folder}") from problem
        yield
