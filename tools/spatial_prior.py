#!/usr/bin/env python
"""Computes spatial priors from the labels of a source: where in the image each class lies (CBST-SP).

    python tools/spatial_prior.py gta5_train --size 1024 2048 --output priors/gta5.npz
    python train_net.py ... SELF_TRAINING.POLICY spatial_prior SELF_TRAINING.PRIOR priors/gta5.npz

Writes the file and, beside it, a picture with one map per class. The size is that of the target's images.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import multiseg_d2  # noqa: F401  isort: skip  (first: it lets Detectron2 be imported)
from detectron2.data import DatasetCatalog, MetadataCatalog

from multiseg_d2.atomic_file import write_atomically
from multiseg_d2.data.register import register_dataset
from multiseg_d2.data.views import register_views
from multiseg_d2.engine.self_training.priors import save_prior, spatial_prior
from multiseg_d2.progress import CONSOLE, progress
from multiseg_d2.user_error import UserError, run_script
from multiseg_d2.yaml_file import did_you_mean


def picture(prior: np.ndarray, classes: Sequence[str]) -> bytes:
    """PNG with one map per class, each on its own scale, brightest where the class is most frequent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no global state, no display
    from matplotlib.figure import Figure

    columns = min(5, len(classes))
    rows = math.ceil(len(classes) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name, shares in zip(figure.subplots(rows, columns, squeeze=False).ravel(), classes, prior):
        axes.imshow(shares, cmap="magma", vmin=0)
        axes.set_title(f"{name} (up to {shares.max():.2f})", fontsize=8)
    for axes in figure.axes:
        axes.set_axis_off()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def shown(records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records, with progress."""
    with progress("counting", len(records), "label maps") as step:
        for record in records:
            yield record
            step()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where something asked for is not there or cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", help="labelled entry of the catalog, for example gta5_train")
    parser.add_argument("--size", nargs=2, type=int, required=True, metavar=("H", "W"), help="of the target's images")
    parser.add_argument("--output", required=True, help="file of the prior, .npz; the picture lies beside it, .png")
    parser.add_argument("--kernel", type=int, help="taps of the Gaussian; default: 70 for 1024 rows, in proportion")
    parser.add_argument("--specs", nargs="*", default=(), help="dataset specs to register first")
    args = parser.parse_args(argv)
    try:
        for spec in args.specs:
            register_dataset(spec)
        register_views([args.entry])
        if args.entry not in DatasetCatalog.list():
            hint = did_you_mean(args.entry, DatasetCatalog.list())
            raise ValueError(f"{args.entry!r} is not registered{hint}")
        space = MetadataCatalog.get(args.entry).label_space
        prior = spatial_prior(shown(DatasetCatalog.get(args.entry)), space.num_classes, args.size, args.kernel)
    except (UserError, ValueError) as problem:
        CONSOLE.print(f"error: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    output = Path(args.output)
    save_prior(output, prior, space.classes)
    write_atomically(output.with_suffix(".png"), picture(prior, space.classes))
    CONSOLE.print(f"{output}: {space.num_classes} classes at {args.size[0]} x {args.size[1]}; picture beside it")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
