"""Runs a phase as a process of its own: ``train_net.py`` with ``--resume``, so that a killed run goes on."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.file import read_checkpoint
from ..json_file import parse_json, read_json
from .jobs import WEIGHTS_NAME, Job

__all__ = ["RunError", "RunStoppedError", "SubprocessRunner"]

_STOPPED = 75  # what train_net.py exits with after a signal, its state saved
_TAIL_BYTES = 8192


class RunError(RuntimeError):
    """A run ended without scores; the message has the end of its log."""


class RunStoppedError(RuntimeError):
    """A run was stopped by a signal; the next call resumes it."""


class SubprocessRunner:
    """Calls the training script for one job at a time.

    Args:
        script: the training script.
        arguments: further arguments of every call, such as ``["--num-gpus", "2"]``.
    """

    def __init__(self, script: Path, arguments: Sequence[str] = ()) -> None:
        self.script, self.arguments = Path(script), list(arguments)

    def __call__(self, job: Job, on_step: Callable[[int], None]) -> dict[str, Any]:
        """Runs a job to its end.

        Args:
            job: what to run; its folder exists.
            on_step: told the number of steps done, about every second.

        Returns:
            Scores by catalog entry, those of all as ``"mean"``, and what the run took as ``"cost"``.

        Raises:
            RunError: the script failed.
            RunStoppedError: it was stopped by a signal.
        """
        log = job.folder / "claims_run.log"
        mode = ["--eval-only"] if job.phase.eval_only else ["--resume"]
        command = [sys.executable, str(self.script), "--config-file", str(job.phase.config), *mode]
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [*command, *self.arguments, *job.overrides], stdout=output, stderr=subprocess.STDOUT
            )
            code = _wait(process, lambda: on_step(_steps_done(job.folder / "metrics.json")))
        if code == _STOPPED:
            raise RunStoppedError(f"{job.title} was stopped; the same command resumes it")
        if code:
            raise RunError(f"exit code {code}; the end of {log}:\n{_tail(log)}")
        return {**_scores(job.folder / "inference" / "report.json"), "cost": _cost(job.folder)}


def _scores(report: Path) -> dict[str, Any]:
    """What the evaluation wrote, by catalog entry, and the means of all as ``"mean"``."""
    if not report.is_file():
        raise RunError(f"the run ended without {report}: is DATASETS.TEST empty?")
    content = read_json(report, RunError, keys=("datasets", "mean"))
    return {**content["datasets"], "mean": content["mean"]}


def _cost(folder: Path) -> dict[str, float | None]:
    """What a run took: processor seconds of a step (median), and millions of parameters; None where nothing trained."""
    metrics, weights = folder / "metrics.json", folder / WEIGHTS_NAME
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    seconds = [number for line in lines if (number := _number(line, "processor_seconds")) is not None]
    parameters = None
    if weights.is_file():
        content = read_checkpoint(weights)
        names = [name for group in content["trainer"]["optimizer"]["param_groups"] for name in group["names"]]
        parameters = sum(content["model"][name].numel() for name in names) / 1e6
    return {"seconds": statistics.median(seconds) if seconds else None, "parameters": parameters}


def _number(line: str, key: str) -> float | None:
    try:
        return float(parse_json(line, "metrics.json", finite=False)[key])
    except (ValueError, KeyError, TypeError):
        return None  # a line that was cut off, or of an evaluation


def _wait(process: subprocess.Popen, poll: Callable[[], None]) -> int:
    """Waits for the end. A Ctrl-C reaches the child as well, which saves and ends by itself; a second one kills it."""
    interrupted = False
    while True:
        try:
            code = process.poll()
            if code is not None:
                return _STOPPED if interrupted else code
            poll()
            time.sleep(0.5)
        except KeyboardInterrupt:
            if interrupted:
                process.kill()
                raise
            interrupted = True


def _steps_done(metrics: Path) -> int:
    """Last step in Detectron2's ``metrics.json``, 0 if there is none yet."""
    if not metrics.is_file():
        return 0
    for line in reversed(_end_of(metrics).splitlines()[-3:]):
        try:
            return int(parse_json(line, str(metrics), finite=False)["iteration"]) + 1
        except (ValueError, KeyError, TypeError):
            continue  # a line that is just being written, or cut off at its beginning
    return 0


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(_end_of(log).splitlines()[-lines:])


def _end_of(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _TAIL_BYTES))
        return file.read().decode(errors="replace")
