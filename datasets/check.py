#!/usr/bin/env python3
"""Checks datasets on disk before training does: python datasets/check.py camvid bdd100k_val my.yaml, or --all.

For every split: number of images against the official one, images without label and labels without image, files that
cannot be decoded, sizes that do not fit, ids that are in no table (file, id, number of pixels), the suspicion that
label ids were given for train ids or the reverse, and how the pixels spread over the classes. Specs are registered, as
training would, so that a concept that does not exist or a name that is taken is found, too. Exit code 1 if anything is
wrong with the files (2: with a spec); --part says that a dataset is incomplete on purpose.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.data.check import KINDS, SplitReport, check_splits, splits_on_disk
from multiseg_d2.data.files import data_root
from multiseg_d2.data.parallel import default_workers
from multiseg_d2.data.register import is_registered, register_dataset, unregister_dataset
from multiseg_d2.data.spec import SplitSpec, load_spec, packaged_specs
from multiseg_d2.data.views import view_of_split
from multiseg_d2.label_space import IGNORE, ILLEGAL
from multiseg_d2.user_error import UserError, run_script
from multiseg_d2.view_name import parse_view

#: Problems shown per kind and split; --json has all of them.
SHOWN = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit code."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    root = options.root or data_root()
    try:
        splits = choose(options.names, root)
    except UserError as problem:
        print(problem, file=sys.stderr)
        return 2
    if options.all:
        splits = splits_on_disk(splits, root)
    reports = check_splits(splits, root, options.workers, options.part)
    failed = show(console, reports, root, named=set(options.names))
    if options.json:
        content = {report.entry: as_json(report, failed) for report in reports}
        write_atomically(options.json, json.dumps({"root": root, "splits": content}, indent=2) + "\n")
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line -> options; ``names`` holds every packaged spec for ``--all``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "spec (camvid), split (camvid_val), view of a split (camvid_train[:30]) or spec file (my.yaml)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--all", action="store_true", help="every packaged dataset that is there")
    parser.add_argument("--part", action="store_true", help="fewer images than there are officially are no error")
    parser.add_argument("--root", help="data root (default: $DETECTRON2_DATASETS, else ./datasets)")
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was found to this file")
    options = parser.parse_args(arguments)
    if bool(options.names) == options.all:
        parser.error("name at least one dataset, or give --all")
    if options.all:
        options.names = list(packaged_specs())
    return options


def choose(names: Sequence[str], root: str) -> list[SplitSpec]:
    """The splits that the names stand for, each once.

    Raises:
        SpecError: a name is neither a packaged spec, nor one of its splits, nor a spec file.
        ViewNameError, DatasetFilesError: a view of a split is none, or asks for more images than there are.
        RegistrationError, TaxonomyError: a spec file contradicts the packaged specs or the taxonomy.
    """
    chosen: dict[str, SplitSpec] = {}
    packaged = packaged_specs()
    by_entry = {}
    if any(name not in packaged and not name.endswith((".yaml", ".yml")) for name in names):
        by_entry = {split.entry: split for name in packaged for split in load_spec(name).splits.values()}
    for name in names:
        if name.endswith((".yaml", ".yml")):
            try_to_register(name)
        view = parse_view(name)
        if view is not None and view.entry in by_entry:
            found = [view_of_split(by_entry[view.entry], view, root)]
        else:
            found = [by_entry[name]] if name in by_entry else load_spec(name).splits.values()
        chosen.update((split.entry, split) for split in found)
    return list(chosen.values())


def try_to_register(path: str) -> None:
    """Registers a spec file and takes it back: a second check may read a mended version of it.

    Raises:
        SpecError, RegistrationError, TaxonomyError: training could not register it either.
    """
    spec = load_spec(path)
    there = is_registered(spec.name)
    register_dataset(path)
    if not there:
        unregister_dataset(spec.name)


def is_wrong(report: SplitReport, reports: Sequence[SplitReport], named: set[str]) -> bool:
    """Whether a split has errors; a missing folder is one if the split was named, or nothing of its spec is there."""
    if report.present or report.entry in named:
        return bool(report.problems)
    return not any(other.present for other in reports if other.spec_name == report.spec_name)


def show(console: Console, reports: Sequence[SplitReport], root: str, named: set[str]) -> set[str]:
    """Prints tables and problems; returns the entries that are wrong."""
    if not reports:
        console.print(f"Nothing to check: no dataset lies below {root} (see datasets/README.md).")
    failed = {report.entry for report in reports if is_wrong(report, reports, named)}
    if reports:
        console.print(overview(reports, failed, root))
    for name in dict.fromkeys(report.spec_name for report in reports):
        group = [r for r in reports if r.spec_name == name and r.class_pixels.sum()]
        if group:
            console.print(pixel_shares(name, group))
            empty = [c for c, n in zip(group[0].classes, sum(report.class_pixels for report in group)) if n == 0]
            console.print(f"without any pixel: {escape(', '.join(empty))}" if empty else "", soft_wrap=True)
    for report in reports:
        if report.entry in failed:
            show_problems(console, report)
        if report.unmatched:
            found = f"{len(report.unmatched)}, for example {', '.join(report.unmatched[:3])}"
            note = f"{report.entry}: pictures that no pattern of the spec takes: {found}"
            console.print(f"[yellow]note[/yellow] {escape(note)}", soft_wrap=True)
    bad = f"[red]{len(failed)} of {len(reports)} splits have errors[/red]" if failed else "[green]no errors[/green]"
    console.print(bad)
    return failed


def overview(reports: Sequence[SplitReport], failed: set[str], root: str) -> Table:
    """One row per split: counts, and how many problems of each kind."""
    table = Table(title=f"Datasets below {escape(root)}", title_justify="left")
    table.add_column("split")
    for heading in (
        "images",
        "expected",
        "labels",
        "strays",
        "unreadable",
        "size",
        "unknown ids",
        "numbering",
        "result",
    ):
        table.add_column(heading, justify="right")
    for report in reports:
        groups = report.by_kind()
        counts = (str(len(groups.get(kind, ())) or "-") for kind in ("stray", "file", "size", "ids"))
        expected = "-" if report.expected is None else str(report.expected)
        result = "[red]errors[/red]" if report.entry in failed else "[green]good[/green]"
        if not report.present and report.entry not in failed:
            result = "[yellow]not there[/yellow]"
        doubt = "suspicious" if "numbering" in groups else "-"
        cells = (str(report.images), expected, str(report.labels), *counts, doubt)
        table.add_row(report.entry, *cells, result)
    return table


def pixel_shares(name: str, reports: Sequence[SplitReport]) -> Table:
    """Share of the scored pixels per class, one column per split; of all pixels, what is ignored and what unknown."""
    pixels = np.stack([report.class_pixels for report in reports], axis=1)  # (256, splits)
    classes = reports[0].classes
    scored = pixels[: len(classes)]
    table = Table(title=f"{name}: percent of the labelled pixels", title_justify="left", min_width=len(name) + 40)
    table.add_column("class")
    for report in reports:
        table.add_column(report.entry, justify="right")
    for c, row in enumerate(100 * scored / np.maximum(scored.sum(0), 1)):
        if scored[c].any():
            table.add_row(classes[c], *(f"{share:.3f}" if n else "none" for share, n in zip(row, scored[c])))
    table.add_section()
    for title, index in (("(ignored, of all pixels)", IGNORE), ("(in no table, of all pixels)", ILLEGAL)):
        if pixels[index].any():
            table.add_row(title, *(f"{share:.3f}" for share in 100 * pixels[index] / pixels.sum(0)))
    return table


def show_problems(console: Console, report: SplitReport) -> None:
    """Prints what is wrong with a split, kind by kind, the first few of each."""
    console.print(f"\n[bold]{report.entry}[/bold]")
    for kind, problems in report.by_kind().items():
        console.print(f"  [red]{KINDS[kind]}[/red] ({len(problems)})")
        alike: dict[str, list[str]] = {}  # what is said of many files is said once
        for problem in problems:
            said = problem.message.replace(problem.file, "") if problem.file else problem.message
            alike.setdefault(said, []).append(problem.message)
        for messages in list(alike.values())[:SHOWN]:
            more = f" [and of {len(messages) - 1} more files the same]" if len(messages) > 1 else ""
            console.print(f"    {escape(messages[0] + more)}", soft_wrap=True)
        if len(alike) > SHOWN:
            console.print(f"    ... and {len(alike) - SHOWN} more (--json FILE lists all)")


def as_json(report: SplitReport, failed: set[str]) -> dict:
    """A report for programs: pixels per class name and per raw id, all problems by kind."""
    used = np.flatnonzero(report.raw_pixels)
    return {
        "failed": report.entry in failed,
        "present": report.present,
        "images": report.images,
        "expected": report.expected,
        "labels": report.labels,
        "checked": report.checked,
        "problems": {k: [{"file": p.file, "message": p.message} for p in ps] for k, ps in report.by_kind().items()},
        "class_pixels": {name: int(n) for name, n in zip(report.classes, report.class_pixels)},
        "ignored_pixels": int(report.class_pixels[IGNORE]),
        "raw_pixels": {int(i): int(report.raw_pixels[i]) for i in used},
    }


if __name__ == "__main__":
    sys.exit(run_script(main))
