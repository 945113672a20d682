"""From a claim to the list of runs that it needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .claim import Claim, ClaimError, Phase, Row, Run
from .identity import PhaseIdentity, identify, source_hash
from .records import FinishedRun, find_record

__all__ = ["Job", "plan"]

WEIGHTS_NAME = "model_final.pth"


@dataclass(frozen=True)
class Job:
    """One phase with one seed. Rows that need the same one share it.

    Attributes:
        title: for progress and messages.
        phase: config and overrides.
        seed: its seed.
        identity: key, tested datasets, number of steps.
        folder: where it runs.
        weights: file of the phase before it, or None.
        cells: (row label, column labels) that its scores fill; empty for an earlier phase.
        record: the finished run, if there is one.
    """

    title: str
    phase: Phase
    seed: int
    identity: PhaseIdentity
    folder: Path
    weights: Path | None
    cells: tuple[tuple[str, tuple[str, ...]], ...]
    record: FinishedRun | None

    @property
    def overrides(self) -> list[str]:
        """``KEY VALUE`` pairs of the call."""
        weights = [text for key in self.phase.weights_as if self.weights for text in (key, str(self.weights))]
        return [*self.phase.overrides, "SEED", str(self.seed), "OUTPUT_DIR", str(self.folder), *weights]

    @property
    def started(self) -> bool:
        """Whether an earlier call began it."""
        return self.record is None and (self.folder / "started").exists()


def plan(
    claim: Claim,
    folder: Path,
    seeds: Sequence[int] | None = None,
    only: Collection[str] = (),
    any_source: bool = False,
) -> list[Job]:
    """Every phase of every run of every row, each once, in an order in which they can be run.

    Seeds come first: after the first seed the table is complete, if uncertain.

    Args:
        claim: what to measure.
        folder: where runs are kept, for all claims together.
        seeds: instead of the claim's.
        only: labels of the rows to run; empty = all.
        any_source: accept finished runs of another version of the package.

    Raises:
        ClaimError: a config cannot be resolved, a column is not tested by its run, or ``only`` names no row.
    """
    unknown = set(only) - {row.label for row in claim.rows}
    if unknown:
        raise ClaimError(f"no rows {sorted(unknown)} in {claim.name}; its rows are {[row.label for row in claim.rows]}")
    planner = _Planner(claim, folder, any_source)
    for seed in seeds if seeds is not None else claim.seeds:
        for row in claim.rows:
            for run in row.runs if not only or row.label in only else ():
                planner.add(row, run, seed)
    return list(planner.jobs.values())


class _Planner:
    """Collects jobs by key, so that rows share phases."""

    def __init__(self, claim: Claim, folder: Path, any_source: bool) -> None:
        self.claim, self.folder, self.any_source = claim, folder, any_source
        self.jobs: dict[str, Job] = {}

    def add(self, row: Row, run: Run, seed: int) -> None:
        before: Job | None = None
        for number, phase in enumerate(run.phases, 1):
            identity = identify(phase, seed, before.identity.key if before else None)
            job = self.jobs.get(identity.key)
            if job is None:
                job = self._job(_title(row, run, number, seed), phase, seed, identity, before)
            if number == len(run.phases):
                _check_columns(self.claim, row, run, identity)
                job = replace(job, cells=(*job.cells, (row.label, run.columns)))
            self.jobs[identity.key] = before = job

    def _job(self, title: str, phase: Phase, seed: int, identity: PhaseIdentity, before: Job | None) -> Job:
        record = find_record(self.folder, identity.key, source_hash(), self.any_source)
        name = f"{phase.config.stem}-s{seed}-{identity.key[:10]}-{source_hash()[:8]}"
        folder = record.folder if record else self.folder / name
        weights = None
        if before is not None:  # an evaluation makes no weights of its own
            weights = before.weights if before.phase.eval_only else before.folder / WEIGHTS_NAME
        return Job(title, phase, seed, identity, folder, weights, (), record)


def _title(row: Row, run: Run, number: int, seed: int) -> str:
    phase = f", phase {number} of {len(run.phases)}" if len(run.phases) > 1 else ""
    columns = f" [{', '.join(run.columns)}]" if len(row.runs) > 1 else ""
    return f"{row.label}{columns}{phase}, seed {seed}"


def _check_columns(claim: Claim, row: Row, run: Run, identity: PhaseIdentity) -> None:
    for label in run.columns:
        dataset = claim.column(label).dataset
        if dataset not in ("", "mean", "cost", *identity.tested):
            raise ClaimError(
                f"{claim.name}: column {label!r} of row {row.label!r} is measured on {dataset}, but "
                f"{run.phases[-1].config.name} tests {list(identity.tested)} (DATASETS.TEST). Give the run the "
                "`columns` that it fills, or the dataset to its config."
            )
