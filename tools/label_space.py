#!/usr/bin/env python
"""Shows label spaces and how they relate.

Names are those of datasets (`list` shows them) or of specs, which may share one; ``--specs`` registers your own first::

    python tools/label_space.py list                         # --markdown: the table of datasets/README.md
    python tools/label_space.py show camvid
    python tools/label_space.py relate camvid cityscapes
    python tools/label_space.py remap camvid cityscapes      # the label-remapping baseline's table
    python tools/label_space.py tree --datasets cityscapes camvid
    python tools/label_space.py tree --taxonomy mseg --datasets ade20k idd
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from multiseg_d2.data import register
from multiseg_d2.data.spec import DatasetSpec
from multiseg_d2.label_space import (
    DISJOINT,
    IGNORE,
    ILLEGAL,
    RELATION_NAMES,
    SUBSET,
    LabelSpace,
    relation,
    remap,
    stack_memberships,
)
from multiseg_d2.taxonomy import Taxonomy
from multiseg_d2.user_error import UserError, run_script
from multiseg_d2.yaml_file import did_you_mean


def known_spaces() -> dict[str, LabelSpace]:
    """Label space of every registered dataset, by dataset name."""
    from detectron2.data import MetadataCatalog

    entries = [MetadataCatalog.get(name) for name in MetadataCatalog.list()]
    return {meta.dataset: meta.label_space for meta in entries if hasattr(meta, "label_space")}


def registered_specs() -> list[DatasetSpec]:
    """Every registered spec, by name."""
    from detectron2.data import MetadataCatalog

    entries = [MetadataCatalog.get(name) for name in MetadataCatalog.list()]
    return sorted({m.spec.name: m.spec for m in entries if hasattr(m, "spec")}.values(), key=lambda spec: spec.name)


def describe(spec: DatasetSpec) -> tuple[str, str, str, str]:
    """Name (with the label space, if it has another), number of classes, images per split (* no labels), licence."""
    splits = []
    for split in spec.splits.values():
        count = f" {split.count}" if split.count else ""
        weak = {"pixel": "", "none": "*"}.get(split.annotation, f" ({split.annotation})")
        splits.append(f"{split.name}{count}{weak}")
    name = spec.name if spec.dataset == spec.name else f"{spec.name} ({spec.dataset})"
    return name, str(len(spec.classes)), ", ".join(splits), spec.licence


def markdown(specs: Iterable[DatasetSpec]) -> list[str]:
    """Lines of the table of datasets, without those that are drawn on this machine."""
    rows = [describe(spec) for spec in specs if not spec.name.startswith("toy_")]
    return ["| spec (label space) | classes | splits and images (* no labels) | licence |", "|---|---|---|---|"] + [
        f"| `{name.split(' ')[0]}`{name[len(name.split(' ')[0]) :]} | {classes} | {splits} | {licence} |"
        for name, classes, splits, licence in rows
    ]


def show(space: LabelSpace) -> Table:
    """Local id, colour, name, raw ids and universal classes of a label space."""
    table = Table(title=f"{space.name}: {space.num_classes} classes")
    for column in ("local id", "", "class", "raw ids", "universal classes"):
        table.add_column(column, overflow="fold")
    for local_id, (name, color, row) in enumerate(zip(space.classes, space.colors, space.membership)):
        raw = np.flatnonzero(space.raw_to_local == local_id)
        swatch = f"[on rgb({','.join(map(str, color))})]    [/]"
        table.add_row(str(local_id), swatch, name, _shorten(raw), f"{int(row.sum())}")
    ignored = np.flatnonzero(space.raw_to_local == IGNORE)
    table.add_row(str(IGNORE), "", "(ignored)", _shorten(ignored), "")
    table.caption = f"{int((space.raw_to_local == ILLEGAL).sum())} raw ids are in no table: an error where they occur"
    return table


def relate(a: LabelSpace, b: LabelSpace) -> Table:
    """Every pair of classes that have something in common."""
    table = Table("class of " + a.name, "is", "class of " + b.name, title=f"{a.name} and {b.name}")
    for row, name in zip(relation(a, b), a.classes):
        meeting = np.flatnonzero(row != DISJOINT)
        for other in meeting:
            table.add_row(name, RELATION_NAMES[row[other]], b.classes[other])
        if not meeting.size:
            table.add_row(name, "[dim]in none of[/]", f"[dim]{b.name}[/]")
    return table


def show_remap(source: LabelSpace, target: LabelSpace) -> Table:
    """The table of the label-remapping baseline, lossy lines marked."""
    codes, (inside, covered) = relation(source, target), stack_memberships([source, target])
    table = Table(f"class of {source.name}", f"becomes class of {target.name}", "", title="Label remapping")
    mapped = remap(source, target)
    for local_id, new_id in enumerate(mapped):
        if new_id == IGNORE:
            table.add_row(source.classes[local_id], "[dim]ignored[/]", "")
            continue
        lossy = codes[local_id, new_id] > SUBSET
        lost = int((inside[local_id] & ~covered[new_id]).sum())
        note = (
            f"lossy: {lost} universal class{'es' * (lost != 1)} of it lie{'s' * (lost == 1)} outside" if lossy else ""
        )
        table.add_row(source.classes[local_id], target.classes[new_id], note)
    table.caption = f"{int((mapped == IGNORE).sum())} of {len(mapped)} classes are ignored"
    return table


def tree(taxonomy: Taxonomy, datasets: list[str]) -> Tree:
    """The concept graph as a tree; a concept with several parents stands under each of them."""
    wanted = set(datasets)
    used = {n for n, c in taxonomy.concepts.items() if wanted & set(c.classes)}
    keep = {n for n in taxonomy.concepts if any(taxonomy.leaves(n) & taxonomy.leaves(u) for u in used)}
    children: dict[str, list[str]] = {}
    for name, concept in taxonomy.concepts.items():
        for parent in concept.parents:
            children.setdefault(parent, []).append(name)

    def grow(node: Tree, name: str) -> None:
        listed = taxonomy.concepts[name].classes
        shown = "; ".join(f"{d}: {', '.join(listed[d])}" for d in datasets if d in listed)
        branch = node.add(f"{name}  [green]{shown}[/]")
        for child in children.get(name, ()):
            if child in keep:
                grow(branch, child)

    root = Tree(f"universal taxonomy ({len(taxonomy.universal)} universal classes)")
    for name, concept in taxonomy.concepts.items():
        if not concept.parents and name in keep:
            grow(root, name)
    return root


def _shorten(ids: np.ndarray) -> str:
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    parts = [str(r[0]) if r.size == 1 else f"{r[0]}-{r[-1]}" for r in runs if r.size]
    return ", ".join(parts[:12]) + (", ..." if len(parts) > 12 else "")


def _space(name: str) -> LabelSpace:
    spaces = register.named_spaces()
    if name not in spaces:
        known = ", ".join(sorted(known_spaces()))
        sys.exit(f"no dataset {name!r}{did_you_mean(name, spaces)}; known: {known}. Name your spec with --specs.")
    return spaces[name]


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["list", "show", "relate", "remap", "tree"])
    parser.add_argument("names", nargs="*", metavar="DATASET")
    parser.add_argument("--specs", nargs="*", default=[], metavar="YAML", help="dataset specs to register first")
    parser.add_argument(
        "--taxonomy", default="", help="as DATASETS.TAXONOMY: mseg, or a file (default: the packaged one)"
    )
    parser.add_argument("--markdown", action="store_true", help="list: as a table for a README")
    parser.add_argument("--datasets", nargs="*", default=[], help="tree: datasets to show (default: all)")
    args = parser.parse_args(argv)
    try:
        for spec in args.specs:
            register.register_dataset(spec)
        register.use_taxonomy(args.taxonomy)
    except UserError as problem:
        sys.exit(str(problem))
    expected = {"list": 0, "show": 1, "relate": 2, "remap": 2, "tree": 0}[args.command]
    if len(args.names) != expected:
        parser.error(f"{args.command} takes {expected} dataset names, not {len(args.names)}")
    console = Console()
    if args.command == "list" and args.markdown:
        print("\n".join(markdown(registered_specs())))
    elif args.command == "list":
        table = Table("spec (label space)", "classes", "splits and images (* no labels)", "licence")
        for spec in registered_specs():
            table.add_row(*describe(spec))
        console.print(table)
    elif args.command == "tree":
        taxonomy = register.current_taxonomy()
        console.print(tree(taxonomy, args.datasets or list(taxonomy.datasets())))
    else:
        draw = {"show": show, "relate": relate, "remap": show_remap}[args.command]
        console.print(draw(*map(_space, args.names)))


if __name__ == "__main__":
    sys.exit(run_script(main))
