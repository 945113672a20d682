#!/usr/bin/env python
"""The first run: draws the toy datasets, trains one model on three label spaces, evaluates it on each.

Says where everything lies. Runs in a few minutes on two CPU cores and downloads nothing. What it does by hand::

    python tools/draw_toy.py --root demo/datasets
    DETECTRON2_DATASETS=demo/datasets python train_net.py --config-file configs/quickstart/toy.yaml OUTPUT_DIR demo/run
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def call(*command: str, data_root: Path) -> None:
    """Runs one of the project's own scripts as a user would; its failure is this one's."""
    print("\n$ " + " ".join(["python", *command]), flush=True)
    environment = {**os.environ, "DETECTRON2_DATASETS": str(data_root)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(done.returncode)


def main(argv: list[str] | None = None) -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo", help="folder of everything it makes; %(default)s")
    parser.add_argument("--config-file", default="configs/quickstart/toy.yaml", help="%(default)s")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs for the config, for example SOLVER.MAX_ITER 50")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    output = args.output.resolve()
    data_root, run = output / "datasets", output / "run"
    call("tools/draw_toy.py", "--root", str(data_root), "--picture", str(output / "toy.png"), data_root=data_root)
    call("train_net.py", "--config-file", args.config_file, "OUTPUT_DIR", str(run), *args.opts, data_root=data_root)
    print(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes.")
    for what, where in (
        ("the drawn scenes and their labels", output / "toy.png"),
        ("image, ground truth, prediction", run / "inference" / "*" / "pictures"),
        ("scores", run / "inference" / "report.md (.json, .csv)"),
        ("curves", f"{os.path.relpath(sys.executable)} -m tensorboard.main --logdir {run}"),
    ):
        print(f"  {what:36} {where}")


if __name__ == "__main__":
    main()
