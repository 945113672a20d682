#!/usr/bin/env python
r"""Relations between the classes of several datasets: measured, listed, drawn, and held against the taxonomy.

Measured with a trained model of UnifiedHead (what training with relational_bce does before its first step)::

    python tools/class_relations.py measure --config-file configs/uniseg/toy.yaml \
        MODEL.WEIGHTS output/uniseg/toy/model_final.pth

writes OUTPUT_DIR/class_responses.npz. From that file::

    python tools/class_relations.py list FILE --graph relations.png
    python tools/class_relations.py list FILE --threshold 0.1 --save other.npz     # for CLASS_STATISTICS
    python tools/class_relations.py report FILE --config-file configs/uniseg/toy.yaml --crops crops

`report` says which relations the taxonomy confirms, which it lacks, which it contradicts, and which it has and the
model does not, with crops of the labelled class. A relation that you accept becomes a line of a taxonomy file::

    python tools/class_relations.py accept "mapillary_vistas: Bicyclist" "cityscapes: rider"
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from multiseg_d2.class_relations import ClassResponses, relations_text, taxonomy_relations
from multiseg_d2.data.register import register_from_config
from multiseg_d2.engine import Trainer, add_config_arguments, load_config, load_weights, setup
from multiseg_d2.engine.dataset_pass import run_over
from multiseg_d2.evaluation.pictures import save
from multiseg_d2.evaluation.relations_report import Comparison, compare, example_crops, graph_picture, taxonomy_lines
from multiseg_d2.modeling.catalog import catalog_space, class_meanings, training_spaces
from multiseg_d2.modeling.relations import STATISTICS_FILE, RelationSource
from multiseg_d2.taxonomy import PACKAGED, Taxonomy
from multiseg_d2.unified import UnifiedClasses
from multiseg_d2.user_error import UserError, run_script


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for something that cannot be done; says why."""
    args = _parser().parse_args(argv)
    if args.command == "measure":
        return measure(args)
    try:
        {"list": show, "report": report, "accept": accept}[args.command](args)
    except (UserError, ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


def measure(args: argparse.Namespace) -> int:
    """One pass over the training sets; writes and lists the responses."""
    cfg = setup(args)
    model = Trainer.build_model(cfg)
    head = model.sem_seg_head
    if not hasattr(head, "union"):
        print(f"error: MODEL.SEM_SEG_HEAD.NAME is {cfg.MODEL.SEM_SEG_HEAD.NAME}, not UnifiedHead", file=sys.stderr)
        return 2
    load_weights(model, cfg.MODEL.WEIGHTS, complete=True)
    measured = RelationSource.from_config(cfg).measure(head, partial(run_over, cfg, model))
    print(relations_text(measured.classes, measured.relations(), measured))
    print(f"\nwritten to {Path(cfg.OUTPUT_DIR, STATISTICS_FILE)}")
    return 0


def show(args: argparse.Namespace) -> None:
    """Lists the relations of a file, perhaps at another threshold."""
    measured = ClassResponses.load(args.file)
    if args.threshold is not None:
        measured = dataclasses.replace(measured, threshold=args.threshold)
    print(relations_text(measured.classes, measured.relations(), measured))
    if args.save:
        measured.save(args.save)
    if args.graph:
        save(graph_picture(measured.classes, measured.relations()), args.graph)


def report(args: argparse.Namespace) -> None:
    """Holds measured relations against those of the taxonomy."""
    cfg = load_config(args.config_file, args.opts)
    register_from_config(cfg)
    union, measured = UnifiedClasses.of(training_spaces(cfg)), ClassResponses.load(args.file)
    if union.names != measured.classes:
        raise ValueError(f"{args.file} has other classes than the union of {cfg.DATASETS.TRAIN}")
    stated, found = taxonomy_relations(union, class_meanings(cfg)), measured.relations()
    for dataset, matrix in found.items():
        result = compare(matrix, stated[dataset], measured.pixels[dataset])
        print("\n".join([f"{dataset}:", *result.lines(union.names)]))
        if args.crops:
            _write_crops(Path(args.crops), dataset, cfg.DATASETS.TRAIN, union, result)


def _write_crops(folder: Path, dataset: str, entries: Sequence[str], union: UnifiedClasses, result: Comparison) -> None:
    """Examples of the labelled class of each relation that somebody has to look at."""
    entry = next(name for name in entries if catalog_space(name)[0] == dataset)
    pairs = [*result.new, *result.contradicted]
    local_ids = {i: int(np.flatnonzero(union.tables[dataset] == i)[0]) for i, _ in pairs}
    crops = example_crops(entry, local_ids.values())
    for i, j in pairs:
        if local_ids[i] in crops:
            name = f"{dataset} {union.names[i]} is {union.names[j]}".replace("/", "-").replace(" ", "_")
            save(crops[local_ids[i]], folder / f"{name}.png")
            print(f"    {folder / name}.png")


def accept(args: argparse.Namespace) -> None:
    """Prints the lines that make one class part of another."""
    taxonomy = Taxonomy.load(args.taxonomy)
    for line in taxonomy_lines(taxonomy, _named(args.inner), _named(args.outer)):
        print(line)


def _named(text: str) -> tuple[str, str]:
    dataset, colon, name = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r} must be 'dataset: class'")
    return dataset.strip(), name.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_config_arguments(commands.add_parser("measure", help="one pass of a model over its training sets"))
    command = commands.add_parser("list", help="prints the relations of a file of responses")
    command.add_argument("file")
    command.add_argument("--threshold", type=float, help="least mean cosine; default: the file's")
    command.add_argument("--save", help="writes the responses with this threshold")
    command.add_argument("--graph", help="draws the relations: a PNG file")
    command = commands.add_parser("report", help="holds the relations of a file against the taxonomy")
    command.add_argument("file")
    command.add_argument("--config-file", required=True, help="of the model that was measured")
    command.add_argument("--crops", help="folder for crops of what the taxonomy does not say or contradicts")
    command.add_argument("--opts", nargs="*", default=(), metavar="KEY VALUE", help="pairs that change the config")
    command = commands.add_parser("accept", help="prints taxonomy lines: the first class lies inside the second")
    command.add_argument("inner", help="'dataset: class'")
    command.add_argument("outer", help="'dataset: class'")
    command.add_argument("--taxonomy", default=PACKAGED, help="default: the packaged one")
    return parser


if __name__ == "__main__":
    sys.exit(run_script(main))
