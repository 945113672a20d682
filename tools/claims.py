#!/usr/bin/env python
"""Measures the rows of a claims file and writes their table.

    python tools/claims.py benchmarks/claims/toy_cdcl.yaml --dry-run    # what would be run
    python tools/claims.py benchmarks/claims/toy_cdcl.yaml              # run what is missing; again: nothing is left
    python tools/claims.py benchmarks/claims/toy_cdcl.yaml --readme docs/results.md
    python tools/claims.py benchmarks/claims/norms.yaml --readme docs/norms.md --picture    # its plot as well

Runs go one after another, each as a process of its own with --resume, so a killed call goes on where it was. A finished
run is known by its content (resolved config, seed, dataset specs, weights, version of the package) and is not repeated.
Arguments after `--` go to train_net.py, for example `-- --num-gpus 2`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console

import multiseg_d2  # noqa: F401  (stand-ins come before detectron2)
from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.claims import Claim, ClaimError, Job, SubprocessRunner, Table, collect, load_claim, plan, run_claim
from multiseg_d2.claims.harness import last_failures
from multiseg_d2.claims.plot import to_png
from multiseg_d2.claims.process import RunStoppedError
from multiseg_d2.claims.progress import estimated_seconds
from multiseg_d2.claims.table import replace_block, to_csv, to_markdown
from multiseg_d2.user_error import run_script

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every run has its scores, 1 if one failed, 2 for a file that cannot be meant, 75 if stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = _parser().parse_args(argv[:cut])
    out = Console()
    try:
        claim = load_claim(args.claim, args.quick)
        jobs = plan(claim, args.output / "runs", args.seeds, args.only, args.any_source)
        if args.dry_run:
            _print_plan(jobs, out)
            return 0
        if args.table_only:
            table = collect(claim, jobs, last_failures(jobs))
        else:
            runner = SubprocessRunner(args.script, argv[cut + 1 :])
            table = run_claim(claim, jobs, runner, lambda table: _write(claim, table, args.output))
        _write(claim, table, args.output, args.readme, args.picture)
    except ClaimError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except RunStoppedError as problem:
        print(problem, file=sys.stderr)
        return 75
    out.print(to_markdown(table), markup=False, highlight=False, soft_wrap=True)
    return 1 if table.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", type=Path, help="claims file (YAML)")
    parser.add_argument("--quick", action="store_true", help="the shorter version that the file has of its table")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those in the file")
    parser.add_argument("--only", nargs="+", default=(), metavar="ROW", help="labels of the rows to run")
    parser.add_argument("--output", type=Path, default=Path("output/claims"), help="runs and tables; %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="show what would be run")
    parser.add_argument("--table-only", action="store_true", help="write the table of what is there, run nothing")
    parser.add_argument("--any-source", action="store_true", help="take runs of other versions of the package, too")
    parser.add_argument("--readme", type=Path, help="replace the block <!-- claims:NAME begin/end --> of this file")
    parser.add_argument("--picture", action="store_true", help="with --readme: its plot, shown in the page")
    parser.add_argument("--script", type=Path, default=ROOT / "train_net.py", help="the training script; %(default)s")
    return parser


def _print_plan(jobs: Sequence[Job], out: Console) -> None:
    for job in jobs:
        state = "done" if job.record else "to resume" if job.started else "new"
        steps = "evaluation" if job.phase.eval_only else f"{job.identity.steps} steps"
        out.print(f"{state:9}  {steps:>13}  {job.title}  {job.folder}", markup=False, highlight=False, soft_wrap=True)
    todo = sum(job.record is None for job in jobs)
    seconds = estimated_seconds(jobs)
    left = f", about {timedelta(seconds=round(seconds))} by those that are done" if todo and seconds is not None else ""
    out.print(f"{todo} of {len(jobs)} runs to do{left}", highlight=False)


def _write(claim: Claim, table: Table, folder: Path, readme: Path | None = None, picture: bool = False) -> None:
    markdown, plot, name = to_markdown(table), to_png(table), f"{claim.name}.png"
    write_atomically(folder / f"{claim.name}.md", markdown)
    write_atomically(folder / f"{claim.name}.csv", to_csv(table))
    write_atomically(folder / name, plot)
    if readme is not None:
        if picture:
            write_atomically(readme.with_name(name), plot)
            markdown += f"\n![{claim.title}]({name})\n"
        write_atomically(readme, replace_block(readme, claim.name, markdown))


if __name__ == "__main__":
    sys.exit(run_script(main))
