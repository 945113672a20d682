#!/usr/bin/env python
r"""Shows the hierarchy of several datasets' classes: what HierarchicalHead learns, as text, as a file, as a picture.

    python tools/hierarchy.py cityscapes mapillary_vistas camvid
    python tools/hierarchy.py --config-file configs/htss/toy.yaml --picture tree.png --write tree.yaml

prints every node with the classes that stand for it, the size of its classifier, and below the tree who is left out of
which classifier. --write gives the file for MODEL.SEM_SEG_HEAD.HIERARCHY, made to be edited: move a node by its
`parent`, remove one, rename one; the same command with --read FILE says whether the result is a tree. --picture draws
the tree, with a square for each dataset that has the class.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import multiseg_d2  # noqa: F401  (stand-ins come before detectron2)

# isort: split
from detectron2.data import MetadataCatalog

from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.data import register
from multiseg_d2.engine import load_config
from multiseg_d2.evaluation.pictures import save
from multiseg_d2.hierarchy import Hierarchy, HierarchyError, read_nodes, write_nodes
from multiseg_d2.modeling.heads.hierarchical import training_hierarchy
from multiseg_d2.user_error import UserError, run_script
from multiseg_d2.yaml_file import did_you_mean

#: Colours of up to nine datasets that are told apart (Paul Tol's muted scheme), then again from the first.
_COLORS = ("#332288", "#CC6677", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
_LINE, _INDENT, _SQUARE, _TEXT = 22, 26, 13, 15  # pixels
_LINES_PER_COLUMN = 70


def of_datasets(names: Sequence[str], file: str = "") -> tuple[Hierarchy, list[str]]:
    """The tree of registered datasets or specs, and the names of the universal classes.

    Args:
        names: of datasets or specs. One whose splits have boxes or tags only is weak.
        file: of nodes; "" = built from the label spaces.

    Raises:
        HierarchyError: a name that is not registered, or what :class:`Hierarchy` raises.
    """
    known = register.named_spaces()
    for name in names:
        if name not in known:
            raise HierarchyError(f"no dataset {name!r}{did_you_mean(name, known)}; --specs registers your own")
    spaces = {known[name].name: known[name] for name in names}
    entries = [MetadataCatalog.get(entry) for entry in MetadataCatalog.list()]
    entries = [entry for entry in entries if getattr(entry, "dataset", None) in spaces]
    weak = [d for d in spaces if {e.annotation for e in entries if e.dataset == d} <= {"box", "tag"}]
    universal = max((entry.universal_classes for entry in entries), key=len)
    if file:
        return Hierarchy(read_nodes(file, universal), spaces, weak, where=file), universal
    return Hierarchy.build(spaces, universal, weak), universal


def of_config(path: str, opts: Sequence[str], file: str = "") -> tuple[Hierarchy, list[str]]:
    """The tree that a config trains, and the names of the universal classes."""
    cfg = load_config(path, list(opts))
    register.register_from_config(cfg)
    if file:
        cfg.defrost()
        cfg.MODEL.SEM_SEG_HEAD.HIERARCHY = file
    universal = max((MetadataCatalog.get(e).universal_classes for e in cfg.DATASETS.TRAIN), key=len)
    return training_hierarchy(cfg), universal


def picture(tree: Hierarchy) -> np.ndarray:
    """(H, W, 3) uint8 RGB: one line per node, in columns; squares say which datasets have the class."""
    datasets, depth = list(tree.paths), [tree.depth(i) for i in range(len(tree.nodes))]
    font = _font(_TEXT)
    owners = [[d for d in datasets if d in dict(tree.standing_for(i))] for i in range(len(tree.nodes))]
    texts = [_caption(tree, i) for i in range(len(tree.nodes))]
    left = len(datasets) * _SQUARE + 10
    width = left + max(d * _INDENT + int(font.getlength(t)) for d, t in zip(depth, texts)) + 40
    columns = -(-len(texts) // _LINES_PER_COLUMN)
    head = _LINE * (len(datasets) + 1)
    height = head + _LINE * (min(len(texts), _LINES_PER_COLUMN) + 1)
    image = Image.new("RGB", (max(width * columns, 420), height), "white")
    draw = ImageDraw.Draw(image)
    for k, dataset in enumerate(datasets):
        _square(draw, 10, k * _LINE + _LINE // 2, k)
        note = f"{dataset} (boxes or tags)" if dataset in tree.weak else dataset
        draw.text((10 + 2 * _SQUARE, k * _LINE + _LINE // 2), note, "black", font, anchor="lm")
    for i, text in enumerate(texts):
        column, row = divmod(i, _LINES_PER_COLUMN)
        x, y = column * width + 10, head + row * _LINE + _LINE // 2
        for dataset in owners[i]:
            _square(draw, x + datasets.index(dataset) * _SQUARE, y, datasets.index(dataset))
        start = _branches(draw, x + left, y, depth[i])
        draw.text((start, y), text, "black" if owners[i] else "#777777", font, anchor="lm")
    return np.asarray(image)


def _branches(draw: ImageDraw.ImageDraw, x: int, y: int, depth: int) -> int:
    """Draws the lines to a node; returns where its name begins."""
    for level in range(depth):
        trunk = x + level * _INDENT + 6
        draw.line([(trunk, y - _LINE // 2), (trunk, y + _LINE // 2)], "#bbbbbb")
    start = x + depth * _INDENT
    if depth:
        draw.line([(start - _INDENT + 6, y), (start - 4, y)], "#bbbbbb")
    return start


def _caption(tree: Hierarchy, node: int) -> str:
    classifier = tree.classifier_of(node)
    size = f"  [{len(tree.children[classifier])} + void]" if classifier >= 0 else ""
    return f"{tree.nodes[node].name}{size}"


def _square(draw: ImageDraw.ImageDraw, x: int, y: int, dataset: int) -> None:
    half = (_SQUARE - 2) // 2
    draw.rectangle([x, y - half, x + 2 * half, y + half], _COLORS[dataset % len(_COLORS)])


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib ships."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="DATASET", help="names of datasets or specs")
    parser.add_argument("--config-file", default="", help="takes the datasets, specs and taxonomy of a config")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="pairs that change the config")
    parser.add_argument("--specs", nargs="*", default=[], metavar="YAML", help="dataset specs to register first")
    parser.add_argument("--read", default="", metavar="YAML", help="this file of nodes, perhaps edited, is the tree")
    parser.add_argument("--write", default="", metavar="YAML", help="writes the file of nodes")
    parser.add_argument("--picture", default="", metavar="PNG", help="draws the tree")
    args = parser.parse_args(argv)
    if bool(args.names) == bool(args.config_file):
        parser.error("name datasets, or a --config-file")
    try:
        for spec in args.specs:
            register.register_dataset(spec)
        if args.names:
            tree, universal = of_datasets(args.names, args.read)
        else:
            tree, universal = of_config(args.config_file, args.opts, args.read)
    except UserError as problem:
        print(problem, file=sys.stderr)
        return 1
    print("\n".join(tree.lines()))
    print(f"\n{len(tree.nodes)} nodes, {len(tree.classifiers)} classifiers")
    print("\n".join(tree.problems()))
    if args.write:
        write_atomically(Path(args.write), write_nodes(tree.nodes, universal))
    if args.picture:
        save(picture(tree), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
